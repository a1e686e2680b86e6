"""How others publish preference data: records of a format -> the answers to a prompt.

A format says, record by record, which answers there are to a prompt and how good they are
(`Answers`), or what is wrong with the record. What becomes of them is the same for all
(`preference_rows.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from polar_xtuner._checks import Problem, RawRow, found
from polar_xtuner.records import text_of
from polar_xtuner.row_files import Message, Raw, Text


class FormatError(ValueError):
    """A record is not of its format: what is wrong with which field."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.problem: Problem = (field, problem)


class Answer(NamedTuple):
    text: Text
    score: float


@dataclass
class Answers:
    """The answers to one prompt."""

    prompt: Text
    answers: list[Answer]
    raw: Raw
    """The record, for its id, its source and a reference that a field of it holds."""
    unscored: int = 0
    """Answers without a score, which are left out."""


@dataclass(frozen=True)
class Format:
    """How a published data set is read.

    Attributes:
        read: a record, and the field to rank by or None -> its answers; raises `FormatError`.
        own: the fields of the prompt and the answers, of which none is a reference.
        has_pairs: every record has two answers, so none is left to be the reference.
        has_scores: answers have several scores, by the names of their fields, to choose from.
        adjacent: records that follow each other and have the same prompt belong together.
    """

    read: Callable[[Raw, str | None], Answers]
    own: tuple[str, ...]
    has_pairs: bool
    has_scores: bool = False
    adjacent: bool = False


def text_field(raw: Raw, name: str) -> Text:
    """A field that is a string or a message list."""
    row = RawRow(raw)
    row.text(name)
    if row.problems:
        raise FormatError(*row.problems[0])
    value: Text = raw[name]
    return value


