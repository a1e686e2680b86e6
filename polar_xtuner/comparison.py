"""Is one model better than another, on the same pairs?

Two accuracies with overlapping intervals may still differ for sure: the pairs are the same, and
what is hard for one model is mostly hard for the other. So the difference is taken pair by pair.
Its interval is bootstrapped over prompts: rows of one prompt share its difficulty, and drawn one by
one they would pass for more evidence than they are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import binomtest

from polar_xtuner.evaluation import Floats, PairScores, pair_losses

DRAWS = 10_000
_AT_ONCE = 10_000_000  # cluster numbers in memory


def compare_pairs(a: PairScores, b: PairScores, prompts: Any, seed: int = 0) -> dict[str, float]:
    """What model `a` has over model `b`: differences are a's figure less b's.

    Args:
        a, b: rewards of the two for the same pairs.
        prompts: (P,) equal for pairs of one prompt.

    Returns:
        pairs, prompts: P, and the number of distinct prompts.
        accuracy_difference, with _low and _high: and its 95 % interval (`bootstrap_intervals`).
        only_first_right, only_second_right: pairs that only a, or only b, ranks right.
        mcnemar_p: McNemar's exact test (binomial, two-sided), the probability of such a split or a
            more uneven one if both models were equally good; it takes pairs as independent.
        loss_difference, with _low and _high: of the mean Bradley-Terry losses; negative is better.

    Raises:
        ValueError: the numbers of pairs differ.
    """
    if not len(a.margins) == len(b.margins) == len(prompts):
        raise ValueError(
            f"the two models must be compared on the same pairs, found {len(a.margins)} and "
            f"{len(b.margins)}, with {len(prompts)} prompts"
        )
    first, second = a.margins > 0, b.margins > 0
    differences = np.stack(
        [first.astype(float) - second, pair_losses(a.margins) - pair_losses(b.margins)], axis=1
    )
    (low, high), (loss_low, loss_high) = bootstrap_intervals(differences, prompts, seed)
    accuracy, loss = differences.mean(0) if len(differences) else (math.nan, math.nan)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return {
        "pairs": len(differences),
        "prompts": len(np.unique(prompts)),
        "accuracy_difference": float(accuracy),
        "accuracy_difference_low": low,
        "accuracy_difference_high": high,
        "only_first_right": only_first,
        "only_second_right": only_second,
        "mcnemar_p": mcnemar(only_first, only_second),
        "loss_difference": float(loss),
        "loss_difference_low": loss_low,
        "loss_difference_high": loss_high,
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """p of McNemar's exact test (1947), two-sided; 1 where the models never differ."""
    n = only_first + only_second
    return float(binomtest(only_first, n, 0.5).pvalue) if n else 1.0


def bootstrap_intervals(
    values: Floats, clusters: Any, seed: int = 0, draws: int = DRAWS
) -> list[tuple[float, float]]:
    """95 % percentile intervals of the means of columns, by a bootstrap of whole clusters.

    Every draw takes as many clusters as there are, with replacement, and the mean over all their
    rows (Field and Welsh 2007, the randomised cluster bootstrap). All columns share the draws.

    Args:
        values: (n, K).
        clusters: (n,) equal for rows of one cluster.

    Returns:
        K times (low, high); NaN with fewer than two clusters, which tell no spread.
    """
    _, of_row = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(of_row.max()) + 1 if len(of_row) else 0
    if count < 2:
        return [(math.nan, math.nan)] * values.shape[1]
    sums = np.stack([np.bincount(of_row, column, count) for column in values.T])
    sizes = np.bincount(of_row, minlength=count)
    rng = np.random.default_rng(seed)
    means = np.empty((len(sums), draws))
    step = max(1, _AT_ONCE // count)
    for start in range(0, draws, step):
        drawn = rng.integers(0, count, (min(step, draws - start), count))
        rows = sizes[drawn].sum(1)
        for k, of_cluster in enumerate(sums):
            means[k, start : start + len(drawn)] = of_cluster[drawn].sum(1) / rows
    lows, highs = np.quantile(means, [0.025, 0.975], axis=1)
    return [(float(low), float(high)) for low, high in zip(lows, highs)]
