"""Train the same pairs with every engine and compare losses and weights.

    python tools/compare_engines.py [--steps 20] [--engines ddp zero2] [--json]

A tiny model on generated data, in float32, the same pairs in every optimizer step
(`pairs_per_step`): one process, two processes with DDP, with DeepSpeed's ZeRO-1, 2 and 3, and two
that share each pack (sequence parallelism, over ZeRO-2). For each, against one process:

    loss      largest relative difference of a step's loss
    weights   largest |w - w1| / |w1 - w0| of a tensor, w0 before training, w1 one process, in
              2-norms: how far off its way a tensor is

Engines add up in other orders, so that gradients differ by rounding, some 1e-7 of their size. Adam
divides each by its own size, so that a gradient near zero is moved by what rounding left of it;
hence the limit on the way, `--most-off`. Exit status 1 above it, or above 1e-5 in a loss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_run import (
    deepspeed_file,
    environment,
    last_checkpoint,
    logged,
    make_data,
    train_command,
)
from tqdm import tqdm

from polar_xtuner.conversion import load_weights

ENGINES = ("ddp", "zero1", "zero2", "zero3", "sp")
MOST_OFF_LOSS = 1e-5
PAIRS = 16

WITHOUT_CHECK = """
from xtuner.tools import train

train.check_cfg = lambda cfg, args: None  # it demands flash_attn, which needs a GPU
train.main()
"""
"""xtuner's own training script, for sequence parallelism on CPUs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--most-off", type=float, default=2e-4)
    parser.add_argument("--json", action="store_true", help="one JSON object an engine")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, PAIRS * args.steps)
        start = {
            name.replace("model.", "llm.", 1): tensor
            for name, tensor in torch.load(folder / "base" / "pytorch_model.bin").items()
        }
        losses, weights = train(folder, "one", args.steps)
        results = []
        for engine in tqdm(args.engines):
            other_losses, other = train(folder, engine, args.steps)
            off = [abs(b - a) / abs(a) for a, b in zip(losses, other_losses, strict=True)]
            ways = [
                (other[name] - weights[name]).norm() / (weights[name] - start[name]).norm()
                for name in weights
            ]
            results.append(
                {
                    "engine": engine,
                    "steps": len(losses),
                    "loss": max(off),
                    "weights": max(ways).item(),
                }
            )
    for result in results:
        print(json.dumps(result) if args.json else row(result))
    good = (r["loss"] <= MOST_OFF_LOSS and r["weights"] <= args.most_off for r in results)
    sys.exit(not all(good))


def row(result: dict[str, Any]) -> str:
    return (
        f"{result['engine']:8}{result['steps']} steps   loss off by {result['loss']:.1e}   "
        f"weights by {result['weights']:.1e} of their way"
    )


def train(folder: Path, engine: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step, and the weights after the last, in float32."""
    processes = 1 if engine == "one" else 2
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "sp": 2}.get(engine)
    work_dir = folder / engine
    command = train_command(
        folder,
        work_dir,
        deepspeed=None if stage is None else deepspeed_file(folder, stage),
        pairs_per_step=PAIRS,
        max_packed_length=2048,
        save_steps=steps,
        **{"train_cfg.max_epochs": None, "train_cfg.max_iters": steps},
        **({"sequence_parallel_size": 2} if engine == "sp" else {}),
    )
    if engine == "sp":
        script = folder / "train_without_check.py"
        script.write_text(WITHOUT_CHECK)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", "2", str(script)]
        command = [*launch, *command[2:], "--launcher", "pytorch"]
    result = subprocess.run(
        command,
        env=environment(processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checkpoint = last_checkpoint(work_dir)
    if checkpoint is None:
        sys.exit(f"{result.stdout[-4000:]}\n\n{engine} has left no checkpoint")
    by_step = logged(work_dir, "loss")
    losses = [by_step[step] for step in range(1, steps + 1)]
    return losses, {name: tensor.float() for name, tensor in load_weights(checkpoint).items()}


if __name__ == "__main__":
    main()
