"""The tiny model that is served, and real vLLM servers.

Run by `make test-engines`, in an environment that has vLLM, transformers 5 and TRL; the model is
trained and converted by the environment that `make venv` makes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING_PYTHON = ROOT / ".venv" / "bin" / "python"
START_SECONDS = 900
"""For a server to start: it takes 40 s on two idle cores, and some more on busy ones."""

LONGEST = 2048
FLAGS = {
    "default flags": (),
    "raw flags": ("--pooler-config", json.dumps({"use_activation": False})),
}


@dataclass(frozen=True)
class Scored:
    """Items of real rows, with what the training environment made of them.

    Attributes:
        folder: the trained and converted model.
        other: the same with one decoder layer 1 % off.
        rewards: those of the training model.
    """

    folder: Path
    other: Path
    items: list[dict[str, Any]]
    ids: list[list[int]]
    rewards: list[float]

    @property
    def sample(self) -> Scored:
        """Every third item, 200 in all."""
        thirds = (values[::3] for values in (self.items, self.ids, self.rewards))
        return Scored(self.folder, self.other, *thirds)

    def off(self, rewards: Sequence[float | None]) -> float:
        """The largest difference to the rewards of the training model."""
        return max(abs(a - b) for a, b in zip(rewards, self.rewards, strict=True))


@pytest.fixture(scope="session")
def scored(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("model")
    made = subprocess.run(
        [TRAINING_PYTHON, Path(__file__).parent / "make_model.py", shared_data, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert made.returncode == 0, made.stdout
    found = json.loads((folder / "scored.json").read_text())
    return Scored(folder / "hf", folder / "other", **found)


@pytest.fixture(scope="session")
def server(
    request: pytest.FixtureRequest, scored: Scored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a vLLM server; the parameter names its flags."""
    folder = tmp_path_factory.mktemp("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` wants a distribution called vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(scored.folder), "--runner", "pooling", "--trust-remote-code"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LONGEST)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    command += FLAGS[request.param]
    sockets = tempfile.TemporaryDirectory()  # a path of one must be short
    settings = {
        "TMPDIR": sockets.name,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),  # of remote code, which is copied there
    }
    log = folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    request.config.stash[LOGS].append(log)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}")
        yield f"127.0.0.1:{port}"
    finally:
        stop(process)
        request.config.stash[LOGS].remove(log)
        sockets.cleanup()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        assert process.poll() is None, f"vLLM ended with {process.returncode}"
        assert time.monotonic() < end, f"vLLM was not ready within {START_SECONDS} s"
        time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """A server and every process that it has started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)


LOGS = pytest.StashKey[list[Path]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LOGS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Show what the running server has logged when a test fails."""
    report = yield
    if report.failed:
        for log in item.config.stash[LOGS]:
            report.sections.append(("log of vLLM", log.read_text(errors="replace")[-8000:]))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests have measured, by `record_property`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.split('::')[1]}: {name} {value}")
