"""Sequences of ids to rewards, through one or several servers that may fail.

All requests of a client run on one event loop in a thread of its own, so that calls from any thread
or loop share connections, and sequences that are asked for at the same time share requests.
`Servers.ask` puts sequences into one queue; workers take from it what fits a request.

What can pass is tried again: lost connections, time-outs, answers cut short, 408, 425, 429, 5xx. A
server that fails rests, twice as long after each failure in a row, while the others go on; when
all have failed too often, what waits for them fails at once. A request that a server refuses (other
4xx), or fails at twice although it is well otherwise, is cut in two until the sequence that it is
about stands alone: it fails, the others do not.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from polar_xtuner.connection import Asker, Limits, MayPass, Refused, Server, Settings
from polar_xtuner.protocols import ServerError, ServerFacts, reward_of
from polar_xtuner.rewards import Scored

T = TypeVar("T")

LINGER = 0.003
"""Seconds that a request which has room waits for sequences asked for at the same time."""

MOMENT = 0.01
"""Seconds after which to look again for a server that is free."""

Memo = OrderedDict[bytes, asyncio.Future[Scored]]
"""What was asked for, by the bytes of its ids."""


class _Gone(Exception):
    """No server has answered for long."""


@dataclass(eq=False)
class _Asked:
    """One sequence that waits for its reward."""

    ids: array[int]
    scored: asyncio.Future[Scored]

    def give(self, scored: Scored) -> None:
        if not self.scored.done():
            self.scored.set_result(scored)

    def fail(self, error: BaseException) -> None:
        if not self.scored.done():
            self.scored.set_exception(error)
            self.scored.exception()  # seen: who asked may have gone


class Servers:
    """Addresses that serve the same model; all methods run on one event loop.

    Args:
        urls: as "http://127.0.0.1:8000".
    """

    def __init__(self, urls: Sequence[str], settings: Settings, limits: Limits) -> None:
        self.limits = limits
        self.servers = [Server(url, settings, limits) for url in urls]
        self._queue: deque[_Asked] = deque()
        self._arrived = asyncio.Event()
        self._taking = asyncio.Lock()
        self._workers: list[asyncio.Task[None]] = []
        self._calls = 0

    async def close(self) -> None:
        """Let connections go; whoever waits gets a ServerError."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for asked in self._queue:
            asked.fail(ServerError("the client was closed"))
        self._queue.clear()
        for server in self.servers:
            await server.close()

    async def ask(
        self, sequences: Sequence[array[int]], memo: Memo, remembered: int
    ) -> list[Scored]:
        """What each sequence gets, in order; those in `memo` are not asked for again.

        Args:
            memo: takes the sequences; the oldest go when it has more than `remembered`.

        Raises:
            ServerError: a server is not what it should be.
        """
        if not self._workers:
            for _ in range(self.limits.in_flight * len(self.servers)):
                self._workers.append(asyncio.create_task(self._work()))
        if not self._calls:
            for server in self.servers:
                server.start_anew()
        futures = []
        for ids in sequences:
            key = ids.tobytes()
            if key not in memo:
                memo[key] = asyncio.get_running_loop().create_future()
                self._queue.append(_Asked(ids, memo[key]))
            futures.append(memo[key])
        while len(memo) > remembered:
            memo.popitem(last=False)
        self._arrived.set()
        self._calls += 1
        try:
            return await asyncio.gather(*futures)
        finally:
            self._calls -= 1

    async def look(self, find: Callable[[ServerFacts, Asker], Awaitable[T]]) -> dict[str, T]:
        """What `find` finds at every server, by its URL.

        Raises:
            ServerError: one is not what it should be, or not there.
        """
        return {server.url: await server.look(find) for server in self.servers}

    # ---- the queue

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            try:
                await self._answer(batch, 0)
            except asyncio.CancelledError:
                for asked in batch:
                    asked.fail(ServerError("the client was closed"))
                raise
            except _Gone as error:
                for asked in batch:
                    asked.give(Scored(None, str(error)))
            except Exception as error:
                for asked in batch:
                    asked.fail(error)

    async def _next_batch(self) -> list[_Asked]:
        async with self._taking:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            # Counting every sequence's ids would take the longer the longer the queue is.
            if len(self._queue) < self.limits.request_items:
                await asyncio.sleep(LINGER)
            batch: list[_Asked] = []
            tokens = 0
            while self._queue and len(batch) < self.limits.request_items:
                tokens += len(self._queue[0].ids)
                if batch and tokens > self.limits.request_tokens:
                    break
                batch.append(self._queue.popleft())
            return batch

    async def _answer(self, batch: list[_Asked], tries: int) -> None:
        """See to it that every sequence of a batch gets a reward or a reason.

        Args:
            tries: how often servers have failed at these sequences, for which they may be at fault.

        Raises:
            ServerError: a server is not what it should be.
            _Gone: there is no server any more.
        """
        while True:
            batch = [asked for asked in batch if not asked.scored.done()]  # or was cancelled
            if not batch:
                return
            server = await self._choose()
            size = sum(len(asked.ids) for asked in batch)
            server.in_flight += 1
            server.tokens += size
            sent_at = time.monotonic()
            facts = None
            try:
                facts = await server.settled()
                batch = _within(batch, facts)
                if batch:
                    await _send(server, facts, batch)
                server.succeeded(sent_at)
                return
            except Refused as refusal:
                if len(batch) == 1:
                    batch[0].give(Scored(None, f"{server.url} ({facts}) refused it: {refusal}"))
                    return
                break
            except MayPass as failure:
                if facts and failure.about_content and tries and await server.is_well(facts):
                    tries += failure.tries
                    if len(batch) > 1:
                        break
                    if tries > self.limits.max_retries:
                        reason = f"{server.url} ({facts}) fails at it, the last time: {failure}"
                        batch[0].give(Scored(None, reason))
                        return
                    rests = False
                else:
                    tries = max(tries, int(failure.about_content))
                    rests = server.failed(sent_at, failure)
            finally:
                server.in_flight -= 1
                server.tokens -= size
            if not rests:
                await asyncio.sleep(self.limits.retry_delay * random.uniform(0.5, 1.0))
        middle = len(batch) // 2
        await self._answer(batch[:middle], tries)
        await self._answer(batch[middle:], tries)

    async def _choose(self) -> Server:
        """The server with the least to do, of those that are free."""
        while True:
            free = [server for server in self.servers if server.is_free]
            if free:
                return min(free, key=lambda server: server.tokens)
            if all(server.is_gone for server in self.servers):
                reasons = "; ".join(f"{server.url}: {server.reason}" for server in self.servers)
                raise _Gone(
                    f"no server answers, after {self.limits.max_retries} retries: {reasons}"
                )
            rests = [server.rest for server in self.servers]
            await asyncio.sleep(max(MOMENT, min(rests)))  # one that does not rest is full


