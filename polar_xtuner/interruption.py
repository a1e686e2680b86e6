"""Ending a run before its end: signals and a time limit.

A signal or the limit is a request: the optimizer step in flight ends, a checkpoint is written, and
the process exits with `STOPPED`. Ranks hear of it at different times and have to end after the same
step, so after each step they add up their requests in the background and look at the sum after the
next one: nothing waits, on the host or on the device, and a run of several processes makes at most
one more step.

Python runs a signal's handler only between two of its own instructions, which a hung collective
never comes back to. So a thread hears of signals from the pipe that Python's C handler writes to.
It also lets a second signal end the process at once. A launcher hands a signal on as another one,
so what comes within `SAME` seconds counts as the same request.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, distributed

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

STOPPED = 75
"""Exit status of a run that was asked to stop and can be resumed: EX_TEMPFAIL of sysexits.h."""

SAME = 2.0
"""Seconds after a signal in which others count as the same request."""


class Interruption:
    """Hears of requests to stop while it is entered; of signals only in the main thread.

    Args:
        time_limit: seconds after the start of the process at which to stop; None is no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.reason: str | None = None
        """Why this process was asked to stop, if it was."""
        self._ends = None if time_limit is None else psutil.Process().create_time() + time_limit
        self._pipe = (-1, -1)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._hear_signals()
        return self

    def _hear_signals(self) -> None:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), daemon=True).start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            # What ends now need not hear that a launcher ends the ranks when one has gone.
            signal.signal(number, signal.SIG_IGN if kind is SystemExit else handler)
        os.close(self._pipe[1])  # the thread reads the end of the file, and ends

    def is_due(self) -> bool:
        """Whether this process was asked to stop, by a signal or by its time limit."""
        if self.reason is None and self._ends is not None and time.time() >= self._ends:
            self._request("its time limit")
        return self.reason is not None

    def _listen(self, pipe: int) -> None:
        heard = 0.0
        while number := os.read(pipe, 1):
            if number[0] not in SIGNALS:
                continue
            name, now = signal.Signals(number[0]).name, time.monotonic()
            if not heard:
                heard = now
                self._request(name)
            elif now - heard > SAME:
                logger.warning("stopping at once: %s, a second signal", name)
                logging.shutdown()
                os._exit(128 + number[0])
        os.close(pipe)

    def _request(self, reason: str) -> None:
        self.reason = reason
        logger.warning(
            "stopping for %s: the step in flight ends, then a checkpoint is written. A second "
            "signal stops at once",
            reason,
        )


class Agreement:
    """All ranks' answer to a question that is asked after each optimizer step.

    Alone, a process has its answer at once; among several, everyone gets the same one a step later.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._asked: tuple[Any, Tensor] | None = None
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            # On the host, so that no GPU waits for it or is waited for.
            self._group = distributed.new_group(backend="gloo")

    def any(self, own: bool) -> bool:
        """Whether some rank said True when this was called last."""
        if self._group is None:
            return own
        answer = False
        if self._asked is not None:
            work, votes = self._asked
            work.wait()
            answer = bool(votes.item())
        votes = torch.tensor([int(own)])
        self._asked = distributed.all_reduce(votes, group=self._group, async_op=True), votes
        return answer

    def close(self) -> None:
        """Take part in what the other ranks still wait for, and end the threads of the group."""
        if self._group is not None:
            if self._asked is not None:
                self._asked[0].wait()
            distributed.destroy_process_group(self._group)


def ignore_signals(*_: Any) -> None:
    """For processes that prepare data: the one they work for decides when they end."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def quieten(dataloader: Any, name: str) -> None:
    """Let the dataloader's processes outlive signals that the run hears.

    Raises:
        ValueError: they would outlive the run as well, which waits for them in the end.
    """
    if dataloader.persistent_workers:
        raise ValueError(
            f"{name}.persistent_workers=True: its processes do not hear signals, so the run would "
            "never end. Leave it out; nothing is gained by it"
        )
    dataloader.worker_init_fn = _QuietWorker(dataloader.worker_init_fn)


class _QuietWorker:
    """Starts a process that prepares data and does not hear signals."""

    def __init__(self, init: Any) -> None:
        self._init = init

    def __call__(self, worker: int) -> None:
        ignore_signals()
        if self._init is not None:
            self._init(worker)


def _ignore(number: int, frame: Any) -> None:
    """The thread has heard of it."""
