"""One server of rewards: what it is, how it has been doing, and one request at a time.

Before a server's first reward counts it is asked what it is and held against a check; again when
it was away; and in short when nothing has been asked of it for a while, for it may have been
started anew meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_REST = 30.0
"""Seconds that a server rests at most."""

KEEP_ALIVE = 4.0
"""Seconds that an idle connection is kept: less than servers do (uvicorn: 5)."""

REMEMBERED = 5.0
"""Seconds for which a server that was found to be wrong is not asked again."""

BUSY = (429, 503)
MAY_PASS = (408, 425, *BUSY)
ABOUT_CONTENT = (400, 413, 422)


@dataclass(frozen=True)
class Limits:
    """How requests are made.

    Attributes:
        request_tokens, request_items: most ids and sequences of one request (a longer sequence
            gets a request of its own).
        in_flight: requests that a server has at once, at most; fewer where it says it is busy.
        connect_timeout, timeout: seconds until a connection stands, until the answer is there.
        max_retries: failures in a row after which a server counts as gone; tries of a sequence
            that a server fails at which is otherwise well.
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


class MayPass(Exception):
    """A try failed in a way that may pass.

    Attributes:
        is_busy: the server says to come again.
        about_content: what was asked may be the reason; never so if the server was not reached.
        tries: for how many it counts: a time-out takes long.
        rest: seconds after which it wants to be asked again.
    """

    def __init__(
        self,
        reason: str,
        *,
        is_busy: bool = False,
        about_content: bool = False,
        tries: int = 1,
        rest: float = 0.0,
    ) -> None:
        super().__init__(reason)
        self.is_busy = is_busy
        self.about_content = about_content
        self.tries = tries
        self.rest = rest


class Refused(Exception):
    """The server does not take this content."""


Asker = Callable[[Sequence[Sequence[int]]], Awaitable[Answer]]
"""One server's answer to one request, tried once."""

Check = Callable[[ServerFacts, Asker, bool], Awaitable[None]]
"""Looks at a server by asking it; raises ServerError if it is not what it should be. The last
argument says that it stood the check before and looks the same: then a short one will do."""


@dataclass(frozen=True)
class Settings:
    """What all servers of a client have in common.

    Attributes:
        check: what a server has to stand before its rewards count.
        well_known: ids that any server of the model can score: for seeing whether it is well.
        model: the name to ask for; None is the one that the server tells.
        api_key: sent as a bearer token.
        bypass_proxy: ignore the environment's proxies for loopback and private addresses.
    """

    engine: Engine
    check: Check
    well_known: Sequence[int]
    model: str | None = None
    api_key: str | None = None
    bypass_proxy: bool = False


