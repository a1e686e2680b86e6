"""Row -> token ids: the one place that knows what POLAR scores.

    BOS  P sep R  <|reward|>  P sep O  <rm>

P prompt, R reference, O output; `sep` is "\\n" for wrapper `sft`, "" for `pretrain` and before
an empty answer. `P sep R` and `P sep O` are each encoded as one text, as POLAR was trained.

Content is data: it is encoded by a copy of the tokenizer that does not know its special tokens,
and should the model behind it still merge characters into one of them (InternLM2's merges build
`<s>` from "<s" and ">"), that token is taken apart into its characters. So no content can
yield BOS, EOS, the separator `<|reward|>` or the reward token `<rm>`.

Over-long parts are cut on token boundaries and then joined as ids; decoded text is never encoded
again. A cut depends on one candidate alone, never on what it is compared with. The counts are
those of POLAR's own client with `response_cut_side="right"`, which gives each part a BOS: with
|X| the ids of X plus one, a response keeps its first `max_response_length - 1` ids, the prompt
its last (max_length - 4 - min(|R|, max_response_length) - min(|O|, max_response_length)) // 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from polar_xtuner.encoder import FastEncoder, encoder_of

TEMPLATE_VERSION = 1
"""Part of every cache key: raise it whenever the same row would get other ids."""

SEPARATOR_TOKEN = "<|reward|>"
REWARD_TOKEN = "[UNUSED_TOKEN_130]"


class Candidate(NamedTuple):
    """One output to score against a reference; all fields are text, `wrapper` as in a row."""

    prompt: str
    reference: str
    output: str
    wrapper: str = "sft"


def check_vocabulary(special_ids: Mapping[str, int], vocab_size: int) -> None:
    """Raise ValueError if one of a template's `special_ids` has no row in the embedding."""
    for name, token_id in special_ids.items():
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"the {name} has id {token_id}, but the model's vocabulary has {vocab_size} ids: "
                "tokenizer and model do not belong together, or separator_token_id / "
                "reward_token_id are set wrongly"
            )


class PartLengths(NamedTuple):
    """Ids of a candidate's prompt, reference and output, each by itself, and of what is kept."""

    whole: tuple[int, int, int]
    kept: tuple[int, int, int]


class _Kept(NamedTuple):
    """What the limits leave of a candidate's parts, and which of its two halves lost ids."""

    prompt: list[int]
    responses: tuple[list[int], list[int]]
    is_cut: tuple[bool, ...]


