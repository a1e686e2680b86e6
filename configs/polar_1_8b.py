# Fine-tune POLAR-1.8B: polar_7b.py with the smaller model and its learning rate.
#
#     xtuner train configs/polar_1_8b.py --cfg-options data_files=/data/train.jsonl

_base_ = "./polar_7b.py"

pretrained_model_name_or_path = "internlm/POLAR-1_8B-Base"
lr = 1e-5

tokenizer = dict(pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path))
train_dataloader = dict(dataset=dict(tokenizer=tokenizer))
optim_wrapper = dict(optimizer=dict(lr=lr))
