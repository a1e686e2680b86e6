"""What vLLM, SGLang and LMDeploy accept and answer: requests as dicts, answers to rewards.

Nothing here talks to a server. All three get ids, never text, since a server may read text with
another tokenizer. What was measured of them, and with which versions, is in docs/serving.md.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Ids = Sequence[int]
Answers = Mapping[str, Any]
"""What a server says of itself: the JSON it answered, by path; a path it lacks is not there."""


class ServerError(RuntimeError):
    """A server is not what it should be, so none of its numbers can be used."""


class AnswerError(ValueError):
    """An answer is not one that the engine gives: cut short, or not of this request."""


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself.

    Attributes:
        version: "" where the engine does not tell.
        model: the name that it serves the model by, "" where it does not tell.
        longest: most ids of a sequence, None where it does not tell.
    """

    engine: str
    version: str
    model: str
    longest: int | None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.engine, self.version)))


class Answer(NamedTuple):
    """The answer to some sequences: what stands for each of them, and how many ids were read."""

    values: list[Any]
    tokens: int | None


class Engine:
    """One serving engine's protocol.

    Attributes:
        name: as `server_type` names it.
        path: where rewards are asked for.
        activates: some versions apply an activation to rewards.
    """

    name: str
    path: str
    activates = False

    def facts(self, answers: Answers) -> ServerFacts:
        raise NotImplementedError

    def request(self, sequences: Sequence[Ids], facts: ServerFacts) -> dict[str, Any]:
        """The body of a request for at least one sequence."""
        raise NotImplementedError

    def read(self, answer: Any, count: int) -> Answer:
        """What an answer says of `count` sequences, in the order they were sent.

        Raises:
            AnswerError: it is not the answer to them.
        """
        raise NotImplementedError

    def advice(self, facts: ServerFacts) -> str:
        """How to start a server that `activates` so that it answers raw rewards."""
        raise NotImplementedError


class VLLM(Engine):
    """From 0.10.1 on vLLM answers sigmoid(reward), unless told not to."""

    name = "vllm"
    path = "/pooling"
    activates = True

    def facts(self, answers: Answers) -> ServerFacts:
        model = _served(answers)
        version = answers.get("/version")
        return ServerFacts(
            self.name,
            str(version.get("version", "")) if isinstance(version, dict) else "",
            str(model.get("id", "")),
            _count(model.get("max_model_len")),
        )

    def request(self, sequences: Sequence[Ids], facts: ServerFacts) -> dict[str, Any]:
        body = {
            "input": [*map(list, sequences)],
            "use_activation": False,  # for raw rewards, from 0.11.1 on; unknown to those before
            "encoding_format": "base64",  # there is a number for every token
        }
        return {"model": facts.model, **body} if facts.model else body

    def read(self, answer: Any, count: int) -> Answer:
        entries = _in_order(_list(answer, "data", count))
        return Answer([_values(_field(entry, "data")) for entry in entries], _tokens(answer))

    def advice(self, facts: ServerFacts) -> str:
        if _version(facts.version) < (0, 11, 1):
            return """--override-pooler-config '{"softmax": false}'"""
        return """--pooler-config '{"use_activation": false}'"""


class SGLang(Engine):
    """0.4.4 dies of a list that holds one sequence; a bare sequence suits every version."""

    name = "sglang"
    path = "/classify"

    def facts(self, answers: Answers) -> ServerFacts:
        info = answers.get("/get_server_info") or {}
        context = _count(_served(answers).get("max_model_len"))
        longest = context - 1 if context else _count(info.get("max_req_input_len"))
        model = answers.get("/get_model_info", {}).get("model_path", "")
        return ServerFacts(self.name, str(info.get("version", "")), str(model), longest)

    def request(self, sequences: Sequence[Ids], facts: ServerFacts) -> dict[str, Any]:
        if len(sequences) == 1:
            return {"input_ids": list(sequences[0])}
        return {"input_ids": [*map(list, sequences)]}

    def read(self, answer: Any, count: int) -> Answer:
        if count == 1 and isinstance(answer, dict):
            answer = [answer]
        entries = _list(answer, None, count)
        used = [_field(_field(entry, "meta_info"), "prompt_tokens") for entry in entries]
        tokens = sum(used) if all(isinstance(n, int) for n in used) else None
        return Answer([_values(_field(entry, "embedding")) for entry in entries], tokens)


