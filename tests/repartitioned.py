"""Processes that take up what `zero_checkpoints.py` has written, cut for other processes or stages.

    torchrun --nproc-per-node N tests/repartitioned.py CONFIG FOLDER

For each of `CHANGES`, FOLDER/BEFORE-NOW-N.pth is what DeepSpeed then says of each parameter: the
float32 weight, the moments, and the weight that the model computes with; and the engine's steps.
For each of `WEIGHTS` it is the weights.
"""

import deepspeed
import torch
import torch.distributed as dist
from zero_checkpoints import WAYS, build_engine, gathered, start, train

from polar_xtuner.repartition import load, load_weights
from polar_xtuner.zero_folder import ZeroFolder

CHANGES = (
    ("zero1", "zero2"),
    ("zero2", "zero3"),
    ("zero3", "zero3"),
    ("zero3", "zero1"),
    ("bfloat16", "bfloat16"),
    ("lora2", "lora3"),
    ("lora3", "lora2"),
)


WEIGHTS = (("zero3", "zero2"), ("zero2.pth", "zero3"), ("lora3.pth", "lora2"))


def computes_with(engine):
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
            if parameter.requires_grad:
                weights[name] = parameter.detach().clone()
    return weights


def save(result, before, now, folder):
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{before}-{now}-{dist.get_world_size()}.pth")


def take_up(cfg, before, now, folder):
    engine = build_engine(cfg, WAYS[now])
    load(engine, ZeroFolder(folder / before))
    state = gathered(engine)
    for name, weight in computes_with(engine).items():
        state[name]["computes with"] = weight
    steps = {int(of["step"]) for of in engine.optimizer.optimizer.state.values()}
    save({"state": state, "steps": steps, "global_steps": engine.global_steps}, before, now, folder)


def take_weights(cfg, before, now, folder):
    engine = build_engine(cfg, WAYS[now])
    load_weights(engine, folder / before)
    weights = computes_with(engine)
    train(engine)  # no step has been counted: the moments begin here
    steps = {int(of["step"]) for of in engine.optimizer.optimizer.state.values()}
    save({"weights": weights, "steps": steps}, before, now, folder)


def main():
    cfg, folder = start()
    for before, now in CHANGES:
        take_up(cfg, before, now, folder)
    for before, now in WEIGHTS:
        take_weights(cfg, before, now, folder)


if __name__ == "__main__":
    main()
