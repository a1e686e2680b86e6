"""Kill a run at random moments, resume it until it is done, and compare with an unbroken one.

    python tools/crash_test.py [--runs 30] [--processes 2] [--deepspeed FILE] [--json]

A tiny model is trained by the real command, with a checkpoint every few iterations. Each run is
killed with SIGKILL, all its processes at once, one to three times: at a random moment of its
training, or every other time in the middle of writing a checkpoint, when a file of a checkpoint
that is not whole is in the work dir. Then it is resumed with `resume=True`. In the end weights and
optimizer state have to be those of the unbroken run, bit for bit.

JSON: `runs`, `kills`, `in_saves` (kills while a checkpoint was being written), `identical` (runs),
`lost` (checkpoints that had been there and were gone or damaged after a kill). Exit status 1 unless
every run was identical, nothing lost and something killed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tiny_run import environment, last_checkpoint, make_data, tensors, train_command
from tqdm import tqdm

from polar_xtuner.checkpoint import CheckpointError, check_checkpoint

ROWS = 420
SETTINGS = {"save_steps": 2, "save_total_limit": 3, "max_packed_length": 768, "num_proc": 1}


class Outcome(NamedTuple):
    kills: int
    in_saves: int
    identical: bool
    lost: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--deepspeed", type=Path, help="a DeepSpeed file to train with")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, ROWS)
        unbroken = Trial(folder, "unbroken", args)
        unbroken.finish()
        truth = tensors(unbroken.end())
        trials = [Trial(folder, str(number), args) for number in range(args.runs)]
        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = [*tqdm(pool.map(lambda t: t.crash(truth), trials), total=len(trials))]
    result = {
        "runs": len(outcomes),
        "kills": sum(outcome.kills for outcome in outcomes),
        "in_saves": sum(outcome.in_saves for outcome in outcomes),
        "identical": sum(outcome.identical for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k:12}{v}" for k, v in result.items()))
    good = result["identical"] == result["runs"] and not result["lost"] and result["kills"]
    sys.exit(not good)


class Trial:
    """One run, from its start to its end, however often it is killed."""

    def __init__(self, folder: Path, name: str, args: argparse.Namespace) -> None:
        self._work_dir = folder / name
        self._log = folder / f"{name}.log"
        self._random = random.Random(f"{args.seed} {name}")
        self._environment = environment(args.processes)
        self._command = train_command(
            folder, self._work_dir, deepspeed=args.deepspeed, resume=True, **SETTINGS
        )
        self._seen: set[str] = set()

    def crash(self, truth: dict[str, torch.Tensor]) -> Outcome:
        """Kill the run a few times, let it finish, and compare it with the unbroken one."""
        kills = in_saves = lost = 0
        for _ in range(self._random.randint(1, 3)):
            wants_save = self._random.random() < 0.5
            was_killed, was_saving = self._run_and_kill(wants_save)
            kills += was_killed
            in_saves += was_saving
            lost += self._lost()
        self.finish()
        found = tensors(self.end())
        identical = found.keys() == truth.keys() and all(
            torch.equal(found[name], truth[name]) for name in truth
        )
        return Outcome(kills, in_saves, identical, lost)

    def finish(self) -> None:
        with open(self._log, "a") as log:
            subprocess.run(
                self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    def end(self) -> Path:
        """The last checkpoint of the run, which has to be there."""
        last = last_checkpoint(self._work_dir)
        if last is None:
            sys.exit(f"{self._log.read_text()[-4000:]}\n\nthe run has left no checkpoint")
        return last

    def _run_and_kill(self, wants_save: bool) -> tuple[bool, bool]:
        """Whether the run was killed before its end, and while it wrote a checkpoint."""
        at_start = self._checkpoints()
        with open(self._log, "a") as log:
            process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        moment: float | None = None
        while process.poll() is None:
            self._seen |= self._checkpoints()
            if moment is None and self._seen - at_start:  # it trains
                moment = time.monotonic() + self._random.random() * 1.5
            if moment is not None and time.monotonic() >= moment:
                if not wants_save or any(self._partial()):
                    break
                time.sleep(0.0005)
            else:
                time.sleep(0.002)
        if process.poll() is not None:
            return False, False
        if wants_save:
            time.sleep(self._random.random() * 0.02)
        kill_all(process.pid)
        process.wait()
        return True, any(self._partial())

    def _lost(self) -> int:
        """Checkpoints that are damaged, and the newest one seen if it is not there any more."""
        there = self._checkpoints()
        lost = 0
        for name in there:
            try:
                check_checkpoint(self._work_dir / name)
            except CheckpointError as error:
                lost += 1
                tqdm.write(str(error))
        newest = max(self._seen, key=number_of, default=None)
        return lost + (newest is not None and newest not in there)

    def _checkpoints(self) -> set[str]:
        return {path.name for path in self._work_dir.glob("iter_*.pth")}

    def _partial(self) -> Iterator[Path]:
        return self._work_dir.glob(".*.partial")


def number_of(name: str) -> int:
    return int("".join(filter(str.isdigit, name)))


def kill_all(pid: int) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    main()
