"""What is odd in rows that training would take: mistakes that cost a run, not a traceback.

`records.py` refuses what cannot be read. Here are rows that can: exports that went wrong (special
tokens, chat marks, broken encodings), labels that contradict each other, answers that give
themselves away. Each finding has a kind; none is proof, all are worth a look.

One row is looked at by itself (`RowChecks`). What takes two rows is found once all have been seen:
`PairLedger` keeps 17 bytes a pair, a 64-bit hash of its texts among them, and sorts them in the
end. (Among a million pairs two hashes fall together by chance once in 40 million data sets.)
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from polar_xtuner._checks import RawRow, one_line, shown
from polar_xtuner.data_result import Giveaway
from polar_xtuner.records import MapFn, Row
from polar_xtuner.template import REWARD_TOKEN, SEPARATOR_TOKEN

KINDS = {
    "contradiction": "the same two answers to the same prompt and reference are labelled both ways",
    "duplicate": "a pair that stands in the data before: it counts twice",
    "other_wrapper": "a pair that stands in the data before, with the other wrapper",
    "repeated_candidate": "one text twice on one side of a row: its pairs count twice",
    "rejected_is_reference": "the rejected answer is the reference: chosen and rejected swapped?",
    "chosen_is_reference": "the chosen answer is the reference: it teaches to look for copies",
    "near_equal": "chosen and rejected differ in white space or in the form of characters only",
    "negative_margin": "the loss would want the rejected answer to lead",
    "empty": "a text without a visible character",
    "placeholder": "a text that stands for a missing value, such as None",
    "special_token": "a special token of the tokenizer in a text: it is read as its characters",
    "chat_mark": "a mark of a chat template or of a transcript in a text",
    "think_tag": "reasoning in tags: is it there in all answers, and in what will be scored?",
    "prompt_in_answer": "an answer that repeats the whole prompt at its beginning",
    "role": "messages whose roles do not fit the field: fields mixed up?",
    "replacement_character": "U+FFFD: text that was decoded wrongly, what was there is lost",
    "mojibake": "UTF-8 that was read as Latin-1 or Windows-1252 on the way",
    "control_character": "characters of terminals and binary data",
    "escaped_newlines": r"\n spelled out where a line should end: escaped twice on the way",
    "html_entity": "characters written as HTML: &amp; &lt; &gt; &quot; &#39;",
    "misspelled_field": "a field that is ignored, with almost the name of one that counts",
    "cut": "a part that is longer than the limits allow: the rest of it is not seen",
}
"""Every kind of warning, and what it says."""

RAW = "data_checks_raw"  # where a row keeps the fields that it was read from

PLACEHOLDERS = frozenset(
    "none null nan n/a #n/a <na> undefined [deleted] [removed] [object_object]".split()
)

LONG_PROMPT = 20
"""Characters from which on an answer does not begin with the prompt by chance."""

_CHAT_MARK = re.compile(
    r"<\|[a-z0-9_]{2,}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\[UNUSED_TOKEN_\d+\]"
    r"|<extra_id_\d+>"
)
_TRANSCRIPT = re.compile(
    r"\n\n(?:Human|Assistant): |### (?:Instruction|Response|Input|Human|Assistant):"
)
_THINK = re.compile(r"</?think(?:ing)?>")
_C1 = re.compile(r"[\x80-\x9f]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|#0?39|#x27|#34);")
_TAG = re.compile(r"<(?!think)[a-z][a-z0-9]*(?: [^<>]*)?>", re.IGNORECASE)
_CODE_SPAN = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
_IMPORT = re.compile(r"(?:from [\w.]+ )?import [\w.*, ]+;?|#include\b|#!/")

# What has a backslash and an n and stands for itself: in quotation marks (of code, so not a long
# way apart), in paths of a drive (which A: and Q: are seldom), between slashes, in names of TeX.
_SPELLED = re.compile(
    r"\"[^\"\n]{0,80}\"|(?<!\w)'[^'\n]{0,80}'(?!\w)|\b[B-PR-Zb-pr-z]:(?:\\[\w.~-]+)+|/\\n/"
    r"|\\n(?:abla|atural|e|earrow|eg|eq|ewcommand|ewline|ewpage|exists|i|leq|geq|mid|oindent"
    r"|ormalsize|ot|otag|otin|parallel|prec|rightarrow|Rightarrow|sim|subseteq|u|ull|umber|warrow"
    r")(?![A-Za-z])"
)

# The bytes 80 to BF as Latin-1 and Windows-1252 show them: what follows the first byte of a
# character's UTF-8. What could end a French or Portuguese quotation is taken for that, unless it
# comes twice in a row, as it would in a language of other letters; so is a quoted letter, « Â ».
_LATER = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_MOJIBAKE = re.compile(
    f'(?<![A-ZÀ-Þ])(?!(?<=[«‹“„‘"\xa0])[ÂÃ][\xa0»])[ÂÃ]{_LATER}|â{_LATER}{{2}}|ï[»¼½]{_LATER}|ð{_LATER}{{3}}'
    f"|(?:[Ä-ß]{_LATER}){{2}}|(?:[à-ï]{_LATER}{{2}}){{2}}"
)

_NOT_ASSISTANT = ("user", "human", "system", "prompter")
_ASSISTANT = ("assistant", "gpt", "model", "bot")
_KNOWN = ("prompt", "reference", "chosen", "rejected", "wrapper", "margin", "source", "id")
_OPTIONAL = ("wrapper", "margin")  # without the others a row is bad, or misses nothing

Odd = tuple[str, str, str]
"""Kind, field and problem."""


def keep_raw(map_fn: MapFn | None = None) -> MapFn:
    """A map function for `read_rows` that lets rows keep their raw fields, which this needs."""

    def keep(raw: dict[str, Any]) -> dict[str, Any]:
        mapped = {} if map_fn is None else map_fn(raw)
        return {**mapped, RAW: {**raw, **mapped}} if isinstance(mapped, dict) else mapped

    return keep


def special_strings(tokenizer: Any) -> frozenset[str]:
    """What a tokenizer calls its special tokens, and POLAR's two, whatever it calls them."""
    if isinstance(tokenizer, Tokenizer):
        added = tokenizer.get_added_tokens_decoder().values()
    else:
        added = tokenizer.added_tokens_decoder.values()
    return frozenset({t.content for t in added if t.special} | {SEPARATOR_TOKEN, REWARD_TOKEN})


