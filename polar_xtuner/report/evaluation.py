"""The page of an evaluation: one model, or several on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polar_xtuner import __version__
from polar_xtuner.evaluation import calibration_curve, wilson_interval
from polar_xtuner.model_evaluation import Evaluation, Figures, ModelEvaluation
from polar_xtuner.records import Row
from polar_xtuner.report.page import signed, write_page
from polar_xtuner.report.plots import (
    Key,
    Line,
    Plot,
    Shares,
    calibration,
    density,
    histogram,
    shares,
)
from polar_xtuner.report.text import ending

WORST = 20
"""Rows of the lowest margins that the page shows, of each model."""
DRAWN = 30
"""Files or sources in a plot, those with the most pairs; the table has all."""
PARTS = 5
"""Of equal size, by length."""

CHOSEN, REJECTED = Key("chosen", "s1"), Key("rejected", "s2", "7 3")


@dataclass(frozen=True)
class Pair:
    """A row as the page shows it: by the pair of its texts with the lowest margin.

    Attributes:
        others: the margins of the same pair by the other models.
    """

    row: Row
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    others: list[tuple[str, float]]

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score


def write_evaluation_report(folder: Path, results: Evaluation) -> Path:
    """Writes `folder`/index.html and gives its path.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    models = results.models
    has_pairs = bool(models[0].figures.pairs)
    return write_page(
        folder,
        "evaluation.html",
        version=__version__,
        results=results,
        models=models,
        first=models[0],
        keys=_keys(models),
        files=_parts(models, lambda model: model.by_file),
        sources=_parts(models, lambda model: model.by_source),
        plots=dict(_plots(models)) if has_pairs else {},
        worst=[worst_pairs(models, number) for number in range(len(models))] if has_pairs else [],
        isnan=math.isnan,
    )


def worst_pairs(models: Sequence[ModelEvaluation], number: int) -> list[Pair]:
    """The rows that the `number`th model ranks worst, the worst first."""
    model = models[number]
    others = [other for i, other in enumerate(models) if i != number]
    pairs: dict[int, Pair] = {}
    for place in np.argsort(model.pairs.margins, kind="stable").tolist():
        at, chosen, rejected = model.places[place].tolist()
        if at not in pairs:
            row = model.rows[at].row
            pairs[at] = Pair(
                row,
                row.chosen[chosen],
                row.rejected[rejected],
                float(model.pairs.chosen[place]),
                float(model.pairs.rejected[place]),
                [(other.name, float(other.pairs.margins[place])) for other in others],
            )
            if len(pairs) == WORST:
                break
    return [*pairs.values()]


def _keys(models: Sequence[ModelEvaluation]) -> list[Key]:
    return [Key.of(number, model.name) for number, model in enumerate(models)]


def _parts(
    models: Sequence[ModelEvaluation], part: Callable[[ModelEvaluation], dict[str, Figures]]
) -> dict[str, list[Figures]]:
    """Figures of every model by file or source, if there are several; the largest first."""
    of_models = [part(model) for model in models]
    if len(of_models[0]) < 2:
        return {}

    def size(name: str) -> float:
        figures = of_models[0][name]
        return figures.pairs.get("pairs", 0) + figures.best_of_n.get("rows", 0)

    names = sorted(of_models[0], key=size, reverse=True)
    return {name: [figures[name] for figures in of_models] for name in names}


def _plots(models: Sequence[ModelEvaluation]) -> Iterator[tuple[str, Any]]:
    keys = _keys(models)
    yield "margins", _margins(models, keys)
    yield "calibration", _calibration(models, keys)
    for name, title, part in (
        ("files", "By file", lambda model: model.by_file),
        ("sources", "By source", lambda model: model.by_source),
    ):
        parts = _parts(models, part)
        drawn = [name for name, of_models in parts.items() if of_models[0].pairs][:DRAWN]
        if len(drawn) > 1:
            series = [
                _shares_of(key, [parts[name][number].pairs for name in drawn])
                for number, key in enumerate(keys)
            ]
            yield name, _accuracies(f"by-{name}", title, drawn, series)
    yield "lengths", [*_by_length(models, keys)]
    yield "density", [_density(number, model) for number, model in enumerate(models)]


def _margins(models: Sequence[ModelEvaluation], keys: Sequence[Key]) -> Plot:
    label = "Histogram of margins: " + "; ".join(
        f"{model.name} mean {model.figures.pairs['margin']:.3f}, "
        f"{model.figures.pairs['accuracy']:.1%} above 0"
        for model in models
    )
    series = [(key, model.pairs.margins) for key, model in zip(keys, models)]
    return histogram("margins", "Margins", label, series, "margin, chosen − rejected reward")


