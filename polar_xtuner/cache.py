"""Tokenised groups on disk, memory-mapped.

A group is all candidates of one prompt and reference, laid out as `[prefix c0][c1][c2]...`: the
longest common token prefix once, then every candidate's own suffix. The store is four flat arrays,
appended to while rows are tokenised, so that memory does not grow with the data, and mapped by
every process that trains on them.

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
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polar_xtuner.packing import attended_pairs

logger = logging.getLogger(__name__)

STORE_VERSION = 3
"""Part of every cache key: raise it whenever the arrays of a store change their meaning."""

PAIR = np.dtype(
    [
        *(("chosen", "i4"), ("rejected", "i4")),  # its candidates, numbered within the group
        ("margin", "f8"),
        *(("file", "i4"), ("line", "i8")),  # of its row; files by number
        ("source", "i4"),  # of its row, by number
        *(("chosen_index", "i4"), ("rejected_index", "i4")),  # in the row's lists of candidates
        *(("chosen_length", "i4"), ("rejected_length", "i4")),  # characters
    ]
)
"""A pair of a group, and where it comes from."""

ARRAYS: dict[str, Any] = {
    "tokens": np.dtype("u4"),  # all groups' ids, one after the other
    "pieces": np.dtype("i4"),  # lengths: prefix, c0, c1, ... of every group
    "pairs": PAIR,
    "groups": np.dtype([("tokens", "i8"), ("pieces", "i8"), ("pairs", "i8")]),  # ends
}


class Group(NamedTuple):
    """Candidates that share their prefix.

    `tokens` (sum of pieces,) ids; `pieces` (1 + candidates,) lengths of the prefix and of each
    suffix; `pairs` (pairs,) of dtype `PAIR`.
    """

    tokens: NDArray[Any]
    pieces: NDArray[Any]
    pairs: NDArray[Any]

    def only(self, pairs: Any) -> Group:
        """The group of some of the pairs, given as an index, and of their candidates."""
        kept = self.pairs[pairs].copy()
        sides = np.stack([kept["chosen"], kept["rejected"]])
        candidates, numbers = np.unique(sides, return_inverse=True)
        kept["chosen"], kept["rejected"] = numbers.reshape(sides.shape)
        pieces = np.split(self.tokens, np.cumsum(self.pieces)[:-1])
        tokens = np.concatenate([pieces[0], *(pieces[c + 1] for c in candidates)])
        return Group(tokens, self.pieces[[0, *(candidates + 1)]], kept)


def lay_out(sequences: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Distinct sequences, lists or tuples of ids, as one group: ids and lengths of its pieces.

    Each suffix keeps at least one id: a sequence ends with the reward token, which stands nowhere
    else in any other, so no sequence is a prefix of another.
    """
    first, last = min(sequences), max(sequences)  # what these share, all do
    shared, most = 0, min(map(len, sequences)) - 1
    while shared < most:  # by halves: slices are compared much faster than single ids
        middle = (shared + most + 1) // 2
        if first[shared:middle] == last[shared:middle]:
            shared = middle
        else:
            most = middle - 1
    suffixes = [s[shared:] for s in sequences]
    tokens = [*sequences[0][:shared], *chain.from_iterable(suffixes)]
    return tokens, [shared, *map(len, suffixes)]


class Block:
    """Groups on their way to a store: its arrays, but for where they begin."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {name: [] for name in ARRAYS}

    def add(self, sequences: Sequence[Any], pairs: Sequence[tuple[Any, ...]]) -> None:
        """One group of distinct `sequences`; `pairs` have the fields of `PAIR`."""
        tokens, pieces = lay_out(sequences)
        for name, values in (("tokens", tokens), ("pieces", pieces), ("pairs", pairs)):
            self._values[name] += values
        ends = (len(self._values[name]) for name in ("tokens", "pieces", "pairs"))
        self._values["groups"].append(tuple(ends))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: np.array(self._values[name], dtype) for name, dtype in ARRAYS.items()}


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

    @cached_property
    def attended(self) -> NDArray[np.int64]:
        """(groups,) pairs of a query and a key that it sees."""
        return attended_by(self._arrays["pieces"], self._starts["pieces"][:-1])

    def unshared_lengths(self) -> NDArray[np.int64]:
        """(groups,) tokens of each group if the two sequences of every pair stood by themselves."""
        firsts, pairs = self._starts["pieces"][:-1], self._arrays["pairs"]
        pieces = np.asarray(self._arrays["pieces"], np.int64)
        first_of_pair = np.repeat(firsts, self.pair_counts)
        suffixes = sum(pieces[first_of_pair + 1 + pairs[side]] for side in ("chosen", "rejected"))
        both = suffixes + 2 * pieces[first_of_pair]
        return np.add.reduceat(both, self._starts["pairs"][:-1])


def attended_by(pieces: NDArray[Any], firsts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(groups,) pairs of a query and a key that it sees (`packing.attended_pairs`).

    Args:
        pieces: (pieces,) lengths of the pieces of all groups.
        firsts: (groups,) number of each group's first piece, its prefix.
    """
    lengths = np.asarray(pieces, np.int64)
    prefixes = lengths[firsts]
    keys = lengths + np.repeat(prefixes, np.diff(firsts, append=len(lengths)))
    # This takes a prefix for a suffix after one like it: too much by the square of its length.
    return np.add.reduceat(attended_pairs(lengths, keys), firsts) - prefixes**2


class StoreWriter:
    """Appends groups to the arrays of a store that is being built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: open(folder / name, "wb") for name in ARRAYS}
        self._end = np.zeros(1, ARRAYS["groups"])

    def write(self, arrays: dict[str, NDArray[Any]]) -> None:
        """The groups of a block's `arrays`."""
        ends = arrays["groups"].copy()
        for name in ends.dtype.names:
            ends[name] += self._end[name]
            self._end[name] += len(arrays[name])
        for name, values in {**arrays, "groups": ends}.items():
            self._files[name].write(values.tobytes())

    def finish(self, meta: dict[str, Any]) -> None:
        """Flush to disk; `meta` is written last, and with the size of every array."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
            file.close()
        (self.folder / "meta.json").write_text(json.dumps({**meta, "sizes": sizes}, indent=1))


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
    for stale in folder.parent.glob(f"*.{host}.*.partial"):  # of killed builds
        key, _, pid = stale.name.removesuffix(".partial").partition(f".{host}.")
        if key == folder.name or not Path("/proc", pid).exists():  # the lock of our key is ours
            shutil.rmtree(stale, ignore_errors=True)
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
