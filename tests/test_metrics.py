"""What is reported is of all pairs of an interval and of all ranks, and costs one transfer."""

import math

import numpy as np
import pytest
import torch
from host_reads import host_reads

from polar_xtuner import metrics
from polar_xtuner.metrics import PAIR_SUMS, Interval, NonFinite, pair_sums, peak_flops
from polar_xtuner.packing import ModelShape, attended_pairs

SHAPE = ModelShape(2, 32, 40, 4, 2)
CAP = 100


def pack(seed, pairs=5, filler=False):
    """(data, outputs, rewards of chosen, of rejected) of a pack with random rewards."""
    rng = np.random.default_rng(seed)
    rewards = torch.from_numpy(rng.normal(3, 2, 2 * pairs).astype(np.float32))
    if pairs > 2:
        rewards[1] = rewards[0]  # a tie
    chosen, rejected = torch.arange(0, 2 * pairs, 2), torch.arange(1, 2 * pairs, 2)
    weights = torch.full((pairs,), 0.0 if filler else 0.2, dtype=torch.float64)
    queries = [int(n) for n in rng.integers(1, 8, 2 * pairs)]
    layout = {
        "query_lengths": queries,
        "key_lengths": [n + int(m) for n, m in zip(queries, rng.integers(0, 9, 2 * pairs))],
    }
    loss = torch.tensor(0.0 if filler else float(rng.random()))
    outputs = {"loss": loss, "sums": pair_sums(rewards, chosen, rejected, weights)}
    r = rewards.double().numpy()
    data = {
        "layout": layout,
        "chosen_P": chosen,
        "rejected_P": rejected,
        "pair_weights_P": weights,
    }
    return data, outputs, r[::2], r[1::2]


def fill(interval, packs, first=0, norms=()):
    interval.start()
    for number, (data, outputs, *_) in enumerate(packs):
        norm = norms[number] if norms else None
        interval.add(first + number, data, outputs, norm)


def test_values_are_of_all_pairs_of_the_interval():
    packs = [pack(seed, pairs=seed + 1) for seed in range(6)]
    interval = Interval(SHAPE, CAP)
    interval.add_wait(0.5)
    fill(interval, packs, norms=[torch.tensor(float(n)) for n in range(6)])
    assert interval.reduce() is None
    values = interval.values()
    chosen, rejected = (np.concatenate([p[i] for p in packs]) for i in (2, 3))
    layouts = [p[0]["layout"] for p in packs]
    tokens = sum(sum(layout["query_lengths"]) for layout in layouts)
    alone = sum(sum(layout["key_lengths"]) for layout in layouts)  # each is in one pair
    truth = {
        "loss": np.mean([float(p[1]["loss"]) for p in packs]),
        "accuracy": (chosen > rejected).mean(),
        "ties": (chosen == rejected).mean(),
        "margin": (chosen - rejected).mean(),
        "chosen_reward": chosen.mean(),
        "chosen_reward_std": chosen.std(),
        "rejected_reward": rejected.mean(),
        "rejected_reward_std": rejected.std(),
        "pairs": 21,
        "pack_fill": tokens / (6 * CAP),
        "share_ratio": alone / tokens,
        "grad_norm": 2.5,
        "data_time": 0.5 / 6,
    }
    for name, value in truth.items():
        assert values[name] == pytest.approx(value, rel=1e-9), name
    seconds = 6 * values["time"]
    assert values["pairs_per_s"] * seconds == pytest.approx(21)
    assert values["tokens_per_s"] * seconds == pytest.approx(tokens)
    assert values["tokens_saved_per_s"] * seconds == pytest.approx(alone - tokens)
    assert "mfu" not in values


def test_many_reductions_of_an_interval_give_the_values_of_one():
    packs = [pack(seed) for seed in range(6)]
    once, often = Interval(SHAPE, CAP), Interval(SHAPE, CAP)
    fill(once, packs)
    once.reduce()
    for number, one in enumerate(packs):
        fill(often, [one], first=number)
        often.reduce()
        assert often.reduce() is None  # nothing new
    a, b = once.values(), often.values()
    timed = {name for name in a if name.endswith(("_per_s", "time"))}
    assert a.keys() == b.keys()
    for name in a.keys() - timed:
        assert a[name] == pytest.approx(b[name], rel=1e-12), name


def test_a_candidate_of_many_pairs_would_stand_alone_in_each():
    data, outputs, *_ = pack(0, pairs=3)
    data["rejected_P"] = torch.tensor([0, 0, 0])
    data["chosen_P"] = torch.tensor([1, 2, 1])
    interval = Interval(SHAPE, CAP)
    fill(interval, [(data, outputs)])
    interval.reduce()
    keys, tokens = data["layout"]["key_lengths"], sum(data["layout"]["query_lengths"])
    alone = 3 * keys[0] + 2 * keys[1] + keys[2]
    assert interval.values()["share_ratio"] == pytest.approx(alone / tokens)


def test_values_start_anew_with_each_interval():
    interval = Interval(SHAPE, CAP)
    for seed in range(3):
        one = pack(seed)
        fill(interval, [one], first=seed)
        interval.reduce()
        assert interval.values()["chosen_reward"] == pytest.approx(one[2].mean())


