"""Rows -> store: what `dataset.py` does once for each data set.

Two passes, so that neither rows nor ids are held in memory. The first reads and checks all rows and
puts the texts of sound ones into a file beside the store, with one small entry a row in an index:
where it stands, and a key of its prompt, reference and wrapper. Then rows of equal keys are brought
together, and the second pass tokenises them chunk by chunk in several processes, in order.
"""

from __future__ import annotations

import marshal
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, groupby, product
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from polar_xtuner.cache import Block, StoreWriter
from polar_xtuner.records import BadRow, Row, RowCheck, RowError
from polar_xtuner.template import Candidate, PolarTemplate
from polar_xtuner.workers import WorkerError, run_in_order

CHUNK_CHARACTERS = 1 << 20
"""Characters that are tokenised in one go (or one group, if that has more)."""

MOST_PROCESSES = 16
"""That tokenise unless told otherwise: more would wait for the one that reads and writes."""

ENTRY = np.dtype([("key", "u8"), ("start", "i8"), ("size", "i8"), ("characters", "i8")])


def tokenise(
    rows: Iterable[Row | BadRow],
    template: PolarTemplate,
    writer: StoreWriter,
    *,
    names: Sequence[str],
    on_bad_row: str = "error",
    group_candidates: bool = True,
    num_proc: int | None = None,
) -> dict[str, Any]:
    """Write the groups of `rows` to a store.

    Args:
        names: of the files, as rows have them; a pair holds its number.
        on_bad_row: see `RowCheck`; "error" stops before anything is tokenised.
        group_candidates: False makes a group of every pair.
        num_proc: processes; None is one a core, 16 at most.

    Returns:
        `rows` and `bad_rows`, counted; `sources`, named by the rows, whose numbers pairs hold.

    Raises:
        BadRowsError: rows are bad and `on_bad_row` is "error".
        WorkerError: a process was killed.
    """
    check, uncut = RowCheck(on_bad_row), RowCheck(on_bad_row)
    path = writer.folder / "rows.spool"
    sources = {"": 0}
    try:
        with open(path, "wb") as file:
            good = tqdm(check.accept(rows), "Reading", unit=" rows", delay=1, mininterval=1)
            index = np.fromiter(_spool(good, file, names, sources), ENTRY)
        if group_candidates:
            index = index[_grouped(index["key"])]
        chunks = [index[start:stop] for start, stop in _chunks(index, group_candidates)]
        job = _Job(path, template, group_candidates)
        with tqdm(total=len(index), desc="Tokenising", unit=" rows", delay=1, mininterval=1) as bar:
            for done in _run(job, chunks, num_proc or _processes()):
                writer.write(done.arrays)
                uncut.rows += done.rows
                for bad in done.bad:
                    uncut.note(BadRow((RowError(names[bad.file], bad.line, "chosen", _EQUAL),)))
                bar.update(done.rows)
        uncut.finish()
    finally:
        path.unlink(missing_ok=True)
    return {
        "rows": uncut.rows - uncut.bad,
        "bad_rows": check.bad + uncut.bad,
        "sources": [*sources],
    }


_EQUAL = "equals a rejected candidate once both are cut to the length limits"


class _Texts(NamedTuple):
    """A sound row, as it waits in the file."""

    prompt: str
    reference: str
    wrapper: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    margin: float
    file: int
    line: int
    source: int


def _spool(
    rows: Iterable[Row], file: IO[bytes], names: Sequence[str], sources: dict[str, int]
) -> Iterator[tuple[int, int, int, int]]:
    """Write the texts of rows to `file` and give the index entry of each; number the sources."""
    numbers = {name: number for number, name in enumerate(names)}
    start = 0
    for row in rows:
        prefix = (row.prompt, row.reference, row.wrapper)
        source = sources.setdefault(row.source or "", len(sources))
        place = (row.margin, numbers[row.file], row.line, source)
        data = marshal.dumps((*prefix, row.chosen, row.rejected, *place))
        file.write(data)
        texts = (*row.chosen, *row.rejected)
        characters = sum(map(len, texts)) + len(texts) * (len(row.prompt) + len(row.reference))
        yield _key(prefix), start, len(data), characters
        start += len(data)


