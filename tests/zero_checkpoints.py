"""Two processes that train a step with DeepSpeed, for each way of keeping the state, and save it.

    torchrun --nproc-per-node 2 tests/zero_checkpoints.py CONFIG FOLDER

For each NAME of `WAYS`, FOLDER/NAME is the checkpoint as `xtuner train --deepspeed` writes it, and
FOLDER/NAME.pth what a file of mmengine would hold: all trained parameters, as DeepSpeed itself
gathers them, and AdamW's state.
"""

import sys
from pathlib import Path

from polar_xtuner import compat  # isort: skip

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from mmengine.config import Config
from xtuner.registry import BUILDER

from polar_xtuner import reward_model
from polar_xtuner.cache import PAIR, Group, lay_out
from polar_xtuner.collate import collate_pack

assert compat
assert reward_model

LORA = {"type": "peft.LoraConfig", "r": 3, "lora_alpha": 8, "target_modules": None}
WAYS = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "sub_group_size": 3000},
    "bfloat16": {"stage": 1, "bf16": True},
    "lora2": {"stage": 2, "lora": LORA},
    "lora3": {"stage": 3, "lora": LORA},
    "frozen3": {"stage": 3, "lora": LORA, "with_frozen": True},
}


def pack():
    sequences = [[1, *range(10, 30 + length)] for length in (3, 5)]
    tokens, pieces = lay_out(sequences)
    group = Group(np.array(tokens), np.array(pieces), np.empty(0, PAIR))
    return collate_pack([{"groups": [group], "pair_weight": 0.0, "rows": []}])["data"]


def write(cfg, name, way, folder):
    torch.manual_seed(0)
    llm = {**cfg.model.llm, "torch_dtype": "torch.bfloat16" if way.get("bf16") else "torch.float32"}
    model = BUILDER.build({**cfg.model, "llm": llm, "lora": way.get("lora")})
    groups = [p for p in model.parameters() if p.requires_grad]
    half = len(groups) // 2
    options = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": way["stage"],
            "sub_group_size": way.get("sub_group_size", int(1e9)),
        },
        "bf16": {"enabled": way.get("bf16", False)},
    }
    optimizer = torch.optim.AdamW([{"params": groups[:half]}, {"params": groups[half:]}], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    engine.backward(engine(pack(), mode="tensor").float().square().sum())
    engine.step()
    frozen = way.get("with_frozen", False)
    engine.save_checkpoint(
        str(folder),
        tag=name,
        save_latest=False,
        client_state={"meta": {"iter": 1}},
        exclude_frozen_parameters=not frozen,
    )
    state = {}
    for full_name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state[full_name] = safe_get_full_fp32_param(parameter).clone()
    if dist.get_rank() == 0:
        trained = [t.clone().requires_grad_() for t in state.values()]
        optimizer = torch.optim.AdamW(trained)
        sum(t.sum() for t in trained).backward()
        optimizer.step()
        checkpoint = {"state_dict": state, "optimizer": optimizer.state_dict(), "meta": {"iter": 1}}
        torch.save(checkpoint, folder / f"{name}.pth")


def main():
    cfg, folder = Config.fromfile(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # Collectives in shared memory, which every process would compile anew for minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    for name, way in WAYS.items():
        write(cfg, name, way, folder)


if __name__ == "__main__":
    main()
