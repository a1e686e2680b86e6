"""What a training row is, and how rows are found, read and checked.

A row is one JSON object: a prompt, a reference answer, one or several chosen and one or several
rejected outputs. Each is a plain string or a list of messages; all that counts of a message list
is its text, the contents joined by newlines.

Reading does not stop at a bad row. The readers yield, in order, a `Row` for what is sound and a
`BadRow` for what is not; a `BadRow` lists all that is wrong with its row as file, line, field and
problem. What becomes of bad rows is decided in one place, by `RowCheck`, once the pass is over,
so the faults of a data set come up together and not one a run.

    find_files -> files -> read_rows -> Row | BadRow -> RowCheck.accept -> Row

Rows stream: lines one by one, parquet by small batches; only a JSON array is loaded whole. No
value is converted to fit: a reward model would learn from the text "None" without complaint.
"""

import glob
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from polar_xtuner._checks import (
    WRAPPERS,
    Problem,
    RawRow,
    found,
    one_line,
    scan_json,
    shown,
    skip_space,
)

__all__ = [
    "WRAPPERS",
    "BadRow",
    "BadRowsError",
    "MapFn",
    "Row",
    "RowCheck",
    "RowError",
    "find_files",
    "map_rows",
    "parse_row",
    "read_lines",
    "read_raw",
    "read_rows",
    "text_of",
]

MapFn = Callable[[dict[str, Any]], dict[str, Any]]
T = TypeVar("T")

_LISTED = 20  # errors that a report spells out
_BATCH = 256  # parquet rows in memory at a time
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"  # what JSON calls white space


@dataclass(frozen=True, slots=True)
class Row:
    """One sound row. Every combination of a chosen and a rejected text is a pair."""

    prompt: str
    reference: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    outputs: tuple[str, ...]
    """The candidates of a row to score, () in a training row."""
    wrapper: str
    source: str | None
    id: str | None
    margin: float
    file: str
    line: int
    """From 1: the line in a file of lines, elsewhere the number of the row."""
    extra: Mapping[str, Any]
    """All other fields, as they were read."""


