"""Two models on the same pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_xtuner import comparison
from polar_xtuner.comparison import bootstrap_intervals, compare_pairs, mcnemar
from polar_xtuner.evaluation import PairScores, pair_figures


def scores_of(margins: Any) -> PairScores:
    margins = np.array(margins, float)
    nothing = np.zeros(len(margins), int)
    return PairScores(margins, np.zeros(len(margins)), nothing, nothing, nothing.astype(np.str_))


MARGINS = st.sampled_from([-1e4, -2.0, -0.5, 0.0, 0.5, 2.0, 1e4])
ROWS = st.lists(st.tuples(MARGINS, MARGINS, st.integers(0, 3)), min_size=1, max_size=25)


@settings(max_examples=30)
@given(ROWS)
def test_differences_are_those_of_the_figures(rows: Any) -> None:
    a, b, prompts = ([*column] for column in zip(*rows))
    found = compare_pairs(scores_of(a), scores_of(b), prompts)
    of_a, of_b = (pair_figures(margins, [0.0] * len(rows)) for margins in (a, b))
    assert found["pairs"] == len(rows) and found["prompts"] == len({*prompts})
    for name in ("accuracy", "loss"):
        difference = of_a[name] - of_b[name]
        assert found[f"{name}_difference"] == pytest.approx(difference, rel=1e-9, abs=1e-9)
    assert found["only_first_right"] == sum(x > 0 >= y for x, y, _ in rows)
    assert found["only_second_right"] == sum(y > 0 >= x for x, y, _ in rows)
    assert math.isnan(found["loss_difference_low"]) == (found["prompts"] < 2)
    mirrored = compare_pairs(scores_of(b), scores_of(a), prompts)
    assert mirrored["mcnemar_p"] == pytest.approx(found["mcnemar_p"])
    assert mirrored["accuracy_difference"] == -found["accuracy_difference"]


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_adds_up_the_binomial_distribution(first: int, second: int) -> None:
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_the_interval_is_that_of_a_plain_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 20, 90).astype(str)
    values = rng.normal(size=(90, 2)) + (clusters.astype(int) % 3)[:, None]
    fast = bootstrap_intervals(values, clusters, seed=5, draws=300)
    members = [values[clusters == name] for name in np.unique(clusters)]
    plain = np.random.default_rng(5)
    means = [
        np.concatenate([members[k] for k in plain.integers(0, len(members), len(members))]).mean(0)
        for _ in range(300)
    ]
    lows, highs = np.quantile(means, [0.025, 0.975], axis=0)
    assert np.allclose(fast, np.stack([lows, highs], axis=1))
    monkeypatch.setattr(comparison, "_AT_ONCE", 50)  # in many parts
    assert bootstrap_intervals(values, clusters, seed=5, draws=300) == fast


def test_the_interval_covers_the_truth_where_rows_of_a_prompt_go_together() -> None:
    rng = np.random.default_rng(0)
    covered, covered_by_rows = [], []
    for seed in range(200):
        clusters = np.repeat(np.arange(50), 6)
        values = (rng.normal(size=50)[clusters] + rng.normal(size=300))[:, None]
        for unit, hits in ((clusters, covered), (np.arange(300), covered_by_rows)):
            [(low, high)] = bootstrap_intervals(values, unit, seed, draws=400)
            hits.append(low <= 0 <= high)
    assert 0.9 <= np.mean(covered) <= 0.99
    assert np.mean(covered_by_rows) < 0.75  # what taking rows for independent would have said


def test_one_prompt_tells_no_spread_and_other_pairs_are_refused() -> None:
    [(low, high)] = bootstrap_intervals(np.ones((4, 1)), ["p"] * 4)
    assert math.isnan(low) and math.isnan(high)
    assert all(map(math.isnan, bootstrap_intervals(np.ones((0, 1)), [])[0]))
    with pytest.raises(ValueError, match="same pairs, found 2 and 1, with 2 prompts"):
        compare_pairs(scores_of([1, 2]), scores_of([1]), [0, 1])
