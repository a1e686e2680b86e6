"""Time from the start of a resumed run to its first step, early and late in a long plan.

    python tools/bench_resume.py [--early 20] [--late 20000] [--repeats 5] [--json]

A very small model is really trained up to the late step, one pair a step. Then the run is resumed
by the real command from both checkpoints in turn, and the seconds counted from the start of the
process to its first log line, imports included. The ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
from crash_test import kill_all
from make_demo import build_tokenizer, write_base, write_data
from tiny_run import environment, train_command
from tqdm import tqdm

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--early", type=int, default=20, help="optimizer step")
    parser.add_argument("--late", type=int, default=20000, help="optimizer step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.late + 200, 1, seed=0)
        write_base(folder / "base", build_tokenizer(), seed=0, **SHAPE)
        checkpoints = [train(folder, step) for step in (args.early, args.late)]
        seconds: list[list[float]] = [[], []]
        for number in tqdm(range(2 * args.repeats)):
            seconds[number % 2].append(until_first_step(folder, checkpoints[number % 2]))
    early, late = map(median, seconds)
    result = {
        "steps": [args.early, args.late],
        "seconds": [round(early, 2), round(late, 2)],
        "ratio": round(late / early, 3),
    }
    print(json.dumps(result) if args.json else f"{early:.2f} s, {late:.2f} s: {late / early:.3f}")


def command(folder: Path, work_dir: Path, *options: object, **settings: object) -> list[str]:
    return train_command(folder, work_dir, *options, pairs_per_step=1, **settings)


def train(folder: Path, step: int) -> Path:
    """The checkpoint of an optimizer step of a run that trains up to it."""
    work_dir = folder / "trained"
    checkpoint = work_dir / f"iter_{step}.pth"
    settings = {"save_steps": step, "save_total_limit": -1, "log_interval": 10, "resume": True}
    with open(folder / "train.log", "a") as log:
        process = subprocess.Popen(
            command(folder, work_dir, **settings), env=environment(), stdout=log, stderr=log
        )
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.1)
        kill_all(process.pid)
        process.wait()
    if not checkpoint.exists():
        sys.exit(f"{(folder / 'train.log').read_text()[-4000:]}\n\nno {checkpoint}")
    return checkpoint


def until_first_step(folder: Path, checkpoint: Path) -> float:
    """Seconds to the first log line of a run that goes on from a checkpoint."""
    resume = command(folder, folder / "resumed", "--resume", checkpoint, save_steps=10**9)
    process = subprocess.Popen(
        resume, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "Iter(train)" in line:
            seconds = time.time() - psutil.Process(process.pid).create_time()
            kill_all(process.pid)
            process.wait()
            return seconds
    sys.exit(f"{''.join(said[-40:])}\n\nthe run has ended before its first step")


if __name__ == "__main__":
    main()
