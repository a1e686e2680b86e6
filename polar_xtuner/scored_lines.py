"""Rows to lines of JSON with their rewards: in order, in constant memory, and resumable.

    {"file", "line", "id", "key", "scores" | "chosen_scores" and "rejected_scores", "error"?}

A line's `key` depends on the row and on the settings that it was scored with, so that an output can
be told from that of other rows or of another model. An `error` says why a row was not scored, or
which of its rewards, null in the lists, could not be had.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from polar_xtuner.evaluation import wilson_interval
from polar_xtuner.records import BadRow, Row
from polar_xtuner.rewards import Scored
from polar_xtuner.template import Candidate

SCORES = ("scores", "chosen_scores", "rejected_scores")
BATCH = 10_000  # lines that become columns together


class Scorer(Protocol):
    """A `RewardModelClient` or a `PolarScorer`."""

    def stream(self, items: Iterable[Any]) -> Iterator[Scored]: ...


def scored_lines(
    scorer: Scorer, rows: Iterable[Row | BadRow], settings: str
) -> Iterator[dict[str, Any]]:
    """The line of every row, in order; holds only the rows whose rewards are under way."""
    waiting: deque[_Line] = deque()

    def candidates() -> Iterator[Candidate]:
        for row in rows:
            waiting.append(_line_of(row, settings))
            if isinstance(row, Row):
                for text in (*row.outputs, *row.chosen, *row.rejected):
                    yield Candidate(row.prompt, row.reference, text, row.wrapper)

    for scored in scorer.stream(candidates()):
        while waiting[0].is_done:  # a bad row, of which nothing was asked
            yield waiting.popleft().finish()
        waiting[0].scored.append(scored)
        if waiting[0].is_done:
            yield waiting.popleft().finish()
    while waiting:
        yield waiting.popleft().finish()


@dataclass
class _Line:
    """A row on its way to a line."""

    fields: dict[str, Any]
    names: list[tuple[str, str]]
    """Of every candidate: the field of the line for its reward, and what an error calls it."""
    scored: list[Scored] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.scored) == len(self.names)

    def finish(self) -> dict[str, Any]:
        problems = []
        for (scores, name), (reward, error) in zip(self.names, self.scored):
            self.fields.setdefault(scores, []).append(reward)
            if reward is None:
                problems.append(f"{name}: {error}")
        if problems:
            self.fields["error"] = "; ".join(problems)
        return self.fields


def _line_of(row: Row | BadRow, settings: str) -> _Line:
    if isinstance(row, BadRow):
        first, problem = row.errors[0], "; ".join(f"{e.field}: {e.problem}" for e in row.errors)
        fields = {"file": first.file, "line": first.line, "id": None}
        return _Line({**fields, "key": _key(settings, problem), "error": problem}, [])
    texts = [row.prompt, row.reference, row.wrapper, row.outputs, row.chosen, row.rejected]
    names = [
        (scores, f"{name}[{i}]")
        for scores, name, outputs in zip(SCORES, ("output", "chosen", "rejected"), texts[3:])
        for i in range(len(outputs))
    ]
    fields = {"file": row.file, "line": row.line, "id": row.id}
    return _Line({**fields, "key": _key(settings, texts)}, names)


def _key(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def take_scored(
    scorer: Scorer, output: Path, rows: Iterator[Row | BadRow], settings: str
) -> Iterator[dict[str, Any]]:
    """The lines that an earlier run has left in `output`, their rows taken from `rows`.

    Goes to the last line without an error; lines before it that have one are done again. Once all
    is read `output` holds these lines and no more: what followed is left to `scored_lines`, a line
    that was half written, and errors, which a server that dies leaves behind.

    Raises:
        ValueError: a line is not that of its row; `output` stays as it is.
    """
    kept = _to_keep(output)
    unfinished = output.with_name(f"{output.name}.unfinished")
    try:
        with output.open("rb") as old, unfinished.open("w", encoding="utf-8") as new:
            for start in range(0, kept, BATCH):
                lines, to_do = [], []
                for number in range(start + 1, min(start + BATCH, kept) + 1):
                    line = _parsed(old.readline(), output, number)
                    row = next(rows, None)
                    _check_same(line, row, settings, f"{output}:{number}")
                    lines.append(line)
                    if "error" in line and row is not None:
                        to_do.append(row)
                done = scored_lines(scorer, to_do, settings)
                for line in lines:
                    line = next(done) if "error" in line else line
                    new.write(json.dumps(line) + "\n")
                    yield line
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_same(line: dict[str, Any], row: Row | BadRow | None, settings: str, where: str) -> None:
    if row is None:
        raise ValueError(f"{where} has no row: there are fewer rows than lines")
    expected = _line_of(row, settings).fields
    if any(line.get(name) != expected[name] for name in ("file", "line", "key")):
        raise ValueError(
            f"{where} is of another row, or scored by another model or with other settings, than "
            f"{expected['file']}:{expected['line']}"
        )


def _to_keep(output: Path) -> int:
    """Lines up to the last one without an error."""
    kept = 0
    with output.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.endswith(b"\n") and "error" not in _parsed(line, output, number):
                kept = number
    return kept


def _parsed(line: bytes, output: Path, number: int) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict) or "key" not in parsed:
        raise ValueError(f"{output}:{number} is no line of scores")
    return parsed


def write_parquet(lines: Path, output: Path) -> None:
    """Lines as columns; a field that a line lacks is null."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    columns = {"file": pa.string(), "line": pa.int64(), "id": pa.string(), "key": pa.string()}
    columns |= dict.fromkeys(SCORES, pa.list_(pa.float64())) | {"error": pa.string()}
    schema = pa.schema([*columns.items()])
    unfinished = output.with_name(f"{output.name}.unfinished")
    with lines.open(encoding="utf-8") as stream, ParquetWriter(unfinished, schema) as writer:
        batch: list[dict[str, Any]] = []
        for line in stream:
            batch.append(json.loads(line))
            if len(batch) == BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch.clear()
        writer.write_table(pa.Table.from_pylist(batch, schema))
    unfinished.replace(output)


class Summary:
    """What lines add up to.

    Attributes:
        rows, errors, bad_rows: all lines, those with an error, those of rows that are not sound.
        first_error: the first one and where it is, "" where there is none.
        n: pairs with both rewards.
    """

    def __init__(self) -> None:
        self.rows = self.errors = self.bad_rows = 0
        self.first_error = ""
        self.n = self._right = self._ties = 0
        self._margins = 0.0

    def add(self, line: dict[str, Any]) -> None:
        self.rows += 1
        if "error" in line:
            self.errors += 1
            self.bad_rows += not any(name in line for name in SCORES)
            where = f"{line['file']}:{line['line']}: {line['error']}"
            self.first_error = self.first_error or where
        self._add_pairs(line.get("chosen_scores", ()), line.get("rejected_scores", ()))

    def _add_pairs(self, chosen: Sequence[float | None], rejected: Sequence[float | None]) -> None:
        for better in chosen:
            for worse in rejected:
                if better is not None and worse is not None:
                    self.n += 1
                    self._right += better > worse
                    self._ties += better == worse
                    self._margins += better - worse

    def figures(self) -> dict[str, Any]:
        """n and numbers of lines, and where there are pairs, their accuracy and margins."""
        figures: dict[str, Any] = {"n": self.n, "errors": self.errors, "bad_rows": self.bad_rows}
        if self.n:
            figures["accuracy"] = self._right / self.n
            figures["accuracy_interval_95"] = [*wilson_interval(self._right, self.n)]
            figures["mean_margin"] = self._margins / self.n
            figures["ties"] = self._ties
        return figures
