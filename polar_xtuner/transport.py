"""Sequences of ids to rewards, through one or several servers that may fail.

All requests of a process's client run on one event loop in a thread of its own, so that calls from
any thread or loop share connections, and sequences that are asked for at the same time share
requests. `Servers.ask` puts sequences into one queue; workers take from it what fits a request.

What can pass is tried again: lost connections, time-outs, answers cut short, 408, 425, 429 and 5xx.
A server that fails rests, twice as long after each failure, while the others go on. A request that
a server refuses (other 4xx), or that twice got no answer from a server that is there, is cut in
two until the sequence that it is about stands alone: it fails, the others do not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from polar_xtuner.protocols import (
    ENGINES,
    INFO_PATHS,
    Answer,
    AnswerError,
    Engine,
    ServerError,
    ServerFacts,
    engine_of,
    error_of,
    reward_of,
)
from polar_xtuner.rewards import Scored

logger = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_REST = 30.0
"""Seconds that a server rests at most."""

LINGER = 0.003
"""Seconds that a request which has room waits for sequences asked for at the same time."""

KEEP_ALIVE = 4.0
"""Seconds that an idle connection is kept: less than servers do (uvicorn: 5)."""

TRIES_WHOLE = 2
"""Failures after which a request of several sequences is cut in two."""

MAY_PASS = (408, 425, 429)
ABOUT_CONTENT = (400, 413, 422)


@dataclass(frozen=True)
class Limits:
    """How requests are made.

    Attributes:
        request_tokens, request_items: most ids and sequences of one request (a longer sequence
            gets a request of its own).
        in_flight: requests that a server has at once.
        connect_timeout, timeout: seconds until a connection stands, until the answer is there.
        max_retries: tries after the first, for each sequence.
        retry_delay: seconds of a server's first rest.
    """

    request_tokens: int = 32768
    request_items: int = 256
    in_flight: int = 8
    connect_timeout: float = 10.0
    timeout: float = 300.0
    max_retries: int = 10
    retry_delay: float = 0.2

    def __post_init__(self) -> None:
        for name in ("request_tokens", "request_items", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("connect_timeout", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0 seconds, got {getattr(self, name)}")
        for name in ("max_retries", "retry_delay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class _MayPass(Exception):
    """A try failed in a way that may pass."""

    def __init__(self, reason: str, rest: float = 0.0, is_there: bool = True) -> None:
        super().__init__(reason)
        self.rest = rest
        self.is_there = is_there  # the server was reached, so the request may be at fault


class _Refused(Exception):
    """The server does not take this content."""


Memo = OrderedDict[bytes, asyncio.Future[Scored]]
"""What was asked for, by the bytes of its ids."""


@dataclass(eq=False)
class _Asked:
    """One sequence that waits for its reward."""

    ids: array[int]
    scored: asyncio.Future[Scored]


@dataclass(eq=False)
class Server:
    """One address: what is there, and how it has been doing."""

    url: str
    session: aiohttp.ClientSession
    facts: ServerFacts | None = None
    was: ServerFacts | None = None
    failures: int = 0
    failed_at: float = 0.0
    succeeded_at: float = 0.0
    rests_until: float = 0.0
    tokens: int = 0
    settling: asyncio.Lock = field(default_factory=asyncio.Lock)

    def succeeded(self, sent_at: float) -> None:
        self.failures = 0
        self.succeeded_at = max(self.succeeded_at, sent_at)

    def failed(self, sent_at: float, failure: _MayPass, delay: float) -> bool:
        """Let it rest, unless it answered a request that was sent later: then say False.

        Requests that were under way together count as one failure.
        """
        if self.succeeded_at > sent_at and failure.is_there and not failure.rest:
            return False
        now = time.monotonic()
        if sent_at >= self.failed_at:
            self.failures += 1
            self.failed_at = now
            rest = max(_rest(self.failures, delay), min(failure.rest, LONGEST_REST))
            self.rests_until = now + rest
            logger.info("%s: %s; resting %.1f s", self.url, failure, rest)
        return True


def _rest(failures: int, delay: float) -> float:
    """Seconds to wait after a number of failures: doubling, with some chance in it."""
    return min(delay * 2.0 ** min(failures - 1, 30), LONGEST_REST) * random.uniform(0.5, 1.0)


@dataclass
class _Row:
    """The failures in a row of one request and of what it was cut into, and the most of them."""

    most: int
    failures: int = 0


Asker = Callable[[Sequence[Sequence[int]]], Awaitable[Answer]]
"""One server's answer to one request, tried once."""

Check = Callable[[ServerFacts, Asker], Awaitable[T]]
"""Looks at a server by asking it; raises ServerError if it is not what it should be."""


