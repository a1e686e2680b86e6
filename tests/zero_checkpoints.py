"""Two processes that train with DeepSpeed, for each way of keeping the state, and save it.

    torchrun --nproc-per-node 2 tests/zero_checkpoints.py CONFIG FOLDER

For each NAME of `WAYS`, FOLDER/NAME is the checkpoint as `xtuner train --deepspeed` writes it,
FOLDER/NAME.pth what a file of mmengine would hold: all trained parameters, as DeepSpeed itself
gathers them, and AdamW's state; and FOLDER/NAME.truth all values as DeepSpeed gathers them.
"""

import sys
from pathlib import Path

from polar_xtuner import compat  # isort: skip

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from mmengine.config import Config
from xtuner.registry import BUILDER

from polar_xtuner import reward_model
from polar_xtuner.cache import PAIR, Group, lay_out
from polar_xtuner.collate import collate_pack

assert compat
assert reward_model

LORA = {"type": "peft.LoraConfig", "r": 3, "lora_alpha": 8, "target_modules": None}
STEPS = 3
"""The head begins with zeros and gets a gradient first, then the B of LoRA, then its A."""
WAYS = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "robin2": {"stage": 2, "robin": True},
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


def build_engine(cfg, way):
    """Two groups of parameters, AdamW."""
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
            "round_robin_gradients": way.get("robin", False),
        },
        "bf16": {"enabled": way.get("bf16", False)},
    }
    optimizer = torch.optim.AdamW([{"params": groups[:half]}, {"params": groups[half:]}], lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]


def gathered(engine):
    """What DeepSpeed itself says of each trained parameter: weight and moments, in float32."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "round_robin_bit16_groups"):
        # It takes the parameters to lie in the model's order, even where they lie in turns, and the
        # moments of the groups after the first it never finds.
        groups, optimizer.bit16_groups = optimizer.bit16_groups, optimizer.round_robin_bit16_groups
        optimizer._link_all_hp_params()
        optimizer.bit16_groups = groups
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    return {
        name: {
            "weight": safe_get_full_fp32_param(parameter).clone(),
            "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg").clone(),
            "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq").clone(),
        }
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def train(engine):
    for _ in range(STEPS):
        engine.backward((engine(pack(), mode="tensor").float() - 1).square().sum())
        engine.step()


def write(cfg, name, way, folder):
    engine = build_engine(cfg, way)
    train(engine)
    frozen = way.get("with_frozen", False)
    engine.save_checkpoint(
        str(folder),
        tag=name,
        save_latest=False,
        client_state={"meta": {"iter": 1}},
        exclude_frozen_parameters=not frozen,
    )
    truth = gathered(engine)
    train(engine)
    for parameter, values in gathered(engine).items():
        truth[parameter]["trained"] = values["weight"]
    if dist.get_rank() == 0:
        torch.save(truth, folder / f"{name}.truth")
        state = {name: values["weight"] for name, values in truth.items()}
        trained = [t.clone().requires_grad_() for t in state.values()]
        optimizer = torch.optim.AdamW(trained)
        sum(t.sum() for t in trained).backward()
        optimizer.step()
        checkpoint = {"state_dict": state, "optimizer": optimizer.state_dict(), "meta": {"iter": 1}}
        torch.save(checkpoint, folder / f"{name}.pth")


def start():
    """Config and folder that the command names, with DeepSpeed ready."""
    torch.set_num_threads(1)
    # Collectives in shared memory, which every process would compile anew for minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    return Config.fromfile(sys.argv[1]), Path(sys.argv[2])


def main():
    cfg, folder = start()
    for name, way in WAYS.items():
        write(cfg, name, way, folder)


if __name__ == "__main__":
    main()