def test_two_ranks_report_the_pairs_of_both(monkeypatch):
    mine, theirs = pack(1, pairs=6), pack(2, pairs=4)
    sent = []
    monkeypatch.setattr(metrics, "data_parallel_size", lambda: 2)
    for one, exchange in (
        (theirs, lambda x: sent.append(x.clone())),
        (mine, lambda x: x.add_(sent[0])),
    ):
        monkeypatch.setattr(metrics, "all_reduce", exchange)
        interval = Interval(SHAPE, CAP, peak=1e9)
        interval.add_wait(3.0)
        fill(interval, [one])
        assert interval.reduce() is None
    values = interval.values()
    chosen = np.concatenate([mine[2], theirs[2]])
    assert values["pairs"] == 10
    assert values["chosen_reward"] == pytest.approx(chosen.mean())
    assert values["chosen_reward_std"] == pytest.approx(chosen.std())
    # Weights hold a factor of the world size (packing.py), so the ranks' mean is the step's loss.
    assert values["loss"] == pytest.approx(float(mine[1]["loss"] + theirs[1]["loss"]) / 2)
    assert values["data_time"] == pytest.approx(3.0)
    flops = sum(flops_of(p[0]["layout"]) for p in (mine, theirs))
    assert values["mfu"] * values["time"] * 2 * 1e9 == pytest.approx(flops)


def flops_of(layout):
    queries, keys = layout["query_lengths"], layout["key_lengths"]
    return SHAPE.flops(sum(queries), sum(map(attended_pairs, queries, keys)))


def test_frozen_weights_save_their_third_of_the_operations():
    one = pack(1)
    found = []
    for frozen in (False, True):
        interval = Interval(SHAPE, CAP, frozen=frozen, peak=1.0)
        fill(interval, [one])
        interval.reduce()
        values = interval.values()
        found.append(values["mfu"] * values["time"])
    tokens = sum(one[0]["layout"]["query_lengths"])
    assert found[0] == pytest.approx(flops_of(one[0]["layout"]))
    assert found[0] - found[1] == pytest.approx(SHAPE.flops(tokens, 0) / 3)


def test_a_pack_that_only_fills_a_step_is_a_pack_of_no_pairs_and_no_tokens():
    interval, full = Interval(SHAPE, CAP), pack(1)
    fill(interval, [full, pack(2, filler=True)])
    interval.reduce()
    values = interval.values()
    assert values["pairs"] == 5
    assert values["accuracy"] == pytest.approx((full[2] > full[3]).mean())
    assert values["pack_fill"] == sum(full[0]["layout"]["query_lengths"]) / (2 * CAP)
    fill(interval, [pack(2, filler=True)])
    interval.reduce()
    values = interval.values()
    assert all(math.isfinite(value) for value in values.values())
    assert values["pairs"] == values["accuracy"] == values["share_ratio"] == 0


def test_a_small_spread_of_large_rewards_keeps_its_standard_deviation():
    rewards = 1000 + torch.linspace(-1e-3, 1e-3, 2000, dtype=torch.float64)
    half = torch.arange(1000)
    sums = dict(zip(PAIR_SUMS, pair_sums(rewards, half, half + 1000, torch.ones(1000)).tolist()))
    mean = sums["chosen"] / 1000
    ours = metrics._deviation(sums["chosen_squares"] / 1000, mean)
    # In float32 a reward of 1000 moves in steps of a fifth of this deviation.
    assert ours == pytest.approx(rewards[:1000].numpy().std(), rel=1e-2)


# ---- What is not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_loss_is_named(bad):
    packs = [pack(seed) for seed in range(5)]
    for number in (2, 3):
        packs[number][1]["loss"].fill_(bad)
    interval = Interval(SHAPE, CAP)
    fill(interval, packs, first=10, norms=[torch.tensor(math.nan)] * 2 + [torch.tensor(1.0)] * 3)
    assert interval.reduce() == NonFinite(10, "gradient", "over all ranks")
    fill(interval, packs, first=10)
    assert interval.reduce() == NonFinite(12, "loss", f"on this rank ({bad})")
    fill(interval, packs, first=10, norms=[torch.tensor(1.0)] * 2 + [torch.tensor(math.nan)] * 3)
    assert interval.reduce() == NonFinite(12, "loss", f"on this rank ({bad})")


def test_every_rank_finds_what_one_of_them_has(monkeypatch):
    good, bad = pack(1), pack(2)
    bad[1]["loss"].fill_(math.nan)
    sent = []
    monkeypatch.setattr(metrics, "all_reduce", lambda x: sent.append(x.clone()))
    fill(interval := Interval(SHAPE, CAP), [good, bad], first=7)
    assert interval.reduce().where == "on this rank (nan)"
    monkeypatch.setattr(metrics, "all_reduce", lambda x: x.add_(sent[0]))
    fill(interval := Interval(SHAPE, CAP), [good, good], first=7)
    assert interval.reduce() == NonFinite(8, "loss", "on another rank")


def test_norms_may_be_numbers_or_tensors():
    interval = Interval(SHAPE, CAP)
    norms = [0, torch.tensor(1.5), torch.tensor(3.0, dtype=torch.bfloat16)]
    fill(interval, [pack(seed) for seed in range(3)], norms=norms)
    assert interval.reduce() is None
    assert interval.values()["grad_norm"] == 1.5


def test_an_iteration_reads_nothing_and_a_reduction_once():
    packs = [pack(seed) for seed in range(4)]
    interval = Interval(SHAPE, CAP)
    # What the host reads of the pack itself it has never given to a device.
    with host_reads(copies=("tolist", "cpu")) as reads:
        fill(interval, packs, norms=[torch.tensor(1.0)] * 4)
        assert reads.count == 0
        interval.reduce()
        assert reads.count == 1
        interval.values()
        assert reads.count == 1


# ---- GPUs


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H800", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L4", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name, peak):
    assert peak_flops(name) == peak
