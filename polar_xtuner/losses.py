"""Bradley-Terry loss over the pairs of a pack, weighted for the whole optimizer step.

    loss = sum over pairs w * (bt(m) + penalty_weight * (p(r_c) + p(r_r)) + centre * (r_c + r_r)^2)
    m = r_c - r_r - margin,  bt(m) = -log sigmoid(m)

with r_c, r_r the rewards of chosen and rejected, and w what the plan says a pair weighs
(`packing.py`). The defaults are the published recipe of POLAR (arXiv 2507.05197): plain ranking
loss, no penalty. Everything is computed in float32, or float64 if the rewards are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOSS_TYPES = ("ranking", "focal")
PENALTY_TYPES = ("none", "L2", "log_barrier")

BARRIER = 5.0
"""The log barrier keeps rewards within +- this (InternLM2, arXiv 2403.17297)."""
BARRIER_EPSILON = 1e-3
"""Nearer than this to a bound, or beyond it, the barrier goes on as its tangent."""


class BradleyTerryLoss(nn.Module):
    """The training loss of a reward model.

    Args:
        loss_type: `ranking` is -log sigmoid(m); `focal` multiplies it by
            (1 - 2 relu(sigmoid(m) - 1/2))^2, which discounts pairs that are right already
            (InternLM2, arXiv 2403.17297).
        label_smoothing: probability e that a label is wrong; (1 - e) bt(m) + e bt(-m), in [0, 0.5).
        center_rewards_coefficient: weight of (r_c + r_r)^2, which centres rewards on zero
            (arXiv 2312.09244).
        penalty_type, penalty_weight: `log_barrier` keeps rewards within +-5, `L2` is r^2.

    Raises:
        ValueError: an option has no such value.
    """

    def __init__(
        self,
        loss_type: str = "ranking",
        label_smoothing: float = 0.0,
        center_rewards_coefficient: float = 0.0,
        penalty_type: str = "none",
        penalty_weight: float = 0.01,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {loss_type!r}")
        if penalty_type not in PENALTY_TYPES:
            raise ValueError(f"penalty_type must be one of {PENALTY_TYPES}, got {penalty_type!r}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.center_rewards_coefficient = center_rewards_coefficient
        self.penalty_type = penalty_type
        self.penalty_weight = penalty_weight

    def forward(
        self, rewards_C: Tensor, chosen_P: Tensor, rejected_P: Tensor, weights_P: Tensor,
        margins_P: Tensor,
    ) -> Tensor:  # fmt: skip
        """Weighted sum over the pairs, a scalar.

        Args:
            rewards_C: (C,) rewards of the pack's candidates, float32 or float64.
            chosen_P, rejected_P: (P,) their numbers in each pair.
            weights_P: (P,) what each pair weighs.
            margins_P: (P,) by how much chosen should exceed rejected.
        """
        r_c, r_r = rewards_C[chosen_P], rewards_C[rejected_P]
        loss_P = self._ranking(r_c - r_r - margins_P.to(rewards_C))
        if self.penalty_type != "none":
            loss_P = loss_P + self.penalty_weight * (self._penalty(r_c) + self._penalty(r_r))
        if self.center_rewards_coefficient:
            loss_P = loss_P + self.center_rewards_coefficient * (r_c + r_r).square()
        return (weights_P.to(loss_P) * loss_P).sum()

    def _ranking(self, m: Tensor) -> Tensor:
        loss = -F.logsigmoid(m)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * F.logsigmoid(-m)
        if self.loss_type == "focal":
            loss = (1 - 2 * F.relu(m.sigmoid() - 0.5)).square() * loss
        return loss

    def _penalty(self, rewards: Tensor) -> Tensor:
        if self.penalty_type == "L2":
            return rewards.square()
        return _barrier(BARRIER - rewards) + _barrier(BARRIER + rewards)


def _barrier(distance: Tensor) -> Tensor:
    """-log(distance), below `BARRIER_EPSILON` its tangent: finite, and it still pulls back."""
    inside = distance.clamp(min=BARRIER_EPSILON)
    return -torch.log(inside) + (inside - distance) / BARRIER_EPSILON