class Server:
    """One address; lives on the event loop that it is made on."""

    def __init__(self, url: str, settings: Settings, limits: Limits) -> None:
        self.url = url
        self.limits = limits
        self.in_flight = 0
        self.tokens = 0
        """Requests and ids that it has at the moment, by those who send them."""
        self._settings = settings
        self._proxy = _proxy_of(url, settings.bypass_proxy)
        self._session = aiohttp.ClientSession(
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}),
            },
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
        )
        self._settling = asyncio.Lock()
        self._facts: ServerFacts | None = None
        self._was: ServerFacts | None = None
        self._posts = 0
        self._answered_at = 0.0
        self._wrong: ServerError | None = None
        self._wrong_until = 0.0
        self.start_anew()

    async def close(self) -> None:
        await self._session.close()

    # ---- how it has been doing

    def start_anew(self) -> None:
        """Forget failures: somebody asks again who has nothing else under way."""
        self._failures = 0
        self._failed_at = self._succeeded_at = self._rests_until = 0.0
        self._allowed = float(self.limits.in_flight)
        self.reason = ""

    @property
    def rest(self) -> float:
        """Seconds that it still rests."""
        return max(0.0, self._rests_until - time.monotonic())

    @property
    def is_free(self) -> bool:
        return self.in_flight < int(self._allowed) and not self.rest

    @property
    def is_gone(self) -> bool:
        """It rests, after more failures in a row than are tried."""
        return self._failures > self.limits.max_retries and self.rest > 0

    def succeeded(self, sent_at: float) -> None:
        self._failures = 0
        self._succeeded_at = max(self._succeeded_at, sent_at)
        self._allowed = min(self._allowed + 1 / self._allowed, float(self.limits.in_flight))

    def failed(self, sent_at: float, failure: MayPass) -> bool:
        """Let it rest, unless it answered a request that was sent later: then say False.

        Requests that were under way together count as one failure.
        """
        if failure.about_content and self._succeeded_at > sent_at:
            return False
        self.reason = str(failure)
        if sent_at >= self._failed_at:
            self._failures += 1
            self._failed_at = time.monotonic()
            rest = self.limits.retry_delay * 2.0 ** min(self._failures - 1, 30)
            rest = max(min(rest, LONGEST_REST) * random.uniform(0.5, 1.0), failure.rest)
            self._rests_until = self._failed_at + min(rest, LONGEST_REST)
            if failure.is_busy:
                self._allowed = max(1.0, self._allowed / 2)
            logger.info("%s: %s; resting %.1f s", self.url, failure, self.rest)
        return True

    # ---- what it is

    async def settled(self) -> ServerFacts:
        """What it is, once it has stood the check.

        Raises:
            MayPass: that cannot be found out now; never about content.
            ServerError: it is not what it should be.
        """
        async with self._settling:
            if self._wrong is not None and time.monotonic() < self._wrong_until:
                raise ServerError(str(self._wrong))
            if self.rest:
                raise MayPass(self.reason)
            idle = not self._posts and time.monotonic() - self._answered_at > KEEP_ALIVE
            if self._facts is None or idle:
                try:
                    facts = await self._ask_facts()
                    await self._settings.check(facts, self._asker(facts), facts == self._was)
                except MayPass as failure:
                    failure.about_content = False  # it was not what is to be scored
                    raise
                except ServerError as error:
                    self._wrong = ServerError(f"{self.url}: {error}")
                    self._wrong_until = time.monotonic() + REMEMBERED
                    self._facts = self._was = None
                    raise self._wrong from error
                self._facts = self._was = facts
                self._answered_at = time.monotonic()
            return self._facts

    async def look(self, find: Callable[[ServerFacts, Asker], Awaitable[T]]) -> T:
        """What `find` finds here, tried as often as requests are.

        Raises:
            ServerError: it is not what it should be, or not there.
        """
        for tries_left in reversed(range(self.limits.max_retries + 1)):
            await asyncio.sleep(self.rest)
            sent_at = time.monotonic()
            try:
                facts = await self._ask_facts()
                return await find(facts, self._asker(facts))
            except MayPass as failure:
                self.failed(sent_at, failure)
                if not tries_left:
                    raise ServerError(f"{self.url}: {failure}") from failure
            except ServerError as error:
                raise ServerError(f"{self.url}: {error}") from error
        raise AssertionError

    async def is_well(self, facts: ServerFacts) -> bool:
        """Whether it scores a sequence that nothing can be wrong with."""
        try:
            await self.post(facts, [self._settings.well_known])
        except (MayPass, Refused):
            return False
        return True

    async def _ask_facts(self) -> ServerFacts:
        answers = {}
        for path in INFO_PATHS:
            status, answer = await self._exchange(path)
            if status in (401, 403):
                raise ServerError(f"it answers {path} with HTTP {status}: it wants an api_key")
            if status == 200 and answer is not None:
                answers[path] = answer
        engine = self._settings.engine
        found = engine_of(answers)
        if found != engine.name:
            raise ServerError(
                f"it is {found or 'no engine that is known here'}, not {engine.name}: set "
                f"server_type (one of {', '.join(ENGINES)}) or the address"
            )
        facts = engine.facts(answers)
        model = self._settings.model
        return replace(facts, model=model) if model else facts

    # ---- one request

    def _asker(self, facts: ServerFacts) -> Asker:
        async def ask(sequences: Sequence[Sequence[int]]) -> Answer:
            try:
                return await self.post(facts, sequences)
            except Refused as refusal:
                raise ServerError(f"it refused a request: {refusal}") from refusal

        return ask

    async def post(self, facts: ServerFacts, sequences: Sequence[Sequence[int]]) -> Answer:
        """Its answer to one request.

        Raises:
            MayPass: there is none, or not a whole one.
            Refused: it does not take what was sent.
            ServerError: it takes no requests of this kind.
        """
        engine = self._settings.engine
        body = json.dumps(engine.request(sequences, facts), separators=(",", ":")).encode()
        self._posts += 1
        try:
            status, answer = await self._exchange(engine.path, body)
        finally:
            self._posts -= 1
        self._answered_at = time.monotonic()
        told = error_of(answer)
        message = told[1] if told else ""
        if told is not None and status == 200:
            status = told[0] or status
        described = f"HTTP {status}" + (f", {message}" if message else "")
        if status in ABOUT_CONTENT:
            raise Refused(described)
        if status in (401, 403):
            raise ServerError(
                f"it answers {engine.path} with {described}: it wants another api_key"
            )
        if status != 200 or told is not None:
            raise ServerError(
                f"it answers {engine.path} with {described}: it does not serve "
                f"{facts.model or 'a reward model'} there"
            )
        try:
            return engine.read(answer, len(sequences))
        except AnswerError as error:
            raise MayPass(str(error), about_content=True) from error

    async def _exchange(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer; None for JSON where there is none in an error's answer.

        Raises:
            MayPass: none came, or not to its end, or it says to come again.
        """
        limits = self.limits
        longest = limits.timeout if body else min(limits.timeout, 3 * limits.connect_timeout)
        with self._failures_on_the_way():
            async with self._session.request(
                "POST" if body else "GET",
                self.url + path,
                data=body,
                proxy=self._proxy,
                timeout=aiohttp.ClientTimeout(total=longest, sock_connect=limits.connect_timeout),
            ) as response:
                status = response.status
                content = await response.read()
                later = response.headers.get("Retry-After", "")
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        told = error_of(answer)
        if status == 200 and told and told[0]:
            status = told[0]
        if status >= 500 or status in MAY_PASS:
            described = f"HTTP {status}" + (f", {told[1]}" if told and told[1] else "")
            is_busy = status in BUSY
            rest = float(later) if later.isdigit() else 0.0
            raise MayPass(described, is_busy=is_busy, about_content=not is_busy, rest=rest)
        if status == 200 and answer is None and body:
            raise MayPass("the answer is not JSON, or cut short", about_content=True)
        return status, answer

    @contextmanager
    def _failures_on_the_way(self) -> Iterator[None]:
        """What goes wrong on the way, as `MayPass`.

        A server that let a connection go may be another by now; one that refused connections has
        been started again, and is checked in full.
        """
        try:
            yield
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL) as error:
            raise ServerError(f"no connection can be made: {type(error).__name__}") from error
        except aiohttp.ClientConnectorError as error:
            self._facts = self._was = None
            raise MayPass(f"no connection: {error.os_error.strerror}") from error
        except aiohttp.ServerTimeoutError as error:
            self._facts = self._was = None
            raise MayPass("no connection in time") from error
        except asyncio.TimeoutError as error:
            raise MayPass("no answer in time", about_content=True, tries=4) from error
        except (aiohttp.ClientError, OSError) as error:
            self._facts = None
            reason = f"the connection was lost: {type(error).__name__}"
            raise MayPass(reason, about_content=True) from error


def _proxy_of(url: str, bypass_private: bool) -> str | None:
    """The environment's; aiohttp would take passwords from ~/.netrc along with it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if proxy_bypass(host) or (bypass_private and _is_private(host)):
        return None
    return getproxies().get(parts.scheme)


def _is_private(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_private
    return host == "localhost"
