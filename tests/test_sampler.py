import logging
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polar_xtuner import sampler
from polar_xtuner.packing import ModelShape, Pack, plan_epoch
from polar_xtuner.sampler import PackSampler


def dataset(groups: int = 60, pairs: int = 1) -> Any:
    """What a sampler asks a dataset for."""
    lengths = np.random.default_rng(0).integers(10, 60, groups)
    return SimpleNamespace(
        lengths=lengths,
        pair_counts=np.full(groups, pairs),
        attended=lengths * (lengths + 1) // 2,
        max_packed_length=200,
    )


def first(packs: PackSampler, count: int) -> list[Pack]:
    return [*islice(packs, count)]


def test_it_goes_on_from_any_iteration_in_any_epoch() -> None:
    whole = PackSampler(dataset(), accumulative_counts=2, seed=3)
    packs = first(whole, 50)
    assert whole.iterations(3) < 50, "not three epochs"
    for start in range(45):
        resumed = PackSampler(dataset(), accumulative_counts=2, seed=3)
        resumed.start_iter = start
        assert first(resumed, 5) == packs[start : start + 5]


def test_each_epoch_has_every_pair_in_an_order_of_its_own() -> None:
    packs = PackSampler(dataset())
    epochs = [packs.iterations(n) for n in range(4)]
    assert len(packs) == epochs[1]
    everything = first(packs, epochs[3])
    orders = [
        [share.group for pack in everything[start:end] for share in pack.shares]
        for start, end in pairwise(epochs)
    ]
    assert all(sorted(order) == [*range(60)] for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_the_packs_of_the_ranks_are_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape(2, 64, 128, 4, 2)
    data = dataset(100)
    plan = plan_epoch(
        data.lengths,
        data.pair_counts,
        shape.flops(data.lengths, data.attended),
        200,
        pairs_per_step=20,
        seed=5,
        ranks=3,
        accumulation=2,
    )
    monkeypatch.setattr(sampler, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(sampler, "get_rank", lambda rank=rank: rank)
        packs = PackSampler(data, accumulative_counts=2, pairs_per_step=20, seed=5)
        packs.model_shape = shape
        wanted = [plan.pack(iteration, rank) for iteration in range(plan.iterations)]
        assert first(packs, len(packs)) == wanted


def test_steps_with_nothing_to_do_for_most_ranks_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampler, "get_world_size", lambda: 4)
    package = logging.getLogger("polar_xtuner")  # the engine hands its records to the run's logger
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="polar_xtuner"):
        len(PackSampler(dataset(pairs=1), pairs_per_step=8))
        assert not caplog.records
        len(PackSampler(dataset(pairs=10), pairs_per_step=20))
    (record,) = caplog.records
    assert "50 % of the packs hold nothing new" in record.getMessage()
