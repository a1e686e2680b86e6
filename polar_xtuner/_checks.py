"""The checks behind `records`: one raw JSON value in, its texts or all that is wrong with it out.

Nothing here raises over what a row holds. A problem is a pair (field, what is wrong with it),
and whoever finds one notes it and goes on, so that a row's problems come out together. Problems
are single short lines: they show values shortened to about 60 characters, never a whole text.
"""

import json
import reprlib
import sys
from collections import Counter
from contextlib import suppress
from typing import Any, TypeGuard

WRAPPERS = ("sft", "pretrain")

Problem = tuple[str, str]

_MISSING = object()


class RawRow:
    """Reads the fields of one raw row; `problems` collects what is wrong with them.

    A wrong value gives a stand-in, so that the rest of the row is checked too: use what the
    methods return only if `problems` is empty in the end. `read` is the set of fields asked for.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.read: set[str] = set()
        self.problems: list[Problem] = []

    def note(self, field: str, problem: str) -> None:
        self.problems.append((field, problem))

    def holds(self, field: str) -> bool:
        return self.raw.get(field) is not None

    def prompt(self) -> str:
        text = self.text("prompt")
        if not text and not self.problems:
            self.note("prompt", "must not be empty")
        return text

    def text(self, field: str) -> str:
        return self._text(self._required(field), field)

    def candidates(self, field: str) -> tuple[str, ...]:
        """The texts of a single candidate or of several."""
        value = self._required(field)
        values = value if _is_several(value) else [value]
        return tuple(map(self._text, values, self.names(field)))

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Chosen and rejected, which must have no text in common."""
        before = len(self.problems)
        chosen, rejected = self.candidates("chosen"), self.candidates("rejected")
        if len(self.problems) == before:
            name_of = dict(zip(rejected, self.names("rejected"), strict=True))
            for text, name in zip(chosen, self.names("chosen"), strict=True):
                if text in name_of:
                    self.note(name, f"must differ from {name_of[text]}, is the same text")
        return chosen, rejected

    def wrapper(self) -> str:
        value = self._optional("wrapper")
        if isinstance(value, str) and value in WRAPPERS:
            return value
        if value is not None:
            self.note("wrapper", f"must be one of {', '.join(WRAPPERS)}, found {found(value)}")
        return WRAPPERS[0]

    def source(self) -> str | None:
        value = self._optional("source")
        return None if value is None else self._string(value, "source")

    def id(self) -> str | None:
        value = self._optional("id")
        if isinstance(value, int) and not isinstance(value, bool):
            with suppress(ValueError):  # thousands of digits, which a map function may give
                return str(value)
        return None if value is None else self._string(value, "id", "a string or an integer")

    def margin(self) -> float:
        value = self._optional("margin")
        if value is None:
            return 0.0
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and abs(value) <= sys.float_info.max:  # which NaN is not
            return float(value)
        self.note("margin", f"must be a finite number, found {found(value)}")
        return 0.0

    def _required(self, field: str) -> Any:
        self.read.add(field)
        return self.raw.get(field, _MISSING)

    def _optional(self, field: str) -> Any:
        self.read.add(field)
        return self.raw.get(field)

    def names(self, field: str) -> list[str]:
        """What problems call the candidates of a field."""
        value = self.raw.get(field)
        return [f"{field}[{i}]" for i in range(len(value))] if _is_several(value) else [field]

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, list):
            return self._string(value, name, "a string or a list of messages")
        if not value:
            self.note(name, "must not be an empty list")
        return "\n".join([self._content(item, f"{name}[{i}]") for i, item in enumerate(value)])

    def _content(self, message: Any, name: str) -> str:
        if not isinstance(message, dict):
            self.note(name, f"must be a message with role and content, found {found(message)}")
            return ""
        role = message.get("role")
        if role is not None and not isinstance(role, str):
            self.note(f"{name}.role", f"must be a string, found {found(role)}")
        return self._string(message.get("content", _MISSING), f"{name}.content")

    def _string(self, value: Any, name: str, expected: str = "a string") -> str:
        if value is _MISSING:
            self.note(name, "is missing")
        elif not isinstance(value, str):
            self.note(name, f"must be {expected}, found {found(value)}")
        else:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                lone = f"the lone surrogate {value[error.start]!r} at character {error.start}"
                self.note(name, f"must be valid Unicode, found {lone}")
            return str(value)  # numpy has strings of its own
        return ""


def _is_several(value: Any) -> TypeGuard[list[Any]]:
    """A list of messages (dicts) is one candidate, any other list that is not empty several."""
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def skip_space(text: str, at: int) -> int:
    """Where the first character at or after `at` stands that is not JSON's white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def scan_json(text: str, at: int) -> tuple[Any, int, list[Problem]]:
    """Reads one JSON value at `at`; gives it, where the text goes on after it, its problems.

    The problems are what `json` lets pass, a field name given twice in one object, and an
    integer of more digits than Python will read.

    Raises:
        json.JSONDecodeError: there is no JSON value.
        RecursionError: its lists and objects are nested too deeply.
    """
    problems: list[Problem] = []

    def an_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            for name, times in Counter(name for name, _ in pairs).items():
                if times > 1:
                    problems.append((shown(name), f"stands {times} times in the same object"))
        return fields

    def an_integer(digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            problems.append(("row", f"holds an integer of {len(digits)} digits, too many to read"))
            return 0

    decoder = json.JSONDecoder(object_pairs_hook=an_object, parse_int=an_integer)
    value, end = decoder.raw_decode(text, skip_space(text, at))
    return value, skip_space(text, end), problems


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 50

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 200 else f"<{x.bit_length()} bits>"


_SHORT = _ShortRepr()


def found(value: Any) -> str:
    """A value's type and the value itself, in about 60 characters."""
    if value is None:
        return "null"
    return f"{type(value).__name__} {one_line(_SHORT.repr(value), 60)}"


def shown(name: str) -> str:
    """A field's name, whatever it is, as errors show it."""
    return one_line(name, 60).strip() or repr(name[:20])


def one_line(text: str, limit: int = 100) -> str:
    """A text as one printable line of at most `limit` characters."""
    line = "".join(char if char.isprintable() else " " for char in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."
