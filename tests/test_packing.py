import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA_SETS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polar_xtuner import packing
from polar_xtuner.cache import lay_out
from polar_xtuner.packing import Pack, best_fit, plan_epoch

Plan = list[list[list[Pack]]]
Ints = NDArray[np.int64]

CAP = 100


@st.composite
def epochs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `plan_epoch` that it can serve."""
    longest = draw(st.sampled_from([1, 30, 50, 51, CAP]))
    shortest = draw(st.sampled_from([1, min(CAP // 2 + 1, longest), longest]))
    ranks, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = draw(st.integers(ranks * accumulation, ranks * accumulation + 60))
    lengths = draw(st.lists(st.integers(shortest, longest), min_size=size, max_size=size))
    pairs = draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))
    return {
        "lengths": np.array(lengths),
        "pairs": np.array(pairs),
        "cap": CAP,
        "seed": draw(st.integers(0, 2**31)),
        "epoch": draw(st.integers(0, 5)),
        "ranks": ranks,
        "accumulation": accumulation,
    }


def same_lengths(
    count: int, length: int, *, ranks: int, accumulation: int, pairs: int = 1
) -> dict[str, Any]:
    return {
        "lengths": np.full(count, length),
        "pairs": np.full(count, pairs),
        "cap": CAP,
        "ranks": ranks,
        "accumulation": accumulation,
    }


def packs_of(plan: Plan) -> list[Pack]:
    return [pack for step in plan for slot in step for pack in slot]


ODD = same_lengths(5, CAP, ranks=2, accumulation=1)  # no pack of two groups to split
SPLIT = same_lengths(8, CAP // 4, ranks=5, accumulation=1)  # 2 packs of 4 that make 5


@given(epochs())
@example(ODD)
@example(SPLIT)
@example(same_lengths(9, CAP // 2 + 1, ranks=2, accumulation=4))
def test_every_group_is_trained_on_exactly_once(arguments: dict[str, Any]) -> None:
    plan = plan_epoch(**arguments)
    trained = [g for pack in packs_of(plan) if pack.pair_weight for g in pack.groups]
    assert sorted(trained) == [*range(len(arguments["lengths"]))]


@given(epochs())
@example(ODD)
@example(SPLIT)
def test_no_pack_is_empty_or_above_the_cap(arguments: dict[str, Any]) -> None:
    packs = packs_of(plan_epoch(**arguments))
    assert all(0 < arguments["lengths"][[*pack.groups]].sum() <= CAP for pack in packs)


@given(epochs())
@example(ODD)
@example(SPLIT)
def test_every_rank_gets_a_pack_in_every_slot_of_every_step(arguments: dict[str, Any]) -> None:
    plan = plan_epoch(**arguments)
    assert plan
    for step in plan:
        assert [len(slot) for slot in step] == [arguments["ranks"]] * arguments["accumulation"]


@given(epochs())
@example(ODD)
@example(same_lengths(9, CAP, ranks=4, accumulation=2, pairs=3))
def test_the_pairs_of_a_step_weigh_the_same_and_as_much_as_its_packs_together(
    arguments: dict[str, Any],
) -> None:
    """The mean over ranks and slots of the packs' sums is then the mean over the step's pairs."""
    for step in plan_epoch(**arguments):
        packs = [pack for slot in step for pack in slot]
        counts = [int(arguments["pairs"][[*pack.groups]].sum()) for pack in packs]
        total = sum(pack.pair_weight * n for pack, n in zip(packs, counts))
        assert abs(total - len(packs)) <= 1e-12 * len(packs)
        assert len({pack.pair_weight for pack in packs} - {0.0}) == 1


@given(epochs())
@example(ODD)
@example(same_lengths(9, CAP, ranks=4, accumulation=2))
def test_a_group_goes_in_again_without_weight_only_where_no_pack_can_be_split(
    arguments: dict[str, Any],
) -> None:
    packs = packs_of(plan_epoch(**arguments))
    fillers = [pack for pack in packs if not pack.pair_weight]
    assert len(fillers) < arguments["ranks"] * arguments["accumulation"]
    if fillers:
        assert all(len(pack.groups) == 1 for pack in packs)
        lengths = arguments["lengths"]
        filled = sorted(lengths[pack.groups[0]] for pack in fillers)
        assert filled == sorted(lengths)[: len(fillers)]


@settings(max_examples=50)
@given(epochs())
def test_the_same_arguments_give_the_same_plan(arguments: dict[str, Any]) -> None:
    before = {name: np.copy(value) for name, value in arguments.items()}
    np.random.seed(1)
    first = plan_epoch(**arguments)
    np.random.seed(2)
    assert plan_epoch(**arguments) == first
    assert all(np.array_equal(arguments[name], before[name]) for name in before)


def some_lengths(count: int, seed: int = 0) -> Ints:
    random = np.random.default_rng(seed)
    return random.lognormal(6, 0.8, count).astype(np.int64).clip(50, 16000)


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"seed": 1, "epoch": 1}])
def test_another_epoch_or_seed_is_another_order(other: dict[str, int]) -> None:
    lengths = some_lengths(3 * packing.WINDOW)
    plans = [
        plan_epoch(lengths, np.ones_like(lengths), 32768, **options)
        for options in ({}, {"seed": 0, "epoch": 0}, other)
    ]
    orders = [[pack.groups for pack in packs_of(plan)] for plan in plans]
    assert orders[0] == orders[1] != orders[2]
    first, second = ({frozenset(groups) for groups in order} for order in orders[1:])
    assert len(first & second) < 0.1 * len(first), "the same packs in another order"


def test_seed_and_epoch_are_not_added_up() -> None:
    lengths = some_lengths(200)
    plans = [
        plan_epoch(lengths, np.ones_like(lengths), 32768, seed=seed, epoch=epoch)
        for seed, epoch in ((1, 2), (2, 1), (3, 0), (0, 3))
    ]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


@given(ranks=st.integers(1, 6), accumulation=st.integers(1, 6), data=st.data())
def test_fewer_groups_than_a_step_has_packs_are_an_error_that_gives_the_numbers(
    ranks: int, accumulation: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, ranks * accumulation - 1))
    with pytest.raises(ValueError, match=rf"^{count} groups .* {ranks} ranks x {accumulation} "):
        plan_epoch(**same_lengths(count, 1, ranks=ranks, accumulation=accumulation))
    plan = plan_epoch(
        **same_lengths(ranks * accumulation, 1, ranks=ranks, accumulation=accumulation)
    )
    assert len(plan) == 1


def test_a_group_above_the_cap_is_an_error_that_gives_its_length() -> None:
    lengths = np.array([5, 101, 7])
    with pytest.raises(ValueError, match=r"101 tokens .* 100"):
        plan_epoch(lengths, np.ones(3, int), 100)
    assert plan_epoch(lengths, np.ones(3, int), 101)


@given(st.lists(st.integers(1, CAP), max_size=80), st.integers(CAP, 2 * CAP))
def test_best_fit_leaves_no_two_packs_that_fit_into_one(lengths: list[int], cap: int) -> None:
    packs = best_fit(np.array(lengths, dtype=np.int64), cap)
    assert sorted(i for pack in packs for i in pack) == [*range(len(lengths))]
    fill = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert all(total <= cap for total in fill)
    assert len(fill) < 2 or fill[0] + fill[1] > cap


def test_a_plan_of_many_windows_holds_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 64)
    lengths = some_lengths(1000)
    packs = packs_of(plan_epoch(lengths, np.ones_like(lengths), 32768, ranks=3))
    assert sorted(g for pack in packs for g in pack.groups) == [*range(1000)]


# On data.


def check_fill(what: str, lengths: Ints, ranks: int = 1, accumulation: int = 1) -> None:
    """Print how full the packs are, and require no more than packs that are 97 % full would be.

    As far as the numbers allow: the last pack holds what is left, and packs are split until
    every step has its number.
    """
    cap, per_step = 32768, ranks * accumulation
    plan = plan_epoch(lengths, np.ones_like(lengths), cap, ranks=ranks, accumulation=accumulation)
    total, count = int(lengths.sum()), len(packs_of(plan))
    print(f"{what}: {len(lengths)} groups in {count} packs, {total / (count * cap):.2%} full")
    most = int(np.ceil(total / (0.97 * cap)))
    assert count <= most + -most % per_step


@pytest.fixture(scope="session")
def real_lengths(shared_data: Path, internlm2_tokenizer: Any) -> Callable[[str], tuple[Ints, Ints]]:
    """Tokens and pairs of each row of a set, and of each group of rows of one question."""

    def text_of(messages: list[dict[str, str]]) -> str:
        return "\n".join(m["content"] for m in messages)

    def lengths_of(name: str) -> tuple[Ints, Ints]:
        from polar_xtuner.template import Candidate, PolarTemplate

        lines = (shared_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        ids = PolarTemplate(internlm2_tokenizer).encode(
            [
                Candidate(*(text_of(row[field]) for field in ("prompt", "reference", side)))
                for row in rows
                for side in ("chosen", "rejected")
            ]
        )
        pairs = [len(lay_out(ids[i : i + 2])[0]) for i in range(0, len(ids), 2)]
        merged: dict[tuple[str, str], dict[tuple[int, ...], None]] = {}
        for number, row in enumerate(rows):
            group = merged.setdefault((text_of(row["prompt"]), text_of(row["reference"])), {})
            group.update(dict.fromkeys(map(tuple, ids[2 * number : 2 * number + 2])))
        whole = [len(lay_out([list(s) for s in group])[0]) for group in merged.values()]
        return np.array(pairs), np.array(whole)

    return lengths_of


@pytest.fixture(scope="session")
def all_real_lengths(
    real_lengths: Callable[[str], tuple[Ints, Ints]],
) -> dict[str, tuple[Ints, Ints]]:
    return {name: real_lengths(name) for name in DATA_SETS}


@pytest.mark.parametrize("name", DATA_SETS)
def test_packs_of_real_rows_are_97_percent_full(
    name: str, all_real_lengths: dict[str, tuple[Ints, Ints]]
) -> None:
    rows, questions = all_real_lengths[name]
    check_fill(f"rows of {name}", rows)
    check_fill(f"questions of {name}", questions)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 2), (8, 1)])
def test_packs_of_all_real_rows_together_are_97_percent_full(
    ranks: int, accumulation: int, all_real_lengths: dict[str, tuple[Ints, Ints]]
) -> None:
    lengths = np.concatenate([rows for rows, _ in all_real_lengths.values()])
    check_fill(f"all rows, {ranks} x {accumulation} packs a step", lengths, ranks, accumulation)


@pytest.mark.parametrize(("per_step", "bound"), [(1, 1.2), (4, 1.05), (16, 1.02)])
def test_what_a_pair_weighs_has_little_to_do_with_its_length(per_step: int, bound: float) -> None:
    """A pair in a step of few long pairs weighs more: packs must mix lengths.

    Packed longest first, the longest tenth weighed 12.8, 2.8 and 1.14 times the shortest.
    """
    lengths = some_lengths(20_000)
    weights = np.zeros(len(lengths))
    for epoch in range(3):
        plan = plan_epoch(lengths, np.ones_like(lengths), 32768, epoch=epoch, ranks=per_step)
        for pack in packs_of(plan):
            weights[[*pack.groups]] += pack.pair_weight
    short, long = np.quantile(lengths, [0.1, 0.9])
    ratio = weights[lengths >= long].mean() / weights[lengths <= short].mean()
    assert 1 / bound < ratio < bound


def test_length_has_nothing_to_do_with_when_a_group_is_trained_on() -> None:
    lengths = some_lengths(60_000)
    plan = plan_epoch(lengths, np.ones_like(lengths), 32768, ranks=2, accumulation=2)
    when = np.empty(len(lengths))
    for number, step in enumerate(plan):
        for slot in step:
            for pack in slot:
                when[[*pack.groups]] = number
    assert len(plan) > 200
    # Independent, |r| of 60,000 groups would stay below 4 / sqrt(60,000) = 0.016; packs of like
    # groups make it noisier.
    assert abs(np.corrcoef(lengths, when)[0, 1]) < 0.02
    assert abs(np.corrcoef(lengths > np.quantile(lengths, 0.99), when)[0, 1]) < 0.03


def test_files_do_not_stay_together() -> None:
    """Row numbers are not kept in order either: steps mix all parts of the data."""
    lengths = some_lengths(20_000)
    plan = plan_epoch(lengths, np.ones_like(lengths), 32768, ranks=2)
    means = [np.mean([g for slot in step for pack in slot for g in pack.groups]) for step in plan]
    per_step = len(lengths) / len(plan)
    assert np.std(means) < 2 * (len(lengths) / np.sqrt(12)) / np.sqrt(per_step)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
