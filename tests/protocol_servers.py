"""Servers that speak like vLLM, SGLang and LMDeploy, with real scores behind them.

    with running("vllm", "0.32.0", hash_score, vocab_size=92544) as server:
        client = RewardModelClient(server.address, ...)

    python tests/protocol_servers.py --engine vllm --version 0.32.0 [--model DIR] [--port 0]

The formats, limits, errors and deaths are those that were measured on the real servers, or read in
the source of their released wheels; "guess" marks the few that were neither. A `fault` makes a
server fail on purpose. The second form is a process of its own, which prints its address when it
is ready: for measuring throughput, and to be killed.

Not replayed: binary answers of vLLM (`encoding_format` "bytes"), chat input, scoring routes other
than those POLAR needs, and how long a GPU takes (`slow`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import math
import random
import signal
import socket
import struct
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from aiohttp import web

ENGINES = [
    ("vllm", "0.8.5"),
    ("vllm", "0.10.0"),
    ("vllm", "0.10.2"),
    ("vllm", "0.11.1"),
    ("vllm", "0.32.0"),
    ("sglang", "0.4.4.post1"),
    ("sglang", "0.5.23"),
    ("lmdeploy", "0.9.2"),
    ("lmdeploy", "0.18.0"),
]

Score = Callable[[list[list[int]]], list[list[float]]]
"""Sequences of ids -> the reward head's value at every position; the reward is the last."""

KEPT_REQUESTS, KEPT_BYTES = 1000, 64 << 20
LARGEST_BODY = 1 << 30


# --- scores ---------------------------------------------------------------------------------------


def hash_score(sequences: list[list[int]]) -> list[list[float]]:
    """Float32 values in [-12, 5) that depend on every id up to theirs, and on its place."""
    scores = []
    for ids in sequences:
        places = np.arange(len(ids), dtype=np.uint64)
        mixed = np.cumsum(np.asarray(ids, np.uint64) * (places * 2 + 1) + places, dtype=np.uint64)
        mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
        scores.append((mixed.astype(np.float32) / np.float32(1 << 24) * 17 - 12).tolist())
    return scores


