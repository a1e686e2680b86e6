"""Rows -> tokenised groups that a dataloader can ask for.

`PolarDataset` tokenises its rows once (`tokenise.py`) into a store on disk (`cache.py`), keyed by
the content of the files, the map function, the tokenizer and the template's limits; a later start
maps what it finds. A dataloader asks for packs: `dataset[Pack]` gives the groups of a pack and what
their pairs weigh. As a plain sequence it is the packs of an epoch on one process, which is what
`xtuner log-dataset` shows.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset as HFDataset
from mmengine.registry import DATASETS
from mmengine.utils import get_object_from_string
from numpy.typing import NDArray
from torch.utils.data import Dataset
from xtuner.registry import BUILDER, MAP_FUNC

from polar_xtuner.cache import STORE_VERSION, Group, TokenStore, open_or_build
from polar_xtuner.controls import shuffle_references
from polar_xtuner.fitting import Fitted, fit
from polar_xtuner.packing import Pack, Plan, Share, plan_epoch
from polar_xtuner.records import BadRow, Row, RowCheck, find_files, map_rows, read_rows
from polar_xtuner.template import PolarTemplate
from polar_xtuner.tokenise import tokenise

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
SHUFFLE_SEED = 0

RESERVED = ("shuffled_references", "source")
"""What figures are named by that are not of a set."""


@BUILDER.register_module()
@DATASETS.register_module()
class PolarDataset(Dataset):  # type: ignore[type-arg]
    """Groups of tokenised candidates, served as packs.

    Args:
        tokenizer: a tokenizer or the config of one.
        data_files: a file, glob or folder, or a list of these (`records.find_files`); or a dict of
            such, whose keys name sets that are evaluated apart.
        dataset: a Hugging Face dataset or the config of one; give this or `data_files`.
        dataset_map_fn: turns an example into a row; a function, or its name in `MAP_FUNC`.
        max_length, max_response_length, separator_token_id, reward_token_id: see `PolarTemplate`.
        max_packed_length: most tokens of a pack; a larger group is split.
        group_candidates: rows of one prompt, reference and wrapper make one group, in which each
            distinct candidate is computed once; False makes a group of every pair.
        on_bad_row: "error" stops before anything is tokenised, "skip" drops and counts.
        on_long_group: what to do with a pair that is longer than a pack: "error" or "skip".
        shuffled_references: give every row the reference of another prompt of its set
            (`controls.shuffle_references`): what a model that reads references cannot judge.
        num_proc: processes that tokenise; None is one a core, 16 at most.
        cache_dir: where stores live; None is `$XDG_CACHE_HOME/polar_xtuner`.

    Raises:
        BadRowsError: rows are bad and `on_bad_row` is "error".
        ValueError: a pair cannot fit a pack and `on_long_group` is "error"; no row is left.
    """

    def __init__(
        self,
        tokenizer: Any,
        data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
        dataset: Any = None,
        dataset_map_fn: str | Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        max_length: int = 16384,
        max_response_length: int = 4096,
        max_packed_length: int = 32768,
        group_candidates: bool = True,
        separator_token_id: int | None = None,
        reward_token_id: int | None = None,
        on_bad_row: str = "error",
        on_long_group: str = "error",
        shuffled_references: bool = False,
        num_proc: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        check_source(data_files, dataset)
        check_options(
            on_bad_row,
            on_long_group,
            num_proc,
            max_length=max_length,
            max_response_length=max_response_length,
            max_packed_length=max_packed_length,
        )
        self.max_packed_length = max_packed_length
        template = PolarTemplate(
            _built(tokenizer),
            max_length,
            max_response_length,
            separator_token_id,
            reward_token_id,
        )
        self.special_ids = template.special_ids
        self.max_length = max_length
        map_fn = map_function(dataset_map_fn)
        source = _FileRows(data_files, map_fn) if dataset is None else _HFRows(dataset, map_fn)
        self._names = source.names

        shuffled = source.sets if shuffled_references else []
        options = f"{STORE_VERSION} {group_candidates} {on_bad_row} {shuffled}"
        key = hashlib.sha256(options.encode())
        fingerprints = source.fingerprint(), template.fingerprint
        for part in fingerprints:
            key.update(part.encode())
        self.store: TokenStore = open_or_build(
            Path(cache_dir) if cache_dir else _default_cache_dir(),
            key.hexdigest()[:32],
            lambda writer: tokenise(
                _shuffled(source) if shuffled_references else source.rows(),
                template,
                writer,
                names=source.names,
                on_bad_row=on_bad_row,
                group_candidates=group_candidates,
                num_proc=num_proc,
            ),
        )
        """All groups, those too long for a pack included."""
        self.metainfo = {
            "files": source.names,
            "sets": source.sets,
            "sources": self.store.meta["sources"],
        }
        """What the numbers of a pair's file, that file's set and its source stand for: the name of
        each file, of the set of each file ("" where sets have no names), and of each source."""
        self._fitted = self._fit(on_long_group)
        _, _, self.lengths, self.pair_counts, self.attended, _ = self._fitted
        if not len(self.lengths):
            raise ValueError(f"there is no row in {', '.join(self._names)}")
        groups = hashlib.sha256(self.lengths.tobytes() + self.pair_counts.tobytes())
        self.identity = {
            "data": fingerprints[0],
            "template": fingerprints[1],
            "max_length": max_length,
            "max_response_length": max_response_length,
            "max_packed_length": max_packed_length,
            "group_candidates": group_candidates,
            "groups": groups.hexdigest(),
        }
        """What a plan for these groups is valid for; hashes where a value is large."""
        self._report()

    def group(self, number: int) -> Group:
        """A group that is trained on: one of the store, or a part of one too long for a pack."""
        whole, parts = self._fitted.whole, self._fitted.parts
        if number < len(whole):
            return self.store[int(whole[number])]
        stored, pairs = parts[number - len(whole)]
        return self.store[stored].only(pairs)

    def __getitem__(self, pack: Pack | int) -> dict[str, Any]:
        """A pack, ready for `collate_pack`: `groups`, `pair_weight`, and where their rows stand.

        Asked for by number it has `input_ids` and `labels` as well, which `xtuner log-dataset`
        shows: all tokens, and 0 at a chosen candidate's reward token, 1 at a rejected one's, else
        -100.
        """
        if isinstance(pack, Pack):
            return self._load(pack)
        loaded = self._load(self._plan.pack(pack, 0))
        tokens = np.concatenate([group.tokens for group in loaded["groups"]])
        labels = np.full(len(tokens), IGNORED_LABEL)
        start = 0
        for group in loaded["groups"]:
            reward_rows = start + np.cumsum(group.pieces)[1:] - 1
            labels[reward_rows[group.pairs["rejected"]]] = 1
            labels[reward_rows[group.pairs["chosen"]]] = 0
            start += len(group.tokens)
        return {**loaded, "input_ids": tokens.tolist(), "labels": labels.tolist()}

    def __len__(self) -> int:
        return self._plan.iterations

    @cached_property
    def _plan(self) -> Plan:
        lengths, cap = self.lengths, self.max_packed_length
        return plan_epoch(lengths, self.pair_counts, lengths, cap)

    def _load(self, pack: Pack) -> dict[str, Any]:
        groups = [self._share(share) for share in pack.shares]
        return {
            "groups": groups,
            "pair_weight": pack.pair_weight,
            "rows": [place for group in groups for place in self._places(group)],
        }

    def _share(self, share: Share) -> Group:
        group = self.group(share.group)
        if share.stop - share.start == len(group.pairs):
            return group
        return group.only(slice(share.start, share.stop))

    def _places(self, group: Group) -> list[str]:
        return [*dict.fromkeys(self._places_of(group.pairs))]

    def _places_of(self, pairs: NDArray[Any]) -> Iterator[str]:
        for file, line in pairs[["file", "line"]].tolist():
            yield f"{self._names[file]}:{line}"

    def _fit(self, on_long_group: str) -> Fitted:
        """What is trained on: groups that fit a pack, and parts of those that do not."""
        fitted = fit(self.store, self.max_packed_length)
        if fitted.unfit:
            unfit = [
                f"{self._names[int(pair['file'])]}:{int(pair['line'])}: {tokens} tokens"
                for pair, tokens in fitted.unfit
            ]
            self._refuse(unfit, on_long_group)
        if fitted.parts:
            logger.info(
                "%d groups longer than a pack are split into %d",
                len(self.store) - len(fitted.whole),
                len(fitted.parts),
            )
        return fitted

    def _refuse(self, unfit: list[str], on_long_group: str) -> None:
        shown = "\n  ".join(unfit[:20])
        more = f"\n  ... and {len(unfit) - 20} more" if len(unfit) > 20 else ""
        message = (
            f"{len(unfit)} pairs do not fit a pack of max_packed_length={self.max_packed_length} "
            f"tokens:\n  {shown}{more}"
        )
        if on_long_group == "error":
            raise ValueError(
                f"{message}\nRaise max_packed_length, lower max_length, or set "
                "on_long_group='skip' to leave them out."
            )
        logger.warning("%s\nThey are left out.", message)

    def _report(self) -> None:
        tokens, unshared = int(self.lengths.sum()), int(self.store.unshared_lengths().sum())
        logger.info(
            "%d rows, %d groups, %d pairs; %d tokens (%d if nothing were shared); %d bad rows "
            "skipped",
            self.store.meta["rows"],
            len(self.lengths),
            int(self.pair_counts.sum()),
            tokens,
            unshared,
            self.store.meta["bad_rows"],
        )


class _FileRows:
    def __init__(self, data_files: Any, map_fn: Callable[..., Any] | None) -> None:
        found = find_sets(data_files)
        self._files = [file for file, _ in found]
        self._map_fn = map_fn
        self.names = [str(file) for file in self._files]
        self.sets = [name for _, name in found]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(_hash_of(self._map_fn).encode())
        for path in self._files:
            content = hashlib.sha256(path.suffix.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
            digest.update(content.digest())
        return digest.hexdigest()

    def rows(self, of_set: str | None = None) -> Iterator[Row | BadRow]:
        files = [f for f, name in zip(self._files, self.sets) if of_set in (None, name)]
        return read_rows(files, self._map_fn)


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
        self.sets = [""]

    def fingerprint(self) -> str:
        return f"{self._dataset._fingerprint} {_hash_of(self._map_fn)}"

    def rows(self, of_set: str | None = None) -> Iterator[Row | BadRow]:
        return map_rows(self._dataset, self.names[0], self._map_fn)


def check_source(data_files: Any, dataset: Any) -> None:
    """Raises ValueError unless exactly one of the two is given."""
    if (data_files is None) == (dataset is None):
        raise ValueError("give the dataset either data_files= or dataset=, and not both")


def check_options(on_bad_row: Any, on_long_group: Any, num_proc: Any, **lengths: Any) -> None:
    """Raises ValueError for what `PolarDataset` cannot be given, whatever its rows."""
    if on_long_group not in ("error", "skip"):
        raise ValueError(f"on_long_group must be 'error' or 'skip', got {on_long_group!r}")
    RowCheck(on_bad_row)
    if num_proc is not None and (type(num_proc) is not int or num_proc < 1):
        raise ValueError(f"num_proc must be None or a whole number >= 1, got {num_proc!r}")
    for name, length in lengths.items():
        if type(length) is not int or length < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {length!r}")


def find_sets(data_files: Any) -> list[tuple[Path, str]]:
    """Every file that `data_files` names, with the name of its set, "" if that has none.

    Raises:
        ValueError: a file is in two sets, or a set cannot be one.
        FileNotFoundError: see `find_files`.
    """
    sets = _sets(data_files) if isinstance(data_files, Mapping) else {"": data_files}
    try:
        found = [(file, name) for name, files in sets.items() for file in find_files(files)]
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"data_files: {error}") from None
    times = Counter(file.resolve() for file, _ in found)
    for file, _ in found:
        if times[file.resolve()] > 1:
            raise ValueError(f"data_files: {file} is in two sets: name it once")
    if not found:
        raise ValueError("data_files is an empty dict: name a set of files, or give None")
    return found


def _sets(data_files: Mapping[Any, Any]) -> dict[str, Any]:
    """Named sets of files.

    Raises:
        ValueError: a name is none that figures can have, or what is named are no files.
    """
    for name, files in data_files.items():
        if not isinstance(name, str) or not name or name.split("/")[0] in RESERVED:
            raise ValueError(
                f"data_files: {name!r} cannot be the name of a set: it must be a text, and must "
                f"not begin with {' or '.join(RESERVED)}"
            )
        if isinstance(files, Mapping):
            raise ValueError(
                f"data_files: the set {name} is a dict, not files (a name that is given on the "
                "command line cannot have a dot)"
            )
    return dict(data_files)


def _shuffled(source: _FileRows | _HFRows) -> Iterator[Row | BadRow]:
    for name in dict.fromkeys(source.sets):
        try:
            yield from shuffle_references(source.rows(name), SHUFFLE_SEED)
        except ValueError as error:
            raise ValueError(f"{name or ', '.join(source.names)}: {error}") from error


def _built(value: Any) -> Any:
    return BUILDER.build(value) if isinstance(value, dict) and "type" in value else value


def map_function(map_fn: Any) -> Callable[..., Any] | None:
    """A map function, by itself or by its name in `MAP_FUNC` or in a module.

    Raises:
        ValueError: there is none of that name.
    """
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
