"""The loss against a derivation in numpy, against xtuner's, and its gradients."""

import itertools

import numpy as np
import pytest
import torch
from xtuner.model.reward import RewardModel

from polar_xtuner.losses import BARRIER, BARRIER_EPSILON, BradleyTerryLoss

OPTIONS = [
    {},
    {"loss_type": "focal"},
    {"label_smoothing": 0.1},
    {"center_rewards_coefficient": 0.03},
    {"penalty_type": "L2", "penalty_weight": 0.05},
    {"penalty_type": "log_barrier", "penalty_weight": 0.02},
    {
        "loss_type": "focal",
        "label_smoothing": 0.2,
        "center_rewards_coefficient": 0.01,
        "penalty_type": "log_barrier",
    },
]


def random_pairs(seed, candidates=9, pairs=14, scale=2.0):
    """Rewards and pairs with repeated candidates, weights and margins; no focal kink is hit."""
    generator = torch.Generator().manual_seed(seed)
    rewards = scale * torch.randn(candidates, generator=generator, dtype=torch.float64)
    every = torch.tensor([*itertools.permutations(range(candidates), 2)])
    chosen, rejected = every[torch.randperm(len(every), generator=generator)[:pairs]].T
    weights = torch.rand(pairs, generator=generator, dtype=torch.float64)
    margins = torch.randn(pairs, generator=generator, dtype=torch.float64)
    return rewards, chosen, rejected, weights, margins


def by_numpy(
    rewards,
    chosen,
    rejected,
    weights,
    margins,
    loss_type="ranking",
    label_smoothing=0.0,
    center_rewards_coefficient=0.0,
    penalty_type="none",
    penalty_weight=0.01,
):
    """One pair after the other, from the formulas of the docstrings."""
    total = 0.0
    for c, r, weight, margin in zip(
        *(x.tolist() for x in (chosen, rejected, weights, margins)), strict=True
    ):
        r_c, r_r = float(rewards[c]), float(rewards[r])
        p = 1 / (1 + np.exp(-(r_c - r_r - margin)))
        loss = -(1 - label_smoothing) * np.log(p) - label_smoothing * np.log(1 - p)
        if loss_type == "focal":
            loss *= (1 - 2 * max(0.0, p - 0.5)) ** 2
        for x in (r_c, r_r):
            if penalty_type == "L2":
                loss += penalty_weight * x**2
            if penalty_type == "log_barrier":
                assert abs(x) < BARRIER - BARRIER_EPSILON
                loss -= penalty_weight * (np.log(BARRIER - x) + np.log(BARRIER + x))
        loss += center_rewards_coefficient * (r_c + r_r) ** 2
        total += weight * loss
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_its_formula(options, seed):
    pairs = random_pairs(seed, scale=1.5)
    ours = BradleyTerryLoss(**options)(*pairs)
    assert ours.shape == ()
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(by_numpy(*pairs, **options), rel=1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_the_value(options, seed, scale):
    # A scale of 8 also goes beyond the barrier.
    rewards, *pairs = random_pairs(seed, scale=scale)
    loss = BradleyTerryLoss(**options)
    assert torch.autograd.gradcheck(lambda r: loss(r, *pairs), rewards.requires_grad_())


def test_float32_rewards_give_a_float32_loss_close_to_the_exact_one():
    rewards, *pairs = random_pairs(0)
    for options in OPTIONS:
        loss = BradleyTerryLoss(**options)
        ours = loss(rewards.float(), *pairs)
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(loss(rewards, *pairs).item(), rel=1e-5)


def test_the_default_is_the_plain_ranking_loss():
    loss = BradleyTerryLoss()
    rewards = torch.tensor([0.3, -0.4], dtype=torch.float64)
    zero, one, weight, margin = torch.tensor([[0], [1], [2], [0]])
    assert loss(rewards, zero, one, weight, margin).item() == pytest.approx(
        2 * np.log1p(np.exp(-0.7)), rel=1e-14
    )


# ---- xtuner's loss


@pytest.mark.parametrize("loss_type", ["ranking", "focal"])
@pytest.mark.parametrize("seed", range(3))
def test_equal_weights_and_no_margin_give_the_loss_of_xtuner(loss_type, seed):
    rewards, chosen, rejected, *_ = random_pairs(seed)
    theirs = rewards.clone().requires_grad_()
    number = len(chosen)
    their_loss = getattr(RewardModel, f"{loss_type}_loss")
    truth = their_loss(None, theirs[chosen], theirs[rejected], avg_factor=1 / number)
    ours = rewards.clone().requires_grad_()
    weights = torch.full((number,), 1 / number, dtype=torch.float64)
    loss = BradleyTerryLoss(loss_type)(ours, chosen, rejected, weights, 0 * weights)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-13)
    (gradient,) = torch.autograd.grad(loss, ours)
    (true_gradient,) = torch.autograd.grad(truth, theirs)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-12, atol=1e-15)


