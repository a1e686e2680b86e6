"""Rows -> a file of them, in a format that `records.py` reads: whole, or not there at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from polar_xtuner.records import BadRow, RowCheck

BATCH = 1000
"""Rows of a Parquet row group."""

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")

Raw = dict[str, Any]
Message = dict[str, str]
Text = str | list[Message]


def write_rows(
    rows: Iterable[Raw | BadRow],
    output: Path,
    *,
    on_bad_row: str = "error",
    several: bool = False,
    names: Sequence[str] = ("source", "id"),
    empty: Callable[[], str] = lambda: "there is no row to write",
) -> int:
    """Writes raw rows; how many. Their fields are the same in all, texts are message lists.

    Args:
        output: its ending is one of `ENDINGS`.
        on_bad_row: see `RowCheck`.
        several: `rejected` is a list of candidates.
        names: fields that may be there beside the texts, all strings.
        empty: says what is wrong if there is no row.

    Raises:
        BadRowsError: a row is bad, and `on_bad_row` is "error".
        ValueError: the ending is another, Parquet cannot be written, or there is no row.
    """
    check_output(output)
    write = _parquet if output.name.lower().endswith(".parquet") else _lines
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        written = write(RowCheck(on_bad_row).accept(rows), unfinished, several, names)
        if not written:
            raise ValueError(empty())
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def check_output(
    output: Path, inputs: Iterable[Path] = (), endings: tuple[str, ...] = ENDINGS
) -> None:
    """Raise ValueError for a file that cannot be written, or is one of `inputs`."""
    if not output.name.lower().endswith(endings):
        raise ValueError(f"{output}: its name must end in {' or '.join(endings)}")
    if output.is_dir():
        raise ValueError(f"{output} is a folder: the output is a file")
    if output.resolve() in {path.resolve() for path in inputs}:
        raise ValueError(f"{output} is read too, and would be lost: give another output")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}")
    if output.name.lower().endswith(".parquet"):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(
                f"{output} needs pyarrow, which is not installed: pip install pyarrow, or give "
                "a .jsonl output"
            ) from None


def _lines(rows: Iterable[Raw], path: Path, several: bool, names: Sequence[str]) -> int:
    written = 0
    with _text(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


@contextmanager
def _text(path: Path) -> Iterator[Any]:
    if ".jsonl.gz." in path.name.lower():
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            yield stream
    else:
        with path.open("w", encoding="utf-8") as stream:
            yield stream


def _parquet(rows: Iterable[Raw], path: Path, several: bool, names: Sequence[str]) -> int:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = dict.fromkeys(("prompt", "reference", "chosen", "rejected"), messages)
    if several:
        columns["rejected"] = pa.list_(messages)
    columns |= dict.fromkeys(names, pa.string())
    schema = pa.schema([*columns.items()])
    written = 0
    rows = iter(rows)
    with ParquetWriter(path, schema) as writer:
        while batch := [*islice(rows, BATCH)]:
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def as_messages(text: Text, role: str) -> list[Message]:
    """A text as a message of `role`; messages as they are, with that role where they have none."""
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return [{"role": m.get("role") or role, "content": m["content"]} for m in text]
