"""Real runs of a tiny model on generated data, for the tools that break, time and compare runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "polar_tiny.py"
BIN = Path(sys.executable).parent
XTUNER = BIN / "xtuner"

FLOAT32 = {
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""A DeepSpeed file but for its stage: all in float32, as no file of xtuner's is."""


def environment(processes: int = 1) -> dict[str, str]:
    """That xtuner is run in; a thread each, so that sums are taken in one order."""
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    own = {"PATH": path, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": str(processes)}
    return {**os.environ, **own}


def make_data(folder: Path, rows: int) -> None:
    """Rows and a base model in `folder`, as `make demo` has them."""
    make = [sys.executable, ROOT / "tools" / "make_demo.py", folder, "--train", rows]
    subprocess.run([*map(str, make), "--held-out", "10"], check=True, stdout=subprocess.DEVNULL)


def train_command(
    data: Path, work_dir: Path, *options: object, deepspeed: Path | None = None, **settings: object
) -> list[str]:
    """`xtuner train` of the tiny model on the data that `make_data` has left."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": data / "base",
        "data_files": data / "train.jsonl",
        "cache_dir": data / "cache",
        "log_interval": 1,
        **settings,
    }
    command: list[object] = [XTUNER, "train", CONFIG, "--work-dir", work_dir, *options]
    if deepspeed is not None:
        command += ["--deepspeed", deepspeed]
    return [str(c) for c in (*command, "--cfg-options", *(f"{k}={v}" for k, v in values.items()))]


def deepspeed_file(folder: Path, stage: int) -> Path:
    """A DeepSpeed file of a ZeRO stage, in float32."""
    path = folder / f"zero{stage}_float32.json"
    path.write_text(json.dumps({**FLOAT32, "zero_optimization": {"stage": stage}}))
    return path


def last_checkpoint(work_dir: Path) -> Path | None:
    pointer = work_dir / "last_checkpoint"
    return Path(pointer.read_text().strip()) if pointer.is_file() else None


def logged(work_dir: Path, field: str) -> dict[int, float]:
    """A field of mmengine's logs of a work dir, by iteration; a later run's value stands."""
    values: dict[int, float] = {}
    for log in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in map(json.loads, log.read_text().splitlines()):
            if field in line:
                values[line["step"]] = line[field]
    return values


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state, by where it stands."""
    from polar_xtuner.checkpoint import load_safely

    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*.pt"))
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, place: str) -> None:
        if isinstance(value, torch.Tensor):
            found[place] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{place}.{key}")
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                walk(item, f"{place}.{number}")

    for file in files:
        walk(load_safely(file), file.name if checkpoint.is_dir() else "")
    return found
