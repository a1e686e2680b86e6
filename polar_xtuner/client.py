"""Rewards over HTTP from vLLM, SGLang or LMDeploy, by the call that POLAR's own client has.

The client sends ids that the template made, the ones that training would have had; what servers
make of text depends on their tokenizer. Before a server's first reward counts, it is looked at:
that it is the engine it should be, answers raw rewards, reads every id, and, where the checkpoint
brings golden scores, that it gives these.

    items -> candidates -> ids (template) -> transport -> rewards
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

from tqdm import tqdm

from polar_xtuner.connection import Asker, Limits, Settings
from polar_xtuner.golden import (
    DTYPES,
    GOLDEN,
    Golden,
    Verification,
    read_golden,
    rows_to_score,
    verify,
)
from polar_xtuner.protocols import (
    ENGINES,
    ServerError,
    ServerFacts,
    is_activated,
    reward_of,
)
from polar_xtuner.rewards import (
    Item,
    Rewards,
    Scored,
    as_items,
    candidate_of,
    check_on_error,
    gather,
    read_calibration,
)
from polar_xtuner.template import Candidate, PolarTemplate, check_vocabulary
from polar_xtuner.tokenizer import load_tokenizer, local_folder
from polar_xtuner.transport import Loop, Memo, Servers

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK = 256
"""Items that are made ids of, and handed on, together."""

REMEMBERED = 1 << 14
"""Sequences of a stream whose rewards are remembered, so that equal ones are asked for once."""

LONG = 1000
"""Items from which on progress is shown."""

PROBES = 8
"""Sequences that a server is asked for at once when it is looked at."""

Ready: TypeAlias = "array[int] | Scored"
"""The ids of an item, or what is wrong with it."""


_OPEN: WeakSet[RewardModelClient] = WeakSet()


@atexit.register
def _close_all() -> None:
    for client in [*_OPEN]:
        client.close()


class Encoded(str):
    """A candidate as one text, for tokenizers, and as the ids that are scored.

    A tokenizer that knows the special tokens and puts BOS first makes `ids` of the text, unless
    the content was cut, or spells special tokens itself: then only `ids` are right.
    """

    ids: list[int]

    def __new__(cls, text: str, ids: list[int]) -> Encoded:
        encoded = super().__new__(cls, text)
        encoded.ids = ids
        return encoded

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoded, (str(self), self.ids)


class RewardModelClient:
    """Asks servers of a POLAR checkpoint for rewards.

    Safe to use from several threads and event loops: calls made at the same time share
    connections and requests.

    Args:
        path: the checkpoint that is served, a Hugging Face folder or hub name: for its tokenizer,
            `config.json` and golden scores.
        max_length, max_response_length: see `PolarTemplate`.
        response_cut_side: "right"; answers are cut as in training, which keeps their beginning.
        server_type: "sglang", "vllm" or "lmdeploy".
        server_address: "HOST:PORT" or a URL; several, in a list or with commas, share the work and
            stand in for each other.
        model: the name that the server serves the model by; None for the one it tells.
        api_key: sent as a bearer token.
        verify: hold a server against the checkpoint's golden scores before its rewards count.
        dtype: "float32", "bfloat16" or "float16", in which the server computes: says how close
            golden scores must be; None for the checkpoint's own.
        on_error: what becomes of items without a reward: "raise" a `RewardError` once the others
            are done, or "none": they get None, and `Rewards.errors` says why.
        normalize: give `Calibration.apply` of rewards, in (0, 1), in place of rewards.
        progress: show a progress bar; None for long lists on a terminal.
        bypass_proxy: ignore the environment's proxies for loopback and private addresses.
        limits: of requests, time-outs and retries; see `connection.Limits`.

    Raises:
        ValueError: a setting is wrong, or the folder lacks what is needed.
    """

    def __init__(
        self,
        path: str,
        max_length: int = 16384,
        max_response_length: int = 4096,
        response_cut_side: str = "right",
        server_type: str = "sglang",
        server_address: str | Sequence[str] = "127.0.0.1:30000",
        *,
        model: str | None = None,
        api_key: str | None = None,
        verify: bool = True,
        dtype: str | None = None,
        on_error: str = "raise",
        normalize: bool = False,
        progress: bool | None = None,
        bypass_proxy: bool = False,
        limits: Limits | None = None,
    ) -> None:
        if response_cut_side != "right":
            raise ValueError(
                f'response_cut_side must be "right", got {response_cut_side!r}: answers that are '
                "too long keep their beginning in training, and a reward for other ids is another"
            )
        if server_type not in ENGINES:
            raise ValueError(
                f"server_type must be one of {', '.join(ENGINES)}, got {server_type!r}"
            )
        check_on_error(on_error)
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.path = path
        self.server_type = server_type
        self.urls = _urls(server_address)
        self.on_error = on_error
        self._verify = verify
        self._progress = progress
        self._limits = limits or Limits()
        folder = local_folder(path)
        config = _read_config(folder)
        self._tokenizer = load_tokenizer(path)
        longest = config.get("max_position_embeddings")
        if longest and longest < max_length:
            logger.warning("max_length=%d: the model takes no more ids", longest)
            max_length = longest
            max_response_length = min(max_response_length, (max_length - 3) // 2)
        self.template = PolarTemplate(self._tokenizer, max_length, max_response_length)
        self._vocabulary = int(config.get("vocab_size", self._tokenizer.get_vocab_size()))
        check_vocabulary(self.template.special_ids, self._vocabulary)
        self._golden: Golden | None = read_golden(folder)
        written = config.get("torch_dtype") or config.get("dtype")
        self._dtype = dtype or (written if written in DTYPES else "float16")
        self._calibration = read_calibration(folder) if normalize else None
        probes = self.template.encode(
            [one for one in map(candidate_of, rows_to_score()) if isinstance(one, Candidate)]
        )
        self._probes = sorted(probes, key=len)[:PROBES]
        self._options: dict[str, Any] = {
            "well_known": self._probes[0],
            "model": model,
            "api_key": api_key,
            "bypass_proxy": bypass_proxy,
        }
        self._unverified: set[ServerFacts] = set()
        self._loop = Loop()
        self._servers: dict[tuple[str, Limits, int], Servers] = {}

    def __call__(self, data: Item | Iterable[Item | Candidate]) -> Rewards:
        """The reward of every item, in order; equal items are asked for once.

        Args:
            data: a dict or several, with `prompt`, `reference` and `output`, each a string or a
                list of messages, and optionally `wrapper`.

        Raises:
            RewardError: an item has no reward, and `on_error` is "raise".
            ServerError: a server is not what it should be.
        """
        items = as_items(data)
        progress = self._progress
        if progress is None:
            progress = len(items) >= LONG and sys.stderr.isatty()
        scored = self._stream(items, len(items))
        bar = tqdm(scored, desc="Scoring", total=len(items), disable=not progress)
        return gather(bar, self.on_error)

    def stream(self, items: Iterable[Item | Candidate]) -> Iterator[Scored]:
        """What every item gets, in order, in constant memory; takes items as it needs them.

        Raises:
            ServerError: a server is not what it should be.
        """
        return self._stream(items, REMEMBERED)

    async def ascore(self, data: Item | Iterable[Item | Candidate]) -> Rewards:
        """As `client(data)`, without blocking the caller's event loop."""
        items = as_items(data)
        memo: Memo = OrderedDict()
        answers: list[asyncio.Future[list[Scored]]] = []
        try:
            for start in range(0, len(items), CHUNK):
                ready = await asyncio.to_thread(self._prepare, items[start : start + CHUNK])
                answers.append(asyncio.wrap_future(self._answers(ready, memo, len(items))))
            scored = [one for chunk in await asyncio.gather(*answers) for one in chunk]
        finally:
            for chunk_answers in answers:
                chunk_answers.cancel()
        return gather(map(self._finish, scored), self.on_error)

    def verify(self, dtype: str | None = None) -> Verification:
        """Whether every server gives the checkpoint's golden scores; of several the worst.

        Args:
            dtype: in which the servers compute; None for the client's `dtype`.

        Raises:
            ServerError: a server is not there, or not the engine it should be.
            ValueError: the checkpoint has no golden scores.
        """
        if self._golden is None:
            raise ValueError(
                f"{self.path} has no golden scores ({GOLDEN}) to verify a server with: "
                "`xtuner convert pth_to_hf` writes them"
            )

        golden = self._golden

        def find(facts: ServerFacts, ask: Asker) -> Awaitable[Verification]:
            return self._verification(golden, facts, ask, dtype or self._dtype)

        found = self._look(find)
        problems = [f"{url}: {p}" for url, result in found.items() for p in result.problems]
        worst = max(found.values(), key=lambda result: (not result.ok, result.max_difference))
        return replace(worst, problems=problems)

    def servers(self) -> dict[str, ServerFacts]:
        """What every server says of itself, by its URL.

        Raises:
            ServerError: a server is not there, or not the engine it should be.
        """

        async def facts_of(facts: ServerFacts, ask: Asker) -> ServerFacts:
            return facts

        return self._look(facts_of)

    def _look(self, find: Callable[[ServerFacts, Asker], Awaitable[T]]) -> dict[str, T]:
        async def look() -> dict[str, T]:
            return await self._connected(self.server_type, self._limits).look(find)

        return self._loop.run(look()).result()

    def close(self) -> None:
        """Let connections go; calls under way get a ServerError. It may be used again."""

        async def close() -> None:
            for key in [*self._servers]:
                servers = self._servers.pop(key)
                if key[-1] == os.getpid():  # those of the process that this was forked from: no
                    await servers.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks:
                await asyncio.wait(tasks, timeout=1)

        if self._loop.is_running:
            self._loop.run(close()).result()
            self._loop.stop()

    def __enter__(self) -> RewardModelClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_loop", "_servers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loop=Loop(), _servers={})

    # ---- as POLAR's own client: encode first, then ask

    def encode(self, data: Item | Iterable[Item | Candidate]) -> Encoded | list[Encoded]:
        """One item, or several, as text and ids.

        Raises:
            RewardError: an item is not sound.
        """
        items = as_items(data)
        ready = self._prepare(items)
        gather((one if isinstance(one, Scored) else Scored(0.0) for one in ready), "raise")
        encoded = [
            Encoded(self._text(item, ids.tolist()), ids.tolist())
            for item, ids in zip(items, ready, strict=True)
            if not isinstance(ids, Scored)
        ]
        inexact = sum(self._ids_of_text(one) != one.ids for one in encoded)
        if inexact:
            logger.warning(
                "no text gives the ids of %d of %d encoded items: tokenizers need their `ids`",
                *(inexact, len(encoded)),
            )
        return encoded[0] if isinstance(data, Mapping) else encoded

    def sglang_request_reward(
        self,
        data: Encoded | Sequence[Encoded],
        retry_delay: float | None = None,
        max_retries: int | None = None,
    ) -> Rewards:
        """The rewards of what `encode` returned, from SGLang; errors as of `client(data)`."""
        return self._request("sglang", data, retry_delay, max_retries)

    def vllm_request_reward(
        self,
        data: Encoded | Sequence[Encoded],
        retry_delay: float | None = None,
        max_retries: int | None = None,
    ) -> Rewards:
        """The rewards of what `encode` returned, from vLLM; errors as of `client(data)`."""
        return self._request("vllm", data, retry_delay, max_retries)

    def lmdeploy_request_reward(
        self,
        data: Encoded | Sequence[Encoded],
        retry_delay: float | None = None,
        max_retries: int | None = None,
    ) -> Rewards:
        """The rewards of what `encode` returned, from LMDeploy; errors as of `client(data)`."""
        return self._request("lmdeploy", data, retry_delay, max_retries)

    def _request(
        self,
        engine: str,
        data: Encoded | Sequence[Encoded],
        retry_delay: float | None,
        max_retries: int | None,
    ) -> Rewards:
        several = [data] if isinstance(data, str) else list(data)
        if not all(isinstance(one, Encoded) for one in several):
            raise TypeError("takes what `encode` returned: a text alone does not say its ids")
        changed: dict[str, Any] = {"retry_delay": retry_delay, "max_retries": max_retries}
        limits = replace(self._limits, **{k: v for k, v in changed.items() if v is not None})
        ready = [self._checked(one.ids) for one in several]
        answers = self._answers(ready, OrderedDict(), len(ready), engine, limits)
        return gather(map(self._finish, answers.result()), self.on_error)

    def _text(self, item: Item | Candidate, ids: list[int]) -> str:
        """The text of a candidate, as POLAR's own client writes it, or, cut, of its ids."""
        candidate = candidate_of(item)
        assert isinstance(candidate, Candidate)
        prompt, reference, output, wrapper = candidate
        special = [self.template.separator_token_id, self.template.reward_token_id]
        separator, reward = (self._tokenizer.id_to_token(token_id) for token_id in special)
        halves = [
            prompt + ("\n" if wrapper == "sft" and answer else "") + answer
            for answer in (reference, output)
        ]
        text = f"{halves[0]}{separator}{halves[1]}{reward}"
        if self._ids_of_text(text) == ids:
            return text
        return self._tokenizer.decode(ids[1:], skip_special_tokens=False)

    def _ids_of_text(self, text: str) -> list[int]:
        return [
            self.template.bos_token_id,
            *self._tokenizer.encode(text, add_special_tokens=False).ids,
        ]

    # ---- from items to rewards

    def _stream(self, items: Iterable[Item | Candidate], remembered: int) -> Iterator[Scored]:
        """As `stream`; equal ones among the last `remembered` sequences are asked for once."""
        memo: Memo = OrderedDict()
        waiting: deque[tuple[int, Future[list[Scored]]]] = deque()
        room = 2 * len(self.urls) * self._limits.in_flight * self._limits.request_tokens
        source = iter(items)
        try:
            while chunk := [*islice(source, CHUNK)]:
                ready = self._prepare(chunk)
                size = sum(len(one) for one in ready if not isinstance(one, Scored))
                waiting.append((size, self._answers(ready, memo, remembered)))
                room -= size
                while room < 0 or waiting[0][1].done():
                    size, answers = waiting.popleft()
                    room += size
                    yield from map(self._finish, answers.result())
                    if not waiting:
                        break
            while waiting:
                yield from map(self._finish, waiting.popleft()[1].result())
        finally:
            for _, answers in waiting:
                answers.cancel()

    def _prepare(self, items: Sequence[Item | Candidate]) -> list[Ready]:
        """The ids of every item, or what is wrong with it."""
        found = [candidate_of(item) for item in items]
        encoded = iter(self.template.encode([one for one in found if isinstance(one, Candidate)]))
        return [one if isinstance(one, Scored) else self._checked(next(encoded)) for one in found]

    def _checked(self, ids: list[int]) -> Ready:
        """Servers die of ids outside the vocabulary, and score whatever else is sent."""
        template = self.template
        outside = sorted({i for i in ids if not 0 <= i < self._vocabulary})
        if outside:
            return Scored(
                None,
                f"has ids outside the model's vocabulary of {self._vocabulary}: {outside[:5]}; the "
                "tokenizer has tokens that the model lacks",
            )
        ends = (template.bos_token_id, template.reward_token_id)
        if len(ids) < 2 or (ids[0], ids[-1]) != ends:
            return Scored(None, f"its ids must begin and end with {ends}: BOS and the reward token")
        return array("I", ids)

    def _answers(
        self,
        ready: list[Ready],
        memo: Memo,
        remembered: int,
        engine: str | None = None,
        limits: Limits | None = None,
    ) -> Future[list[Scored]]:
        async def answers() -> list[Scored]:
            servers = self._connected(engine or self.server_type, limits or self._limits)
            sequences = [one for one in ready if not isinstance(one, Scored)]
            scored = iter(await servers.ask(sequences, memo, remembered))
            return [one if isinstance(one, Scored) else next(scored) for one in ready]

        return self._loop.run(answers())

    def _finish(self, scored: Scored) -> Scored:
        if self._calibration is None or scored.reward is None:
            return scored
        return Scored(self._calibration.apply(scored.reward))

    # ---- what is asked of a server before its rewards count

    def _connected(self, engine: str, limits: Limits) -> Servers:
        """Runs on the event loop."""
        key = (engine, limits, os.getpid())
        if key not in self._servers:
            _OPEN.add(self)
            settings = Settings(ENGINES[engine], self._check, **self._options)
            self._servers[key] = Servers(self.urls, settings, limits)
        return self._servers[key]

    async def _check(self, facts: ServerFacts, ask: Asker, again: bool) -> None:
        if self._verify and self._golden is not None:
            rows = self._golden.rows[:PROBES] if again else self._golden.rows
            golden = replace(self._golden, rows=rows)
            verification = await self._verification(golden, facts, ask, self._dtype)
            if not verification.ok:
                problems = "\n  ".join(verification.problems)
                raise ServerError(
                    f"{facts} does not give the golden scores of {self.path}:\n  {problems}\n"
                    "verify=False asks it all the same."
                )
            return
        values, problems_found = await self._values(facts, ask, self._probes)
        if _are_activated(facts, values):
            problems_found.append(_activated(facts))
        if problems_found:
            raise ServerError(f"{facts} cannot be used. {' '.join(problems_found)}")
        if facts not in self._unverified:
            self._unverified.add(facts)
            logger.warning(
                "%s: its rewards are raw, but whether they are those of %s is not known: %s",
                facts,
                self.path,
                "it is not verified" if self._golden else f"the checkpoint has no {GOLDEN}",
            )

    async def _verification(
        self, golden: Golden, facts: ServerFacts, ask: Asker, dtype: str
    ) -> Verification:
        candidates = [Candidate(r.prompt, r.reference, r.output, r.wrapper) for r in golden.rows]
        encoded = PolarTemplate(self._tokenizer).encode(candidates)  # as the export did, uncut
        fits = [len(ids) <= (facts.longest or len(ids)) for ids in encoded]
        rows = tuple(row for row, fit in zip(golden.rows, fits) if fit)
        sequences = [ids for ids, fit in zip(encoded, fits) if fit]
        values, problems = await self._values(facts, ask, sequences)
        found = verify(replace(golden, rows=rows), sequences, [reward_of(v) for v in values], dtype)
        if not found.ok and _are_activated(facts, values):
            problems.append(_activated(facts))
        return replace(found, ok=found.ok and not problems, problems=[*problems, *found.problems])

    async def _values(
        self, facts: ServerFacts, ask: Asker, sequences: Sequence[Sequence[int]]
    ) -> tuple[list[Any], list[str]]:
        """A server's answers to sequences, and what is wrong with how it read them."""
        values: list[Any] = []
        sent = tokens = 0
        for start in range(0, len(sequences), PROBES):
            some = sequences[start : start + PROBES]
            answer = await ask(some)
            values += answer.values
            if answer.tokens is not None:
                sent += sum(map(len, some))
                tokens += answer.tokens
        lost = f"It read {tokens} ids of {sent} that were sent: it drops or adds some."
        return values, [lost] if tokens != sent else []


def _are_activated(facts: ServerFacts, values: Sequence[Any]) -> bool:
    return ENGINES[facts.engine].activates and is_activated(values)


def _activated(facts: ServerFacts) -> str:
    return (
        "It answers numbers in [0, 1], an activation of the rewards: start it with "
        f"{ENGINES[facts.engine].advice(facts)}."
    )


def _urls(server_address: str | Sequence[str]) -> list[str]:
    given = [server_address] if isinstance(server_address, str) else server_address
    urls = [address.strip().rstrip("/") for several in given for address in several.split(",")]
    if not urls or not all(urls):
        raise ValueError(f"server_address must be HOST:PORT, a URL, or several, got {given!r}")
    urls = [url if "://" in url else f"http://{url}" for url in urls]
    for parts in map(urlsplit, urls):
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(
                "server_address must be HOST:PORT or http(s)://HOST:PORT, without user and "
                f"password (there is api_key), got one of {parts.scheme}://{parts.hostname}"
            )
    return urls


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no Hugging Face folder: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold an object")
    return config
