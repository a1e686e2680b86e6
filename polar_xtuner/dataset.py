"""Rows -> tokenised groups that a dataloader can ask for.

`PolarDataset` tokenises its rows once into a store on disk (`cache.py`), keyed by the content of
the files, the map function, the tokenizer and the template's limits; a later start maps what it
finds. A dataloader asks for packs: `dataset[Pack]` gives the groups of a pack and what their
pairs weigh. As a plain sequence it is the packs of an epoch on one process, which is what
`xtuner log-dataset` shows.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset as HFDataset
from mmengine.registry import DATASETS
from mmengine.utils import get_object_from_string
from torch.utils.data import Dataset
from tqdm import tqdm
from xtuner.registry import BUILDER, MAP_FUNC

from polar_xtuner.cache import STORE_VERSION, StoreWriter, TokenStore, open_or_build
from polar_xtuner.packing import Pack, plan_epoch
from polar_xtuner.records import BadRow, Row, RowCheck, RowError, find_files, map_rows, read_rows
from polar_xtuner.template import Candidate, PolarTemplate

logger = logging.getLogger(__name__)

CHUNK_CANDIDATES, CHUNK_CHARACTERS = 4096, 1 << 23
"""Most candidates and characters that are encoded in one call (or one row, if that has more)."""

IGNORED_LABEL = -100


@BUILDER.register_module()
@DATASETS.register_module()
class PolarDataset(Dataset):  # type: ignore[type-arg]
    """Groups of tokenised candidates, served as packs.

    Args:
        tokenizer: a tokenizer or the config of one.
        data_files: a file, glob or folder, or a list of these (`records.find_files`).
        dataset: a Hugging Face dataset or the config of one; give this or `data_files`.
        dataset_map_fn: turns an example into a row; a function, or its name in `MAP_FUNC`.
        max_length, max_response_length, separator_token_id, reward_token_id: see `PolarTemplate`.
        max_packed_length: most tokens of a pack.
        on_bad_row: "error" stops before anything is tokenised, "skip" drops and counts.
        on_long_group: what to do with a group that is longer than a pack: "error" or "skip".
        cache_dir: where stores live; None is `$XDG_CACHE_HOME/polar_xtuner`.

    Raises:
        BadRowsError: rows are bad and `on_bad_row` is "error".
        ValueError: a group cannot fit a pack and `on_long_group` is "error"; no row is left.
    """

    metainfo: ClassVar[dict[str, Any]] = {}  # mmengine's loop asks every dataset for it

    def __init__(
        self,
        tokenizer: Any,
        data_files: str | Sequence[str] | None = None,
        dataset: Any = None,
        dataset_map_fn: str | Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        max_length: int = 16384,
        max_response_length: int = 4096,
        max_packed_length: int = 32768,
        separator_token_id: int | None = None,
        reward_token_id: int | None = None,
        on_bad_row: str = "error",
        on_long_group: str = "error",
        cache_dir: str | None = None,
    ) -> None:
        if (data_files is None) == (dataset is None):
            raise ValueError("give the dataset either data_files= or dataset=, and not both")
        if on_long_group not in ("error", "skip"):
            raise ValueError(f"on_long_group must be 'error' or 'skip', got {on_long_group!r}")
        RowCheck(on_bad_row)
        self.max_packed_length = max_packed_length
        self._on_bad_row = on_bad_row
        template = PolarTemplate(
            _built(tokenizer),
            max_length,
            max_response_length,
            separator_token_id,
            reward_token_id,
        )
        self.special_ids = template.special_ids
        self.max_length = max_length
        map_fn = _map_function(dataset_map_fn)
        source = _FileRows(data_files, map_fn) if dataset is None else _HFRows(dataset, map_fn)
        self._names = source.names

        key = hashlib.sha256()
        for part in (source.fingerprint(), template.fingerprint, on_bad_row, str(STORE_VERSION)):
            key.update(part.encode())
        self.store: TokenStore = open_or_build(
            Path(cache_dir) if cache_dir else _default_cache_dir(),
            key.hexdigest()[:32],
            lambda writer: self._tokenise(source, template, writer),
        )
        """All groups, those too long for a pack included."""
        self.groups = self._fitting(on_long_group)
        """(groups,) numbers in the store of the groups that are trained on."""
        if not len(self.groups):
            raise ValueError(f"no row to train on in {', '.join(self._names)}")
        self.lengths = self.store.lengths[self.groups]
        """(groups,) tokens of each group."""
        self.pair_counts = self.store.pair_counts[self.groups]
        """(groups,) pairs of each group."""
        self._report()

    def __getitem__(self, pack: Pack | int) -> dict[str, Any]:
        """A pack, ready for `collate_pack`: `groups`, `pair_weight`, and where their rows stand.

        Asked for by number it has `input_ids` and `labels` as well, which `xtuner log-dataset`
        shows: all tokens, and 0 at a chosen candidate's reward token, 1 at a rejected one's, else
        -100.
        """
        if isinstance(pack, Pack):
            return self._load(pack)
        loaded = self._load(self._plain_packs[pack])
        tokens = np.concatenate([group.tokens for group in loaded["groups"]])
        labels = np.full(len(tokens), IGNORED_LABEL)
        start = 0
        for group in loaded["groups"]:
            reward_rows = start + np.cumsum(group.pieces)[1:] - 1
            labels[reward_rows[group.pairs["rejected"]]] = 1
            labels[reward_rows[group.pairs["chosen"]]] = 0
            start += len(group.tokens)
        return {**loaded, "input_ids": tokens.tolist(), "labels": labels.tolist()}

    def _load(self, pack: Pack) -> dict[str, Any]:
        numbers = [int(self.groups[i]) for i in pack.groups]
        return {
            "groups": [self.store[n] for n in numbers],
            "pair_weight": pack.pair_weight,
            "rows": [self._place(n) for n in numbers],
        }

    def __len__(self) -> int:
        return len(self._plain_packs)

    @cached_property
    def _plain_packs(self) -> list[Pack]:
        plan = plan_epoch(self.lengths, self.pair_counts, self.max_packed_length)
        return [pack for step in plan for slot in step for pack in slot]

    def _place(self, number: int) -> str:
        file, line = self.store.row(number)
        return f"{self._names[file]}:{line}"

    def _tokenise(
        self, source: _FileRows | _HFRows, template: PolarTemplate, writer: StoreWriter
    ) -> dict[str, Any]:
        check = RowCheck(self._on_bad_row)
        rows = sum(1 for _ in check.accept(source.rows()))
        files = {name: number for number, name in enumerate(source.names)}
        uncut = RowCheck(self._on_bad_row)
        with tqdm(total=rows, desc="Tokenising", unit=" rows", mininterval=1) as bar:
            good = (row for row in source.rows() if isinstance(row, Row))
            for row, sequences, pairs in uncut.accept(_tokenised(good, template)):
                writer.add(sequences, pairs, (files[row.file], row.line))
                bar.update()
        return {"rows": rows - uncut.bad, "bad_rows": check.bad + uncut.bad}

    def _fitting(self, on_long_group: str) -> np.ndarray[Any, Any]:
        fits = self.store.lengths <= self.max_packed_length
        long = np.flatnonzero(~fits)
        if len(long):
            shown = "\n".join(
                f"  {self._place(i)}: {self.store.lengths[i]} tokens" for i in long[:20].tolist()
            )
            more = f"\n  ... and {len(long) - 20} more" if len(long) > 20 else ""
            message = (
                f"{len(long)} of {len(fits)} groups do not fit a pack of max_packed_length="
                f"{self.max_packed_length} tokens:\n{shown}{more}"
            )
            if on_long_group == "error":
                raise ValueError(
                    f"{message}\nRaise max_packed_length, lower max_length, or set "
                    "on_long_group='skip' to leave them out."
                )
            logger.warning("%s\nThey are left out.", message)
        return np.flatnonzero(fits)

    def _report(self) -> None:
        tokens = int(self.lengths.sum())
        alone = int(self.store.sequence_lengths()[self.groups].sum())
        logger.info(
            "%d rows, %d pairs; %d tokens (%d if no prefix were shared); %d bad rows skipped",
            len(self.groups),
            int(self.pair_counts.sum()),
            tokens,
            alone,
            self.store.meta["bad_rows"],
        )


class _FileRows:
    def __init__(self, data_files: Any, map_fn: Callable[..., Any] | None) -> None:
        self._files = find_files(data_files)
        self._map_fn = map_fn
        self.names = [str(f) for f in self._files]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(_hash_of(self._map_fn).encode())
        for path in self._files:
            content = hashlib.sha256(path.suffix.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
            digest.update(content.digest())
        return digest.hexdigest()

    def rows(self) -> Iterator[Row | BadRow]:
        return read_rows(self._files, self._map_fn)


class _HFRows:
    def __init__(self, dataset: Any, map_fn: Callable[..., Any] | None) -> None:
        self._dataset = _built(dataset)
        self._map_fn = map_fn
        if isinstance(self._dataset, Mapping):  # a DatasetDict
            if "train" not in self._dataset:
                raise ValueError(
                    f"the dataset has splits {sorted(self._dataset)} and no 'train': choose one "
                    "with split= in its config"
                )
            self._dataset = self._dataset["train"]
        if not isinstance(self._dataset, HFDataset):
            raise ValueError(
                "dataset= must give a datasets.Dataset (not a streaming one) or a DatasetDict, got "
                f"{type(self._dataset).__name__}: for files use data_files="
            )
        self.names = [self._dataset.info.builder_name or "dataset"]

    def fingerprint(self) -> str:
        return f"{self._dataset._fingerprint} {_hash_of(self._map_fn)}"

    def rows(self) -> Iterator[Row | BadRow]:
        return map_rows(self._dataset, self.names[0], self._map_fn)


Tokenised = tuple[Row, list[list[int]], list[tuple[int, int, float]]]


def _tokenised(rows: Iterator[Row], template: PolarTemplate) -> Iterator[Tokenised | BadRow]:
    """Each row with its distinct sequences and its pairs (chosen, rejected, margin)."""
    for chunk in _chunks(rows):
        ids = iter(
            template.encode(
                [
                    Candidate(row.prompt, row.reference, text, row.wrapper)
                    for row in chunk
                    for text in (*row.chosen, *row.rejected)
                ]
            )
        )
        for row in chunk:
            numbers: dict[tuple[int, ...], int] = {}
            chosen, rejected = (
                [numbers.setdefault(tuple(next(ids)), len(numbers)) for _ in texts]
                for texts in (row.chosen, row.rejected)
            )
            if set(chosen) & set(rejected):
                problem = "equals a rejected candidate once both are cut to the length limits"
                yield BadRow((RowError(row.file, row.line, "chosen", problem),))
                continue
            pairs = [(c, r, row.margin) for c, r in product(chosen, rejected)]
            yield row, [list(n) for n in numbers], pairs


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    candidates = characters = 0
    for row in rows:
        texts = (*row.chosen, *row.rejected)
        chunk.append(row)
        candidates += len(texts)
        characters += sum(map(len, texts)) + len(texts) * (len(row.prompt) + len(row.reference))
        if candidates >= CHUNK_CANDIDATES or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, candidates, characters = [], 0, 0
    if chunk:
        yield chunk


def _built(value: Any) -> Any:
    return BUILDER.build(value) if isinstance(value, dict) and "type" in value else value


def _map_function(map_fn: Any) -> Callable[..., Any] | None:
    if not isinstance(map_fn, str):
        return map_fn
    found = MAP_FUNC.get(map_fn) or get_object_from_string(map_fn)
    if not callable(found):
        raise ValueError(
            f"dataset_map_fn {map_fn!r} is neither registered in xtuner's MAP_FUNC nor an "
            "importable name"
        )
    return found


def _hash_of(map_fn: Callable[..., Any] | None) -> str:
    """Of the function and of the source of its module: dill only names what can be imported."""
    if map_fn is None:
        return ""
    from datasets.fingerprint import Hasher

    function = map_fn
    while isinstance(function, partial):
        function = function.func
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return Hasher.hash([map_fn, Path(file).read_bytes() if file else b""])


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polar_xtuner"
