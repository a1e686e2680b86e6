"""Text of rows, logs and paths as something that a page can hold and a reader can see."""

from __future__ import annotations

import re
import unicodedata

# NUL and lone surrogates cannot stand in a page at all. The others are instructions to whatever
# shows the text, and would hide what a row holds: of direction (Unicode's "Trojan source"), or none
# that a browser shows. Marks that scripts need to be written, such as joiners, stay.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


# More marks on one letter than any script needs; they would stand over the lines above and below.
_MARK = r"[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
_PILE = re.compile(rf"({_MARK}{{4}})({_MARK}+)")


def visible(text: str) -> str:
    """The text with what cannot be seen written out: control pictures, or the code as [U+202E]."""
    text = _UNSEEN.sub(_written_out, text)
    return _PILE.sub(lambda pile: f"{pile[1]}[+{len(pile[2])} marks]", text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"[U+{code:04X}]"


def short(text: str, length: int) -> str:
    """One line of at most `length` characters, visible, an ellipsis where it goes on."""
    line = " ".join(visible(text).split())
    if len(line) <= length:
        return line
    end = length - 1
    while end and unicodedata.combining(line[end]):  # keep a letter with its marks
        end -= 1
    return line[:end].rstrip() + "…"


def ending(text: str, length: int) -> str:
    """`short`, of which the end is left: of a path, what tells it from others."""
    line = " ".join(visible(text).split())
    return line if len(line) <= length else "…" + line[len(line) - length + 1 :].lstrip()


def ends(text: str, length: int) -> str:
    """`short`, of which a third at the start and the end are left: what tells names apart may stand
    in either."""
    line = " ".join(visible(text).split())
    if len(line) <= length:
        return line
    start = (length - 1) // 3
    end = len(line) - (length - 1 - start)
    while start and unicodedata.combining(line[start]):  # keep a letter with its marks
        start -= 1
    while end < len(line) and unicodedata.combining(line[end]):
        end += 1
    return f"{line[:start].rstrip()}…{line[end:].lstrip()}"
