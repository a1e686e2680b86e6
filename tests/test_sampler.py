import logging
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polar_xtuner import sampler
from polar_xtuner.packing import ModelShape, Pack, plan_epoch
from polar_xtuner.sampler import PackSampler, Stretch


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
    monkeypatch.setattr(sampler, "data_parallel_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(sampler, "data_parallel_rank", lambda rank=rank: rank)
        packs = PackSampler(data, accumulative_counts=2, pairs_per_step=20, seed=5)
        packs.model_shape = shape
        wanted = [plan.pack(iteration, rank) for iteration in range(plan.iterations)]
        assert first(packs, len(packs)) == wanted


def test_steps_with_nothing_to_do_for_most_ranks_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampler, "data_parallel_size", lambda: 4)
    package = logging.getLogger("polar_xtuner")  # the engine hands its records to the run's logger
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="polar_xtuner"):
        len(PackSampler(dataset(pairs=1), pairs_per_step=8))
        assert not caplog.records
        len(PackSampler(dataset(pairs=10), pairs_per_step=20))
    (record,) = caplog.records
    assert "50 % of the packs hold nothing new" in record.getMessage()


# ---- Runs whose ranks change


def pairs_of(packs: list[Pack]) -> list[tuple[int, int]]:
    """Group and number of every pair that counts."""
    return [
        (share.group, pair)
        for pack in packs
        if pack.pair_weight
        for share in pack.shares
        for pair in range(share.start, share.stop)
    ]


def ranked(
    monkeypatch: pytest.MonkeyPatch, ranks: int, history: list[Stretch], **options: Any
) -> list[PackSampler]:
    """The samplers of all ranks of a run."""
    samplers = []
    monkeypatch.setattr(sampler, "data_parallel_size", lambda: ranks)
    for _ in range(ranks):
        packs = PackSampler(dataset(80, pairs=3), **options)
        packs.follow(history or [packs.now(0)])
        packs.start_iter = packs.history[-1].step * packs.accumulative_counts
        samplers.append(packs)
    return samplers


def steps_of(
    monkeypatch: pytest.MonkeyPatch, samplers: list[PackSampler], steps: int
) -> list[list[Pack]]:
    """The packs of all ranks in each of the next optimizer steps."""
    counts = samplers[0].accumulative_counts
    streams = []
    for rank, packs in enumerate(samplers):
        monkeypatch.setattr(sampler, "data_parallel_rank", lambda rank=rank: rank)
        streams.append(first(packs, steps * counts))
    return [
        [pack for stream in streams for pack in stream[step * counts : (step + 1) * counts]]
        for step in range(steps)
    ]


@pytest.mark.parametrize("pairs_per_step", [None, 20, 7])
def test_an_epoch_that_goes_on_with_other_ranks_has_every_pair_once(
    pairs_per_step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[list[Pack]] = []
    history: list[Stretch] = []
    for ranks, counts, steps in ((3, 1, 2), (2, 2, 1), (1, 3, None)):
        options = {"accumulative_counts": counts, "pairs_per_step": pairs_per_step, "seed": 5}
        history = [*history, Stretch(len(done), ranks, counts)]
        samplers = ranked(monkeypatch, ranks, history, **options)
        left = samplers[0].iterations(1) // counts - len(done) if steps is None else steps
        done += steps_of(monkeypatch, samplers, left)
    assert sorted(pairs_of([pack for step in done for pack in step])) == [
        (group, pair) for group in range(80) for pair in range(3)
    ]
    for step in done:
        pairs = len(pairs_of(step))
        assert {pack.pair_weight for pack in step if pack.pair_weight} == {len(step) / pairs}
        assert pairs_per_step in (None, pairs) or step is done[-1]
    # The next epoch has all groups again, planned for the ranks there are now.
    (alone,) = samplers
    following = first(alone, alone.iterations(2) - alone.start_iter)
    epoch = following[alone.iterations(1) - alone.start_iter :]
    assert len(pairs_of(epoch)) == len(set(pairs_of(epoch))) == 240


def test_the_share_that_is_done_is_of_pairs_in_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [Stretch(0, 3, 1), Stretch(2, 2, 1)]
    (packs, _) = ranked(monkeypatch, 2, history)
    three = ranked(monkeypatch, 3, [Stretch(0, 3, 1)])
    two_steps = len(pairs_of([p for step in steps_of(monkeypatch, three, 2) for p in step]))
    assert packs.share_done(0, 2) == 0
    assert packs.share_done(2, 2) == pytest.approx(two_steps / 480)
    assert packs.share_done(packs.iterations(1), 2) == 0.5
    assert packs.share_done(packs.iterations(2), 2) == 1


def test_where_ranks_change_between_two_epochs_nothing_is_left_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (before,) = ranked(monkeypatch, 1, [])
    end = before.iterations(1)
    history = [Stretch(0, 1, 1), Stretch(end, 2, 1)]
    samplers = ranked(monkeypatch, 2, history)
    steps = samplers[0].iterations(2) - end
    packs = [pack for step in steps_of(monkeypatch, samplers, steps) for pack in step]
    assert len(pairs_of(packs)) == len(set(pairs_of(packs))) == 240
