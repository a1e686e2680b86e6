"""Preference data as others publish it -> rows with a reference.

Of the answers that a format gives (`preference_formats.py`), sorted by score, one text is taken
once, and

    reference "best"    the best answer is the reference, the second chosen, the third rejected,
                        as in the paper (arXiv 2507.05197)
    another reference   the best answer is chosen, the second rejected

With pairs="all" every two answers of different scores make a pair; in a group they cost little
more. Answers of equal scores make none. What gives no row is counted, with the reason.

Records stream. A file of references is put into a temporary database on disk, keys and all.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from polar_xtuner._checks import found
from polar_xtuner.data_checks import digest
from polar_xtuner.preference_formats import (
    FORMATS,
    Answer,
    Answers,
    Format,
    FormatError,
    text_field,
)
from polar_xtuner.records import BadRow, RowError, find_files, parse_row, read_raw, text_of
from polar_xtuner.row_files import Raw, Text, as_messages

PAIRS = ("paper", "all")
BEST = "best"


def convert(
    files: Iterable[Path],
    format: str,
    *,
    reference: str | None = None,
    pairs: str = "paper",
    score: str | None = None,
) -> Conversion:
    """Rows of a published data set.

    Args:
        files: what `find_files` gives.
        format: one of `FORMATS`.
        reference: "best", "field:NAME", "file:PATH"; None is "best" for formats of more than two
            answers.
        pairs: one of `PAIRS`.
        score: the field to rank by, None the format's own.

    Raises:
        ValueError: the format has no such reference, or no such score; the field of the reference
            is that of the prompt or of an answer; the file of references
            holds two for a prompt, or none.
        BadRowsError: a row of the file of references is bad.
    """
    kind = FORMATS[format]
    if reference is None and not kind.has_pairs:
        reference = BEST
    if reference is None or (reference == BEST and kind.has_pairs):
        raise ValueError(
            f"{format} has two answers to a prompt, and the better one is chosen: none is left to "
            "be the reference. Name one: --reference field:NAME, a field of each record, or "
            "--reference file:PATH, a file of rows with prompt and reference"
        )
    if reference.removeprefix("field:") in kind.own:
        raise ValueError(
            f"--reference {reference}: is the prompt or an answer of {format}: name another field"
        )
    if score is not None and not kind.has_scores:
        raise ValueError(f"{format} has no scores to choose from: leave --score out")
    return Conversion(files, format, reference_of(reference), pairs, score)


class Conversion:
    """Iterates over rows and `BadRow`s; afterwards `dropped` says what gave no row, and why."""

    def __init__(
        self,
        files: Iterable[Path],
        format: str,
        reference: Reference | None,
        pairs: str,
        score: str | None,
    ) -> None:
        self._files, self._format = files, format
        self._reference, self._pairs, self._score = reference, pairs, score
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Raw | BadRow]:
        for file, line, read in self._read():
            if isinstance(read, BadRow):
                yield read
                continue
            try:
                rows = self._rows_of(read)
            except FormatError as error:
                yield BadRow((RowError(file, line, *error.problem),))
                continue
            for row in rows:
                checked = parse_row(row, file, line)
                yield checked if isinstance(checked, BadRow) else row

    def empty(self) -> str:
        """What is wrong if there is no row."""
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        advice = ""
        if self._reference is None and reasons:
            advice = ". With --reference field:NAME or file:PATH two answers are enough"
        return f"there is no row to write{': ' + reasons if reasons else ''}{advice}"

    def _read(self) -> Iterator[tuple[str, int, Answers | BadRow]]:
        kind = FORMATS[self._format]
        records = self._records(kind)
        if not kind.adjacent:
            yield from records
            return
        number = iter(range(1 << 62))

        def key(record: tuple[str, int, Answers | BadRow]) -> Any:
            answers = record[2]
            return next(number) if isinstance(answers, BadRow) else (record[0], str(answers.prompt))

        for _, members in groupby(records, key):
            (file, line, first), *others = members
            if isinstance(first, Answers):
                for _, _, other in others:
                    assert isinstance(other, Answers)
                    first.answers += other.answers
                    first.unscored += other.unscored
            yield file, line, first

    def _records(self, kind: Format) -> Iterator[tuple[str, int, Answers | BadRow]]:
        for file, line, raw in read_raw(self._files):
            if isinstance(raw, BadRow):
                yield file, line, raw
                continue
            try:
                if not isinstance(raw, dict):
                    raise FormatError("row", f"must be an object, found {found(raw)}")
                yield file, line, kind.read(raw, self._score)
            except FormatError as error:
                yield file, line, BadRow((RowError(file, line, *error.problem),))

    def _rows_of(self, read: Answers) -> list[Raw]:
        if read.unscored:
            self.dropped["answers without a score"] += read.unscored
        answers = self._sorted(read.answers)
        if self._reference is None:
            reference: Text = answers.pop(0).text if answers else ""
            few = "prompts with fewer than three different answers, the best for the reference"
        else:
            few = "prompts with fewer than two different answers"
            named = self._reference(read)
            if named is None:
                self.dropped["prompts without a reference in the file of references"] += 1
                return []
            reference = named
            others = [a for a in answers if text_of(a.text) != text_of(reference)]
            if len(others) < len(answers):
                self.dropped["answers that are the reference"] += 1
            answers = others
        if len(answers) < 2:
            self.dropped[few] += 1
            return []
        rows = [
            _row(read, self._format, reference, chosen, rejected, several=self._pairs == "all")
            for chosen, rejected in self._chosen_and_rejected(answers)
        ]
        if not rows:
            self.dropped["prompts whose answers have equal scores"] += 1
        return rows

    def _sorted(self, answers: Iterable[Answer]) -> list[Answer]:
        """Best first, each text once."""
        best: dict[str, Answer] = {}
        for answer in sorted(answers, key=lambda answer: -answer.score):
            if best.setdefault(text_of(answer.text), answer) is not answer:
                self.dropped["answers that repeat another one to their prompt"] += 1
        return [*best.values()]

    def _chosen_and_rejected(self, answers: list[Answer]) -> Iterator[tuple[Text, list[Text]]]:
        if self._pairs == "paper":
            first, second, *_ = answers
            if first.score > second.score:
                yield first.text, [second.text]
            return
        for answer in answers:
            worse = [other.text for other in answers if other.score < answer.score]
            if worse:
                yield answer.text, worse


def _row(
    read: Answers, format: str, reference: Text, chosen: Text, rejected: list[Text], several: bool
) -> Raw:
    row: Raw = {
        "prompt": as_messages(read.prompt, "user"),
        "reference": as_messages(reference, "assistant"),
        "chosen": as_messages(chosen, "assistant"),
        "rejected": [as_messages(text, "assistant") for text in rejected],
    }
    if not several:
        row["rejected"] = row["rejected"][0]
    source = read.raw.get("source")
    row["source"] = source if isinstance(source, str) else format
    for name in ("id", "prompt_id"):
        value = read.raw.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return {**row, "id": str(value)}
    return row


# References that are named

Reference = Callable[[Answers], Text | None]
"""The reference of a record, None if there is none."""


def reference_of(named: str) -> Reference | None:
    """What `--reference` names, None for "best".

    Raises:
        ValueError, BadRowsError: see `convert`.
    """
    how, _, what = named.partition(":")
    if named == BEST:
        return None
    if how == "field" and what:
        return lambda read: text_field(read.raw, what)
    if how == "file" and what:
        return _ReferenceFile(what)
    raise ValueError(f"--reference {named}: must be best, field:NAME or file:PATH")


def reference_files(named: str | None) -> list[Path]:
    """The files that `--reference file:PATH` reads, none for what else it names.

    Raises:
        ValueError: there is no such file, or it is of no format that is read.
    """
    how, _, path = (named or "").partition(":")
    if how != "file" or not path:
        return []
    try:
        return find_files(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--reference {named}: {error}") from error


class _ReferenceFile:
    """References by the text of their prompts, on disk."""

    def __init__(self, path: str) -> None:
        self._table = sqlite3.connect("")  # a temporary file, gone when this is
        self._table.execute("create table refs (prompt integer primary key, text, file, line)")
        count = 0
        for file, line, raw in read_raw(reference_files(f"file:{path}")):
            if isinstance(raw, BadRow):
                raise ValueError(f"--reference file:{path}: {raw.errors[0]}")
            try:
                prompt, reference = _prompt_and_reference(raw)
            except FormatError as error:
                raise ValueError(f"--reference file:{path}: {file}:{line}: {error}") from error
            self._add(prompt, reference, file, line)
            count += 1
        if not count:
            raise ValueError(f"--reference file:{path}: holds no row")

    def _add(self, prompt: Text, reference: Text, file: str, line: int) -> None:
        key = _key(prompt)
        row = self._get(key)
        if row is None:
            values = (key, json.dumps(reference), file, line)
            self._table.execute("insert into refs values (?, ?, ?, ?)", values)
        elif text_of(json.loads(row[0])) != text_of(reference):
            raise ValueError(
                f"{file}:{line}: has another reference to the prompt of {row[1]}:{row[2]}: "
                "leave one of them out"
            )

    def _get(self, key: int) -> Any:
        query = "select text, file, line from refs where prompt = ?"
        return self._table.execute(query, (key,)).fetchone()

    def __call__(self, read: Answers) -> Text | None:
        row = self._get(_key(read.prompt))
        return None if row is None else json.loads(row[0])


def _key(prompt: Text) -> int:
    return digest(text_of(prompt)) - (1 << 63)  # as SQLite has signed integers


def _prompt_and_reference(raw: Any) -> tuple[Text, Text]:
    if not isinstance(raw, dict):
        raise FormatError("row", f"must be an object, found {found(raw)}")
    names = ("instruction", "output") if "instruction" in raw else ("prompt", "reference")
    return text_field(raw, names[0]), text_field(raw, names[1])  # the former are AlpacaEval's


# Fields