@dataclass(frozen=True, slots=True)
class RowError:
    """One thing that is wrong with one row, and where."""

    file: str
    line: int
    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.problem}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, with all that is wrong with it."""

    errors: tuple[RowError, ...]


class BadRowsError(ValueError):
    """Some rows of a pass are bad. `errors`: the first 20; `count`: how many rows are bad."""

    def __init__(self, errors: Sequence[RowError], total: int, count: int, rows: int) -> None:
        super().__init__(errors, total, count, rows)
        self.errors = list(errors)
        self.total = total
        self.count = count
        self.rows = rows

    def __str__(self) -> str:
        return f'{self.report()}\nFix them, or leave them out with on_bad_row="skip".'

    def report(self) -> str:
        """How many rows are bad, and the first errors, one a line."""
        lines = [f"{self.count} of {self.rows} rows are bad:", *map(str, self.errors)]
        if self.total > len(self.errors):
            lines.append(f"... and {self.total - len(self.errors)} more")
        return "\n  ".join(lines)


class RowCheck:
    """Lets the good rows of a pass through and keeps account of the bad ones.

    `rows` counts the rows seen, good and bad, `bad` the bad ones; `errors` holds the first 20
    errors.

    Args:
        on_bad_row: "error" raises once the pass is over if any row was bad; "skip" leaves bad
            rows out and logs one warning that names them.

    Raises:
        ValueError: for any other `on_bad_row`.
    """

    def __init__(self, on_bad_row: str = "error") -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f'Unknown {on_bad_row=}: must be "error" or "skip"')
        self.on_bad_row = on_bad_row
        self.rows = 0
        self.bad = 0
        self.errors: list[RowError] = []
        self._total = 0  # errors, listed or not

    def accept(self, items: Iterable[T | BadRow]) -> Iterator[T]:
        """Yields what is not a `BadRow` of `items`: rows, or what was made of them.

        Raises:
            BadRowsError: after the last item, if a row was bad and `on_bad_row` is "error".
        """
        for item in items:
            self.rows += 1
            if isinstance(item, BadRow):
                self.note(item)
            else:
                yield item
        self.finish()

    def note(self, bad: BadRow) -> None:
        """Counts a bad row."""
        self.bad += 1
        self._total += len(bad.errors)
        self.errors += bad.errors[: _LISTED - len(self.errors)]

    def finish(self) -> None:
        """What `accept` does after the last item."""
        if self.bad:
            error = BadRowsError(self.errors, self._total, self.bad, self.rows)
            if self.on_bad_row == "error":
                raise error
            logging.getLogger(__name__).warning("Bad rows are left out: %s", error.report())


def text_of(value: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a string (itself) or of a message list (its contents, joined by newlines)."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def parse_row(raw: Any, file: str, line: int, *, scoring: bool = False) -> Row | BadRow:
    """Checks one raw row, completely, and makes it a `Row`.

    Args:
        raw: the JSON object, as Python's `json` would give it.
        file, line: where the row stands, to name it by.
        scoring: the row is one to score. It then has either a field `output`, one candidate or
            several, or chosen and rejected like a training row. `output` takes precedence:
            beside it, chosen and rejected are fields like any other.
    """
    if not isinstance(raw, dict):
        return _bad(file, line, "row", f"must be an object, found {found(raw)}")
    row = RawRow(raw)
    prompt, reference = row.prompt(), row.text("reference")
    chosen: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    if scoring and row.holds("output"):
        outputs = row.candidates("output")
    elif scoring and not row.holds("chosen") and not row.holds("rejected"):
        row.note("output", "is missing, and so are chosen and rejected")
    else:
        chosen, rejected = row.sides()
    wrapper, source, id, margin = row.wrapper(), row.source(), row.id(), row.margin()
    if row.problems:
        return _bad_row(file, line, row.problems)
    extra = {name: value for name, value in raw.items() if name not in row.read}
    return Row(
        prompt, reference, chosen, rejected, outputs, wrapper, source, id, margin, file, line, extra
    )


def find_files(data_files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `data_files` names: a file, a folder, a glob, or a list of such.

    A folder stands for the files of a known format in it and below, without hidden ones; a glob
    for every file it matches, `**` included. Both are sorted. A file named twice is read once,
    however it is spelled, by the first of its names.

    Raises:
        FileNotFoundError: an entry names nothing that exists, or nothing to read.
        ValueError: a file's format is unknown, or the list is empty.
    """
    entries = [data_files] if isinstance(data_files, (str, Path)) else list(data_files)
    if not entries:
        raise ValueError("no files: the list is empty")
    paths = [path for entry in entries for path in _paths_of(entry)]
    for path in paths:
        _format(path)
    names: dict[Path, Path] = {}
    for path in paths:
        names.setdefault(path.resolve(), path)
    return list(names.values())


def read_rows(
    files: Iterable[Path], map_fn: MapFn | None = None, *, scoring: bool = False
) -> Iterator[Row | BadRow]:
    """Streams the rows of files, in order.

    A file that breaks off or cannot be unpacked gives its rows up to there, then one `BadRow`
    of the field "file", and reading goes on with the next file.

    Args:
        files: what `find_files` gives.
        map_fn: called with each raw row; the dict it returns is merged over that row. If it
            raises, the row is bad.
        scoring: see `parse_row`.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file's format is unknown.
    """
    for file, line, raw in read_raw(files):
        yield _checked(raw, file, line, map_fn, scoring)


def read_raw(files: Iterable[Path]) -> Iterator[tuple[str, int, Any]]:
    """Streams (file, line, raw row) as `read_rows` reads them, before they are checked.

    The raw row is whatever JSON has there, or a `BadRow` where nothing can be had.
    """
    for path in files:
        for line, raw in _READERS[_format(path)](path):
            yield str(path), line, raw


def map_rows(
    examples: Iterable[Any], name: str, map_fn: MapFn | None = None, *, scoring: bool = False
) -> Iterator[Row | BadRow]:
    """`read_rows` for dicts that are no files, such as a Hugging Face dataset.

    Their `file` is `name`, their `line` the number of the row, from 1.
    """
    for line, raw in enumerate(examples, 1):
        yield _checked(raw, name, line, map_fn, scoring)


def _checked(raw: Any, file: str, line: int, map_fn: MapFn | None, scoring: bool) -> Row | BadRow:
    if isinstance(raw, BadRow):
        return raw
    if map_fn is not None and isinstance(raw, dict):
        try:
            mapped = map_fn(raw)
        except Exception as error:  # whatever a user's function raises
            problem = f"raised {type(error).__name__}: {one_line(str(error))}"
            return _bad(file, line, "dataset_map_fn", problem)
        if not isinstance(mapped, dict):
            problem = f"must return a dict, found {found(mapped)}"
            return _bad(file, line, "dataset_map_fn", problem)
        raw = {**raw, **mapped}
    return parse_row(raw, file, line, scoring=scoring)


