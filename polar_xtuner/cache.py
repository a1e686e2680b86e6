"""Tokenised groups on disk, memory-mapped.

A group is all candidates of one row, laid out as `[prefix c0][c1][c2]...`: the longest common
token prefix once, then every candidate's own suffix. The store is five flat arrays, appended to
while rows are tokenised, so that memory does not grow with the data, and mapped by every
process that trains on them.

A store is built in a folder of its own and renamed into place when it is complete: what stands
under a key's name is whole, whatever happened to the process that built it. Processes of one
machine take turns on a lock, so that the first builds and the others find it built; where a lock
does not reach (two machines on one network file system) both build and one rename wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

STORE_VERSION = 1
"""Part of every cache key: raise it whenever the arrays of a store change their meaning."""

PAIR = np.dtype([("chosen", "i4"), ("rejected", "i4"), ("margin", "f8")])
"""A pair of a group: its two candidates, numbered within the group, and the row's margin."""

ARRAYS: dict[str, Any] = {
    "tokens": np.dtype("u4"),  # all groups' ids, one after the other
    "pieces": np.dtype("i4"),  # lengths: prefix, c0, c1, ... of every group
    "pairs": PAIR,
    "groups": np.dtype([("tokens", "i8"), ("pieces", "i8"), ("pairs", "i8")]),  # ends
    "rows": np.dtype([("file", "i4"), ("line", "i8")]),  # each group's row: number of file, line
}


class Group(NamedTuple):
    """Candidates that share their prefix.

    `tokens` (sum of pieces,) ids; `pieces` (1 + candidates,) lengths of the prefix and of each
    suffix; `pairs` (pairs,) of dtype `PAIR`.
    """

    tokens: NDArray[Any]
    pieces: NDArray[Any]
    pairs: NDArray[Any]


def lay_out(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Distinct sequences as one group: its ids and the lengths of its pieces.

    Each suffix keeps at least one id: a sequence ends with the reward token, which stands nowhere
    else in any other, so no sequence is a prefix of another.
    """
    first = sequences[0]
    shared = len(first)
    for other in sequences[1:]:
        limit = min(shared, len(other))
        if first[:limit] == other[:limit]:
            shared = limit
        else:
            shared = next(i for i in range(limit) if first[i] != other[i])
    shared = min(shared, *(len(s) - 1 for s in sequences))
    suffixes = [s[shared:] for s in sequences]
    tokens = [*first[:shared], *(i for suffix in suffixes for i in suffix)]
    return tokens, [shared, *map(len, suffixes)]


class TokenStore:
    """Groups of a complete store; indexing maps, it does not load."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self._arrays = {name: _map(folder / name, dtype) for name, dtype in ARRAYS.items()}
        ends = self._arrays["groups"]
        self._starts = np.zeros(len(ends) + 1, dtype=ends.dtype)
        self._starts[1:] = ends
        self.lengths: NDArray[np.int64] = np.diff(self._starts["tokens"])
        """(groups,) tokens of each group."""
        self.pair_counts: NDArray[np.int64] = np.diff(self._starts["pairs"])
        """(groups,) pairs of each group."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Group:
        start, end = self._starts[index], self._starts[index + 1]
        return Group(
            *(self._arrays[name][start[name] : end[name]] for name in ("tokens", "pieces", "pairs"))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self._folder,)  # workers map the files, they get no copy

    def row(self, index: int) -> tuple[int, int]:
        """Number of the file and line in it where the row of a group stands."""
        file, line = self._arrays["rows"][index]
        return int(file), int(line)

    def sequence_lengths(self) -> NDArray[np.int64]:
        """(groups,) tokens of each group if every candidate were laid out by itself."""
        starts = self._starts["pieces"]
        prefixes = np.asarray(self._arrays["pieces"])[starts[:-1]].astype(np.int64)
        candidates = np.diff(starts) - 1
        return self.lengths + prefixes * (candidates - 1)


class StoreWriter:
    """Appends groups to the arrays of a store that is being built."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: open(folder / name, "wb") for name in ARRAYS}
        self._ends = np.zeros(1, ARRAYS["groups"])

    def add(
        self,
        sequences: Sequence[Sequence[int]],
        pairs: Sequence[tuple[int, int, float]],
        row: tuple[int, int],
    ) -> None:
        """One group of distinct `sequences`; `row` is the number of its file and its line."""
        tokens, pieces = lay_out(sequences)
        self._write("tokens", tokens)
        self._write("pieces", pieces)
        self._write("pairs", list(pairs))
        self._files["groups"].write(self._ends.tobytes())
        self._write("rows", [row])

    def _write(self, name: str, values: list[Any]) -> None:
        self._files[name].write(np.array(values, ARRAYS[name]).tobytes())
        if name in self._ends.dtype.names:  # type: ignore[operator]
            self._ends[name] += len(values)

    def finish(self, meta: dict[str, Any]) -> None:
        """Flush to disk; `meta` is written last, and with the size of every array."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
            file.close()
        (self._folder / "meta.json").write_text(json.dumps({**meta, "sizes": sizes}, indent=1))


def open_or_build(
    cache_dir: Path, key: str, build: Callable[[StoreWriter], dict[str, Any]]
) -> TokenStore:
    """The store of `key`, built by `build(writer) -> meta` where it is not yet complete.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = cache_dir / key
    if _is_complete(folder):
        return TokenStore(folder)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{key}.lock"):
            if not _is_complete(folder):
                _build(folder, build)
    except OSError as error:
        raise OSError(
            f"cannot build the token cache in {cache_dir}: {error}. If it is the cache that cannot "
            "be written, free some space there, or set cache_dir to another folder"
        ) from error
    return TokenStore(folder)


def _build(folder: Path, build: Callable[[StoreWriter], dict[str, Any]]) -> None:
    host = socket.gethostname()
    for stale in folder.parent.glob(f"{folder.name}.{host}.*.partial"):
        shutil.rmtree(stale)  # of a killed build: its process held the lock that is ours now
    partial = folder.parent / f"{folder.name}.{host}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        writer = StoreWriter(partial)
        writer.finish(build(writer))
        if folder.exists() and not _is_complete(folder):
            logger.warning("%s is damaged (a file is missing or cut short): rebuilt", folder)
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            if not _is_complete(folder):  # else another machine was faster: as good as ours
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == sizes[name] for name in ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):  # whatever damage made of the JSON
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        waited = 0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited % 60 == 0:
                    logger.warning(
                        "waiting for another process to tokenise the data (%s)", path.stem
                    )
                time.sleep(1)
                waited += 1
        yield


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")