class RowChecks:
    """Looks at rows one by one.

    Args:
        special: what `special_strings` gives.
    """

    def __init__(self, special: Iterable[str]) -> None:
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))

    def __call__(self, row: Row) -> Iterator[Odd]:
        """All that is odd about a row that was read with `keep_raw`."""
        raw = row.extra[RAW]
        names = RawRow(raw)
        chosen = dict(zip(names.names("chosen"), row.chosen))
        rejected = dict(zip(names.names("rejected"), row.rejected))
        answers = {"reference": row.reference, **chosen, **rejected}
        for field, text in {"prompt": row.prompt, **answers}.items():
            for kind, problem in self._of_text(text):
                yield kind, field, problem
        for field, text in answers.items():
            yield from _of_answer(field, text, row.prompt)
        yield from _of_sides(row.reference, chosen, rejected)
        for field in ("prompt", "reference", *chosen, *rejected):
            yield from _of_roles(field, _value(raw, field))
        if row.margin < 0:
            yield "negative_margin", "margin", f"is {row.margin:g}"
        for name in row.extra:
            if name != RAW and (meant := _meant(name)):
                yield "misspelled_field", shown(name), f"is ignored: is {meant} meant?"

    def _of_text(self, text: str) -> Iterator[tuple[str, str]]:
        if not text.strip():
            yield "empty", "holds only white space" if text else "is empty"
            return
        if len(text) < LONG_PROMPT and text.strip().casefold().replace(" ", "_") in PLACEHOLDERS:
            yield "placeholder", f"is {text.strip()!r}"
        special = self._special.search(text)
        if special:
            yield "special_token", f"holds {special[0]!r} {_at(special)}"
        for mark in _CHAT_MARK.finditer(text):
            if not self._special.fullmatch(mark[0]):
                yield "chat_mark", f"holds {mark[0]!r} {_at(mark)}"
                break
        if "\ufffd" in text:
            yield "replacement_character", _first(text, "\ufffd", "U+FFFD")
        for found in () if text.isascii() else _MOJIBAKE.finditer(text):
            meant = _decoded(found[0])
            if meant and not _C1.search(meant):  # no text had such characters before: “Â”
                yield "mojibake", f"holds {found[0]!r} {_at(found)}, which should be {meant!r}"
                break
        control = _CONTROL.search(text)
        if control:
            yield "control_character", f"holds U+{ord(control[0]):04X} {_at(control)}"
        if text.count("\\n") > 1 and "\n" not in text.strip():
            times = _SPELLED.sub("", _without_code(text)).count("\\n")
            if times > 1:
                yield "escaped_newlines", f"holds \\n {times} times, and no newline"
        if entity := _entity(text):
            yield "html_entity", f"holds {entity[0]!r} {_at(entity)}"


