"""Runs of two processes that are stopped, killed, and gone on with by another number.

What the launcher has a part in is launched by `xtuner train`; the others are its processes alone.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from commands import ROOT, TINY, TRAIN, run, run_forked, run_ranks

from polar_xtuner.conversion import load_weights
from polar_xtuner.interruption import STOPPED

sys.path.insert(0, str(ROOT / "tools"))
from tiny_run import deepspeed_file, environment, last_checkpoint, logged, tensors, train_command

PLUG_IN = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

RANK = int(os.environ.get("RANK", 0))

@HOOKS.register_module()
class At(Hook):
    def __init__(self, iteration, rank, what):
        self.place, self.what = (iteration, rank), what

    def after_train_iter(self, runner, **kwargs):
        if (runner.iter + 1, RANK) != self.place:
            return
        if self.what == "raise":
            raise OSError("the tray of node 7 is open")
        os.kill(os.getpid(), getattr(signal, self.what))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo data, a tiny base model and a plug-in that breaks runs."""
    folder = tmp_path_factory.mktemp("processes")
    tool = ROOT / "tools" / "make_demo.py"
    made = run_forked(tool, folder, "--train", 300, "--held-out", 10)
    assert made.returncode == 0, made.stderr
    (folder / "breaks.py").write_text(PLUG_IN)
    (folder / "config.py").write_text(
        f"_base_ = {str(TINY)!r}\n"
        "custom_imports = dict(imports=['polar_xtuner.engine', 'breaks'])\n"
        "iteration = 0\nrank = 0\nwhat = 'SIGUSR1'\n"
        "custom_hooks = [dict(type='At', iteration=iteration, rank=rank, what=what)]\n"
    )
    return folder


def arguments(tiny: Path, work_dir: Path, *options: object, **settings: object) -> list[object]:
    """Of `xtuner train`."""
    values = {
        "pretrained_model_name_or_path": tiny / "base",
        "data_files": tiny / "train.jsonl",
        "cache_dir": tiny / "cache",
        "log_interval": 1,
        "save_steps": 100,
        **settings,
    }
    given = ("--cfg-options", *(f"{name}={value}" for name, value in values.items()))
    return [tiny / "config.py", "--work-dir", work_dir, *options, *given]


def train(
    tiny: Path, work_dir: Path, *options: object, processes: int = 2, **settings: object
) -> list[subprocess.CompletedProcess[str]]:
    """The processes that `xtuner train` launches."""
    command = [TRAIN, *arguments(tiny, work_dir, *options, **settings)]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny)}
    if processes == 1:
        return [run_forked(*command, **env)]
    return run_ranks(processes, *command, "--launcher", "pytorch", **env)