def _key(texts: Iterable[str]) -> int:
    digest = blake2b(digest_size=8)
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(digest.digest(), "big")


def _grouped(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Row numbers with equal keys side by side, groups in the order of their first rows."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def _chunks(index: NDArray[Any], grouped: bool) -> Iterator[tuple[int, int]]:
    """First and last row of chunks of about `CHUNK_CHARACTERS`, which divide no group."""
    ends = np.cumsum(index["characters"])
    borders = np.arange(1, len(index) + 1)
    if grouped:
        borders = np.append(np.flatnonzero(np.diff(index["key"])) + 1, len(index))
    start = done = 0
    while start < len(index):
        full = np.searchsorted(ends, done + CHUNK_CHARACTERS) + 1
        stop = int(borders[min(np.searchsorted(borders, full), len(borders) - 1)])
        yield start, stop
        start, done = stop, int(ends[stop - 1])


class _Done(NamedTuple):
    rows: int
    arrays: dict[str, NDArray[Any]]
    bad: list[_Texts]


@dataclass(frozen=True)
class _Job:
    """What a process needs to tokenise any chunk, given the index entries of its rows."""

    path: Path
    template: PolarTemplate
    group_candidates: bool

    def __call__(self, entries: NDArray[Any]) -> _Done:
        rows = self._read(entries)
        ids = map(
            tuple,
            self.template.encode(
                [
                    Candidate(row.prompt, row.reference, text, row.wrapper)
                    for row in rows
                    for text in (*row.chosen, *row.rejected)
                ]
            ),
        )
        block, bad = Block(), []
        for _, members in groupby(rows, key=lambda row: row[:3]):
            numbers: dict[tuple[int, ...], int] = {}
            pairs: list[tuple[Any, ...]] = []
            for row in members:
                chosen, rejected = [
                    [
                        (numbers.setdefault(next(ids), len(numbers)), index, len(text))
                        for index, text in enumerate(texts)
                    ]
                    for texts in (row.chosen, row.rejected)
                ]
                if {c for c, *_ in chosen} & {r for r, *_ in rejected}:
                    bad.append(row)
                else:
                    place = (row.margin, row.file, row.line, row.source)
                    pairs += [
                        (c, r, *place, c_index, r_index, c_length, r_length)
                        for (c, c_index, c_length), (r, r_index, r_length) in product(
                            chosen, rejected
                        )
                    ]
            sequences = [*numbers]
            groups = [pairs] if self.group_candidates else [[pair] for pair in pairs]
            for group in filter(None, groups):
                used = dict.fromkeys(chain.from_iterable(pair[:2] for pair in group))
                place_of = {candidate: place for place, candidate in enumerate(used)}
                block.add(
                    [sequences[candidate] for candidate in used],
                    [(place_of[c], place_of[r], *row_of) for c, r, *row_of in group],
                )
        return _Done(len(rows), block.arrays(), bad)

    def _read(self, entries: NDArray[Any]) -> list[_Texts]:
        with open(self.path, "rb") as file:
            places = entries[["start", "size"]].tolist()
            return [
                _Texts(*marshal.loads(os.pread(file.fileno(), size, at))) for at, size in places
            ]


def _processes() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MOST_PROCESSES)


def _run(job: _Job, entries: list[NDArray[Any]], processes: int) -> Iterator[_Done]:
    processes = min(processes, len(entries))
    # A slow tokenizer may be code of its own, which another process would not find.
    if processes < 2 or not job.template.is_fast or not sys.executable:
        yield from map(job, entries)
        return
    try:
        yield from run_in_order(job, entries, processes)
    except WorkerError as error:
        raise WorkerError(f"{error}: lower num_proc, 1 needs no other process") from error