def _string(raw: Raw, name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise FormatError(name, _wrong("a string", raw, name))
    text_field(raw, name)
    return value


def _list(raw: Raw, name: str) -> list[Any]:
    value = raw.get(name)
    if not isinstance(value, list):
        raise FormatError(name, _wrong("a list", raw, name))
    return value


def _number(raw: Raw, name: str, place: str = "") -> float | None:
    """None for a value that stands for none."""
    value = raw.get(name)
    if value is None or value == "N/A":
        if name not in raw:
            raise FormatError(f"{place}{name}", "is missing")
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise FormatError(f"{place}{name}", f"must be a number, found {found(value)}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{place}{name}", f"must be a number, found {found(value)}")
    if value != value:  # NaN, as pandas writes what is missing
        return None
    if abs(value) > sys.float_info.max:
        raise FormatError(f"{place}{name}", f"must be a finite number, found {found(value)}")
    return float(value)


def _wrong(expected: str, raw: Raw, name: str) -> str:
    return f"must be {expected}, found {found(raw[name])}" if name in raw else "is missing"


def _two(prompt: Text, chosen: Text, rejected: Text, raw: Raw) -> Answers:
    """A pair without scores."""
    return Answers(prompt, [Answer(chosen, 1.0), Answer(rejected, 0.0)], raw)


def _without_history(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt that two talks have in common, and how each goes on.

    The prompt is their common beginning up to the last message that is not the assistant's.

    Raises:
        FormatError: there is none, or a talk does not go on.
    """
    alike = takewhile(lambda two: two[0] == two[1], zip(chosen, rejected))
    shared = [message for message, _ in alike]
    shared = shared[: min(len(shared), len(chosen) - 1, len(rejected) - 1)]
    while shared and shared[-1].get("role") == "assistant":
        shared.pop()
    if not shared:
        raise FormatError("rejected", "has no history in common with chosen, to be the prompt")
    return shared, chosen[len(shared) :], rejected[len(shared) :]


# Formats

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_rlhf(raw: Raw, score: str | None) -> Answers:
    """Anthropic/hh-rlhf: `chosen` and `rejected`, transcripts of "\\n\\nHuman: ..." and
    "\\n\\nAssistant: ..."."""
    talks = [_turns(_string(raw, name), name) for name in ("chosen", "rejected")]
    return _two(*_without_history(talks[0], talks[1]), raw)


def _turns(transcript: str, name: str) -> list[Message]:
    start, *parts = _TURN.split(transcript)
    if start.strip() or not parts:
        raise FormatError(name, f"must begin with \\n\\nHuman:, found {found(transcript)}")
    turns = [
        {"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])
    ]
    if turns[-1]["role"] != "assistant":
        raise FormatError(name, "must end with a turn of the Assistant")
    return turns


def _ultrafeedback(raw: Raw, score: str | None) -> Answers:
    """openbmb/UltraFeedback: `instruction` and `completions`, each with `response` and scores."""
    if "completions" not in raw and "chosen" in raw:
        raise FormatError(
            "completions", "is missing: this looks binarized, use --from ultrafeedback-binarized"
        )
    prompt = _string(raw, "instruction")
    answers, unscored = [], 0
    for number, completion in enumerate(_list(raw, "completions")):
        place = f"completions[{number}]"
        if not isinstance(completion, dict):
            raise FormatError(place, f"must be an object, found {found(completion)}")
        value = _number(completion, score or "overall_score", f"{place}.")
        response = completion.get("response")
        if not isinstance(response, str):
            raise FormatError(f"{place}.response", _wrong("a string", completion, "response"))
        if value is None:
            unscored += 1
        else:
            answers.append(Answer(response, value))
    return Answers(prompt, answers, raw, unscored)


def _ultrafeedback_binarized(raw: Raw, score: str | None) -> Answers:
    """HuggingFaceH4/ultrafeedback_binarized: `chosen` and `rejected`, talks that begin with the
    prompt, and `score_chosen` and `score_rejected`."""
    if "completions" in raw:
        raise FormatError("chosen", "is missing: this has completions, use --from ultrafeedback")
    talks = [_talk(raw, name) for name in ("chosen", "rejected")]
    scores = [_number(raw, f"score_{name}") for name in ("chosen", "rejected")]
    prompt, *answers = _without_history(talks[0], talks[1])
    scored = [Answer(a, s) for a, s in zip(answers, scores) if s is not None]
    return Answers(prompt, scored, raw, 2 - len(scored))


def _talk(raw: Raw, name: str) -> list[Message]:
    value = text_field(raw, name)
    if isinstance(value, str):
        raise FormatError(name, f"must be a list of messages, found {found(value)}")
    return value


_EXTRA_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _helpsteer(raw: Raw, score: str | None) -> Answers:
    """nvidia/HelpSteer and HelpSteer2: a record an answer, with `prompt`, `response` and scores,
    those of a prompt one after the other."""
    if "response_1" in raw:
        if score is not None:
            raise FormatError(score, "a preference has no scores to choose from: leave --score out")
        return _helpsteer_preference(raw)
    prompt, response = _helpsteer_prompt(raw), _string(raw, "response")
    value = _number(raw, score or "helpfulness")
    answers = [] if value is None else [Answer(response, value)]
    return Answers(prompt, answers, raw, 1 - len(answers))


def _helpsteer_preference(raw: Raw) -> Answers:
    """HelpSteer2's preferences: `response_1`, `response_2` and `preference_strength`, from -3, the
    first is much better, to 3."""
    strength = _number(raw, "preference_strength")
    texts = [_string(raw, name) for name in ("response_1", "response_2")]
    prompt = _helpsteer_prompt(raw)
    if strength is None:
        return Answers(prompt, [], raw, 2)
    return Answers(prompt, [Answer(texts[0], -strength), Answer(texts[1], strength)], raw)


def _helpsteer_prompt(raw: Raw) -> Text:
    """Talks of several turns have marks between them."""
    prompt = _string(raw, "prompt")
    first, *parts = _EXTRA_TURN.split(prompt)
    if not parts:
        return prompt
    turns = [{"role": "user", "content": first}]
    roles = {"User": "user", "Assistant": "assistant"}
    return turns + [
        {"role": roles[who], "content": said} for who, said in zip(parts[::2], parts[1::2])
    ]


def _alpaca_eval(raw: Raw, score: str | None) -> Answers:
    """AlpacaEval's annotations: `instruction`, `output_1`, `output_2` and `preference`, from 1, the
    first is better, to 2; 1.5 and 0 are draws."""
    if "output" in raw and "output_1" not in raw:
        raise FormatError(
            "output_1",
            "is missing: these are outputs without a preference. Give annotations, and outputs as "
            "--reference file:PATH",
        )
    prompt = _string(raw, "instruction")
    texts = [_string(raw, name) for name in ("output_1", "output_2")]
    preference = _number(raw, "preference")
    if preference is None:
        return Answers(prompt, [], raw, 2)
    if preference != 0 and not 1 <= preference <= 2:
        raise FormatError("preference", f"must be from 1 to 2, or 0, found {preference:g}")
    second = 0.0 if preference == 0 else preference - 1.5
    return Answers(prompt, [Answer(texts[0], -second), Answer(texts[1], second)], raw)


def _trl(raw: Raw, score: str | None) -> Answers:
    """TRL's preferences: `chosen` and `rejected`, texts or messages, and `prompt`, or with that
    as their common beginning, or both."""
    chosen, rejected = text_field(raw, "chosen"), text_field(raw, "rejected")
    prompt = None if raw.get("prompt") is None else text_field(raw, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _two(*_without_common_text(chosen, rejected), raw)
        return _two(prompt, *_without_prompt(prompt, chosen, rejected), raw)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise FormatError("rejected", "must be a string like chosen, or messages like chosen")
    if prompt is None:
        return _two(*_without_history(chosen, rejected), raw)
    size = len(prompt)
    if chosen[:size] == prompt == rejected[:size]:
        return _two(prompt, chosen[size:], rejected[size:], raw)
    if {chosen[0].get("role"), rejected[0].get("role")} & _ASKING:
        return _two(*_with_prompt(prompt, *_without_history(chosen, rejected)), raw)
    return _two(prompt, chosen, rejected, raw)


_ASKING = {"system", "developer", "user", "human"}
"""Roles that begin a talk, and no answer."""


def _without_prompt(prompt: Text, chosen: str, rejected: str) -> tuple[str, str]:
    """Answers without the prompt where both begin with it; a single word may be chance (Hello)."""
    text = text_of(prompt)
    if len(text.split()) > 1 and chosen.startswith(text) and rejected.startswith(text):
        return chosen[len(text) :], rejected[len(text) :]
    return chosen, rejected


def _with_prompt(
    prompt: Text, history: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """A history that two talks have in common, which must hold the prompt, and the answers."""
    texts = [text_of(history), *(message["content"] for message in history)]
    if text_of(prompt).strip() not in map(str.strip, texts):
        raise FormatError(
            "prompt",
            "is not in the history that chosen and rejected begin with: without this field that "
            "history is the prompt",
        )
    return history, chosen, rejected


def _without_common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """As TRL's `extract_prompt` does: up to the first difference, a space left to the answers."""
    alike = takewhile(lambda two: two[0] == two[1], zip(chosen, rejected))
    size = sum(1 for _ in alike)
    if size and chosen[size - 1] == " ":
        size -= 1
    if not size:
        raise FormatError("rejected", "has no beginning in common with chosen, to be the prompt")
    return chosen[:size], chosen[size:], rejected[size:]


def _ranked(raw: Raw, score: str | None) -> Answers:
    """`prompt` and `responses`, best first, or with `scores`."""
    prompt, responses = text_field(raw, "prompt"), _list(raw, "responses")
    texts = [
        text_field({f"responses[{i}]": text}, f"responses[{i}]") for i, text in enumerate(responses)
    ]
    if raw.get("scores") is None:
        return Answers(prompt, [Answer(t, -float(i)) for i, t in enumerate(texts)], raw)
    scores = _list(raw, "scores")
    if len(scores) != len(texts):
        raise FormatError("scores", f"are {len(scores)}, to {len(texts)} responses")
    numbers = [_number({f"scores[{i}]": s}, f"scores[{i}]") for i, s in enumerate(scores)]
    answers = [Answer(t, n) for t, n in zip(texts, numbers) if n is not None]
    return Answers(prompt, answers, raw, len(texts) - len(answers))


FORMATS = {
    "hh-rlhf": Format(_hh_rlhf, ("chosen", "rejected"), has_pairs=True),
    "ultrafeedback": Format(_ultrafeedback, ("instruction",), has_pairs=False, has_scores=True),
    "ultrafeedback-binarized": Format(
        _ultrafeedback_binarized, ("prompt", "chosen", "rejected"), has_pairs=True
    ),
    "helpsteer": Format(
        _helpsteer,
        ("prompt", "response", "response_1", "response_2"),
        has_pairs=False,
        has_scores=True,
        adjacent=True,
    ),
    "alpaca-eval": Format(_alpaca_eval, ("instruction", "output_1", "output_2"), has_pairs=True),
    "trl": Format(_trl, ("prompt", "chosen", "rejected"), has_pairs=True),
    "ranked": Format(_ranked, ("prompt",), has_pairs=False),
}
"""By the name that `--from` gives."""


def describe(name: str) -> str:
    """What a format is."""
    return " ".join((FORMATS[name].read.__doc__ or "").split())