def _bad(file: str | Path, line: int, field: str, problem: str) -> BadRow:
    return _bad_row(file, line, [(field, problem)])


def _bad_row(file: str | Path, line: int, problems: Iterable[Problem]) -> BadRow:
    return BadRow(tuple(RowError(str(file), line, *problem) for problem in problems))


def _paths_of(entry: str | Path) -> list[Path]:
    path = Path(entry)
    if path.is_file():
        return [path]
    if path.is_dir():
        paths = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and file.name.lower().endswith(tuple(_READERS))
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        what = "folder holds no file of a known format"
    elif glob.has_magic(str(entry)):
        paths = [Path(name) for name in sorted(glob.glob(str(entry), recursive=True))]
        paths = [file for file in paths if file.is_file()]
        what = "glob matches no file"
    else:
        raise FileNotFoundError(f"no such file or folder: {entry}")
    if not paths:
        raise FileNotFoundError(f"this {what}: {entry}")
    return paths


def _format(path: Path) -> str:
    for ending in _READERS:
        if path.name.lower().endswith(ending):
            return ending
    raise ValueError(f"unknown format: {path} (known are {', '.join(_READERS)})")


# A reader yields (line, raw row), or (line, BadRow) where no raw row can be had.


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Streams (line, raw row) of a file of JSON lines; (line, `BadRow`) where no row can be had."""
    line = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for line, data in enumerate(stream, 1):
                data = data.removeprefix(_BOM) if line == 1 else data
                if data.strip(_SPACE):
                    yield line, _parse_line(data, path, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = f"cannot be unpacked from here on: {one_line(str(error))}"
        yield line + 1, _bad(path, line + 1, "file", problem)


def _parse_line(data: bytes, path: Path, line: int) -> Any:
    try:
        text = data.decode()
        raw, end, problems = scan_json(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return _bad_row(path, line, problems) if problems else raw
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: {error.reason} (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} (column {error.colno})"
    except RecursionError:
        problem = "is nested too deeply"
    return _bad(path, line, "row", problem)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as stream:
        starts = (line.removeprefix(_BOM).lstrip(_SPACE)[:1] for line in stream)
        is_array = next(filter(None, starts), b"") == b"["
    return _read_array(path) if is_array else read_lines(path)


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    # Bytes that are not UTF-8 become surrogates, so that they spoil only their own row.
    text = path.read_bytes().removeprefix(_BOM).decode(errors="surrogateescape")
    row = 0
    at = skip_space(text, text.index("[") + 1)
    try:
        more = not text.startswith("]", at)
        while more:
            raw, end, problems = scan_json(text, at)
            row += 1
            try:
                text[at:end].encode()
            except UnicodeEncodeError as error:
                problems = [("row", f"is not UTF-8 (character {error.start + 1} of the row)")]
            yield row, _bad_row(path, row, problems) if problems else raw
            more = text.startswith(",", end)
            at = end + more
        if not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at = skip_space(text, at + 1)
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} (column {error.colno}); rows after it are not read"
        yield error.lineno, _bad(path, error.lineno, "file", problem)
    except RecursionError:
        line = text.count("\n", 0, skip_space(text, at)) + 1
        problem = "holds a row here that is nested too deeply; rows after it are not read"
        yield line, _bad(path, line, "file", problem)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    row = 0
    with path.open("rb") as stream:
        try:
            file = ParquetFile(stream)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                yield 1, _bad(path, 1, "file", "has two columns of one name; no row of it is read")
                return
            for batch in file.iter_batches(_BATCH):
                for i in range(batch.num_rows):
                    row += 1
                    raw, problems = {}, []
                    for name, column in zip(names, batch.columns, strict=True):
                        try:
                            raw[name] = column[i].as_py()
                        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
                            problems.append(
                                (shown(name), f"cannot be read: {one_line(str(error))}")
                            )
                    yield row, _bad_row(path, row, problems) if problems else raw
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            problem = f"is not readable parquet from here on: {one_line(str(error))}"
            yield row + 1, _bad(path, row + 1, "file", problem)


_READERS = {
    ".jsonl": read_lines,
    ".jsonl.gz": read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