def checkpoints(work_dir: Path) -> list[str]:
    return sorted(path.name for path in work_dir.glob("iter_*.pth"))


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_one_rank_is_told_to_stop_all_do_and_the_resumed_run_is_the_unbroken_one(
    engine: str, tiny: Path, tmp_path: Path
) -> None:
    options = ("--deepspeed", deepspeed_file(tmp_path, 2)) if engine == "zero2" else ()
    train(tiny, tmp_path / "unbroken", *options)
    ranks = train(tiny, tmp_path / "broken", *options, iteration=5, rank=1)
    assert [rank.returncode for rank in ranks] == [STOPPED, STOPPED], ranks
    (stopped,) = checkpoints(tmp_path / "broken")
    assert stopped in ("iter_6.pth", "iter_7.pth")  # a step after the signal was heard
    train(tiny, tmp_path / "broken", *options, resume=True)
    last = checkpoints(tmp_path / "unbroken")
    assert checkpoints(tmp_path / "broken") == sorted([stopped, *last])
    one, other = (tensors(tmp_path / name / last[-1]) for name in ("unbroken", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for field in ("loss", "lr", "grad_norm"):
        assert logged(tmp_path / "broken", field) == logged(tmp_path / "unbroken", field)


def test_the_documented_launch_passes_on_what_a_scheduler_sends_to_all_processes(
    tiny: Path, tmp_path: Path
) -> None:
    command = train_command(tiny, tmp_path / "run", save_steps=1000, **{"train_cfg.max_epochs": 99})
    log = tmp_path / "log"
    with open(log, "w") as out:
        launch = subprocess.Popen(
            ["bash", "-c", f"trap '' USR1; exec {shlex.join(command)}"],
            env=environment(2),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        while launch.poll() is None and "Iter(train)" not in log.read_text():
            time.sleep(0.1)
        parent = psutil.Process(launch.pid)
        for process in [parent, *parent.children(recursive=True)]:
            process.send_signal(signal.SIGUSR1)
        launch.wait(60)
    assert len(checkpoints(tmp_path / "run")) == 1, log.read_text()
    assert log.read_text().count("exitcode  : 75") == 2


SIXTEEN = {"pairs_per_step": 16, "max_packed_length": 2048, "save_total_limit": 9}
"""The same pairs in a step, whatever the number of processes."""


def train_on(
    tiny: Path, work_dir: Path, before: tuple[int, int], now: tuple[int, int]
) -> tuple[dict[int, float], Path]:
    """Losses and weights where others go on after six steps: each (processes, ZeRO stage or 0)."""
    for (processes, stage), resume in ((before, ()), (now, ("--resume", work_dir / "iter_6.pth"))):
        engine = ("--deepspeed", deepspeed_file(tiny, stage)) if stage else ()
        ranks = train(
            *(tiny, work_dir, *engine, *resume), processes=processes, save_steps=6, **SIXTEEN
        )
        assert not any(rank.returncode for rank in ranks), ranks[0].stderr[-1000:]
    assert f"the epoch goes on with {now[0]} ranks x 1 packs a step" in ranks[0].stdout
    assert sum(logged(work_dir, "pairs").values()) == 300
    return logged(work_dir, "loss"), last_checkpoint(work_dir)


@pytest.mark.parametrize(("before", "now"), [((2, 3), (1, 2)), ((1, 2), (2, 3))])
def test_an_epoch_goes_on_with_another_number_of_processes(
    before: tuple[int, int], now: tuple[int, int], tiny: Path, tmp_path: Path
) -> None:
    """With DDP, and just so with DeepSpeed, at another stage of ZeRO besides."""
    ddp, weights = train_on(tiny, tmp_path / "ddp", (before[0], 0), (now[0], 0))
    zero, folder = train_on(tiny, tmp_path / "zero", before, now)
    assert zero == pytest.approx(ddp, rel=1e-5)
    start, one, other = (
        load_weights(p) for p in (tmp_path / "ddp" / "iter_6.pth", weights, folder)
    )
    for name, tensor in one.items():
        way = (tensor - start[name]).norm()
        assert (other[name] - tensor).norm() <= 1e-4 * way, name


def test_any_engine_takes_the_weights_alone_from_a_deepspeed_folder(
    tiny: Path, tmp_path: Path
) -> None:
    zero3 = ("--deepspeed", deepspeed_file(tmp_path, 3))
    few = {"train_cfg.max_epochs": None, "train_cfg.max_iters": 3, **SIXTEEN}
    train(tiny, tmp_path / "before", *zero3, **few)
    losses = []
    for processes, engine in ((1, ()), (2, zero3)):
        work_dir, start = tmp_path / str(processes), tmp_path / "before" / "iter_3.pth"
        ranks = train(tiny, work_dir, *engine, processes=processes, load_from=start, **few)
        assert not any(rank.returncode for rank in ranks), ranks[0].stderr[-1000:]
        losses.append(logged(work_dir, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < 0.69  # of a head of zeros it is ln 2


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("SIGKILL", "Signal 9 (SIGKILL) received by PID"),
        ("raise", "OSError: the tray of node 7 is open"),
    ],
)
def test_a_rank_that_dies_ends_the_run_with_its_own_error_last(
    what: str, shown: str, tiny: Path, tmp_path: Path
) -> None:
    command = ("xtuner", "train", *arguments(tiny, tmp_path, iteration=3, rank=1, what=what))
    env = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny)}
    said = run(*command, **env).stdout  # `run` waits ten minutes at most
    cause = said[said.index("Root Cause (first observed failure)") :]
    assert "rank      : 1" in cause
    assert shown in cause
    assert not checkpoints(tmp_path)


def test_a_deepspeed_file_of_xtuner_runs_as_it_is(tiny: Path, tmp_path: Path) -> None:
    few = {"train_cfg.max_epochs": None, "train_cfg.max_iters": 3}
    ranks = train(tiny, tmp_path, "--deepspeed", "deepspeed_zero3_offload", **few)
    assert checkpoints(tmp_path) == ["iter_3.pth"], ranks
