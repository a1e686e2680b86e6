# Train a tiny model on generated data, on a laptop without a GPU: what `make demo` runs.
#
#     python tools/make_demo.py demo && xtuner train configs/polar_tiny.py

_base_ = "./polar_7b.py"

pretrained_model_name_or_path = "demo/base"
data_files = "demo/train.jsonl"
autocast_dtype = None
max_length = 512
max_response_length = 128
max_packed_length = 768
dataloader_num_workers = 0
accumulative_counts = 1
use_activation_checkpointing = False
lr = 1e-3
penalty_type = "L2"  # small rewards: in float32 the scores of two implementations stay close

tokenizer = dict(
    pretrained_model_name_or_path=pretrained_model_name_or_path, trust_remote_code=False
)
model = dict(
    llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path),
    loss=dict(penalty_type=penalty_type),
    use_activation_checkpointing=use_activation_checkpointing,
)
train_dataloader = dict(
    num_workers=dataloader_num_workers,
    pin_memory=False,  # no GPU
    dataset=dict(
        data_files=data_files,
        tokenizer=tokenizer,
        max_length=max_length,
        max_response_length=max_response_length,
        max_packed_length=max_packed_length,
    ),
    sampler=dict(accumulative_counts=accumulative_counts),
)
optim_wrapper = dict(
    dtype=autocast_dtype, optimizer=dict(lr=lr), accumulative_counts=accumulative_counts
)
param_scheduler = dict(accumulative_counts=accumulative_counts)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)  # no GPUs