def _at(found: re.Match[str]) -> str:
    return f"at character {found.start()}"


def _first(text: str, character: str, name: str) -> str:
    return f"holds {name} {text.count(character)} times, first at character {text.index(character)}"


def _without_code(text: str) -> str:
    """The text with blanks for what is in backticks."""
    return _CODE_SPAN.sub(lambda code: " " * len(code[0]), text) if "`" in text else text


def _entity(text: str) -> re.Match[str] | None:
    """An entity that is neither in code nor, between the first and the last tag, in HTML."""
    if not _ENTITY.search(text):
        return None
    text = _without_code(text)
    first, last = _TAG.search(text), text.rfind("</")
    for entity in _ENTITY.finditer(text):
        if first is None or not first.end() <= entity.start() < last:
            return entity
    return None


def _decoded(text: str) -> str:
    """What the bytes behind a text are in UTF-8; "" if they are not."""
    return b"".join(map(_byte, text)).decode(errors="ignore")


def _byte(character: str) -> bytes:
    return bytes([ord(character)]) if ord(character) < 256 else character.encode("cp1252")


def _of_answer(field: str, text: str, prompt: str) -> Iterator[Odd]:
    transcript = _TRANSCRIPT.search(text)
    if transcript:
        yield "chat_mark", field, f"holds {transcript[0].strip()!r} {_at(transcript)}"
    think = _THINK.search(text)
    if think:
        yield "think_tag", field, f"holds {think[0]!r} {_at(think)}"
    start = prompt.strip()
    if len(start) >= LONG_PROMPT and text.lstrip().startswith(start) and not _is_code(start):
        yield "prompt_in_answer", field, f"begins with the prompt, {len(start)} characters of it"


def _is_code(prompt: str) -> bool:
    """Whether the first line imports a module or begins a function: its answer completes it."""
    line = prompt.partition("\n")[0].rstrip()
    begins = line.endswith((":", "{")) and re.search(r"\w\(", line) and ")" in line
    return bool(begins or _IMPORT.match(line))


def _of_sides(reference: str, chosen: dict[str, str], rejected: dict[str, str]) -> Iterator[Odd]:
    for kind, side in (("chosen_is_reference", chosen), ("rejected_is_reference", rejected)):
        first: dict[str, str] = {}
        for field, text in side.items():
            if text == reference:
                yield kind, field, "is the same text as the reference"
            if text in first:
                yield "repeated_candidate", field, f"is the same text as {first[text]}"
            first.setdefault(text, field)
    normal = {_normal(text): field for field, text in chosen.items()}
    for field, text in rejected.items():
        if (same := normal.get(_normal(text))) is not None:
            yield "near_equal", field, f"differs from {same} in white space or character forms only"


def _normal(text: str) -> str:
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def _value(raw: dict[str, Any], field: str) -> Any:
    """What a row holds under the name that problems call it by."""
    name, _, number = field.partition("[")
    return raw[name][int(number[:-1])] if number else raw[name]


def _of_roles(field: str, value: Any) -> Iterator[Odd]:
    if isinstance(value, str):
        return
    first, last = (str(value[place].get("role")).lower() for place in (0, -1))
    if field == "prompt":
        if last in _ASSISTANT:
            yield "role", field, f"ends with a message of the role {one_line(last, 30)}"
    elif first in _NOT_ASSISTANT:
        yield "role", field, f"begins with a message of the role {one_line(first, 30)}"
    elif last in _NOT_ASSISTANT:
        yield "role", field, f"ends with a message of the role {one_line(last, 30)}"


@lru_cache(maxsize=10_000)
def _meant(name: str) -> str | None:
    plain = name.strip().lower().replace("-", "_")
    if name in _KNOWN:
        return None
    close = difflib.get_close_matches(plain, _OPTIONAL, n=1, cutoff=0.9)
    return close[0] if close else None


class _Run(NamedTuple):
    """Pairs of the same texts, whichever of the two is chosen, in the order of their rows."""

    flags: list[int]
    rows: list[int]


