# Train a tiny model on generated data, on a laptop without a GPU: what `make demo` runs.
#
#     python tools/make_demo.py demo && xtuner train configs/polar_tiny.py

_base_ = "./polar_7b.py"

pretrained_model_name_or_path = "demo/base"
data_files = "demo/train.jsonl"
max_length = 512
max_response_length = 128
max_packed_length = 1024
accumulative_counts = 1
lr = 1e-3

tokenizer = dict(
    pretrained_model_name_or_path=pretrained_model_name_or_path, trust_remote_code=False
)
model = dict(
    llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path),
    use_activation_checkpointing=False,
)
train_dataloader = dict(
    num_workers=0,
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
    _delete_=True,
    type="OptimWrapper",  # AmpOptimWrapper needs a GPU
    optimizer=dict(type="AdamW", lr=lr, betas=(0.9, 0.95), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=True),
    accumulative_counts=accumulative_counts,
)
param_scheduler = dict(accumulative_counts=accumulative_counts)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)  # processes without GPUs
