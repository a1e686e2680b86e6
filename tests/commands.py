"""Running the commands that users type."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "polar_tiny.py"
BIN = Path(sys.executable).parent
LONGEST = 600
"""Seconds that a command may take."""


def run(*command: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """A command of the environment that runs the tests; what it printed is in `.stdout`."""
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
    )


# A tool spends up to ten seconds on imports and one on its work. What follows starts it in a fork
# of a process that has imported what it needs of other packages, and done nothing else: arguments,
# streams, exit status, memory and all of this package are its own. What a test says about imports,
# or about variables that other packages read in them, needs `run`.

TRAIN, CONVERT, LOG_DATASET = (
    Path(find_spec("xtuner").origin).parent / "tools" / name
    for name in ("train.py", "model_converters/pth_to_hf.py", "log_dataset.py")
)
"""The scripts that `xtuner train`, `xtuner convert pth_to_hf` and `xtuner log-dataset` run."""

FORKS = multiprocessing.get_context("forkserver")
"""For tests that run functions in processes of their own."""

FORKS.set_forkserver_preload(["xtuner.tools.train", "pyarrow.parquet", "tensorboard"])


def run_forked(
    script: Path, *arguments: object, stdin: str = "", cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS` without the time for imports, with `.stdout` and `.stderr`."""
    (done,) = _run_forks([str(script), *map(str, arguments)], stdin, cwd, [env])
    return done


def run_ranks(
    processes: int, script: Path, *arguments: object, **env: str
) -> list[subprocess.CompletedProcess[str]]:
    """The processes of `torchrun --nproc-per-node PROCESSES SCRIPT ARGUMENTS`, in the same way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    job |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _run_forks([str(script), *map(str, arguments)], "", None, ranks)


def _run_forks(
    command: list[str], stdin: str, cwd: Path | None, envs: list[dict[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """Processes of one command at the same time, each with variables of its own."""
    with tempfile.TemporaryDirectory() as name:
        forks = []
        for number, env in enumerate(envs):
            streams = [Path(name) / f"{stream}{number}" for stream in ("in", "out", "err")]
            streams[0].write_text(stdin)
            settings = (command, streams, cwd or Path.cwd(), {**os.environ, **env})
            forks.append((FORKS.Process(target=_main, args=settings), *streams[1:]))
            forks[-1][0].start()
        try:
            for process, *_ in forks:
                process.join(LONGEST)
                if process.exitcode is None:
                    raise subprocess.TimeoutExpired(command, LONGEST)
        finally:
            for process, *_ in forks:
                process.kill()
        return [
            subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())
            for process, out, err in forks
        ]


def _main(command: list[str], streams: list[Path], cwd: Path, env: dict[str, str]) -> None:
    """What `python` does with a script, in a process that is one already."""
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [str(Path(command[0]).parent), *filter(None, [env.get("PYTHONPATH")])]
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # a fork of `multiprocessing` leaves them out