def _calibration(models: Sequence[ModelEvaluation], keys: Sequence[Key]) -> Plot:
    """Of one model as it is and at its temperature; of several, all as they are."""
    pairs = [(key, model.pairs, 1.0) for key, model in zip(keys, models)]
    temperature = models[0].figures.pairs["temperature"]
    if len(models) == 1:
        pairs[0] = Key("as it is", "s1"), models[0].pairs, 1.0
        if not math.isnan(temperature):
            scaled = Key(f"margins divided by {temperature:.3g}", "s2", "7 3")
            pairs.append((scaled, models[0].pairs, temperature))
    lines, counts, told = [], [], []
    for key, scores, temperature in pairs:
        curve = calibration_curve(scores.chosen, scores.rejected, temperature=temperature)
        lines.append(Line(key, curve.confidence, curve.accuracy))
        counts.append(curve.pairs)
        told.append(f"{key.name}, expected error {curve.ece:.3f}")
    label = "Accuracy against confidence in ten bins: " + "; ".join(told)
    return calibration("calibration", "Calibration", label, lines, counts)


def _by_length(models: Sequence[ModelEvaluation], keys: Sequence[Key]) -> Iterator[Plot]:
    """Accuracy by how long the outputs are, and by which one is how much longer."""
    scores = models[0].pairs
    longer = np.maximum(scores.chosen_lengths, scores.rejected_lengths)
    yield _masked(
        "by-length", "By length of the longer output, characters", _fifths(longer), models, keys
    )
    chosen = np.maximum(scores.chosen_lengths, 1)
    ratio = np.log2(chosen / np.maximum(scores.rejected_lengths, 1))
    limit = math.log2(1.1)
    sides = {
        "rejected ≥ 2 ×": ratio <= -1,
        "rejected longer": (ratio > -1) & (ratio < -limit),
        "within 10 %": np.abs(ratio) <= limit,
        "chosen longer": (ratio > limit) & (ratio < 1),
        "chosen ≥ 2 ×": ratio >= 1,
    }
    yield _masked("by-longer", "By which output is longer", sides, models, keys)


def _fifths(lengths: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Masks of parts of about equal size, by the lengths that they hold; fewer where many are
    equal."""
    inner = np.quantile(lengths, np.linspace(0, 1, PARTS + 1)[1:-1], method="nearest")
    bounds = np.unique([lengths.min() - 1, *inner, lengths.max()]).tolist()
    return {
        f"{low + 1:,} to {high:,}": (lengths > low) & (lengths <= high)
        for low, high in pairwise(bounds)
    }


def _masked(
    id: str,
    title: str,
    masks: dict[str, NDArray[np.bool_]],
    models: Sequence[ModelEvaluation],
    keys: Sequence[Key],
) -> Plot:
    """Accuracy in the parts of the pairs that hold any."""
    kept = [(name, mask) for name, mask in masks.items() if mask.any()]
    series = []
    for key, model in zip(keys, models):
        figures = []
        for _, mask in kept:
            right, n = int((model.pairs.margins > 0)[mask].sum()), int(mask.sum())
            low, high = wilson_interval(right, n)
            figures.append({"accuracy": right / n, "accuracy_low": low, "accuracy_high": high})
        series.append(_shares_of(key, figures))
    return _accuracies(id, title, [name for name, _ in kept], series)


def _shares_of(key: Key, figures: Sequence[dict[str, float]]) -> Shares:
    columns = [[of_part[f"accuracy{end}"] for of_part in figures] for end in ("", "_low", "_high")]
    return Shares(key, *columns)


def _accuracies(id: str, title: str, names: Sequence[str], series: Sequence[Shares]) -> Plot:
    told = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, series[0].values))
    label = f"Accuracy with 95 % intervals, {title.lower()}: {told}"
    return shares(id, title, label, names, series, "accuracy")


def _density(number: int, model: ModelEvaluation) -> Plot:
    scores = model.pairs
    correlation = model.figures.lengths["score_length_correlation"]
    told = "" if math.isnan(correlation) else f", correlation {signed(correlation, 2)}"
    label = f"Rewards against the lengths of all outputs{told}"
    lines = [
        _means(CHOSEN, scores.chosen_lengths, scores.chosen),
        _means(REJECTED, scores.rejected_lengths, scores.rejected),
    ]
    return density(
        f"density-{number}",
        f"Reward and length{told}: {ending(model.name, 40)}",
        label,
        np.concatenate([scores.chosen_lengths, scores.rejected_lengths]),
        np.concatenate([scores.chosen, scores.rejected]),
        lines,
        "characters",
    )


def _means(key: Key, lengths: NDArray[np.int64], rewards: NDArray[np.float64]) -> Line:
    """Mean reward of parts by length."""
    masks = _fifths(lengths).values()
    x = [float(np.median(lengths[mask])) for mask in masks]
    return Line(key, x, [float(rewards[mask].mean()) for mask in masks])
