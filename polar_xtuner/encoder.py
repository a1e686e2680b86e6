"""Text -> ids, where all text is data.

A fast tokenizer is copied, and the copy does not know its special tokens. Most tokenizers of
language models are byte-pair encodings whose tokens never reach from a word over the space before
the next one. Where the vocabulary says so, a text is cut there, and every distinct word is
encoded once and remembered: the ids are the same, for no merge could have crossed the cut.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterable
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

from tokenizers import Tokenizer

if hasattr(os, "register_at_fork"):  # Windows lacks it
    # The threads of `tokenizers` do not live on in a fork, which would wait for them for ever. It
    # sees to that itself, but not where TOKENIZERS_PARALLELISM is set, as importing xtuner does.
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

SPACE = "▁"
"""What sentencepiece writes for a space."""

_HOLDS_BYTE = re.compile(r".<0x[0-9A-F]{2}>|<0x[0-9A-F]{2}>.", re.DOTALL)

REMEMBERED_WORDS, LONGEST_WORD = 1 << 18, 64
"""Words that are remembered at most, and the characters of the longest of them."""


def encoder_of(tokenizer: Any) -> FastEncoder | SlowEncoder:
    """For a transformers tokenizer or a `tokenizers.Tokenizer`."""
    if isinstance(tokenizer, Tokenizer):
        return FastEncoder(tokenizer.to_str())
    if tokenizer.is_fast:
        return FastEncoder(tokenizer.backend_tokenizer.to_str())
    return SlowEncoder(tokenizer)


class FastEncoder:
    """Encodes through a copy of a fast tokenizer.

    Args:
        settings: the tokenizer, as `Tokenizer.to_str` gives it.
    """

    def __init__(self, settings: str) -> None:
        self._settings = settings
        self._memo: dict[str, list[int]] = {}
        self._lock = threading.Lock()  # of the memo: requests may be scored in threads
        self.identity = self._settings.encode()
        """Equal for two encoders only if they give every text the same ids."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FastEncoder, (self._settings,)

    def encode(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of every text."""
        if self._word is None:
            return self._encode_whole([*texts])
        split = [self._word.findall(text) for text in texts]
        with self._lock:
            return self._join(split)

    def _join(self, split: list[list[str]]) -> list[list[int]]:
        """Ids of texts that are split into words."""
        memo = self._memo
        if len(memo) > REMEMBERED_WORDS:
            memo.clear()
        new = [word for word in set(chain.from_iterable(split)) if word not in memo]
        memo.update(zip(new, self._encode_whole(new)))
        ids = [[*chain.from_iterable(map(memo.__getitem__, words))] for words in split]
        for word in new:
            if len(word) > LONGEST_WORD:
                del memo[word]
        return ids

    def most_ids(self, text: str) -> float:
        """A bound on the ids of a text: one a byte of what is left for splitting.

        (NFC, for one, can make three characters of one.)
        """
        normalizer = self._copy.normalizer
        if normalizer is None or self._word is not None:  # a space becomes one token
            return len(text.encode())
        return len(normalizer.normalize_str(text).encode())

    def token(self, token_id: int) -> str:
        return self._copy.id_to_token(token_id)

    def separable(self, left: str, right: str) -> bool:
        """Whether the ids of `left + right` are those of `left` and then those of `right`."""
        if not left or not right:
            return True
        if self._reaches is None:
            return False
        sides = tuple(SPACE if c == " " else c for c in (left[-1], right[0]))
        return sides not in self._reaches and not self._characters.isdisjoint(sides)

    def _encode_whole(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # The "fast" variant leaves out where in the text each id stands.
        encode = getattr(self._copy, "encode_batch_fast", self._copy.encode_batch)
        return [e.ids for e in encode(texts, add_special_tokens=False)]

    @cached_property
    def _copy(self) -> Tokenizer:
        copy = Tokenizer.from_str(self._settings)
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _reaches(self) -> set[tuple[str, str]] | None:
        """Neighbouring characters within any token; None if that says nothing about merges.

        A merge makes a token, so none joins two characters that stand side by side in no token.
        """
        vocabulary = self._copy.get_vocab()
        # Characters that are no tokens are spelled in bytes, which may not merge.
        if not _is_plain_bpe(self._copy) or any(map(_HOLDS_BYTE.search, vocabulary)):
            return None
        # A token that was added may hold a plain space.
        return {pair for token in vocabulary for pair in pairwise(token.replace(" ", SPACE))}

    @cached_property
    def _characters(self) -> set[str]:
        return {token for token in self._copy.get_vocab() if len(token) == 1}

    @cached_property
    def _word(self) -> re.Pattern[str] | None:
        """A word: spaces, what follows up to the next space, and that space too where a token
        could hold it together with the character before."""
        if self._reaches is None or SPACE not in self._characters:
            return None
        space = f" {SPACE}"
        before = {a for a, b in self._reaches if b == SPACE and a != SPACE}
        joins = re.escape("".join(sorted(before)))
        joined = f"|[{joins}][{space}]*" if joins else ""
        return re.compile(f"[{space}]*(?:[^{space}{joins}]+{joined})+|[{space}]+")


class SlowEncoder:
    """Encodes through a tokenizer that is written in Python, one text at a time."""

    def __init__(self, tokenizer: Any) -> None:
        options = {k: str(v) for k, v in tokenizer.init_kwargs.items() if k != "name_or_path"}
        settings = json.dumps([tokenizer.get_vocab(), options], sort_keys=True)
        self.identity = f"{type(tokenizer).__name__} {settings}".encode()
        self._tokenizer = tokenizer

    def encode(self, texts: Iterable[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return [self._tokenizer.encode(text, **options) for text in texts]

    def most_ids(self, text: str) -> float:
        return math.inf

    def token(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def separable(self, left: str, right: str) -> bool:
        return not left or not right


def _is_plain_bpe(tokenizer: Tokenizer) -> bool:
    """Whether ids depend on merges alone: sentencepiece's way, a space replaced and no more."""
    settings = json.loads(tokenizer.to_str())
    model, pre_tokenizer = settings["model"], settings["pre_tokenizer"]
    normalizer = settings["normalizer"] or {"normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    if pre_tokenizer == _METASPACE:
        steps, pre_tokenizer = [*steps, _REPLACE], None
    return (
        pre_tokenizer is None
        and bool(steps)
        and all(step == _REPLACE for step in steps)
        and model["type"] == "BPE"
        and not any(model[option] for option in _OPTIONS)
        and not any(
            token[option]
            for token in settings["added_tokens"]
            if not token["special"]  # special ones are text here
            for option in ("single_word", "lstrip", "rstrip")
        )
    )


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_METASPACE = {
    "type": "Metaspace",
    "replacement": SPACE,
    "prepend_scheme": "never",
    "split": False,
}
_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
