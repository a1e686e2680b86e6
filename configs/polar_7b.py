# Fine-tune POLAR-7B on preference rows: all weights, published hyperparameters (arXiv 2507.05197).
#
#     NPROC_PER_NODE=8 xtuner train configs/polar_7b.py --deepspeed deepspeed_zero2 \
#         --cfg-options data_files=/data/train.jsonl
#
# A setting of part 1 can be given on the command line: what is computed from it follows.

custom_imports = dict(imports=["polar_xtuner.engine"])  # registers the names used below

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = "internlm/POLAR-7B-Base"  # folder or hub name to start from
torch_dtype = "torch.float32"  # to load weights in; torch.bfloat16 only with --deepspeed
autocast_dtype = "bfloat16"  # to compute in, unless --deepspeed decides; None: in torch_dtype
attention = "auto"  # auto | flash_attn | sdpa; auto takes flash-attn where it is installed
use_activation_checkpointing = True  # compute layers again in the backward pass, to save memory
separator_token_id = None  # id of <|reward|>; None asks the tokenizer
reward_token_id = None  # id of [UNUSED_TOKEN_130]; None asks the tokenizer

# Loss
loss_type = "ranking"  # ranking (Bradley-Terry) | focal
label_smoothing = 0.0  # probability that a label is wrong
center_rewards_coefficient = 0.0  # weight of (chosen + rejected)^2, which centres rewards on 0
penalty_type = "none"  # none | L2 | log_barrier (within +-5)
penalty_weight = 0.01  # weight of the penalty

# Data
data_files = "data/train.jsonl"  # a file, glob or folder; several: data_files=a.jsonl,b.jsonl
val_data_files = {}  # rows to validate on, as above; named sets: dict(NAME=FILES); {}: none
test_data_files = {}  # the same, for xtuner test
dataset_map_fn = None  # turns an example into a row: a name in MAP_FUNC, or package.module.function
on_bad_row = "error"  # error: name the bad rows and stop | skip: leave them out and count them
on_long_group = "error"  # the same for pairs that are longer than a pack
max_length = 16384  # most tokens of a scored sequence; the prompt is cut to fit
max_response_length = 4096  # most tokens of a reference or an answer
max_packed_length = max_length * 2  # most tokens of a pack: what goes through the model at once
group_candidates = True  # rows of one prompt and reference share their prefix
num_proc = None  # processes that tokenise; None: one a core, 16 at most
cache_dir = None  # where tokenised data is kept; None: ~/.cache/polar_xtuner
dataloader_num_workers = 2  # processes that prepare packs

# Scheduler & optimizer
accumulative_counts = 2  # packs that each GPU adds up before the optimizer steps
pairs_per_step = None  # pairs of an optimizer step (published: 320); None fills the packs
sequence_parallel_size = 1  # GPUs that share a pack; above 1 needs --deepspeed and flash-attn
max_epochs = 1  # a reward model that sees its data twice overfits
lr = 2e-5  # published for 7B; 1e-5 for 1.8B
betas = (0.9, 0.95)  # of AdamW
weight_decay = 0  # of AdamW
max_norm = 1  # gradients are clipped to this norm
warmup_ratio = 0.03  # share of the run over which the learning rate rises
final_lr_ratio = 0.1  # share of the learning rate that the cosine ends at

# Validate
val_steps = 500  # iterations between validations, one is at the end as well; None: only there
val_controls = False  # also with shuffled references, and whether length explains the rewards
val_scores_file = None  # "scores/{iter}.parquet" or .jsonl: the rewards of every row
test_scores_file = None  # the same, for xtuner test

# Save & log
save_steps = 500  # iterations between checkpoints
save_total_limit = 2  # checkpoints to keep; -1 keeps all
save_best = None  # a validation figure, "val/accuracy": also keep the best weights by it
time_limit = None  # "23:30:00": time after the start at which to save and stop; None: no limit
resume_changed = False  # True: resume although data, limits, seed or packing have changed
log_interval = 10  # iterations between log lines, at which the host waits for the GPU
seed = 42  # of the order of the data and of new weights

