"""Processes that take up what `zero_checkpoints.py` has written, cut for other processes or stages.

    torchrun --nproc-per-node N tests/repartitioned.py CONFIG FOLDER

For each of `CHANGES`, FOLDER/BEFORE-NOW.pth is what DeepSpeed then says of each parameter: the
float32 weight, the moments, and the weight that the model computes with; the engine's steps; and
the steps of the optimizer and the weights after some steps more.
For each of `WEIGHTS` it is the weights.
"""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from zero_checkpoints import WAYS, build_engine, gathered, start, train

from polar_xtuner.repartition import take_up, take_weights
from polar_xtuner.zero_folder import ZeroFolder

CHANGES = (
    ("zero1", "robin2"),
    ("robin2", "zero3"),
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


def steps_of(engine):
    return {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}


def save(result, before, now, folder):
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{before}-{now}.pth")


def resume(cfg, before, now, folder):
    engine = build_engine(cfg, WAYS[now])
    take_up(engine, ZeroFolder(folder / before))
    state = gathered(engine)
    for name, weight in computes_with(engine).items():
        state[name]["computes with"] = weight
    global_steps = engine.global_steps
    train(engine)
    assert "optim_states" not in Path("/proc/self/maps").read_text(), "files are still mapped"
    result = {"state": state, "steps": steps_of(engine), "global_steps": global_steps}
    trained = {name: values["weight"] for name, values in gathered(engine).items()}
    save({**result, "trained": trained}, before, now, folder)


def start_from(cfg, before, now, folder):
    engine = build_engine(cfg, WAYS[now])
    take_weights(engine, folder / before)
    weights = computes_with(engine)
    train(engine)  # no step has been counted: the moments begin here
    save({"weights": weights, "steps": steps_of(engine)}, before, now, folder)


def main():
    cfg, folder = start()
    for before, now in CHANGES:
        resume(cfg, before, now, folder)
    for before, now in WEIGHTS:
        start_from(cfg, before, now, folder)


if __name__ == "__main__":
    main()