def penalties(rewards, kind):
    """The penalty of each reward alone: half that of a pair of it with itself, less its loss."""
    same, one = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    loss = BradleyTerryLoss(penalty_type=kind, penalty_weight=0.5)
    values = [loss(reward[None], same, same, one, 0 * one) for reward in rewards]
    return torch.stack(values) - np.log(2)


def test_penalties_are_those_of_xtuner_within_the_bounds():
    inside = BARRIER - 2 * BARRIER_EPSILON
    rewards = torch.linspace(-inside, inside, 201, dtype=torch.float64)
    for kind, theirs in (
        ("L2", lambda r: RewardModel.l2_penalty(None, r)),
        # xtuner computes this one in float32.
        ("log_barrier", lambda r: RewardModel.log_barrier_penalty(None, r, -5, 5)),
    ):
        truth = torch.stack([theirs(r).double() for r in rewards])
        tolerance = 1e-13 if kind == "L2" else 1e-4
        torch.testing.assert_close(penalties(rewards, kind), truth, rtol=tolerance, atol=tolerance)


def test_beyond_the_barrier_it_is_finite_and_pulls_back_ever_more():
    beyond = torch.tensor([4.9995, 5.0, 5.001, 6.0, 60.0, 6e4], dtype=torch.float64)
    for sign in (1, -1):
        rewards = (sign * beyond).requires_grad_()
        values = penalties(rewards, "log_barrier")
        (gradient,) = torch.autograd.grad(values.sum(), rewards)
        assert torch.isfinite(values).all()
        assert (values.diff() > 0).all()
        assert (sign * gradient > 0.99 / BARRIER_EPSILON).all(), "pushes towards zero"


def test_the_barrier_goes_on_as_its_tangent():
    edge = BARRIER - BARRIER_EPSILON
    step = 1e-7
    rewards = torch.tensor([edge - step, edge, edge + step], dtype=torch.float64)
    low, middle, high = penalties(rewards, "log_barrier").tolist()
    assert (high - middle) / step == pytest.approx((middle - low) / step, rel=1e-3)


# ---- Weights, margins and far-off rewards


def test_a_pair_counts_by_its_weight_and_none_at_zero():
    for options in OPTIONS:
        rewards, chosen, rejected, weights, margins = random_pairs(3, scale=1.5)
        loss = BradleyTerryLoss(**options)
        one_by_one = sum(
            weight * loss(rewards, c[None], r[None], torch.ones(1), margin[None])
            for c, r, weight, margin in zip(chosen, rejected, weights, margins, strict=True)
        )
        whole = loss(rewards, chosen, rejected, weights, margins)
        assert whole.item() == pytest.approx(one_by_one.item(), rel=1e-12)
        assert loss(rewards, chosen, rejected, 0 * weights, margins).item() == 0


def test_a_margin_moves_chosen_down_by_as_much():
    rewards, chosen, rejected, weights, _ = random_pairs(4)
    for options in ({}, {"loss_type": "focal"}, {"label_smoothing": 0.1}):
        loss = BradleyTerryLoss(**options)
        for c, r, weight in zip(chosen, rejected, weights, strict=True):
            moved = rewards.clone()
            moved[c] -= 0.75
            pair = (c[None], r[None], weight[None])
            with_margin = loss(rewards, *pair, torch.tensor([0.75]))
            assert with_margin.item() == pytest.approx(loss(moved, *pair, torch.zeros(1)).item())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rewards_far_apart_give_finite_losses_and_gradients(options):
    rewards = torch.tensor([3e4, -3e4, 0.0]).requires_grad_()
    chosen, rejected = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])
    weights, margins = torch.full((3,), 1 / 3), torch.zeros(3)
    loss = BradleyTerryLoss(**options)(rewards, chosen, rejected, weights, margins)
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, r"loss_type must be one of \('ranking', 'focal'\), got 'dpo'"),
        (
            {"penalty_type": "l2"},
            r"penalty_type must be one of \('none', 'L2', 'log_barrier'\), got 'l2'",
        ),
        ({"penalty_type": None}, "penalty_type must be one of .* got None"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0.5\), got -0.1"),
    ],
)
def test_an_option_with_no_such_value_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        BradleyTerryLoss(**options)
