"""Figures of the pairs that a runner evaluates.

Every rank sends the two rewards of each of its pairs to all others, so that figures are computed
from the pairs themselves: a mean over ranks or packs is never taken, and a pair counts once however
often a rank had to compute it to keep step with the others.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from numpy.typing import NDArray

from polar_xtuner._checks import one_line
from polar_xtuner.cache import PAIR
from polar_xtuner.checkpoint import atomic_file
from polar_xtuner.evaluation import PairScores, length_figures, pair_figures

logger = logging.getLogger(__name__)

Figures = dict[str, float]

MOST_SOURCES = 32
"""Sources whose figures are logged."""

PLACE = ("file", "line", "chosen_index", "rejected_index")
"""What tells a pair from all others."""


@METRICS.register_module()
class PolarMetric(BaseMetric):  # type: ignore[misc]
    """Figures of the pairs (`evaluation.py`), of all ranks, at full precision.

    `<prefix>/accuracy` and so on are of all pairs, `<prefix>/<set>/accuracy` of a named set
    (`data_files` is a dict), `<prefix>/source/<source>/accuracy` of the rows of a `source`.

    Args:
        prefix: of the figures' names.
        length_bias: add `evaluation.length_figures` of all pairs.
        scores_file: a .jsonl or .parquet file for the rewards of every row; `{iter}` in its name
            stands for the iteration.

    Raises:
        ValueError: the scores' file has another ending.
    """

    default_prefix = "val"

    def __init__(
        self,
        prefix: str | None = None,
        length_bias: bool = False,
        scores_file: str | None = None,
    ) -> None:
        super().__init__(prefix=prefix)
        if scores_file is not None and not scores_file.endswith((".jsonl", ".parquet")):
            raise ValueError(
                f"scores_file must end in .jsonl or .parquet, got {scores_file!r}: it holds a line "
                "or a row for each row of the data"
            )
        self.length_bias = length_bias
        self.scores_file = scores_file

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Keep the rewards of a pack's pairs, on their device."""
        if data_batch["data"]["pair_weights_P"].numpy().any():  # else it only fills a step
            (rewards,) = data_samples
            pairs = data_batch["data_samples"]["pairs"]
            self.results.append((pairs, rewards["chosen"], rewards["rejected"]))

    def evaluate(self, size: int) -> Figures:
        """Figures of the pairs of all ranks, the same on each.

        Raises:
            ValueError: a reward is not finite; names its row.
        """
        own = _joined(self.results)
        self.results.clear()
        every = _once(*map(np.concatenate, zip(*all_gather_object(own))))
        metrics = self.compute_metrics([every])
        control = self.dataset_meta.get("control", "")
        if self.scores_file is not None and not control and is_main_process():
            try:
                self._write(*every)
            except OSError as error:  # no reason to end a run
                logger.error("the scores could not be written: %s", error)
        prefix = "/".join(filter(None, (self.prefix, control)))
        # mmengine's log of a test drops numbers of numpy's other types.
        return {f"{prefix}/{name}": float(value) for name, value in metrics.items()}

    def compute_metrics(self, results: list[Any]) -> Figures:
        """Figures of a single (pairs, chosen rewards, rejected rewards), without prefix."""
        ((pairs, chosen, rejected),) = results
        self._check(pairs, chosen, rejected)
        scores = PairScores(
            chosen,
            rejected,
            pairs["chosen_length"],
            pairs["rejected_length"],
            # As objects: a string array is as wide as its longest string.
            np.array(self.dataset_meta["sources"], object)[pairs["source"]],
        )
        figures = pair_figures(chosen, rejected)
        if self.length_bias:
            figures |= length_figures(scores)
        for part, mask in self._parts(pairs):
            of_part = pair_figures(chosen[mask], rejected[mask])
            figures |= {f"{part}/{name}": value for name, value in of_part.items()}
        return figures

    def names(self) -> list[str]:
        """Of all figures that there will be."""
        nothing = np.empty(0)
        figures = self.compute_metrics([(np.empty(0, PAIR), nothing, nothing)])
        return [f"{self.prefix}/{name}" for name in figures]

    def _parts(self, pairs: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Sets and sources that have a name, and which of the pairs are theirs."""
        sets, sources = np.array(self.dataset_meta["sets"], object), self.dataset_meta["sources"]
        for name in dict.fromkeys(self.dataset_meta["sets"]):
            if name:
                yield name, sets[pairs["file"]] == name
        if len(sources) - 1 > MOST_SOURCES:
            logger.warning("no figures by source: there are %d sources", len(sources) - 1)
            return
        for number, name in enumerate(sources):
            if name:
                yield f"source/{one_line(name, len(name))}", pairs["source"] == number

    def _check(self, pairs: NDArray[Any], *rewards: NDArray[np.float64]) -> None:
        bad = np.flatnonzero(~np.isfinite(rewards).all(axis=0))
        if len(bad):
            files = self.dataset_meta["files"]
            rows = [f"{files[file]}:{line}" for file, line in pairs[bad][["file", "line"]].tolist()]
            shown = ", ".join(dict.fromkeys(rows[:20]))
            raise ValueError(
                f"{len(bad)} of {len(pairs)} pairs have a reward that is not finite, of the rows "
                f"{shown}: the weights are damaged or the precision overflows"
            )

    def _write(self, pairs: NDArray[Any], chosen: Any, rejected: Any) -> None:
        assert self.scores_file is not None
        name = self.scores_file.replace("{iter}", str(self.dataset_meta.get("iteration", 0)))
        path = Path(name)
        lines = _score_lines(self.dataset_meta, pairs, chosen, rejected)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            if path.suffix == ".jsonl":
                file.writelines(f"{json.dumps(line)}\n".encode() for line in lines)
            else:
                import pyarrow
                from pyarrow.parquet import write_table

                write_table(pyarrow.Table.from_pylist([*lines]), file)
        logger.info("scores of every row: %s", path)


def _joined(results: Sequence[Any]) -> tuple[NDArray[Any], ...]:
    """Pairs (P,) of dtype `PAIR`, their chosen and rejected rewards (P,) float64."""
    pairs = [np.empty(0, PAIR), *(pairs for pairs, *_ in results)]
    rewards = [
        torch.cat([torch.empty(0).double(), *(result[side].double().cpu() for result in results)])
        for side in (1, 2)
    ]
    return np.concatenate(pairs), *(reward.numpy() for reward in rewards)


def _once(pairs: NDArray[Any], *rewards: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Each pair once, in the order of its row: the same whatever ranks and packs there were."""
    order = np.lexsort([pairs[name] for name in reversed(PLACE)])
    places = np.stack([pairs[name][order] for name in PLACE], axis=1)
    new = np.ones(len(order), bool)
    new[1:] = (places[1:] != places[:-1]).any(axis=1)
    kept = order[new]
    return pairs[kept], *(reward[kept] for reward in rewards)


def _score_lines(
    meta: Mapping[str, Any], pairs: NDArray[Any], chosen: Any, rejected: Any
) -> Iterator[dict[str, Any]]:
    """What is written of every row: its place, set and source, the rewards of its candidates."""
    starts = np.flatnonzero(
        np.any([np.diff(pairs[name], prepend=-1) for name in ("file", "line")], axis=0)
    )
    for rows in np.split(np.arange(len(pairs)), starts[1:]) if len(pairs) else []:
        first = pairs[rows[0]]
        yield {
            "file": meta["files"][first["file"]],
            "line": int(first["line"]),
            "set": meta["sets"][first["file"]],
            "source": meta["sources"][first["source"]],
            "chosen_scores": _by_candidate(pairs["chosen_index"][rows], chosen[rows]),
            "rejected_scores": _by_candidate(pairs["rejected_index"][rows], rejected[rows]),
        }


def _by_candidate(indices: NDArray[Any], rewards: NDArray[np.float64]) -> list[float | None]:
    """By their places in the row; None for one that is in no pair, as none of it fits a pack."""
    known = dict(zip(indices.tolist(), rewards.tolist()))
    return [known.get(index) for index in range(max(known) + 1)]
