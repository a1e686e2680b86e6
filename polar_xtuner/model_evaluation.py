"""A model's rewards for rows of files, and the figures that they come to.

    rows_to_evaluate -> rows -> evaluate_model -> ModelEvaluation -> compare -> Evaluation

Two kinds of rows are evaluated: those with chosen and rejected, of which every combination is a
pair (`evaluation`), and those with several outputs and labels (`best_of_n`). Rows are held in
memory, with their texts. A row that has no reward is an error: a figure without it would be of
other rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from polar_xtuner.best_of_n import best_of_n_figures, best_of_n_rows, check_labels, labels_of
from polar_xtuner.comparison import bootstrap_intervals, compare_pairs
from polar_xtuner.controls import shuffle_references
from polar_xtuner.evaluation import PairScores, length_figures, pair_figures
from polar_xtuner.records import Row, RowCheck, read_rows
from polar_xtuner.scored_lines import SCORES, Scorer, scored_lines, write_parquet


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row and the rewards of its outputs, which go with `labels`, or of chosen and rejected."""

    row: Row
    scores: tuple[float, ...]
    chosen_scores: tuple[float, ...]
    rejected_scores: tuple[float, ...]
    labels: tuple[float, ...]
    key: str
    """Of this row and this model, see `scored_lines`."""

    def line(self) -> dict[str, Any]:
        """What `scored_lines` gives of the row."""
        line = {"file": self.row.file, "line": self.row.line, "id": self.row.id, "key": self.key}
        return line | {name: [*getattr(self, name)] for name in SCORES if getattr(self, name)}


@dataclass(frozen=True)
class Figures:
    """Of some rows. Each is empty where no row is of its kind.

    Attributes:
        pairs: `evaluation.pair_figures`; of all rows also `prompts`, the number of distinct ones,
            and `accuracy_prompts_low` and `_high`, a 95 % interval of the accuracy that takes the
            prompts as independent and not the pairs.
        lengths: `evaluation.length_figures`.
        best_of_n: `best_of_n.best_of_n_figures`.
    """

    pairs: dict[str, float]
    lengths: dict[str, float]
    best_of_n: dict[str, float]


@dataclass(frozen=True)
class ModelEvaluation:
    """What one model makes of the rows.

    Attributes:
        name: the model, as the user named it.
        rows: in the order of the files.
        pairs: all pairs of all rows: of a row every chosen with every rejected text, in order.
        places: (P, 3) int, where a pair is from: its row in `rows`, and its texts in the row's
            `chosen` and `rejected`, all from 0.
        figures, by_file, by_source: of all rows, and of those of one file or named source.
        shuffled: of all rows with their references shuffled; None where that was not asked for.
        shuffled_pairs: `pairs` with their references shuffled, in the same order, or None.
    """

    name: str
    rows: list[ScoredRow]
    pairs: PairScores
    places: npt.NDArray[np.int64]
    figures: Figures
    by_file: dict[str, Figures]
    by_source: dict[str, Figures]
    shuffled: Figures | None = None
    shuffled_pairs: PairScores | None = None


@dataclass(frozen=True)
class Comparison:
    """The first model against another, on the same rows.

    Attributes:
        against: the name of the other model.
        pairs: `comparison.compare_pairs`, the first less the other; empty without pairs.
        best_of_n: differences, with _low and _high of 95 %, of `top_is_best` and `label_of_top`;
            empty without such rows.
    """

    against: str
    pairs: dict[str, float]
    best_of_n: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Of one model, and of others on the same rows.

    Attributes:
        files: that the rows are from.
        bad_rows: left out of them.
        seed: of shuffled references and of bootstraps.
        models: the model, then those it is compared with.
        comparisons: of the first with each of the others, in their order.
    """

    files: list[str]
    bad_rows: int
    seed: int
    models: list[ModelEvaluation]
    comparisons: list[Comparison] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All figures and no rows, ready for `json`: NaN is None."""
        models = [
            {
                "model": model.name,
                **asdict(model.figures),
                "files": {name: asdict(part) for name, part in model.by_file.items()},
                "sources": {name: asdict(part) for name, part in model.by_source.items()},
                "shuffled_references": model.shuffled and asdict(model.shuffled),
            }
            for model in self.models
        ]
        return _without_nan(
            {
                "bad_rows": self.bad_rows,
                "seed": self.seed,
                **models[0],
                "against": [
                    {**model, "difference": {"pairs": one.pairs, "best_of_n": one.best_of_n}}
                    for model, one in zip(models[1:], self.comparisons)
                ],
            }
        )


def rows_to_evaluate(files: Iterable[Path], on_bad_row: str) -> tuple[list[Row], int]:
    """The rows of files with chosen and rejected, or outputs and labels; and how many were bad.

    Raises:
        BadRowsError: a row is bad, and `on_bad_row` is "error".
        ValueError: there is no row.
    """
    files = [*files]
    check = RowCheck(on_bad_row)
    rows = [*check.accept(check_labels(read_rows(files, scoring=True)))]
    if not rows:
        raise ValueError(f"no row to evaluate in {', '.join(map(str, files))}")
    return rows, check.bad


