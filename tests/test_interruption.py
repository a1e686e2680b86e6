"""Requests to stop: heard at once, agreed on by all ranks, and not twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import ROOT

from polar_xtuner.interruption import SAME, SIGNALS, STOPPED, Agreement, Interruption


def wait_for(condition: object, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
    return condition()  # type: ignore[operator]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_is_a_request_and_what_it_did_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.is_due()
        os.kill(os.getpid(), number)
        assert wait_for(interruption.is_due)
        assert interruption.reason == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_signal_that_a_launcher_hands_on_is_the_same_request() -> None:
    with Interruption() as interruption:
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert wait_for(interruption.is_due)
        time.sleep(0.2)


def test_a_time_limit_counts_from_the_start_of_the_process() -> None:
    age = time.time() - psutil.Process().create_time()
    with Interruption(time_limit=age + 1000) as interruption:
        assert not interruption.is_due()
    with Interruption(time_limit=age + 1) as interruption:
        assert not interruption.is_due()
        assert wait_for(interruption.is_due)
        assert interruption.reason == "its time limit"


HANGS = """
import hashlib, sys, time
from polar_xtuner.interruption import Interruption
with Interruption():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, as in a collective that hangs
"""


def test_a_second_signal_stops_at_once_even_what_hangs_in_c() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


AGREES = """
import os, sys, time
import torch.distributed as dist
from polar_xtuner.interruption import Agreement
dist.init_process_group("gloo")
rank, agreement = dist.get_rank(), Agreement()
for step in range(100):
    time.sleep(0.02 * (rank == step % 2))
    if agreement.any(rank == 1 and step >= 7):
        break
agreement.close()
dist.destroy_process_group()
open(f"{sys.argv[1]}/{rank}", "w").write(str(step))
"""


def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    script = tmp_path / "agrees.py"
    script.write_text(AGREES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "29411", str(script), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(launch, check=True, env=env)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["8", "8"]


def test_one_process_has_its_answer_at_once() -> None:
    agreement = Agreement()
    assert not agreement.any(False)
    assert agreement.any(True)


def test_the_exit_status_is_that_of_a_failure_that_may_pass() -> None:
    assert STOPPED == os.EX_TEMPFAIL
