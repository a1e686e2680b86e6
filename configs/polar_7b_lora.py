# Fine-tune POLAR-7B with LoRA: adapters on all linear layers, and the reward head.
#
#     xtuner train configs/polar_7b_lora.py --cfg-options data_files=/data/train.jsonl

_base_ = "./polar_7b.py"

torch_dtype = "torch.bfloat16"  # of the frozen weights; what is trained is float32
lr = 2e-4
lora_r = 64  # rank of the adapters
lora_alpha = 128  # their scale is lora_alpha / lora_r
lora_dropout = 0.0  # above 0, scores in training are noisy

model = dict(
    llm=dict(torch_dtype=torch_dtype),
    lora=dict(
        type="peft.LoraConfig",
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias="none",
        target_modules=None,  # None: all linear layers of the decoder
    ),
)
optim_wrapper = dict(optimizer=dict(lr=lr))