async def _send(server: Server, facts: ServerFacts, batch: list[_Asked]) -> None:
    answer = await server.post(facts, [asked.ids for asked in batch])
    for asked, values in zip(batch, answer.values, strict=True):
        reward = reward_of(values)
        error = f"{server.url} ({facts}) answered no finite number"
        asked.give(Scored(reward, None if reward is not None else error))


def _within(batch: list[_Asked], facts: ServerFacts) -> list[_Asked]:
    """Those that the server takes; the others fail."""
    longest = facts.longest
    if longest is None:
        return batch
    for asked in batch:
        if len(asked.ids) > longest:
            reason = (
                f"has {len(asked.ids)} ids, {facts} takes at most {longest}: start the server with "
                f"a longer context, or the client with max_length={longest}"
            )
            asked.give(Scored(None, reason))
    return [asked for asked in batch if len(asked.ids) <= longest]


class Loop:
    """An event loop in a thread of its own, made when it is first needed.

    A process that was forked from one with a loop makes another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    @property
    def is_running(self) -> bool:
        return self._loop is not None and self._pid == os.getpid()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or not self.is_running:
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                threading.Thread(
                    target=self._loop.run_forever, name="polar rewards", daemon=True
                ).start()
            return self._loop

    def stop(self) -> None:
        with self._lock:
            if self._loop is not None and self.is_running:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None
