# Fine-tune POLAR-7B with QLoRA: polar_7b_lora.py on frozen weights in 4 bits (needs CUDA).
#
#     xtuner train configs/polar_7b_qlora.py --cfg-options data_files=/data/train.jsonl

_base_ = "./polar_7b_lora.py"

model = dict(
    llm=dict(
        quantization_config=dict(
            type="transformers.BitsAndBytesConfig",
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="torch.bfloat16",
            llm_int8_skip_modules=["v_head"],
        ),
    ),
)