def evaluate_model(
    name: str, scorer: Scorer, rows: Sequence[Row], controls: bool = False, seed: int = 0
) -> ModelEvaluation:
    """Scores rows and computes all figures; with `controls` also with shuffled references.

    Raises:
        ValueError: a text has no reward; with `controls`, all rows are of one prompt.
    """
    # Shuffled first: that it cannot be done should not be told after hours of scoring.
    others = [*shuffle_references(rows, seed)] if controls else []
    scored = score_rows(name, scorer, rows)
    pairs, places = pairs_of(scored)
    evaluation = ModelEvaluation(
        name,
        scored,
        pairs,
        places,
        _all_figures(scored, pairs, places, seed),
        _by(scored, lambda row: row.file),
        _by(scored, lambda row: row.source),
    )
    if not controls:
        return evaluation
    scored = score_rows(name, scorer, [row for row in others if isinstance(row, Row)], " shuffled")
    shuffled, _ = pairs_of(scored)
    figures = _all_figures(scored, shuffled, places, seed)
    return replace(evaluation, shuffled=figures, shuffled_pairs=shuffled)


def score_rows(name: str, scorer: Scorer, rows: Sequence[Row], how: str = "") -> list[ScoredRow]:
    """Rows with the rewards of all their texts, in order.

    Raises:
        ValueError: a text has no reward; names the row.
    """
    lines = scored_lines(scorer, rows, name)
    bar = tqdm(lines, desc=f"Scoring{how}", total=len(rows), unit=" rows")
    scored = []
    for line, row in zip(bar, rows):  # in this order the bar sees its end
        if "error" in line:
            raise ValueError(f"{row.file}:{row.line}: {line['error']}")
        scores, chosen, rejected = (tuple(line.get(name, ())) for name in SCORES)
        scored.append(ScoredRow(row, scores, chosen, rejected, labels_of(row), line["key"]))
    return scored


def write_scores(rows: Iterable[ScoredRow], output: Path) -> None:
    """A line of JSON a row, or for a `.parquet` name columns, at full precision."""
    as_parquet = output.name.lower().endswith(".parquet")
    lines = output.with_name(f"{output.name}.{'lines' if as_parquet else 'unfinished'}")
    try:
        with lines.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row.line()) + "\n" for row in rows)
        if as_parquet:
            write_parquet(lines, output)
        else:
            lines.replace(output)
    finally:
        lines.unlink(missing_ok=True)


def pairs_of(rows: Sequence[ScoredRow]) -> tuple[PairScores, npt.NDArray[np.int64]]:
    """All pairs of rows, and the `places` that they are from (`ModelEvaluation`)."""
    places = [
        (number, chosen, rejected)
        for number, row in enumerate(rows)
        for chosen, rejected in product(
            range(len(row.chosen_scores)), range(len(row.rejected_scores))
        )
    ]
    return PairScores(
        np.array([rows[i].chosen_scores[c] for i, c, _ in places], np.float64),
        np.array([rows[i].rejected_scores[r] for i, _, r in places], np.float64),
        np.array([len(rows[i].row.chosen[c]) for i, c, _ in places], np.int64),
        np.array([len(rows[i].row.rejected[r]) for i, _, r in places], np.int64),
        np.array([rows[i].row.source or "" for i, _, _ in places], np.str_),
    ), np.array(places, np.int64).reshape(-1, 3)


def compare_models(first: ModelEvaluation, other: ModelEvaluation, seed: int = 0) -> Comparison:
    """The first model's figures less the other's, on the same rows."""
    prompts = _prompts(first.rows)
    pairs: dict[str, float] = {}
    best_of_n: dict[str, float] = {}
    if len(first.places):
        pairs = compare_pairs(first.pairs, other.pairs, prompts[first.places[:, 0]], seed)
    rated = [number for number, row in enumerate(first.rows) if row.labels]
    if rated:
        of_first, of_other = (best_of_n_rows(*_rated(model.rows)) for model in (first, other))
        for name in ("top_is_best", "label_of_top"):
            values = of_first[name] - of_other[name]
            there = ~np.isnan(values)
            [(low, high)] = bootstrap_intervals(values[there, None], prompts[rated][there], seed)
            mean = float(values[there].mean()) if there.any() else math.nan
            best_of_n |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return Comparison(other.name, pairs, best_of_n)


def figures_of(rows: Sequence[ScoredRow], pairs: PairScores) -> Figures:
    """Of rows and their pairs (`pairs_of`)."""
    rewards, labels = _rated(rows)
    return Figures(
        pair_figures(pairs.chosen, pairs.rejected) if len(pairs.chosen) else {},
        length_figures(pairs) if len(pairs.chosen) else {},
        best_of_n_figures(rewards, labels) if rewards else {},
    )


def _all_figures(
    rows: Sequence[ScoredRow], pairs: PairScores, places: npt.NDArray[np.int64], seed: int
) -> Figures:
    figures = figures_of(rows, pairs)
    if figures.pairs:
        prompts = _prompts(rows)[places[:, 0]]
        right = (pairs.margins > 0).astype(float)
        [(low, high)] = bootstrap_intervals(right[:, None], prompts, seed)
        figures.pairs.update(
            prompts=len(np.unique(prompts)), accuracy_prompts_low=low, accuracy_prompts_high=high
        )
    return figures


def _by(rows: Sequence[ScoredRow], key: Callable[[Row], str | None]) -> dict[str, Figures]:
    """Figures of every part of the rows that has a name, sorted by it."""
    parts: dict[str, list[ScoredRow]] = {}
    for row in rows:
        name = key(row.row)
        if name:
            parts.setdefault(name, []).append(row)
    return {name: figures_of(parts[name], pairs_of(parts[name])[0]) for name in sorted(parts)}


def _prompts(rows: Sequence[ScoredRow]) -> npt.NDArray[np.int64]:
    """(R,) a number for every row, the same for rows of one prompt."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(row.row.prompt, len(numbers)) for row in rows], np.int64)


def _rated(
    rows: Sequence[ScoredRow],
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Rewards and labels of the rows that have labels."""
    rated = [row for row in rows if row.labels]
    return [row.scores for row in rated], [row.labels for row in rated]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