def tiny_model(folder: Path | str) -> Score:
    """A checkpoint in float32, one sequence at a time."""
    import torch

    from polar_xtuner.collate import PackLayout
    from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel

    model = InternLM2ForRewardModel.from_pretrained(str(folder), torch_dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(sequences: list[list[int]]) -> list[list[float]]:
        scores = []
        for ids in sequences:
            places_T = torch.arange(len(ids))
            layout = PackLayout.of([(0, len(ids))])  # no prefix to share
            scores.append(model(torch.tensor(ids), places_T, layout, places_T).tolist())
        return scores

    return score


def drop_bos(score: Score) -> Score:
    """A broken model: it does not see the first id."""
    return lambda sequences: score([ids[1:] or ids for ids in sequences])


def cut_last(score: Score) -> Score:
    """A broken model: it does not see the last id, the reward token."""
    return lambda sequences: score([ids[:-1] or ids for ids in sequences])


def slow(score: Score, seconds: float) -> Score:
    """A model that takes `seconds` for every sequence, one after the other."""

    def slowly(sequences: list[list[int]]) -> list[list[float]]:
        time.sleep(seconds * len(sequences))
        return score(sequences)

    return slowly


# --- answers --------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A response before it is sent: `content` is JSON, or text where it is a str."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def encoded(self) -> tuple[bytes, str]:
        if isinstance(self.content, str):
            return self.content.encode(), "text/plain"
        return json.dumps(self.content).encode(), "application/json"


class Refused(Exception):
    """Of a request, with the answer that says why."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class Crash(Exception):
    """The engine does not survive the request."""


INTERNAL_ERROR = Answer("Internal Server Error", 500)
"""What an uncaught exception becomes in a FastAPI server."""


# --- engines --------------------------------------------------------------------------------------


class Engine:
    """What one version of an engine accepts and answers."""

    scoring: tuple[str, ...] = ()
    """The routes that score, POST."""

    score: Callable[[list[list[int]]], Awaitable[list[list[float]]]]
    """Set by the server."""

    def __init__(
        self,
        version: str,
        max_length: int,
        vocab_size: int,
        served_name: str,
        raw: bool,
        step: bool,
        tokenizer: Path | str | None,
        token_bos: int | None,
        warm_up: float,
    ) -> None:
        self.version = version
        self.number = tuple(int(part) for part in version.split(".")[:3])
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.served_name = served_name
        self.raw = raw
        self.step = step
        self.warm_up = warm_up
        self.tokenizer = None
        if tokenizer is not None:
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
            self.token_bos = self.tokenizer.token_to_id("<s>") if token_bos is None else token_bos

    def information(self, path: str, uptime: float) -> Answer | None:
        """The answer to GET `path`; None is 404."""
        raise NotImplementedError

    async def respond(self, path: str, body: Any, media_type: str) -> Answer:
        """The answer to POST `path`.

        Raises:
            Refused, Crash.
        """
        raise NotImplementedError

    async def last_values(self, sequences: list[list[int]]) -> list[float]:
        return [values[-1] for values in await self.score(sequences)]

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise Refused(self.error("this server has no tokenizer"))
        return [self.token_bos, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_all(self, inputs: Any) -> list[list[int]]:
        """Ids of each of `str | [str] | [int] | [[int]]`; TypeError if it is none of these."""
        if isinstance(inputs, str):
            return [self.encode(inputs)]
        if not isinstance(inputs, list):
            raise TypeError("input is neither text nor a list")
        types = set(map(type, inputs))
        if types <= {int}:
            return [inputs]
        if types == {str}:
            return [self.encode(text) for text in inputs]
        if types == {list} and all(set(map(type, ids)) <= {int} for ids in inputs):
            return inputs
        raise TypeError("input is a list of mixed or wrong types")

    def outside(self, ids: Sequence[int]) -> bool:
        return bool(ids) and (min(ids) < 0 or max(ids) >= self.vocab_size)

    def error(self, message: str, status: int = 400, kind: str = "BadRequestError") -> Answer:
        raise NotImplementedError

    def model_card(self, **fields: Any) -> Answer:
        card = {"id": self.served_name, "object": "model", "created": int(time.time()), **fields}
        return Answer({"object": "list", "data": [card]})


def usage(sequences: list[list[int]]) -> dict[str, Any]:
    tokens = sum(map(len, sequences))
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


def sigmoid(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return 1 / (1 + np.exp(-values, dtype=np.float32))


class Vllm(Engine):
    scoring = ("/pooling",)

    def information(self, path: str, uptime: float) -> Answer | None:
        if path == "/version":
            return Answer({"version": self.version})
        if path == "/health":
            return Answer("")
        if path == "/v1/models":
            return self.model_card(
                owned_by="vllm", root=self.served_name, parent=None, max_model_len=self.max_length
            )
        return None

    async def respond(self, path: str, body: Any, media_type: str) -> Answer:
        if media_type != "application/json":
            status = 415 if self.number < (0, 9) else 400
            raise Refused(self.error("Unsupported Media Type: Only 'application/json'", status))
        if not isinstance(body, dict) or "input" not in body:
            raise Refused(self.error("1 validation error: Field required: input"))
        encoding = body.get("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise Refused(self.error("encoding_format: Input should be 'float' or 'base64'"))
        if "normalize" in body and self.number >= (0, 12):
            raise Refused(self.error("Parameter `normalize` was removed"))
        model = body.get("model")
        if model and model != self.served_name:
            message = f"The model `{model}` does not exist."
            raise Refused(self.error(message, 404, "NotFoundError"))
        try:
            sequences = self.encode_all(body["input"])
        except TypeError as error:
            raise Refused(self.error(str(error))) from None
        for ids in sequences:
            self.check(ids)
        scores = await self.score(sequences)
        data = [
            {"index": i, "object": "pooling", "data": self.result(values, body, encoding)}
            for i, values in enumerate(scores)
        ]
        return Answer(
            {
                "id": f"pool-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": self.served_name,
                "data": data,
                "usage": usage(sequences),
            }
        )

    def check(self, ids: list[int]) -> None:
        if not ids:
            raise Refused(self.error("The decoder prompt cannot be empty"))
        if len(ids) > self.max_length:
            raise Refused(
                self.error(
                    f"This model's maximum context length is {self.max_length} tokens. However, "
                    f"you requested {len(ids)} tokens in the input for embedding generation. "
                    "Please reduce the length of the input."
                )
            )
        if max(ids) >= self.vocab_size:
            raise Refused(self.error(f"Token id {max(ids)} is out of vocabulary"))
        if min(ids) < 0:
            if self.number < (0, 12):  # run: 0.8.5, 0.10.2; source: 0.10.0, 0.11.1
                raise Crash
            raise Refused(self.error(f"Token id {min(ids)} is out of vocabulary"))

    def result(self, values: list[float], body: dict[str, Any], encoding: str) -> Any:
        array = np.array(values[-1:] if self.step else values, "<f4")
        if self.activates(body):
            array = sigmoid(array)
        if encoding == "base64":
            return base64.b64encode(array.tobytes()).decode()
        return array[:, None].tolist()

    def activates(self, body: dict[str, Any]) -> bool:
        if self.number < (0, 10, 1):
            return False
        asked = body.get("use_activation") if self.number >= (0, 11, 1) else None
        deprecated = (body.get("softmax"), body.get("activation"))
        if self.version == "0.11.1" and deprecated != (None, None):
            return True  # also for false: `if softmax := ... is not None` is a bool
        return not self.raw if asked is None else asked

    def error(self, message: str, status: int = 400, kind: str = "BadRequestError") -> Answer:
        error = {"message": message, "type": kind, "param": None, "code": status}
        if self.number <= (0, 10, 0):
            return Answer({"object": "error", **error}, status)
        return Answer({"error": error}, status)


class Sglang(Engine):
    @property
    def is_old(self) -> bool:
        return self.number < (0, 5)

    @property
    def scoring(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("/classify",) if self.is_old else ("/classify", "/v1/classify", "/v1/embeddings")

    def information(self, path: str, uptime: float) -> Answer | None:
        if path in ("/health", "/health_generate"):
            is_warm = uptime >= self.warm_up or (self.is_old and path == "/health")
            return Answer("", 200 if is_warm else 503)
        if path == "/get_model_info" or (path == "/model_info" and not self.is_old):
            return Answer(self.model_info())
        if path == "/get_server_info" or (path == "/server_info" and not self.is_old):
            return Answer(self.server_info())
        if path == "/v1/models":
            limit = {} if self.is_old else {"parent": None, "max_model_len": self.max_length}
            return self.model_card(owned_by="sglang", root=self.served_name, **limit)
        return None

    def model_info(self) -> dict[str, Any]:
        info = {"model_path": "/model", "tokenizer_path": "/model", "is_generation": False}
        if not self.is_old:
            info |= {
                "served_model_name": self.served_name,
                "preferred_sampling_params": None,
                "weight_version": "default",
                "load_format": "auto",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": "internlm2",
                "architectures": ["InternLM2ForRewardModel"],
            }
        return info

    def server_info(self) -> dict[str, Any]:
        """The fields that could serve a client, of some 400."""
        info = {
            "model_path": "/model",
            "tokenizer_path": "/model",
            "served_model_name": self.served_name,
            "context_length": None,  # as on the command line, where it need not be
            "is_embedding": True,
            "status": "ready",
            "max_total_num_tokens": 100000,
            "max_req_input_len": self.max_length - 6,
            "version": self.version,
        }
        if not self.is_old:
            info["internal_states"] = [{}]
        return info

    async def respond(self, path: str, body: Any, media_type: str) -> Answer:
        if not isinstance(body, dict):
            raise Refused(self.malformed("Input should be a valid dictionary"))
        if path == "/classify":
            return await self.classify(body)
        if "input" not in body:
            raise Refused(self.malformed("Field required: input"))
        try:
            sequences = self.encode_all(body["input"])
        except TypeError as error:
            raise Refused(self.malformed(str(error))) from None
        for ids in sequences:
            if not ids or min(ids) < 0:
                raise Refused(self.flat_error("Token ID must be non-negative"))
            self.check(ids)
        rewards = await self.last_values(sequences)
        data: list[dict[str, Any]]
        if path == "/v1/embeddings":
            data = [
                {"embedding": [reward], "index": i, "object": "embedding"}
                for i, reward in enumerate(rewards)
            ]
        else:  # a softmax over one label
            data = [
                {"index": i, "label": "LABEL_0", "probs": [1.0], "num_classes": 1}
                for i in range(len(rewards))
            ]
        return Answer(
            {
                "object": "list",
                "model": self.served_name,
                "data": data,
                "usage": usage(sequences),
            }
        )

    async def classify(self, body: dict[str, Any]) -> Answer:
        text, input_ids = body.get("text"), body.get("input_ids")
        if text is None and input_ids is None:
            raise Refused(self.error("At least one of text, input_ids, or image is needed"))
        if text is not None and input_ids is not None:
            raise Refused(self.error("text and input_ids cannot be provided at the same time"))
        given = text if text is not None else input_ids
        if given == []:
            raise Refused(INTERNAL_ERROR)
        try:
            if text is not None and not isinstance(text[0], str):
                raise TypeError("text: Input should be a valid string")
            if input_ids is not None and not isinstance(input_ids, list):
                raise TypeError("input_ids: Input should be a valid list")
            sequences = self.encode_all(given)
        except TypeError as error:
            raise Refused(self.malformed(str(error))) from None
        is_batch = isinstance(given, list) and not isinstance(given[0], int)
        if self.is_old and is_batch and len(given) == 1:
            if text is not None:
                raise Refused(INTERNAL_ERROR)
            raise Crash
        for ids in sequences:
            self.check(ids)
        began = time.monotonic()
        rewards = await self.last_values(sequences)
        results = [
            {
                "embedding": [reward],
                "meta_info": {
                    "id": uuid.uuid4().hex,
                    "finish_reason": {"type": "length", "length": 0},
                    "prompt_tokens": len(ids),
                    "e2e_latency": time.monotonic() - began,
                },
            }
            for ids, reward in zip(sequences, rewards)
        ]
        return Answer(results if is_batch else results[0])

    def check(self, ids: list[int]) -> None:
        if not ids:  # a guess
            raise Refused(INTERNAL_ERROR)
        longest = self.max_length - (6 if self.is_old else 1)
        if len(ids) > longest:
            raise Refused(
                self.error(
                    f"The input ({len(ids)} tokens) is longer than the model's context length "
                    f"({self.max_length} tokens)."
                )
            )
        if self.outside(ids):
            raise Crash

    def malformed(self, message: str) -> Answer:
        if self.is_old:
            detail = [{"type": "value_error", "loc": ["body"], "msg": message, "input": None}]
            return Answer({"detail": detail}, 422)
        return self.flat_error(message)

    def flat_error(self, message: str) -> Answer:
        error = {"object": "error", "message": message, "type": "Bad Request", "param": None}
        return Answer({**error, "code": 400}, 400)

    def error(self, message: str, status: int = 400, kind: str = "") -> Answer:
        return Answer({"error": {"message": message}}, status)


class Lmdeploy(Engine):
    scoring = ("/pooling",)

    @property
    def is_old(self) -> bool:
        return self.number < (0, 10)

    def information(self, path: str, uptime: float) -> Answer | None:
        if path == "/health":
            return Answer("") if self.is_old else Answer({"status": "healthy"})
        if path == "/v1/models":
            return self.model_card(owned_by="lmdeploy", root=self.served_name, parent=None)
        return None

    async def respond(self, path: str, body: Any, media_type: str) -> Answer:
        if not isinstance(body, dict) or "input" not in body:
            raise Refused(self.malformed("Field required"))
        try:
            sequences = self.encode_all(body["input"])
        except TypeError as error:
            raise Refused(self.malformed(str(error))) from None
        if body["input"] == []:
            raise Refused(self.error("Input list cannot be empty."))
        for ids in sequences:
            self.check(ids)
        rewards = await self.last_values(sequences)
        data = [
            {"index": i, "object": "pooling", "data": reward} for i, reward in enumerate(rewards)
        ]
        return Answer(
            {
                "id": f"pool-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": body.get("model") or self.served_name,
                "data": data,
                "usage": usage(sequences),
            }
        )

    def check(self, ids: list[int]) -> None:
        if len(ids) < 2:  # a squeezed tensor of one value has no last one
            raise Refused(INTERNAL_ERROR)
        if len(ids) > self.max_length or self.outside(ids):  # the second is a guess
            raise Refused(INTERNAL_ERROR)

    def encode(self, text: str) -> list[int]:
        ids = super().encode(text)
        return ids[1:] if ids[1:2] == [self.token_bos] else ids

    def malformed(self, message: str) -> Answer:
        if self.is_old:
            detail = [{"type": "value_error", "loc": ["body", "input"], "msg": message}]
            return Answer({"detail": detail}, 422)
        return self.error(f"input: {message}")

    def error(self, message: str, status: int = 400, kind: str = "invalid_request_error") -> Answer:
        error = {"message": message, "type": kind, "code": status, "param": None}
        return Answer({**error, "object": "error"}, status)


KINDS: dict[str, type[Engine]] = {"vllm": Vllm, "sglang": Sglang, "lmdeploy": Lmdeploy}


# --- faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Answers `status` with `text`, and scores nothing."""

    status: int = 500
    headers: tuple[tuple[str, str], ...] = ()
    text: str = "Internal Server Error"


@dataclass(frozen=True)
class Hang:
    """Never answers."""


@dataclass(frozen=True)
class Reset:
    """Resets the connection: with nothing read of the body, or with the scores computed."""

    unread: bool = False


@dataclass(frozen=True)
class CutShort:
    """Sends `share` of the promised bytes and closes the connection; or promises no more than
    those and keeps it (`promised`), as some proxies do."""

    share: float = 0.5
    promised: bool = False


@dataclass(frozen=True)
class Shuffle:
    """Results in reverse order; `index`, where the engine has one, still tells."""


@dataclass(frozen=True)
class Omit:
    """One result less."""

    place: int = 0


@dataclass(frozen=True)
class NotANumber:
    """One result is NaN: `NaN` as Python writes it, or `null` as orjson does."""

    place: int = 0
    as_null: bool = False


@dataclass(frozen=True)
class ErrorWithStatus200:
    """The engine's own error body, but status 200: vLLM whose model does not pool."""


@dataclass(frozen=True)
class Die:
    """As a crash; back after `seconds`, or never."""

    seconds: float | None = None


Action = Status | Hang | Reset | CutShort | Shuffle | Omit | NotANumber | ErrorWithStatus200 | Die

Fault = Callable[[int, Any], "Action | None"]
"""(number of the scoring request, from 0; its body) -> what goes wrong with it. Only faults of this
module, which need no body, can reset a connection before the body is read."""


def _by_number(choose: Callable[[int], Action | None]) -> Fault:
    def fault(number: int, body: Any) -> Action | None:
        return choose(number)

    fault.needs_no_body = True  # type: ignore[attr-defined]
    return fault


UNAVAILABLE = Status(503, (), "Service Unavailable")


def busy(retry_after: str = "0") -> Status:
    """429 as a proxy answers it."""
    return Status(429, (("Retry-After", retry_after),), "Too Many Requests")


def first(count: int, action: Action) -> Fault:
    """The first `count` requests."""
    return _by_number(lambda number: action if number < count else None)


def every(step: int, action: Action) -> Fault:
    """Requests 0, step, 2 step, ..."""
    return _by_number(lambda number: action if number % step == 0 else None)


def at(numbers: Collection[int], action: Action) -> Fault:
    return _by_number(lambda number: action if number in numbers else None)


def either(*faults: Fault) -> Fault:
    """The first of these that has an action."""

    def fault(number: int, body: Any) -> Action | None:
        actions = (one(number, body) for one in faults)
        return next((action for action in actions if action is not None), None)

    fault.needs_no_body = all(map(_needs_no_body, faults))  # type: ignore[attr-defined]
    return fault


def _needs_no_body(fault: Fault) -> bool:
    return getattr(fault, "needs_no_body", False)


ANY_ACTION: tuple[Action, ...] = (
    Status(),
    UNAVAILABLE,
    busy(),
    Hang(),
    Reset(),
    Reset(unread=True),
    CutShort(),
    CutShort(promised=True),
    Shuffle(),
    Omit(),
    NotANumber(),
    NotANumber(as_null=True),
    ErrorWithStatus200(),
    Die(0.3),
)


def random_faults(seed: int, share: float, actions: Sequence[Action] = ANY_ACTION) -> Fault:
    """A `share` of the requests fail, each in a way that depends on `seed` and its number."""

    def choose(number: int) -> Action | None:
        rng = random.Random(f"{seed} {number}")
        return rng.choice(actions) if rng.random() < share else None

    return _by_number(choose)


# --- server ---------------------------------------------------------------------------------------


class Request(NamedTuple):
    path: str
    body: Any
    """Parsed JSON; None where it is none."""


class Server:
    """One server, in a thread; see `running`. Counters stay over deaths."""

    def __init__(self, engine: Engine, score: Score, port: int, fault: Fault | None) -> None:
        self.engine = engine
        self.asked: Counter[str] = Counter()
        """GET requests by path."""
        self.requests_received = 0
        """Scoring requests, also those that then fail."""
        self.requests_answered = 0
        """Scoring requests with status 200 and results, also those that a fault spoiled."""
        self.items_received = 0
        self.items_answered = 0
        self.items_per_request: deque[int] = deque(maxlen=KEPT_REQUESTS)
        """Inputs of the last scoring requests, in order of arrival."""
        self.actions: Counter[str] = Counter()
        """What the fault did, by the action's name."""
        self.connections = 0
        """TCP connections that were accepted."""
        self.in_flight = 0
        self.in_flight_max = 0
        self.deaths = 0
        self.errors: list[BaseException] = []
        """What went wrong in the server itself; `running` raises the first of them."""
        self._bodies: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self.fault: Fault = fault or (lambda number, body: None)
        """May be set while the server runs."""
        self._score = score
        self._started = 0.0
        self._listener: asyncio.Server | None = None
        self._runner: web.AppRunner | None = None
        self._background: set[asyncio.Task[None]] = set()
        # Bound but not listening: it refuses, and keeps the port for `come_back`.
        self._reserved = _bound(port)
        self.port: int = self._reserved.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        engine.score = self._scored
        self._engine_thread = ThreadPoolExecutor(1, "protocol-server-engine")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="protocol-server")
        self._thread.start()
        try:
            self.come_back()
        except BaseException:
            self.close()
            raise

    @property
    def requests(self) -> list[Request]:
        """The last scoring requests, in order of arrival: `KEPT_REQUESTS` of `KEPT_BYTES`."""
        return [Request(path, _json(raw)) for path, raw in tuple(self._bodies)]

    @property
    def is_alive(self) -> bool:
        return self._listener is not None

    def die(self) -> None:
        """As a crash: connections are reset, new ones refused."""
        self._call(self._die())

    def come_back(self) -> None:
        """Listens again, on the same port."""
        self._call(self._listen())

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._engine_thread.shutdown(cancel_futures=True)
        self._reserved.close()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _listen(self) -> None:
        if self._listener is not None:
            return
        app = web.Application(client_max_size=LARGEST_BODY)
        runner = web.AppRunner(
            app,
            handle_signals=False,
            access_log=None,
            handler_cancellation=True,  # of a client that gave up
            shutdown_timeout=1,
        )

        async def handle(request: web.Request) -> web.StreamResponse:
            if self._runner is not runner:  # accepted while it died
                return _cut(request)
            return await self._handle(request)

        app.router.add_route("*", "/{path:.*}", handle)
        await runner.setup()
        accept = runner.server
        assert accept is not None

        def protocol() -> asyncio.BaseProtocol:
            self.connections += 1
            return accept()

        self._runner = runner
        self._listener = await self._loop.create_server(
            protocol, sock=_bound(self.port), backlog=1024
        )
        self._started = time.monotonic()

    def _stop(self) -> web.AppRunner | None:
        """Refuses and resets; what is left is to wait for the handlers."""
        if self._listener is None or self._runner is None:
            return None
        self._listener.close()
        runner, self._listener, self._runner = self._runner, None, None
        _reset_all(runner)
        return runner

    async def _die(self, seconds: float | None = None) -> None:
        runner = self._stop()
        if runner is None:
            return
        self.deaths += 1
        self._start(_finish(runner))  # a handler that calls this cannot wait for itself
        if seconds is not None:
            self._start(self._return(seconds))

    async def _return(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._listen()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    async def _close(self) -> None:
        runner = self._stop()
        if runner is not None:
            await _finish(runner)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _scored(self, sequences: list[list[int]]) -> list[list[float]]:
        return await self._loop.run_in_executor(self._engine_thread, self._score, sequences)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "POST" and request.path in self.engine.scoring:
            self.in_flight += 1
            self.in_flight_max = max(self.in_flight, self.in_flight_max)
            try:
                return await self._answer(request)
            except (ConnectionError, web.HTTPException):
                raise
            except Exception as error:
                self.errors.append(error)
                raise
            finally:
                self.in_flight -= 1
        if request.method == "GET":
            self.asked[request.path] += 1
            answer = self.engine.information(request.path, time.monotonic() - self._started)
            if answer is not None:
                return _response(answer)
        return _response(Answer({"detail": "Not Found"}, 404))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        number = self.requests_received
        self.requests_received += 1
        fault = self.fault
        if _needs_no_body(fault) and fault(number, None) == Reset(unread=True):
            self.actions["Reset"] += 1
            return _cut(request)
        raw = await request.read()
        body = _json(raw)
        self._keep(request.path, raw)
        items = _items(body)
        self.items_per_request.append(items)
        self.items_received += items
        action = fault(number, body)
        if action is not None:
            self.actions[type(action).__name__] += 1
        match action:
            case Status(status, headers, text):
                return _response(Answer(text, status, dict(headers)))
            case Hang():
                await asyncio.Event().wait()
            case ErrorWithStatus200():
                error = self.engine.error("The model does not support Pooling API")
                return _response(Answer(error.content))
            case Die(seconds):
                await self._die(seconds)
                return _cut(request)
        try:
            answer = await self.engine.respond(request.path, body, request.content_type)
        except Refused as refused:
            return _response(refused.answer)
        except Crash:
            await self._die()
            return _cut(request)
        self.requests_answered += 1
        self.items_answered += items
        match action:
            case Reset():
                return _cut(request)
            case CutShort(share, promised):
                return await _cut_short(request, answer, share, promised)
            case Shuffle() | Omit() | NotANumber():
                return _response(Answer(_changed(answer.content, action)))
        return _response(answer)

    def _keep(self, path: str, raw: bytes) -> None:
        self._bodies.append((path, raw))
        self._bytes += len(raw)
        while len(self._bodies) > 1 and (
            self._bytes > KEPT_BYTES or len(self._bodies) > KEPT_REQUESTS
        ):
            self._bytes -= len(self._bodies.popleft()[1])


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


async def _finish(runner: web.AppRunner) -> None:
    for _ in range(5):  # turns of the loop, for connections that were just being accepted
        await asyncio.sleep(0)
        _reset_all(runner)
    await runner.cleanup()


def _reset_all(runner: web.AppRunner) -> None:
    assert runner.server is not None
    for connection in runner.server.connections:
        _reset(connection.transport)


def _cut(request: web.Request) -> web.StreamResponse:
    _reset(request.transport)
    return web.Response()  # goes nowhere


async def _cut_short(
    request: web.Request, answer: Answer, share: float, promised: bool
) -> web.StreamResponse:
    content, media_type = answer.encoded()
    sent = content[: int(len(content) * share)]
    if promised:
        return web.Response(body=sent, content_type=media_type)
    response = web.StreamResponse(headers={"Content-Type": media_type})
    response.content_length = len(content)
    with contextlib.suppress(ConnectionError):  # the client is gone already
        await response.prepare(request)
        await response.write(sent)
    if request.transport is not None:
        request.transport.close()
    return response


def _bound(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _reset(transport: asyncio.BaseTransport | None) -> None:
    if transport is None:
        return
    connection = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed by the client
        no_lingering = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_lingering)
    assert isinstance(transport, asyncio.Transport)
    transport.abort()


def _response(answer: Answer) -> web.Response:
    content, media_type = answer.encoded()
    return web.Response(
        body=content, status=answer.status, headers=answer.headers, content_type=media_type
    )


def _items(body: Any) -> int:
    if not isinstance(body, dict):
        return 0
    inputs = next((body[key] for key in ("input", "input_ids", "text") if key in body), None)
    if isinstance(inputs, list) and inputs and not isinstance(inputs[0], int):
        return len(inputs)
    return int(bool(inputs))


def _changed(content: Any, action: Shuffle | Omit | NotANumber) -> Any:
    """`content` with its results shuffled, one left out, or one of them not a number."""
    is_openai = isinstance(content, dict) and "data" in content
    is_bare = isinstance(content, dict) and not is_openai
    results = content["data"] if is_openai else [content] if is_bare else content
    match action:
        case Shuffle():
            results = results[::-1]
        case Omit(place):
            place %= len(results)
            results = results[:place] + results[place + 1 :]
        case NotANumber(place, as_null):
            place %= len(results)
            results = [*results]
            results[place] = _without_number(results[place], None if as_null else math.nan)
    if is_openai:
        return {**content, "data": results}
    return results[0] if is_bare and results else results


def _without_number(result: dict[str, Any], bad: float | None) -> dict[str, Any]:
    if "embedding" in result:
        return {**result, "embedding": [bad]}
    values = result.get("data")
    if isinstance(values, str):  # base64, which holds no null
        array = np.frombuffer(base64.b64decode(values), "<f4").copy()
        array[-1] = math.nan
        return {**result, "data": base64.b64encode(array.tobytes()).decode()}
    if isinstance(values, list):
        return {**result, "data": [*values[:-1], [bad]]}
    return {**result, "data": bad}


@contextlib.contextmanager
def running(
    engine: str,
    version: str,
    score: Score,
    *,
    max_length: int = 2048,
    vocab_size: int,
    port: int = 0,
    served_name: str = "polar",
    raw: bool = False,
    step: bool = False,
    fault: Fault | None = None,
    tokenizer: Path | str | None = None,
    token_bos: int | None = None,
    warm_up: float = 0.0,
) -> Iterator[Server]:
    """A server on 127.0.0.1, in a thread of this process.

    Args:
        engine, version: one of `ENGINES`.
        max_length: the model's context.
        raw: vLLM, started with the flag that turns its sigmoid off.
        step: vLLM, with STEP pooling: one value per input.
        tokenizer: a folder with a `tokenizer.json`; without one, text is refused.
        token_bos: what is put before a text's ids; None is the tokenizer's `<s>`.
        warm_up: seconds after each start in which SGLang says 503 to /health.

    Raises:
        What went wrong in the server itself, when the context ends.
    """
    if (engine, version) not in ENGINES:
        raise ValueError(f"Unknown {engine=} {version=}")
    kind = KINDS[engine](
        version, max_length, vocab_size, served_name, raw, step, tokenizer, token_bos, warm_up
    )
    server = Server(kind, score, port, fault)
    try:
        yield server
    finally:
        server.close()
    if server.errors:
        raise server.errors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=KINDS, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--model", help="a checkpoint; hashes of the ids without")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, help="92544 without a checkpoint")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.0, help="the model takes, per sequence")
    args = parser.parse_args()
    vocab_size, score, tokenizer = args.vocab_size or 92544, hash_score, None
    if args.model:
        score = tiny_model(args.model)
        tokenizer = args.model if (Path(args.model) / "tokenizer.json").is_file() else None
        if args.vocab_size is None:
            vocab_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with running(
        args.engine,
        args.version,
        slow(score, args.seconds) if args.seconds else score,
        max_length=args.max_length,
        vocab_size=vocab_size,
        port=args.port,
        raw=args.raw,
        step=args.step,
        tokenizer=tokenizer,
    ) as server:
        print(server.url, flush=True)
        while not stop.wait(1) and server.is_alive:
            pass


if __name__ == "__main__":
    main()
