"""Light processes that share work.

They are started afresh and import what the job needs, no more: a fork of a training process would
hold its threads' locks, and `multiprocessing` would run the main script again (all of xtuner).
Each is served by a thread of its own over a pair of pipes, one call at a time.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any


class WorkerError(RuntimeError):
    """A process ended before it had answered."""


def run_in_order(job: Callable[[Any], Any], calls: Iterable[Any], processes: int) -> Iterator[Any]:
    """`job(call)` of every call, in order; the processes are a few calls ahead at most.

    Args:
        job: is pickled, as calls and answers are.

    Raises:
        WorkerError: a process was killed.
        Exception: what `job` raises.
    """
    pool = ThreadPoolExecutor(processes)
    own = threading.local()
    started: list[subprocess.Popen[bytes]] = []

    def answer(call: Any) -> Any:
        if not hasattr(own, "process"):
            own.process = _start(job)
            started.append(own.process)
        return _ask(own.process, call)

    pending: deque[Future[Any]] = deque()
    try:
        for call in calls:
            pending.append(pool.submit(answer, call))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.kill()
        pool.shutdown()
        for process in started:
            process.communicate()


def _start(job: Any) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.getenv("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # The processes are what runs in parallel.
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )
    _send(process.stdin, job, process)
    return process


def _ask(process: subprocess.Popen[bytes], call: Any) -> Any:
    _send(process.stdin, call, process)
    try:
        answer, error = pickle.load(process.stdout)  # type: ignore[arg-type]
    except (EOFError, pickle.UnpicklingError):
        raise _ended(process) from None
    if error is not None:
        raise error
    return answer


def _send(pipe: IO[bytes] | None, value: Any, process: subprocess.Popen[bytes]) -> None:
    assert pipe is not None
    try:
        pickle.dump(value, pipe, pickle.HIGHEST_PROTOCOL)
        pipe.flush()
    except BrokenPipeError:
        raise _ended(process) from None


def _ended(process: subprocess.Popen[bytes]) -> WorkerError:
    return WorkerError(f"a process that works for this one ended with status {process.wait()}")


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    gc.disable()  # looking for cycles among millions of ids takes a quarter of the time
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    job = pickle.load(calls)
    while True:
        try:
            call = pickle.load(calls)
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None] = job(call), None
        except Exception as error:
            answer = None, error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve()
