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
from typing import Any


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
    crew = _Crew()

    def answer(call: Any) -> Any:
        if not hasattr(own, "process"):
            own.process = crew.start()
            _send(own.process, job)
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
        crew.end()
        pool.shutdown()


class _Crew:
    """The processes that were started, so that they end together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_over = False

    def start(self) -> subprocess.Popen[bytes]:
        # It imports what this process does, from the same places: neither the working directory
        # nor an environment variable of its own decides.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        with self._lock:
            if self._is_over:
                raise WorkerError("the work is over")
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # The processes are what runs in parallel.
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
            self._processes.append(process)
        return process

    def end(self) -> None:
        with self._lock:
            self._is_over = True
            for process in self._processes:
                process.kill()
        for process in self._processes:
            process.wait()


def _ask(process: subprocess.Popen[bytes], call: Any) -> Any:
    _send(process, call)
    try:
        answer, error = pickle.load(process.stdout)  # type: ignore[arg-type]
    except (EOFError, pickle.UnpicklingError):
        raise _ended(process) from None
    if error is not None:
        raise error
    return answer


def _send(process: subprocess.Popen[bytes], value: Any) -> None:
    assert process.stdin is not None
    try:
        pickle.dump(value, process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
    except BrokenPipeError:
        raise _ended(process) from None


def _ended(process: subprocess.Popen[bytes]) -> WorkerError:
    status = process.wait()
    why = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
    return WorkerError(f"a process that works for this one ended with status {status}{why}")


def serve() -> None:
    """What such a process does."""
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
