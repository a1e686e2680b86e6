import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from operator import itemgetter, mul
from pathlib import Path
from typing import Any

import pytest

import polar_xtuner
from polar_xtuner.workers import WorkerError, run_in_order


def test_answers_come_in_the_order_of_the_calls() -> None:
    # Early calls take longest.
    slept = run_in_order(time.sleep, [0.3, 0.2, 0.0, 0.1], 3)
    assert [*slept] == [None] * 4
    assert [*run_in_order(partial(mul, 3), range(50), 4)] == [3 * i for i in range(50)]
    assert [*run_in_order(partial(mul, 3), [], 4)] == []


def test_large_calls_and_answers_pass() -> None:
    assert [*map(len, run_in_order(partial(mul, 3), [bytes(3_000_000)] * 4, 2))] == [9_000_000] * 4


def test_what_a_job_raises_is_raised_here_and_the_processes_end() -> None:
    answers = run_in_order(itemgetter("a"), [{"a": 1}, {"b": 2}, {"a": 3}], 2)
    assert next(answers) == 1
    with pytest.raises(KeyError):
        next(answers)
    assert not children()


def test_a_killed_process_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(WorkerError, match="status -9"):
        [*run_in_order(eval, ["1 + 1", "__import__('os').kill(__import__('os').getpid(), 9)"], 2)]
    assert not children()


def test_what_a_job_prints_is_not_taken_for_an_answer() -> None:
    assert [*run_in_order(print, ["hello"] * 5, 2)] == [None] * 5


def test_processes_import_what_this_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the working directory nor its modules decide."""
    for name in ("tokenize", "pickle", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')")
    (tmp_path / "polar_xtuner").mkdir()
    (tmp_path / "polar_xtuner" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (found,) = run_in_order(eval, ["__import__('polar_xtuner').__file__"], 1)
    assert found == polar_xtuner.__file__


def test_an_early_end_does_not_wait_for_the_calls_under_way() -> None:
    start = time.monotonic()
    answers = run_in_order(time.sleep, [0.0, *[60.0] * 20], 2)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 30
    assert not children()


def test_calls_are_taken_a_few_ahead_only() -> None:
    taken = []

    def calls() -> Iterator[int]:
        for call in range(100):
            taken.append(call)
            yield call

    answers = run_in_order(partial(mul, 1), calls(), 2)
    assert next(answers) == 0
    assert len(taken) < 10
    answers.close()  # type: ignore[attr-defined]
    assert not children()


WORKING = """
from time import sleep
from polar_xtuner.workers import run_in_order
answers = run_in_order(sleep, [0.0, 0.0, 2.0, 2.0], 2)
next(answers)
print("started", flush=True)
next(answers), next(answers)
"""


def test_processes_end_with_the_one_that_started_them() -> None:
    """Killed as it is, it cannot end them: they see its end of the pipe closed."""
    root = Path(__file__).parents[1]
    command: list[Any] = [sys.executable, "-c", WORKING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        working = children(parent.pid)
        assert len(working) == 2
        parent.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in working):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(pid: int | None = None) -> list[int]:
    """Processes that were started by one and have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            command = entry.with_name("cmdline").read_bytes()
        except OSError:
            continue
        is_helper = b"multiprocessing" in command  # of other tests; they stay
        if int(fields[1]) == (pid or os.getpid()) and fields[0] != "Z" and not is_helper:
            found.append(int(entry.parent.name))
    return found