#######################################################################
#                      PART 2  Model & tokenizer                      #
#######################################################################
tokenizer = dict(
    type="transformers.AutoTokenizer.from_pretrained",
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    trust_remote_code=True,  # POLAR's tokenizer class lives beside its checkpoint
    padding_side="left",
)

model = dict(
    type="PolarRewardModel",
    llm=dict(
        type="polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained",
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        torch_dtype=torch_dtype,
    ),
    loss=dict(
        type="BradleyTerryLoss",
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        center_rewards_coefficient=center_rewards_coefficient,
        penalty_type=penalty_type,
        penalty_weight=penalty_weight,
    ),
    attention=attention,
    use_activation_checkpointing=use_activation_checkpointing,
)

#######################################################################
#                      PART 3  Dataset & dataloader                   #
#######################################################################
train_dataset = dict(
    type="PolarDataset",
    data_files=data_files,
    dataset_map_fn=dataset_map_fn,
    tokenizer=tokenizer,
    max_length=max_length,
    max_response_length=max_response_length,
    max_packed_length=max_packed_length,
    group_candidates=group_candidates,
    separator_token_id=separator_token_id,
    reward_token_id=reward_token_id,
    on_bad_row=on_bad_row,
    on_long_group=on_long_group,
    num_proc=num_proc,
    cache_dir=cache_dir,
)

train_dataloader = dict(
    batch_size=1,  # packs; their size is max_packed_length
    num_workers=dataloader_num_workers,
    dataset=train_dataset,
    pin_memory=True,  # packs are copied to the GPU while it computes
    sampler=dict(
        type="PackSampler",
        accumulative_counts=accumulative_counts,
        pairs_per_step=pairs_per_step,
    ),
    collate_fn=dict(type="collate_pack"),
)

# What these leave unsaid is as in train_dataloader; their rows are in val_data_files and
# test_data_files.
val_dataloader = dict(dataset=dict())
val_evaluator = dict(type="PolarMetric", length_bias=val_controls, scores_file=val_scores_file)
val_cfg = dict(type="PolarValLoop", shuffled_references=val_controls)

test_dataloader = dict(dataset=dict())
test_evaluator = dict(
    type="PolarMetric", prefix="test", length_bias=val_controls, scores_file=test_scores_file
)
test_cfg = dict(type="PolarTestLoop", shuffled_references=val_controls)

#######################################################################
#                    PART 4  Scheduler & optimizer                    #
#######################################################################
optim_wrapper = dict(
    type="PolarOptimWrapper",
    dtype=autocast_dtype,
    optimizer=dict(type="AdamW", lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm),
    accumulative_counts=accumulative_counts,
)

param_scheduler = dict(
    type="WarmupCosineLR",
    by_epoch=False,
    warmup_ratio=warmup_ratio,
    final_lr_ratio=final_lr_ratio,
    accumulative_counts=accumulative_counts,
)

train_cfg = dict(
    type="PolarTrainLoop",
    max_epochs=max_epochs,
    val_interval=val_steps,
    time_limit=time_limit,
    resume_changed=resume_changed,
)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(
        type="LoggerHook", log_metric_by_epoch=False, interval=log_interval, ignore_last=False
    ),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="PolarCheckpointHook",
        by_epoch=False,
        interval=save_steps,
        max_keep_ckpts=save_total_limit,
        save_best=save_best,
    ),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)

visualizer = dict(
    type="Visualizer",
    vis_backends=[
        dict(type="TensorboardVisBackend"),
        dict(type="LocalVisBackend"),  # vis_data/scalars.json, one line a log line
    ],
)
runner_type = "PolarRunner"  # tokenises before it loads the model
log_level = "INFO"
load_from = None  # a checkpoint to start from, or to resume
resume = False  # True resumes from load_from, or from the newest checkpoint of the work dir
randomness = dict(seed=seed, deterministic=False)
log_processor = dict(type="PolarLogProcessor", by_epoch=False)
