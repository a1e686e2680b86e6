"""Figures of scored pairs: accuracy, loss, calibration, and how far length explains them.

A pair is a prompt, a reference and two outputs of which one was preferred; its margin is the chosen
reward less the rejected one. Everything here is a function of arrays over pairs, numpy and nothing
else, so that validation during training and the evaluation of a model report the same numbers.

A figure that cannot be computed is NaN: all of them without pairs, a correlation where one side is
constant. A reward that is not finite is an error; no figure would show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BINS = 10
"""Of the expected calibration error, of equal width, on [0.5, 1]."""

DECADES = 4
PER_DECADE = 25
"""The search for a temperature: 10^-4 to 10^4 times the median margin, 25 steps a decade."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairScores:
    """Pairs with the rewards of one model.

    Attributes:
        chosen, rejected: (P,) float64 rewards.
        chosen_lengths, rejected_lengths: (P,) int, characters of the two outputs.
        sources: (P,) str, "" where a row names none.
    """

    chosen: Floats
    rejected: Floats
    chosen_lengths: npt.NDArray[np.int64]
    rejected_lengths: npt.NDArray[np.int64]
    sources: npt.NDArray[np.str_]

    def only(self, mask: Any) -> PairScores:
        """The pairs that `mask` takes: (P,) bool, or their numbers."""
        return PairScores(*(values[mask] for values in vars(self).values()))

    @property
    def margins(self) -> Floats:
        """(P,) chosen less rejected reward."""
        return self.chosen - self.rejected