class Servers:
    """Addresses that serve the same model; all methods run on one event loop.

    Args:
        urls: as "http://127.0.0.1:8000".
        engine: what they must be.
        limits: see `Limits`.
        check: what a server has to stand before its first reward counts, and again when it has
            been away.
        model: the name to ask for; None is the one that the server tells.
        api_key: sent as a bearer token.
        bypass_proxy: ignore the environment's proxies for loopback and private addresses.
    """

    def __init__(
        self,
        urls: Sequence[str],
        engine: Engine,
        limits: Limits,
        check: Check[None],
        model: str | None = None,
        api_key: str | None = None,
        bypass_proxy: bool = False,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self._check = check
        self._model = model
        self._queue: deque[_Asked] = deque()
        self._arrived = asyncio.Event()
        self._taking = asyncio.Lock()
        self._workers: list[asyncio.Task[None]] = []
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=limits.timeout, sock_connect=limits.connect_timeout)
        self.servers = [
            Server(
                url,
                aiohttp.ClientSession(
                    headers={"Content-Type": "application/json", **headers},
                    timeout=timeout,
                    trust_env=not (bypass_proxy and _is_private(url)),
                    connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
                ),
            )
            for url in urls
        ]

    async def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for asked in self._queue:
            asked.scored.cancel()
        self._queue.clear()
        for server in self.servers:
            await server.session.close()

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
        return await asyncio.gather(*futures)

    async def inspect(self, check: Check[T]) -> dict[str, T]:
        """What `check` finds at every server, by its URL.

        Raises:
            ServerError: one is not what it should be, or not there.
        """
        found = {}
        for server in self.servers:
            for tries_left in reversed(range(self.limits.max_retries + 1)):
                await asyncio.sleep(max(0.0, server.rests_until - time.monotonic()))
                sent_at = time.monotonic()
                try:
                    facts = await self._facts(server)
                    found[server.url] = await check(facts, self._asker(server, facts))
                    break
                except _MayPass as failure:
                    server.failed(sent_at, failure, self.limits.retry_delay)
                    if not tries_left:
                        raise ServerError(f"{server.url}: {failure}") from failure
        return found

    # ---- the queue

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            try:
                # So many that a sequence at fault stands alone in the end.
                most = max(self.limits.max_retries, TRIES_WHOLE + len(batch).bit_length())
                await self._answer(batch, 0, _Row(most))
            except Exception as error:
                for asked in batch:
                    if not asked.scored.done():
                        asked.scored.set_exception(error)
                        asked.scored.exception()  # seen: who asked may have gone

    async def _next_batch(self) -> list[_Asked]:
        async with self._taking:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            if not self._fills_request():
                await asyncio.sleep(LINGER)
            batch: list[_Asked] = []
            tokens = 0
            while self._queue and len(batch) < self.limits.request_items:
                tokens += len(self._queue[0].ids)
                if batch and tokens > self.limits.request_tokens:
                    break
                batch.append(self._queue.popleft())
            return [asked for asked in batch if not asked.scored.done()]

    def _fills_request(self) -> bool:
        # Counting every sequence's ids would take the longer the longer the queue is.
        return len(self._queue) >= self.limits.request_items

    async def _answer(self, batch: list[_Asked], tries: int, row: _Row) -> None:
        """See to it that every sequence of a batch gets a reward or a reason.

        Args:
            tries: how often these sequences have failed.
            row: of the request that they were first asked for with.
        """
        if not batch:
            return
        while True:
            server = await self._choose()
            size = sum(len(asked.ids) for asked in batch)
            server.tokens += size
            sent_at = time.monotonic()
            try:
                facts = await self._settled(server)
                batch = _within(batch, facts)
                if batch:
                    await self._send(server, facts, batch)
                server.succeeded(sent_at)
                row.failures = 0
                return
            except _Refused as refusal:
                if len(batch) == 1:
                    _give(batch[0], Scored(None, f"{facts} refused it: {refusal}"))
                    return
                break
            except _MayPass as failure:
                tries += 1
                row.failures += 1
                alone = len(batch) == 1 or not failure.is_there
                if row.failures > row.most or (alone and tries > self.limits.max_retries):
                    reason = f"no reward after {tries} tries, the last: {failure}"
                    for asked in batch:
                        _give(asked, Scored(None, reason))
                    return
                if not server.failed(sent_at, failure, self.limits.retry_delay):
                    await asyncio.sleep(_rest(tries, self.limits.retry_delay))
                if not alone and tries >= TRIES_WHOLE:
                    break
            finally:
                server.tokens -= size
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            await self._answer(half, tries, row)

    async def _choose(self) -> Server:
        """The server with the least to do, of those that do not rest."""
        while True:
            now = time.monotonic()
            awake = [server for server in self.servers if server.rests_until <= now]
            if awake:
                return min(awake, key=lambda server: server.tokens)
            await asyncio.sleep(min(server.rests_until for server in self.servers) - now)

    async def _send(self, server: Server, facts: ServerFacts, batch: list[_Asked]) -> None:
        answer = await self._post(server, facts, [asked.ids for asked in batch])
        for asked, values in zip(batch, answer.values, strict=True):
            reward = reward_of(values)
            error = None if reward is not None else f"{facts} answered no finite number"
            _give(asked, Scored(reward, error))

    # ---- one server

    async def _settled(self, server: Server) -> ServerFacts:
        """What a server is, asked once, and again when it was away; checked before it counts."""
        try:
            return await self._settle(server)
        except _MayPass as failure:
            failure.is_there = False  # whatever failed, it was not what is to be scored
            raise

    async def _settle(self, server: Server) -> ServerFacts:
        async with server.settling:
            if server.facts is None:
                facts = await self._facts(server)
                if server.was != facts:
                    await self._check(facts, self._asker(server, facts))
                server.facts = server.was = facts
                logger.info("%s is %s", server.url, facts)
            return server.facts

    async def _facts(self, server: Server) -> ServerFacts:
        answers = {}
        for path in INFO_PATHS:
            status, answer = await self._exchange(server, path)
            if status in (401, 403):
                raise ServerError(f"{server.url} answers {path} with {status}: it wants an api_key")
            if status == 200 and answer is not None:
                answers[path] = answer
        found = engine_of(answers)
        if found != self.engine.name:
            raise ServerError(
                f"{server.url} is {found or 'no engine that is known here'}, not "
                f"{self.engine.name}: set server_type (one of {', '.join(ENGINES)}) or the address"
            )
        facts = self.engine.facts(answers)
        if self._model:
            facts = ServerFacts(facts.engine, facts.version, self._model, facts.longest)
        return facts

    def _asker(self, server: Server, facts: ServerFacts) -> Asker:
        async def ask(sequences: Sequence[Sequence[int]]) -> Answer:
            try:
                return await self._post(server, facts, sequences)
            except _Refused as refusal:
                raise ServerError(f"{server.url} refused a request: {refusal}") from refusal

        return ask

    async def _post(
        self, server: Server, facts: ServerFacts, sequences: Sequence[Sequence[int]]
    ) -> Answer:
        body = json.dumps(self.engine.request(sequences, facts), separators=(",", ":")).encode()
        status, answer = await self._exchange(server, self.engine.path, body)
        told = error_of(answer)
        if told is not None:
            status, message = (told[0] or status) if status == 200 else status, told[1]
        else:
            message = ""
        described = f"HTTP {status}" + (f", {message}" if message else "")
        if status in ABOUT_CONTENT:
            raise _Refused(described)
        if status != 200 or told is not None:
            raise ServerError(
                f"{server.url} answers {self.engine.path} with {described}: "
                + {401: "it wants another api_key", 403: "it wants another api_key"}.get(
                    status, f"it does not serve {facts.model or 'a reward model'} there"
                )
            )
        try:
            return self.engine.read(answer, len(sequences))
        except AnswerError as error:
            raise _MayPass(str(error)) from error

    async def _exchange(
        self, server: Server, path: str, body: bytes | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of an answer; None for JSON where there is none in an error's answer.

        Raises:
            _MayPass: none came, or not to its end, or it says to come again.
        """
        method = "GET" if body is None else "POST"
        with _failures(server):
            async with server.session.request(method, server.url + path, data=body) as response:
                status = response.status
                content = await response.read()
                later = response.headers.get("Retry-After", "")
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if status >= 500 or status in MAY_PASS:
            message = (error_of(answer) or (None, ""))[1]
            described = f"HTTP {status}" + (f", {message}" if message else "")
            raise _MayPass(described, rest=float(later) if later.isdigit() else 0.0)
        if status == 200 and answer is None and path == self.engine.path:
            raise _MayPass("the answer is not JSON, or cut short")
        told = error_of(answer)
        if status == 200 and told and ((told[0] or 0) >= 500 or told[0] in MAY_PASS):
            raise _MayPass(f"an error with HTTP 200: {told[0]}, {told[1]}")
        return status, answer


@contextmanager
def _failures(server: Server) -> Iterator[None]:
    """What goes wrong on the way, as `_MayPass`; a server that was away is asked again what it is.

    One that let a connection go may be another by now, but says so; one that refused connections
    has been started again, and is checked in full.
    """
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        server.facts = server.was = None
        raise _MayPass(f"no connection: {error.os_error.strerror}", is_there=False) from error
    except asyncio.TimeoutError as error:
        raise _MayPass("no answer in time") from error
    except aiohttp.InvalidURL as error:
        raise ServerError(f"{server.url} is no address") from error
    except (aiohttp.ClientError, OSError) as error:
        server.facts = None
        raise _MayPass(f"the connection was lost: {type(error).__name__}") from error


def _within(batch: list[_Asked], facts: ServerFacts) -> list[_Asked]:
    """Those that the server takes; the others fail."""
    longest = facts.longest
    if longest is None:
        return batch
    for asked in batch:
        if len(asked.ids) > longest:
            _give(
                asked,
                Scored(
                    None,
                    f"has {len(asked.ids)} ids, {facts} takes at most {longest}: start the server "
                    f"with a longer context, or the client with max_length={longest}",
                ),
            )
    return [asked for asked in batch if len(asked.ids) <= longest]


def _give(asked: _Asked, scored: Scored) -> None:
    if not asked.scored.done():
        asked.scored.set_result(scored)


def _is_private(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ip_address(host).is_private
    return host == "localhost"


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