class LMDeploy(Engine):
    """Answers a bare number for a sequence."""

    name = "lmdeploy"
    path = "/pooling"

    def facts(self, answers: Answers) -> ServerFacts:
        model = _served(answers)
        longest = _count(model.get("max_model_len"))
        return ServerFacts(self.name, "", str(model.get("id", "")), longest)

    def request(self, sequences: Sequence[Ids], facts: ServerFacts) -> dict[str, Any]:
        body = {"input": [*map(list, sequences)]}
        return {"model": facts.model, **body} if facts.model else body

    def read(self, answer: Any, count: int) -> Answer:
        entries = _in_order(_list(answer, "data", count))
        return Answer([_values(_field(entry, "data")) for entry in entries], _tokens(answer))


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (SGLang(), VLLM(), LMDeploy())}

INFO_PATHS = ("/version", "/v1/models", "/get_model_info", "/get_server_info")
"""What is asked of a server to find out what it is."""


def engine_of(answers: Answers) -> str | None:
    """The engine that says this of itself; None if it is none that we know."""
    owner = _served(answers).get("owned_by")
    if owner in ENGINES:
        return str(owner)
    if isinstance(answers.get("/get_model_info"), dict):
        return SGLang.name
    if "version" in (answers.get("/version") or {}):
        return VLLM.name
    return None


def reward_of(values: Any) -> float | None:
    """The last of a sequence's values, which is the one at the reward token; None if it is not a
    finite number."""
    last = values[-1] if len(values) else None
    while isinstance(last, list) and last:
        last = last[-1]
    if isinstance(last, bool) or not isinstance(last, (int, float, np.floating)):
        return None
    return float(last) if math.isfinite(last) else None


def is_activated(answers: Sequence[Any]) -> bool:
    """Whether an activation was applied: all values of all sequences lie in [0, 1].

    Of raw rewards that is next to impossible where there is one for every token. (A model whose
    head is zero answers 0 to everything, which no sigmoid does.)
    """
    try:
        values = np.concatenate([np.ravel(np.asarray(a, dtype=np.float64)) for a in answers])
    except (TypeError, ValueError):  # no numbers: they have no rewards either
        return False
    return bool(values.any() and np.all((values >= 0) & (values <= 1)))


def error_of(answer: Any) -> tuple[int | None, str] | None:
    """(status, message) of an answer that reports an error in any engine's way, else None.

    Some versions send it with HTTP status 200.
    """
    if not isinstance(answer, dict):
        return None
    nested = answer.get("error")
    if isinstance(nested, dict):
        answer = {**nested, "object": "error"}
    elif isinstance(nested, str):
        answer = {"message": nested, "object": "error"}
    elif isinstance(answer.get("detail"), (str, list)):
        answer = {"message": _detail(answer["detail"]), "object": "error"}
    if answer.get("object") != "error":
        return None
    return _count(answer.get("code")), _without_content(str(answer.get("message", "")))


def _detail(detail: str | list[Any]) -> str:
    """Of FastAPI's errors what is wrong and where; they also repeat what was sent."""
    if isinstance(detail, str):
        return detail
    return "; ".join(
        f"{'.'.join(map(str, entry.get('loc', [])))}: {entry.get('msg', '')}"
        for entry in detail[:3]
        if isinstance(entry, dict)
    )


def _without_content(message: str) -> str:
    """A server's message in one short line, less what it may repeat of the request."""
    message = re.sub(r"\[[^\]]*(\]|$)|'[^']*'|\"[^\"]*\"", "...", message)
    return " ".join(message.split())[:200]


def _served(answers: Answers) -> Mapping[str, Any]:
    models = answers.get("/v1/models")
    entries = models.get("data") if isinstance(models, dict) else None
    return entries[0] if isinstance(entries, list) and entries else {}


def _count(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def _list(answer: Any, field: str | None, count: int) -> list[Any]:
    entries = answer if field is None else _field(answer, field)
    if not isinstance(entries, list) or len(entries) != count:
        found = f"{len(entries)}" if isinstance(entries, list) else f"a {type(entries).__name__}"
        raise AnswerError(f"{count} sequences were asked for, the answer has {found}")
    return entries


def _field(value: Any, field: str) -> Any:
    if not isinstance(value, dict) or field not in value:
        raise AnswerError(f"the answer has no {field} where it should have one")
    return value[field]


def _in_order(entries: list[Any]) -> list[Any]:
    places = [entry.get("index") if isinstance(entry, dict) else None for entry in entries]
    if all(place is None for place in places):
        return entries
    by_place = dict(zip(places, entries))
    try:
        return [by_place[place] for place in range(len(entries))]
    except KeyError:
        raise AnswerError("the indices of the answer are not those of the request") from None


def _tokens(answer: Any) -> int | None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def _values(data: Any) -> Any:
    """A sequence's values: one, one for every token, or these in base64 (little-endian float32)."""
    if isinstance(data, str):
        try:
            return np.frombuffer(base64.b64decode(data, validate=True), "<f4")
        except ValueError as error:
            raise AnswerError(f"the answer is not base64 of float32: {error}") from None
    return data if isinstance(data, list) else [data]
