# Train a tiny model to tell policies apart, POLAR's pre-training: polar_tiny.py on policy pairs.
#
#     python tools/demo_policies.py

_base_ = "./polar_tiny.py"

pretrained_model_name_or_path = "demo/policies/base"
data_files = "demo/policies/train.jsonl"
penalty_type = "none"
lr = 2e-3

tokenizer = dict(pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(
    llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path),
    loss=dict(penalty_type=penalty_type),
)
train_dataloader = dict(dataset=dict(data_files=data_files, tokenizer=tokenizer))
optim_wrapper = dict(optimizer=dict(lr=lr))
