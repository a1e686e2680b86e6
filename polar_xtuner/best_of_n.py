"""Best of N: does the reward pick the best of several candidates of a prompt?

    {"prompt": ..., "reference": ..., "output": ["4", "5", "four"], "labels": [1, 0, 0.8]}

A row to score with a number for every candidate, the higher the better: right or wrong, a grade, a
share of tests passed. Numbers are compared within a row only, so each row may have its own scale.
Candidates with equal rewards are in no order: every figure is its mean over all orders of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.stats import kendalltau, spearmanr

from polar_xtuner._checks import Problem, found
from polar_xtuner.evaluation import Floats, wilson_interval
from polar_xtuner.records import BadRow, Row, RowError

LABELS = "labels"
LARGEST = 1e300
"""Of labels, whose sums and differences have to be finite too."""

ROW_FIGURES = (
    *("label_of_top", "label_mean", "label_best"),
    *("top_is_best", "random_is_best", "ndcg", "spearman", "kendall"),
)


def check_labels(items: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
    """Rows to evaluate: pairs as they are, rows with outputs if they have labels, else a `BadRow`.

    Of a row that passes, `labels_of` gives the labels.
    """
    for item in items:
        problems = _problems(item) if isinstance(item, Row) and item.outputs else []
        if isinstance(item, Row) and problems:
            yield BadRow(tuple(RowError(item.file, item.line, *problem) for problem in problems))
        else:
            yield item


def labels_of(row: Row) -> tuple[float, ...]:
    """The label of every output of a row that `check_labels` let through."""
    return tuple(map(float, row.extra[LABELS])) if row.outputs else ()


def _problems(row: Row) -> list[Problem]:
    labels = row.extra.get(LABELS)
    count = len(row.outputs)
    if labels is None:
        return [(LABELS, "is missing: outputs are judged by a list of numbers, one for each")]
    if not isinstance(labels, list):
        return [(LABELS, f"must be a list of numbers, found {found(labels)}")]
    problems = [
        (f"{LABELS}[{i}]", f"must be a number up to {LARGEST:g} in size, found {found(label)}")
        for i, label in enumerate(labels)
        if isinstance(label, bool)
        or not isinstance(label, (int, float))
        or not abs(label) <= LARGEST  # which NaN is not
    ]
    if len(labels) != count:
        problems.append((LABELS, f"must be {count}, one for each output, found {len(labels)}"))
    if count < 2:
        problems.append(("output", "must be several candidates, to choose from, found one"))
    return problems


def best_of_n_rows(
    rewards: Sequence[Sequence[float]], labels: Sequence[Sequence[float]]
) -> dict[str, Floats]:
    """The figures of every row, (R,) each; see `best_of_n_figures`.

    NaN in a row with equal labels, but for `label_of_top`, `label_mean` and `label_best`.
    """
    columns: dict[str, list[float]] = {name: [] for name in ROW_FIGURES}
    for row, (of_row, of_labels) in enumerate(zip(rewards, labels, strict=True)):
        values, grades = np.asarray(of_row, float), np.asarray(of_labels, float)
        if values.shape != grades.shape:
            raise ValueError(f"row {row} has {len(values)} rewards and {len(grades)} labels")
        if not (np.isfinite(values).all() and np.isfinite(grades).all()):
            raise ValueError(f"row {row} (from 0) has a reward or label that is not finite")
        for name, value in zip(ROW_FIGURES, _figures_of_row(values, grades), strict=True):
            columns[name].append(value)
    return {name: np.array(column, float) for name, column in columns.items()}


def best_of_n_figures(
    rewards: Sequence[Sequence[float]], labels: Sequence[Sequence[float]]
) -> dict[str, float]:
    """How well rewards choose among the candidates of every row; means over the rows.

    Args:
        rewards, labels: of the candidates of every row.

    Returns:
        rows, candidates: how many there are.
        rows_equal_labels: rows whose labels are all equal, where nothing can be chosen wrong. They
            are left out of the figures that follow, but for the labels' means.
        top_is_best, top_is_best_low, top_is_best_high: share of the rows whose candidate with the
            highest reward has the best label, and its 95 % interval.
        random_is_best: the same of a candidate chosen at random.
        label_of_top, label_mean, label_best: mean over all rows of the label of the candidate with
            the highest reward, of the mean label, and of the best one.
        ndcg: normalised discounted cumulative gain (Järvelin and Kekäläinen 2002: gains divided by
            log2(1 + rank)), the gain of a candidate being its label less the row's lowest.
        spearman, kendall: rank correlations of rewards and labels (tau-b); 0 in a row whose
            rewards are all equal.

    Raises:
        ValueError: a reward or a label is not finite, or their numbers differ.
    """
    rows = best_of_n_rows(rewards, labels)
    means = {name: _mean(values[~np.isnan(values)]) for name, values in rows.items()}
    judged = int((~np.isnan(rows["ndcg"])).sum())
    share = means.pop("top_is_best")
    low, high = wilson_interval(share * judged, judged) if judged else (math.nan, math.nan)
    return {
        "rows": len(rows["ndcg"]),
        "candidates": sum(map(len, rewards)),
        "rows_equal_labels": len(rows["ndcg"]) - judged,
        "top_is_best": share,
        "top_is_best_low": low,
        "top_is_best_high": high,
        **means,
    }


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _figures_of_row(rewards: Floats, labels: Floats) -> tuple[float, ...]:
    """In the order of `ROW_FIGURES`."""
    top, best = rewards == rewards.max(), labels == labels.max()
    means = float(labels[top].mean()), float(labels.mean()), float(labels.max())
    if best.all():
        return (*means, *[math.nan] * 5)
    is_flat = bool(top.all())
    return (
        *means,
        float(best[top].mean()),
        float(best.mean()),
        _ndcg(rewards, labels),
        0.0 if is_flat else float(spearmanr(rewards, labels).statistic),
        0.0 if is_flat else float(kendalltau(rewards, labels).statistic),
    )


def _ndcg(rewards: Floats, labels: Floats) -> float:
    """Candidates with equal rewards share the mean of their gains (McSherry and Najork 2008)."""
    gains = labels - labels.min()
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))
    _, places, counts = np.unique(-rewards, return_inverse=True, return_counts=True)
    mean_gains = np.bincount(places, gains) / counts
    return float(np.repeat(mean_gains, counts) @ discounts / (-np.sort(-gains) @ discounts))