class PolarTemplate:
    """Turns candidates into token ids.

    Args:
        tokenizer: a transformers tokenizer or a `tokenizers.Tokenizer`.
        max_length: most ids of a sequence.
        max_response_length: most ids of a reference or output, a BOS of its own included.
        separator_token_id, reward_token_id: read from the tokenizer's `<|reward|>` and
            `[UNUSED_TOKEN_130]` where None.

    Raises:
        ValueError: the limits contradict each other, or the tokenizer lacks a special token.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 16384,
        max_response_length: int = 4096,
        separator_token_id: int | None = None,
        reward_token_id: int | None = None,
    ) -> None:
        if max_response_length < 2 or max_length < 2 * max_response_length + 3:
            raise ValueError(
                "max_length must hold two responses and three special tokens: needed is "
                f"max_length >= 2 * max_response_length + 3 and max_response_length >= 2, got "
                f"max_length={max_length}, max_response_length={max_response_length}"
            )
        self.max_length = max_length
        self.max_response_length = max_response_length
        self.bos_token_id = _named_id(tokenizer, "bos_token_id", "<s>")
        self.eos_token_id = _named_id(tokenizer, "eos_token_id", "</s>")
        self.separator_token_id = _special_id(tokenizer, SEPARATOR_TOKEN, separator_token_id)
        self.reward_token_id = _special_id(tokenizer, REWARD_TOKEN, reward_token_id)
        self._encoder = encoder_of(tokenizer)
        self.special_ids = {
            "BOS": self.bos_token_id,
            "EOS": self.eos_token_id,
            f"separator {SEPARATOR_TOKEN}": self.separator_token_id,
            f"reward token {REWARD_TOKEN}": self.reward_token_id,
        }
        """What no content can yield."""
        self._forbidden = set(self.special_ids.values())
        if len(self._forbidden) != 4:
            raise ValueError(f"these must be four different ids: {self.special_ids}")
        self._spelled: dict[int, list[int]] = {}
        settings = [TEMPLATE_VERSION, max_length, max_response_length, self.special_ids]
        self.fingerprint = hashlib.sha256(
            self._encoder.identity + json.dumps(settings).encode()
        ).hexdigest()
        """Equal for two templates only if they give every candidate the same ids."""

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer is of the `tokenizers` library."""
        return isinstance(self._encoder, FastEncoder)

    def encode(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        """Ids of every candidate, each at most `max_length`, in order.

        Equal texts within one call are encoded once, and so are words (`encoder.py`).
        """
        candidates = [Candidate(*map(_valid_unicode, c)) for c in candidates]
        long = {c for c in candidates if self._may_need_cut(c)}
        parts = self._encode_texts(text for c in long for text in ("\n", *c[:3]))
        kept = {c: self._cut(c, parts) for c in long}
        pieces = {c: (self._pieces(c, 0), self._pieces(c, 1)) for c in candidates}
        joined = self._encode_texts(
            text
            for c, halves in pieces.items()
            for half, is_cut in zip(halves, kept[c].is_cut if c in kept else (False, False))
            if not is_cut
            for text in half
        )
        newline = parts.get("\n", [])  # only needed where something is cut
        return [self._assemble(c, pieces[c], kept.get(c), joined, newline) for c in candidates]

    def part_lengths(self, candidates: Sequence[Candidate]) -> list[PartLengths]:
        """What the limits leave of every candidate's parts, in order."""
        candidates = [Candidate(*map(_valid_unicode, c)) for c in candidates]
        parts = self._encode_texts(text for c in candidates for text in c[:3])
        lengths = []
        for c in candidates:
            kept = self._cut(c, parts)
            prompt, reference, output = (len(parts[text]) for text in c[:3])
            left = (len(kept.prompt), len(kept.responses[0]), len(kept.responses[1]))
            lengths.append(PartLengths((prompt, reference, output), left))
        return lengths

    def _pieces(self, c: Candidate, side: int) -> tuple[str, ...]:
        """The half `P sep R` (side 0) or `P sep O` in texts whose ids are those of the half."""
        left, right = c.prompt + _separator(c, c[1 + side]), c[1 + side]
        return (left, right) if self._encoder.separable(left, right) else (left + right,)

    def _may_need_cut(self, c: Candidate) -> bool:
        """False if even the most ids would fit; spares encoding the parts by themselves."""
        prompt, reference, output = (self._encoder.most_ids(text) + 2 for text in c[:3])
        return (
            max(reference, output) > self.max_response_length
            or 2 * prompt + reference + output > self.max_length - 4
        )

    def _cut(self, c: Candidate, parts: dict[str, list[int]]) -> _Kept:
        prompt, reference, output = (parts[text] for text in c[:3])
        kept_reference = reference[: self.max_response_length - 1]
        kept_output = output[: self.max_response_length - 1]
        room = self.max_length - 4 - (len(kept_reference) + 1) - (len(kept_output) + 1)
        kept_prompt = prompt[max(0, len(prompt) - max(0, room // 2)) :]
        is_cut = tuple(
            len(kept_prompt) < len(prompt) or len(kept_response) < len(response)
            for kept_response, response in ((kept_reference, reference), (kept_output, output))
        )
        return _Kept(kept_prompt, (kept_reference, kept_output), is_cut)

    def _assemble(
        self,
        c: Candidate,
        pieces: tuple[tuple[str, ...], ...],
        kept: _Kept | None,
        joined: dict[str, list[int]],
        newline: list[int],
    ) -> list[int]:
        halves = []
        for side, texts in enumerate(pieces):
            if kept is None or not kept.is_cut[side]:
                halves.append([*chain.from_iterable(joined[text] for text in texts)])
            else:
                separator = newline if _separator(c, c[1 + side]) else []
                halves.append(kept.prompt + separator + kept.responses[side])
        ids = [
            self.bos_token_id,
            *halves[0],
            self.separator_token_id,
            *halves[1],
            self.reward_token_id,
        ]
        if len(ids) > self.max_length and kept is not None and not all(kept.is_cut):
            # Joined texts can take a few ids more than their parts, for which the cut left room.
            return self._assemble(c, pieces, kept._replace(is_cut=(True, True)), joined, newline)
        return ids

    def _encode_texts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(texts))
        return {t: self._as_data(ids) for t, ids in zip(distinct, self._encoder.encode(distinct))}

    def _as_data(self, ids: list[int]) -> list[int]:
        if self._forbidden.isdisjoint(ids):
            return ids
        return [part for i in ids for part in (self._spell(i) if i in self._forbidden else (i,))]

    def _spell(self, token_id: int) -> list[int]:
        """A special token's text, one character at a time."""
        if token_id not in self._spelled:
            token = self._encoder.token(token_id)
            characters = self._encoder.encode([*token])
            spelled = [i for ids in characters for i in ids]
            if not self._forbidden.isdisjoint(spelled):
                raise ValueError(
                    f"token {token_id} is {token!r}, which any text can hold: "
                    "set separator_token_id and reward_token_id to tokens made for them"
                )
            self._spelled[token_id] = spelled
        return self._spelled[token_id]


def _separator(c: Candidate, response: str) -> str:
    return "\n" if c.wrapper == "sft" and response else ""


def _valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which no tokenizer takes, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _named_id(tokenizer: Any, attribute: str, token: str) -> int:
    if isinstance(tokenizer, Tokenizer):
        token_id = tokenizer.token_to_id(token)
    else:
        token_id = getattr(tokenizer, attribute)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {attribute}: POLAR sequences need {token!r}")
    return token_id


def _special_id(tokenizer: Any, token: str, configured: int | None) -> int:
    if configured is not None:
        return configured
    known = (
        tokenizer.get_vocab(with_added_tokens=True)
        if isinstance(tokenizer, Tokenizer)
        else tokenizer.get_vocab()
    )
    if token not in known:
        option = "separator_token_id" if token == SEPARATOR_TOKEN else "reward_token_id"
        raise ValueError(
            f"the tokenizer has no token {token!r}: add it as a special token, or set {option} "
            "to the id that the checkpoint was trained with"
        )
    return known[token]
