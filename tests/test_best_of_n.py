"""Choosing among several candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_xtuner.best_of_n import (
    LARGEST,
    best_of_n_figures,
    best_of_n_rows,
    check_labels,
    labels_of,
)
from polar_xtuner.evaluation import wilson_interval
from polar_xtuner.records import BadRow, Row, map_rows

VALUES = st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0])
ROW = st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=5)


def in_all_orders(rewards: Any, labels: Any) -> Iterator[list[float]]:
    """The labels by falling reward, candidates with equal rewards in every order."""
    for order in permutations(range(len(rewards))):
        if all(rewards[a] >= rewards[b] for a, b in pairwise(order)):
            yield [labels[i] for i in order]


def plain_ndcg(ranked: list[float]) -> float:
    lowest = min(ranked)

    def dcg(labels: list[float]) -> float:
        return sum((label - lowest) / math.log2(i + 2) for i, label in enumerate(labels))

    return dcg(ranked) / dcg(sorted(ranked, reverse=True))


def plain_kendall(x: Any, y: Any) -> float:
    sign = np.sign
    pairs = [(sign(x[i] - x[j]), sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    norm = math.sqrt(sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs))
    return sum(a * b for a, b in pairs) / norm if norm else 0.0


def plain_spearman(x: Any, y: Any) -> float:
    def ranks(values: Any) -> list[float]:
        return [sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values]

    if len({*x}) == 1:
        return 0.0
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


@settings(max_examples=60)
@given(ROW)
def test_the_figures_of_a_row_are_means_over_all_orders_of_equal_rewards(row: Any) -> None:
    rewards, labels = ([*column] for column in zip(*row))
    found = {name: float(values[0]) for name, values in best_of_n_rows([rewards], [labels]).items()}
    orders = [*in_all_orders(rewards, labels)]

    def mean(function: Any) -> float:
        return sum(map(function, orders)) / len(orders)

    assert found["label_of_top"] == pytest.approx(mean(lambda ranked: ranked[0]))
    assert found["label_mean"] == pytest.approx(sum(labels) / len(labels))
    assert found["label_best"] == max(labels)
    others = ("top_is_best", "random_is_best", "ndcg", "spearman", "kendall")
    if len({*labels}) == 1:
        assert all(math.isnan(found[name]) for name in others)
        return
    best = max(labels)
    assert found["top_is_best"] == pytest.approx(mean(lambda ranked: ranked[0] == best))
    assert found["random_is_best"] == pytest.approx(labels.count(best) / len(labels))
    assert found["ndcg"] == pytest.approx(mean(plain_ndcg))
    assert found["spearman"] == pytest.approx(plain_spearman(rewards, labels))
    assert found["kendall"] == pytest.approx(plain_kendall(rewards, labels))


@settings(max_examples=40)
@given(st.lists(ROW, min_size=1, max_size=6))
def test_figures_are_means_over_rows_and_say_what_is_left_out(rows: Any) -> None:
    rewards, labels = ([[pair[i] for pair in row] for row in rows] for i in (0, 1))
    found, columns = best_of_n_figures(rewards, labels), best_of_n_rows(rewards, labels)
    flat = sum(len({*of_row}) == 1 for of_row in labels)
    assert (found["rows"], found["rows_equal_labels"]) == (len(rows), flat)
    assert found["candidates"] == sum(map(len, rows))
    for name, column in columns.items():
        there = [value for value in column if not math.isnan(value)]
        if there:
            assert found[name] == pytest.approx(sum(there) / len(there))
        else:
            assert math.isnan(found[name]) and math.isnan(found["top_is_best_low"])
    if flat < len(rows):
        ends = found["top_is_best_low"], found["top_is_best_high"]
        n = len(rows) - flat
        assert ends == pytest.approx(wilson_interval(found["top_is_best"] * n, n))


@settings(max_examples=40)
@given(ROW, st.floats(0.01, 100), st.floats(-50, 50))
def test_the_scale_of_labels_does_not_matter_to_the_ranking(row: Any, a: float, b: float) -> None:
    rewards, labels = ([*column] for column in zip(*row))
    one, other = (
        best_of_n_rows([rewards], [scaled]) for scaled in (labels, [a * x + b for x in labels])
    )
    for name in ("top_is_best", "ndcg", "spearman", "kendall"):
        assert np.allclose(one[name], other[name], equal_nan=True)


def test_damaged_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 2 rewards and 3 labels"):
        best_of_n_figures([[1, 2], [1, 2]], [[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"row 0 .* not finite"):
        best_of_n_figures([[math.nan, 2]], [[1, 2]])


# --- labels in rows ------------------------------------------------------------------------------


def checked(**fields: Any) -> Row | BadRow:
    raw = {"prompt": "p", "reference": "r", **fields}
    [row] = check_labels(map_rows([raw], "rows", scoring=True))
    return row


def test_labels_go_with_outputs() -> None:
    row = checked(output=["a", "b"], labels=[1, 0.5])
    assert isinstance(row, Row) and labels_of(row) == (1.0, 0.5)
    pair = checked(chosen="a", rejected="b", labels="of something else")
    assert isinstance(pair, Row) and labels_of(pair) == ()


@pytest.mark.parametrize(
    "output, labels, errors",
    [
        (["a", "b"], None, ["labels: is missing"]),
        (["a", "b"], 3, ["labels: must be a list of numbers, found int 3"]),
        (["a", "b"], [1], ["labels: must be 2, one for each output, found 1"]),
        (
            ["a", "b"],
            [1, True],
            ["labels[1]: must be a number up to 1e+300 in size, found bool True"],
        ),
        (["a", "b"], [1.1e300, -1.1e300], ["labels[0]: must be", "labels[1]: must be"]),
        (["a", "b"], [math.nan, 10**400], ["labels[0]: must be", "labels[1]: must be"]),
        (["a", "b"], ["1", None], ["labels[0]: must be", "labels[1]: must be"]),
        ("a", [1], ["output: must be several candidates"]),
        ("a", [], ["labels: must be 1", "output: must be several"]),
    ],
)
def test_bad_labels_are_named_by_field(output: Any, labels: Any, errors: list[str]) -> None:
    row = checked(output=output, labels=labels)
    assert isinstance(row, BadRow)
    for error, start in zip(row.errors, errors, strict=True):
        assert (error.file, error.line) == ("rows", 1)
        assert f"{error.field}: {error.problem}".startswith(start)


def test_the_largest_labels_have_figures() -> None:
    labels = [LARGEST, -LARGEST, 0]
    assert isinstance(checked(output=["a", "b", "c"], labels=labels), Row)
    figures = best_of_n_figures([[1, 2, 3], [3, 2, 1]], [labels, labels])
    assert all(map(math.isfinite, figures.values()))


def test_a_row_with_neither_pair_nor_output_is_bad() -> None:
    row = checked(labels=[1, 2])
    assert isinstance(row, BadRow) and "output: is missing" in str(row.errors[0])
