"""Rows as verl reads them: prompt and reference in, verl's Parquet columns out.

    data_source    the row's `source`, or a name for all
    prompt         messages; verl applies the policy's chat template to them
    ability        a name for all
    reward_model   style "polar", ground_truth: the reference, as messages
    extra_info     split, index, ability, prompt (again: a reward function sees only this one),
                   wrapper, id

These are the columns of POLAR's own recipe. Rows are read and checked as in training and stream
in batches of `BATCH`; the file is there only once it is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from polar_xtuner.records import BadRow, Row, RowCheck, RowError, read_rows
from polar_xtuner.row_files import as_messages

BATCH = 1000
MESSAGES = "verl_messages"  # where a row keeps its prompt and reference as they were read


def read_prompts(files: Iterable[Path]) -> Iterator[Row | BadRow]:
    """Rows that have a prompt and a reference; what else they have does not matter.

    A message of a prompt needs its role, which a chat template asks for.
    """
    for row in read_rows(files, _keep_messages, scoring=True):
        if isinstance(row, Row) and not isinstance(row.extra[MESSAGES]["prompt"], str):
            errors = tuple(
                RowError(
                    row.file, row.line, f"prompt[{i}].role", "is missing: chat templates need it"
                )
                for i, message in enumerate(row.extra[MESSAGES]["prompt"])
                if not message.get("role")
            )
            if errors:
                yield BadRow(errors)
                continue
        yield row


def _keep_messages(raw: dict[str, Any]) -> dict[str, Any]:
    """To read a row as one to score, of whose output nothing is asked."""
    return {"output": "", MESSAGES: {name: raw.get(name) for name in ("prompt", "reference")}}


def write_verl_parquet(
    rows: Iterable[Row | BadRow],
    output: Path,
    data_source: str = "polar",
    ability: str = "general",
    split: str = "train",
    on_bad_row: str = "error",
) -> int:
    """Writes what `read_prompts` gives; how many rows it wrote.

    Args:
        data_source: of rows without a `source`.
        ability, split: of all rows.
        on_bad_row: see `RowCheck`.

    Raises:
        BadRowsError: a row is bad, and `on_bad_row` is "error".
        ValueError: there is no row.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    info = [("split", pa.string()), ("index", pa.int64()), ("ability", pa.string())]
    info += [("prompt", pa.list_(message)), ("wrapper", pa.string()), ("id", pa.string())]
    schema = pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("ability", pa.string()),
            (
                "reward_model",
                pa.struct([("style", pa.string()), ("ground_truth", pa.list_(message))]),
            ),
            ("extra_info", pa.struct(info)),
        ]
    )

    def columns(row: Row, index: int) -> dict[str, Any]:
        prompt = as_messages(row.extra[MESSAGES]["prompt"], "user")
        return {
            "data_source": row.source or data_source,
            "prompt": prompt,
            "ability": ability,
            "reward_model": {
                "style": "polar",
                "ground_truth": as_messages(row.extra[MESSAGES]["reference"], "assistant"),
            },
            "extra_info": {
                "split": split,
                "index": index,
                "ability": ability,
                "prompt": prompt,
                "wrapper": row.wrapper,
                "id": row.id,
            },
        }

    written = 0
    unfinished = output.with_name(f"{output.name}.unfinished")
    good = RowCheck(on_bad_row).accept(rows)
    try:
        with ParquetWriter(unfinished, schema) as writer:
            while batch := [columns(row, written + i) for i, row in enumerate(islice(good, BATCH))]:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                written += len(batch)
        if not written:
            raise ValueError("there is no row to write")
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return written