class PairLedger:
    """Remembers the pairs of all rows, and finds those that stand there more than once."""

    def __init__(self) -> None:
        self._keys, self._flags, self._rows = array("Q"), array("B"), array("q")

    def add(self, number: int, row: Row) -> None:
        """The pairs of a row; rows are numbered in their order."""
        context = digest(row.prompt, row.reference)
        better, worse = ([digest(text) for text in side] for side in (row.chosen, row.rejected))
        wrapper = row.wrapper == "pretrain"
        for c in better:
            for r in worse:
                low, high = min(c, r), max(c, r)
                data = b"".join(key.to_bytes(8, "big") for key in (context, low, high))
                self._keys.append(int.from_bytes(blake2b(data, digest_size=8).digest(), "big"))
                self._flags.append(2 * wrapper + (c < r))
                self._rows.append(number)

    def __len__(self) -> int:
        return len(self._keys)

    def findings(self, place_of: Callable[[int], str]) -> Iterator[tuple[int, Odd]]:
        """(number of the row, what is odd), once a row and kind; `place_of` names a row."""
        seen: dict[tuple[int, str], tuple[int, int]] = {}  # the earlier row, and how many pairs
        for run in self._runs():
            first: dict[int, int] = {}
            for flag, row in zip(run.flags, run.rows):
                for kind, other in (
                    ("duplicate", first.get(flag)),
                    ("other_wrapper", first.get(flag ^ 2)),
                    ("contradiction", first.get(flag ^ 1, first.get(flag ^ 3))),
                ):
                    if other is not None and other != row:
                        earlier, times = seen.get((row, kind), (other, 0))
                        seen[row, kind] = earlier, times + 1
                first.setdefault(flag, row)
        for (row, kind), (other, times) in seen.items():
            yield row, (kind, *_told(kind, place_of(other), times))

    def _runs(self) -> Iterator[_Run]:
        keys, flags, rows = (np.array(values) for values in (self._keys, self._flags, self._rows))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else keys
        ends = np.append(starts[1:], len(keys))
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1]):
            members = order[start:end]
            yield _Run(flags[members].tolist(), rows[members].tolist())


def _told(kind: str, place: str, times: int) -> tuple[str, str]:
    pairs = "this pair" if times == 1 else f"{times} of these pairs"
    if kind == "contradiction":
        return "chosen", f"is chosen here over what it is rejected for in {place}"
    if kind == "duplicate":
        return "row", f"repeats {place}: {pairs} with the same prompt, reference and wrapper"
    return "wrapper", f"differs from {place}, which has {pairs} with the same prompt and reference"


_MARKDOWN = re.compile(r"\*\*\w|^#{1,6} |^[-*] ", re.MULTILINE)

FEATURES: dict[str, Callable[[str], bool]] = {
    "begins with white space": lambda text: text[:1].isspace(),
    "ends with white space": lambda text: text[-1:].isspace(),
    "ends with a punctuation mark": lambda text: text.rstrip()[-1:] in tuple(".!?:;。！？"),
    "has several lines": lambda text: "\n" in text.strip(),
    "has Markdown": lambda text: _MARKDOWN.search(text) is not None,
    "has a code block": lambda text: "```" in text,
}
"""What is plain to see of an answer."""

GIVEN_AWAY, LEAST_SHARE, LEAST_PAIRS = 0.95, 0.1, 20
"""A feature gives a data set away that is one side's alone in this share of the pairs that it tells
apart, if these are this share of all pairs, and this many."""


class Giveaways:
    """Counts, over all pairs, which side alone has a feature."""

    def __init__(self) -> None:
        self.pairs = 0
        self._chosen, self._rejected = Counter[str](), Counter[str]()

    def add(self, row: Row) -> None:
        """The pairs of a row."""
        for name, has in FEATURES.items():
            better, worse = sum(map(has, row.chosen)), sum(map(has, row.rejected))
            self._chosen[name] += better * (len(row.rejected) - worse)
            self._rejected[name] += worse * (len(row.chosen) - better)
        self.pairs += len(row.chosen) * len(row.rejected)

    def found(self) -> tuple[Giveaway, ...]:
        """Features that tell the sides apart."""
        counts = (Giveaway(name, self._chosen[name], self._rejected[name]) for name in FEATURES)
        return tuple(filter(self._tells, counts))

    def _tells(self, one: Giveaway) -> bool:
        told = one.chosen_only + one.rejected_only
        return (
            told >= max(LEAST_PAIRS, LEAST_SHARE * self.pairs)
            and max(one.chosen_only, one.rejected_only) >= GIVEN_AWAY * told
        )


def digest(*texts: str) -> int:
    """A 64-bit hash of texts."""
    state = blake2b(digest_size=8)
    for text in texts:
        data = text.encode()
        state.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(state.digest(), "big")
