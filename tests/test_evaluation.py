"""Figures of pairs, each against a plain reimplementation."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import warnings
from fractions import Fraction
from operator import mul
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polar_xtuner.evaluation import (
    PairScores,
    best_temperature,
    by_source,
    calibration_curve,
    correlation,
    length_figures,
    likeliest_temperature,
    pair_figures,
    wilson_interval,
)

# Few distinct values, so that there are ties, and some extreme ones.
REWARDS = st.sampled_from([-1e4, -3.25, -1.0, -0.5, 0.0, 0.125, 0.5, 1.0, 2.5, 1e4])
PAIRS = st.lists(st.tuples(REWARDS, REWARDS), min_size=1, max_size=40)


def close(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def plain_ece(pairs: list[tuple[float, float]], temperature: float = 1, bins: int = 10) -> float:
    members: dict[int, list[tuple[float, bool]]] = {}
    for chosen, rejected in pairs:
        confidence = sigmoid(abs(chosen - rejected) / temperature)
        place = next((b for b in range(bins) if confidence < 0.5 + (b + 1) * 0.5 / bins), bins - 1)
        members.setdefault(place, []).append((confidence, chosen > rejected))
    return sum(
        abs(sum(right for _, right in some) - math.fsum(confidence for confidence, _ in some))
        for some in members.values()
    ) / len(pairs)


def scores_of(pairs: Any, lengths: Any = None, sources: Any = None) -> PairScores:
    n = len(pairs)
    pairs = np.array(pairs, float).reshape(-1, 2)
    lengths = np.ones((n, 2), int) if lengths is None else np.array(lengths, int).reshape(-1, 2)
    return PairScores(
        *(pairs[:, 0], pairs[:, 1], lengths[:, 0], lengths[:, 1]),
        np.array([""] * n if sources is None else sources, np.str_),
    )


@given(PAIRS)
def test_every_figure_is_what_its_name_says(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = ([*side] for side in zip(*pairs))
    figures = pair_figures(chosen, rejected)
    n = len(pairs)
    right = sum(c > r for c, r in pairs)
    # log(1 + exp(-margin)), where exp would overflow the margin itself
    losses = [math.log1p(math.exp(r - c)) if c - r > -30 else r - c for c, r in pairs]
    expected = {
        "pairs": n,
        "accuracy": right / n,
        "accuracy_low": wilson_interval(right, n)[0],
        "accuracy_high": wilson_interval(right, n)[1],
        "ties": sum(c == r for c, r in pairs) / n,
        "margin": sum(c - r for c, r in pairs) / n,
        "chosen_reward": statistics.fmean(chosen),
        "chosen_reward_std": statistics.pstdev(chosen),
        "rejected_reward": statistics.fmean(rejected),
        "rejected_reward_std": statistics.pstdev(rejected),
        "loss": sum(losses) / n,
        "ece": plain_ece(pairs),
    }
    for name, value in expected.items():
        assert close(figures[name], value), name
    assert [*expected, "temperature", "ece_at_temperature"] == [*figures]


@settings(max_examples=40)
@given(PAIRS)
def test_no_temperature_is_better_than_the_best(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = ([*side] for side in zip(*pairs))
    figures = pair_figures(chosen, rejected)
    right, n = sum(c > r for c, r in pairs), len(pairs)
    if right == n or right <= n / 2:
        assert math.isnan(figures["temperature"]) and math.isnan(figures["ece_at_temperature"])
        return
    margins = [abs(c - r) for c, r in pairs if c != r]
    others = [statistics.median(margins) * 10 ** (e / 25) for e in range(-100, 101, 4)]
    least = min(plain_ece(pairs, other) for other in others)
    if math.isnan(figures["temperature"]):  # at a bound
        ends = plain_ece(pairs, others[0]), plain_ece(pairs, others[-1])
        assert min(ends) == pytest.approx(least, abs=1e-9)
        return
    assert figures["ece_at_temperature"] <= least + 1e-9
    assert figures["ece_at_temperature"] == pytest.approx(
        plain_ece(pairs, figures["temperature"]), abs=1e-9
    )
    assert figures["temperature"] == best_temperature(chosen, rejected)  # the same every time


@pytest.mark.parametrize("temperature", [0.02, 1.0, 300.0])
def test_the_temperature_that_margins_were_made_with_is_found(temperature: float) -> None:
    rng = np.random.default_rng(1)
    margins = np.abs(rng.normal(0, 2 * temperature, 20_000))
    right = rng.random(len(margins)) < 1 / (1 + np.exp(-margins / temperature))
    margins = np.where(right, margins, -margins)
    found = pair_figures(margins, np.zeros_like(margins))
    assert found["temperature"] == pytest.approx(temperature, rel=0.05)
    assert found["ece_at_temperature"] < 0.01
    likeliest = likeliest_temperature(margins, np.zeros_like(margins))
    assert likeliest == pytest.approx(temperature, rel=0.03)


@given(PAIRS)
def test_at_no_other_temperature_are_pairs_likelier(pairs: list[tuple[float, float]]) -> None:
    margins = [chosen - rejected for chosen, rejected in pairs]
    found = likeliest_temperature(*zip(*pairs))
    has_one = min(margins) < 0 < math.fsum(margins)
    assert math.isnan(found) != has_one
    if has_one:

        def loss(temperature: float) -> float:
            scaled = [m / temperature for m in margins]
            return math.fsum(math.log1p(math.exp(-abs(m))) + max(-m, 0) for m in scaled)

        others = (0.01, 0.5, 0.99, 1.01, 2, 100)
        assert loss(found) <= min(loss(found * factor) for factor in others) * (1 + 1e-9)


@given(PAIRS, st.sampled_from([0.3, 1.0, 7.0]), st.sampled_from([1, 4, 10]))
def test_the_error_is_that_of_the_curve(
    pairs: list[tuple[float, float]], temperature: float, bins: int
) -> None:
    chosen, rejected = zip(*pairs)
    curve = calibration_curve(chosen, rejected, bins, temperature)
    assert curve.pairs.sum() == len(pairs)
    assert np.array_equal(np.isnan(curve.accuracy), curve.pairs == 0)
    there = curve.pairs > 0
    edges = np.linspace(0.5, 1, bins + 1)
    assert (curve.confidence[there] >= edges[:-1][there] - 1e-12).all()
    assert (curve.confidence[there] <= edges[1:][there] + 1e-12).all()
    assert curve.ece == pytest.approx(plain_ece(pairs, temperature, bins), abs=1e-9)


def test_without_pairs_figures_are_nan() -> None:
    figures = pair_figures([], [])
    assert figures.pop("pairs") == 0
    assert all(math.isnan(value) for value in figures.values())
    lengths = length_figures(scores_of([]))
    assert lengths.pop("pairs_longer_wrong") == 0
    assert all(math.isnan(value) for value in lengths.values())
    assert by_source(scores_of([])) == {}
    assert math.isnan(calibration_curve([], []).ece)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(bad: float) -> None:
    good = [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"1 of 3 chosen rewards .* pair 1 \(from 0\)"):
        pair_figures([0.0, bad, 2.0], good)
    with pytest.raises(ValueError, match=r"1 of 3 rejected rewards .* pair 2 "):
        calibration_curve(good, [0.0, 1.0, bad])
    with pytest.raises(ValueError, match="rejected"):
        length_figures(scores_of([(0.0, bad)]))
    with pytest.raises(ValueError, match="same pairs"):
        pair_figures(good, good[:2])


LENGTHS = st.integers(0, 4)
WITH_LENGTHS = st.lists(st.tuples(st.tuples(REWARDS, REWARDS), st.tuples(LENGTHS, LENGTHS)))


@given(WITH_LENGTHS.filter(bool))
def test_length_figures_are_what_their_names_say(rows: Any) -> None:
    pairs, lengths = zip(*rows)
    figures = length_figures(scores_of(pairs, lengths))
    wins = sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in lengths)
    assert figures["longer_wins"] == wins / len(rows)
    assert figures["longer_wins_low"] <= wins / len(rows) <= figures["longer_wins_high"]
    wrong = [pair for pair, (c, r) in rows if r > c]
    assert figures["pairs_longer_wrong"] == len(wrong)
    part = pair_figures(*zip(*wrong)) if wrong else pair_figures([], [])
    for end in ("", "_low", "_high"):
        assert close(figures[f"accuracy_longer_wrong{end}"], part[f"accuracy{end}"])

    def pearson(x: list[float], y: list[int]) -> float:
        if len({*x}) < 2 or len({*y}) < 2:
            return math.nan
        return statistics.correlation(x, y)

    both = [(value, length) for pair, two in rows for value, length in zip(pair, two)]
    expected = pearson(*([*side] for side in zip(*both)))  # type: ignore[arg-type]
    assert close(figures["score_length_correlation"], expected)
    margins, differences = [c - r for c, r in pairs], [c - r for c, r in lengths]
    assert close(figures["margin_length_correlation"], pearson(margins, differences))


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FINITE, FINITE), max_size=20))
@example([(1.7e308, 1.0), (-1.7e308, 2.0), (1e300, 0.0)])
@example([(5e-324, 1.0), (0.0, 2.0)])
@example([(1.0, 3.0), (1.0, 3.0), (1.0 + 2**-52, 4.0)])  # a mean of these is 1
def test_a_correlation_is_exact_and_silent_for_all_finite_values(pairs: Any) -> None:
    sides = [[*map(Fraction, side)] for side in zip(*pairs)]
    (x, y) = [[n - sum(side) / len(side) for n in side] for side in sides] or [[], []]
    covariance, spread = sum(map(mul, x, y)), sum(map(mul, x, x)) * sum(map(mul, y, y))
    expected = math.nan
    if spread:
        expected = math.sqrt(covariance**2 / spread) * (1 if covariance > 0 else -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correlation(*([*side] for side in zip(*pairs))) if pairs else correlation([], [])
    assert close(found, expected)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.tuples(REWARDS, REWARDS), st.sampled_from(["", "b", "a"]))))
def test_sources_part_the_pairs_that_name_one(rows: Any) -> None:
    scores = scores_of([pair for pair, _ in rows], sources=[source for _, source in rows])
    parts = by_source(scores)
    assert [*parts] == sorted({source for _, source in rows} - {""})
    for source, figures in parts.items():
        alone = pair_figures(*zip(*(pair for pair, of in rows if of == source)))
        assert all(close(figures[name], alone[name]) for name in alone)
    assert len(scores.only(scores.sources == "a").margins) == sum(of == "a" for _, of in rows)


def test_wilson_s_interval_covers_the_share_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for p, n in ((0.5, 30), (0.9, 100), (0.98, 400)):
        intervals = [wilson_interval(k, n) for k in rng.binomial(n, p, 2000)]
        assert 0.92 < np.mean([low <= p <= high for low, high in intervals]) < 0.98
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for n in range(1, 200):  # where rounding would leave the share itself outside
        assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1
    # Newcombe 1998, table I, 15 of 148
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


def test_figures_need_no_torch() -> None:
    code = "import sys, polar_xtuner.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