class CalibrationCurve(NamedTuple):
    """How often the more confident pairs are right, by bins of confidence.

    Attributes:
        confidence: (B,) mean sigmoid(|margin| / temperature) of a bin's pairs, NaN without pairs.
        accuracy: (B,) share of them that is ranked right, NaN without pairs.
        pairs: (B,) int, their number.
    """

    confidence: Floats
    accuracy: Floats
    pairs: npt.NDArray[np.int64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over the pairs of their bin's |accuracy - confidence|.

        Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
        """
        n = self.pairs.sum()
        if not n:
            return math.nan
        return float(np.nansum(self.pairs * np.abs(self.accuracy - self.confidence)) / n)


def pair_figures(chosen: Any, rejected: Any) -> dict[str, float]:
    """The figures of pairs, by the names of the training log.

    Args:
        chosen, rejected: (P,) rewards.

    Returns:
        pairs: P.
        accuracy, accuracy_low, accuracy_high: share of the pairs whose chosen reward is higher, and
            its 95 % interval (`wilson_interval`).
        ties: share of the pairs with two equal rewards; they count as wrong.
        margin: mean of chosen less rejected.
        chosen_reward, chosen_reward_std, rejected_reward, rejected_reward_std: over the pairs, the
            deviation that of a population.
        loss: mean -log sigmoid(margin), Bradley-Terry.
        ece: expected calibration error of sigmoid(|margin|) as the probability of being right.
        temperature, ece_at_temperature: see `best_temperature`.

    Raises:
        ValueError: a reward is not finite, or the two have different lengths.
    """
    chosen, rejected = _checked(chosen, rejected)
    n, margins = len(chosen), chosen - rejected
    right = int((margins > 0).sum())
    low, high = wilson_interval(right, n) if n else (math.nan, math.nan)
    temperature = best_temperature(chosen, rejected)
    at_temperature = (
        math.nan
        if math.isnan(temperature)
        else calibration_curve(chosen, rejected, temperature=temperature).ece
    )
    return {
        "pairs": n,
        "accuracy": right / n if n else math.nan,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": _mean(margins == 0),
        "margin": _mean(margins),
        "chosen_reward": _mean(chosen),
        "chosen_reward_std": _std(chosen),
        "rejected_reward": _mean(rejected),
        "rejected_reward_std": _std(rejected),
        "loss": _mean(pair_losses(margins)),
        "ece": calibration_curve(chosen, rejected).ece,
        "temperature": temperature,
        "ece_at_temperature": at_temperature,
    }


def length_figures(scores: PairScores) -> dict[str, float]:
    """How far the length of an output explains preferences and rewards.

    Returns:
        longer_wins, longer_wins_low, longer_wins_high: accuracy of always choosing the longer
            output, two of equal length being half right, and its 95 % interval.
        pairs_longer_wrong: pairs whose rejected output is the longer one.
        accuracy_longer_wrong, accuracy_longer_wrong_low, accuracy_longer_wrong_high: accuracy of
            the rewards on these.
        score_length_correlation: Pearson's, of reward and length over the two outputs of every
            pair; an output that is in several pairs counts in each.
        margin_length_correlation: Pearson's, of margin and difference in length over the pairs.

    Raises:
        ValueError: a reward is not finite.
    """
    chosen, rejected = _checked(scores.chosen, scores.rejected)
    longer = np.sign(scores.chosen_lengths - scores.rejected_lengths)
    n, wins = len(longer), float((0.5 + 0.5 * longer).sum())
    wrong = longer < 0
    n_wrong, right = int(wrong.sum()), int((chosen > rejected)[wrong].sum())
    nothing = (math.nan, math.nan)
    wins_low, wins_high = wilson_interval(wins, n) if n else nothing
    low, high = wilson_interval(right, n_wrong) if n_wrong else nothing
    return {
        "longer_wins": wins / n if n else math.nan,
        "longer_wins_low": wins_low,
        "longer_wins_high": wins_high,
        "pairs_longer_wrong": n_wrong,
        "accuracy_longer_wrong": right / n_wrong if n_wrong else math.nan,
        "accuracy_longer_wrong_low": low,
        "accuracy_longer_wrong_high": high,
        "score_length_correlation": correlation(
            np.concatenate([chosen, rejected]),
            np.concatenate([scores.chosen_lengths, scores.rejected_lengths]),
        ),
        "margin_length_correlation": correlation(
            chosen - rejected, scores.chosen_lengths - scores.rejected_lengths
        ),
    }


def by_source(scores: PairScores) -> dict[str, dict[str, float]]:
    """`pair_figures` of every source that is named, sorted by name."""
    return {
        str(source): pair_figures(part.chosen, part.rejected)
        for source in np.unique(scores.sources)
        if source
        for part in [scores.only(scores.sources == source)]
    }


def calibration_curve(
    chosen: Any, rejected: Any, bins: int = BINS, temperature: float = 1.0
) -> CalibrationCurve:
    """Confidence and accuracy of pairs by bins of equal width of sigmoid(|margin| / temperature).

    Raises:
        ValueError: a reward is not finite, or the temperature is not positive.
    """
    chosen, rejected = _checked(chosen, rejected)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    margins = chosen - rejected
    confidence = np.exp(-pair_losses(np.abs(margins) / temperature))
    places = np.minimum(((confidence - 0.5) * (2 * bins)).astype(int), bins - 1)
    pairs = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return CalibrationCurve(
            np.bincount(places, confidence, bins) / pairs,
            np.bincount(places, margins > 0, bins) / pairs,
            pairs,
        )


def best_temperature(chosen: Any, rejected: Any) -> float:
    """The temperature T for which sigmoid(|margin| / T) has the least calibration error.

    Temperature scaling of Guo et al. 2017, fitted to the error itself. The search is over a grid of
    T from 10^-4 to 10^4 times the median of the margins' absolute values (those that are 0 left
    out), then twice closer around the best, to 0.03 %; of equally good ones it is the lowest. NaN
    where there is no best one: if every pair is right, the lower T the better; if no more than half
    are, or if the search ends at a bound of the grid, no T makes the margins' confidence true.

    Raises:
        ValueError: a reward is not finite.
    """
    chosen, rejected = _checked(chosen, rejected)
    margins = chosen - rejected
    right = (margins > 0).sum()
    if right == len(margins) or 2 * right <= len(margins):
        return math.nan

    def error(exponent: float) -> float:
        return calibration_curve(chosen, rejected, temperature=scale * 10**exponent).ece

    scale = float(np.median(np.abs(margins[margins != 0])))
    grid = np.linspace(-DECADES, DECADES, 2 * DECADES * PER_DECADE + 1)
    best = _lowest(error, grid)
    if best in (grid[0], grid[-1]):
        return math.nan
    for step in (1 / PER_DECADE, 0.05 / PER_DECADE):
        # The middle is the best one so far: a closer look never loses it.
        best = _lowest(error, best + step * np.linspace(-1, 1, 41))
    return float(scale * 10**best)


def likeliest_temperature(chosen: Any, rejected: Any) -> float:
    """The temperature T with the least mean loss, -log sigmoid(margin / T).

    Temperature scaling as Guo et al. 2017 fit it. Unlike `best_temperature` it is the bottom of a
    convex function (of 1 / T), which few pairs blur less. NaN where there is none: with no pair
    ranked wrong the lower T the better, with a mean margin of 0 or less the higher.

    Raises:
        ValueError: a reward is not finite.
    """
    chosen, rejected = _checked(chosen, rejected)
    margins = chosen - rejected
    if not len(margins) or margins.mean() <= 0 or margins.min() >= 0:
        return math.nan
    margins /= np.abs(margins).max()  # so that no power of 2 overflows

    def slope(inverse: float) -> float:
        return float(-(margins * np.exp(-pair_losses(-inverse * margins))).mean())

    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(np.abs(chosen - rejected).max() / high)


def pair_losses(margins: Floats) -> Floats:
    """(P,) Bradley-Terry losses, -log sigmoid(margin), without overflow."""
    losses: Floats = np.logaddexp(0.0, -margins)
    return losses


def correlation(x: Any, y: Any) -> float:
    """Pearson's; NaN where there are fewer than two values or all on one side are equal."""
    x, y = _from_first(x), _from_first(y)
    if not x.any() or not y.any():
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _from_first(values: Any) -> Floats:
    """Differences to the first value, divided by a power of two so that they are at most 2.

    They correlate as the values do; no square of them overflows, and no mean rounds them away.
    """
    values = np.asarray(values, np.float64)
    _, exponent = np.frexp(np.abs(values).max(initial=0))
    values = np.ldexp(values, -exponent)
    return values - values[:1]


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), which is in it; (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def _checked(chosen: Any, rejected: Any) -> tuple[Floats, Floats]:
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if chosen.ndim != 1 or chosen.shape != rejected.shape:
        raise ValueError(
            "chosen and rejected must be rewards of the same pairs, found shapes "
            f"{chosen.shape} and {rejected.shape}"
        )
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(rewards)} {side} rewards are not finite, the first in pair "
                f"{bad[0]} (from 0): {rewards[bad[0]]}"
            )
    return chosen, rejected


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _std(values: Floats) -> float:
    return float(np.std(values)) if len(values) else math.nan


def _lowest(function: Callable[[float], float], points: Floats) -> float:
    """The first of the points at which the function is lowest."""
    return float(points[np.argmin([function(point) for point in points])])
