import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA_SETS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polar_xtuner import packing
from polar_xtuner.packing import ModelShape, Pack, Plan, Share, attended_pairs, best_fit, plan_epoch

Ints = NDArray[np.int64]
Arguments = dict[str, Any]  # of `plan_epoch`

CAP = 100
TOKENS = 32768
POLAR_7B = ModelShape(32, 4096, 14336, 32, 8)


def arguments_of(lengths: Any, **others: Any) -> Arguments:
    lengths = np.array(lengths, np.int64)
    rest = {"pairs": np.ones_like(lengths), "costs": lengths**2, "cap": CAP}
    return {"lengths": lengths, **rest, **others}


@st.composite
def epochs(draw: st.DrawFn) -> Arguments:
    """Arguments of `plan_epoch` that it can serve, with `pairs_per_step` or without."""
    longest = draw(st.sampled_from([1, 30, 50, 51, CAP]))
    shortest = draw(st.sampled_from([1, min(CAP // 2 + 1, longest), longest]))
    ranks, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    per_step = ranks * accumulation
    size = draw(st.integers(per_step, per_step + 60))

    def per_group(values: st.SearchStrategy[Any]) -> NDArray[Any]:
        return np.array(draw(st.lists(values, min_size=size, max_size=size)))

    arguments = arguments_of(
        per_group(st.integers(shortest, longest)),
        pairs=per_group(st.integers(1, draw(st.sampled_from([1, 9, 40])))),
        seed=draw(st.integers(0, 2**31)),
        epoch=draw(st.integers(0, 5)),
        ranks=ranks,
        accumulation=accumulation,
    )
    if draw(st.booleans()):
        arguments["costs"] = per_group(st.integers(0, 3) | st.floats(0, 1e9))
    if draw(st.booleans()):
        wanted = draw(st.integers(per_step, per_step + 30))
        # Were a share left over, every pack would hold more than the cap less a length.
        arguments |= {"pairs_per_step": wanted, "cap": CAP * (wanted // per_step + 2)}
    return arguments


ODD = arguments_of([CAP] * 5, ranks=2)  # no pack of two groups to split
SPLIT = arguments_of([CAP // 4] * 8, ranks=5)  # 2 packs of 4 that make 5
HALVES = arguments_of([CAP // 2 + 1] * 9, ranks=2, accumulation=4)
TIES = arguments_of([1] * 9, ranks=2, costs=np.zeros(9))
DIVIDED = arguments_of([9] * 5, ranks=2, pairs=np.full(5, 70), pairs_per_step=4)
REST = arguments_of([9] * 9, ranks=2, accumulation=2, pairs_per_step=8)  # one pair in four packs


def corners(test: Any) -> Any:
    for arguments in (ODD, SPLIT, HALVES, TIES, DIVIDED, REST):
        test = example(arguments)(test)
    return given(epochs())(test)


def packs_of(plan: Plan) -> list[Pack]:
    return [plan.pack(i, rank) for i in range(plan.iterations) for rank in range(plan.ranks)]


def steps_of(plan: Plan) -> list[list[Pack]]:
    packs, size = packs_of(plan), plan.ranks * plan.accumulation
    return [packs[i : i + size] for i in range(0, len(packs), size)]


def trained_shares(packs: Iterable[Pack]) -> list[Share]:
    return [share for pack in packs if pack.pair_weight for share in pack.shares]


def pairs_in(packs: Iterable[Pack]) -> int:
    return sum(share.stop - share.start for share in trained_shares(packs))


@corners
def test_every_pair_is_trained_on_exactly_once(arguments: Arguments) -> None:
    shares = defaultdict(list)
    for share in sorted(trained_shares(packs_of(plan_epoch(**arguments)))):
        shares[share.group].append((share.start, share.stop))
    assert [*shares] == [*range(len(arguments["lengths"]))]
    for group, parts in shares.items():
        starts, stops = zip(*parts)
        assert all(start < stop for start, stop in parts)
        assert (*starts, arguments["pairs"][group]) == (0, *stops)
        assert len(parts) == 1 or "pairs_per_step" in arguments


@corners
def test_no_pack_is_empty_or_above_the_cap(arguments: Arguments) -> None:
    """A part of a group counts as the whole."""
    for pack in packs_of(plan_epoch(**arguments)):
        groups = [share.group for share in pack.shares]
        assert 0 < arguments["lengths"][groups].sum() <= arguments["cap"]


@corners
def test_every_rank_gets_a_pack_in_every_slot_of_every_step(arguments: Arguments) -> None:
    plan = plan_epoch(**arguments)
    wanted = arguments["ranks"], arguments.get("accumulation", 1)
    assert (plan.ranks, plan.accumulation) == wanted
    assert len(plan.ends) == len(plan.pair_weights) == plan.iterations * plan.ranks
    assert plan.iterations == plan.steps * plan.accumulation > 0
    assert [*plan.ends] == [*np.cumsum([len(pack.shares) for pack in packs_of(plan)])]


@corners
def test_the_pairs_of_a_step_weigh_as_much_as_its_packs(arguments: Arguments) -> None:
    """The mean over ranks and slots of the packs' sums is then the mean over the step's pairs."""
    for packs in steps_of(plan_epoch(**arguments)):
        total = sum(pack.pair_weight * pairs_in([pack]) for pack in packs)
        assert abs(total - len(packs)) <= 1e-12 * len(packs)
        assert len({pack.pair_weight for pack in packs} - {0.0}) == 1


@corners
def test_what_only_fills_a_step_is_the_shortest_group(arguments: Arguments) -> None:
    for packs in steps_of(plan_epoch(**arguments)):
        fillers = [pack for pack in packs if not pack.pair_weight]
        assert len(fillers) < len(packs)
        for ((group, start, stop),) in (pack.shares for pack in fillers):
            assert arguments["lengths"][group] == arguments["lengths"].min()
            assert (start, stop) == (0, arguments["pairs"][group])


@pytest.mark.parametrize("window", [1, 5, packing.WINDOW])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (3, 2), (8, 2), (8, 16)])
def test_windows_and_steps_of_any_size_hold_every_group(
    ranks: int, accumulation: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", window)
    for lengths in ([CAP // 2 + 1] * 265, [CAP] * 265, [1] * 1000, [30, 60, 100] * 99):
        plan = plan_epoch(**arguments_of(lengths, ranks=ranks, accumulation=accumulation))
        groups = [share.group for share in trained_shares(packs_of(plan))]
        assert sorted(groups) == [*range(len(lengths))]
        assert all(map(pairs_in, steps_of(plan)))


@settings(max_examples=50)
@corners
def test_the_same_arguments_give_the_same_plan(arguments: Arguments) -> None:
    before = {name: np.copy(value) for name, value in arguments.items()}
    np.random.seed(1)
    first = packs_of(plan_epoch(**arguments))
    np.random.seed(2)
    assert packs_of(plan_epoch(**arguments)) == first
    assert all(np.array_equal(arguments[name], before[name]) for name in before)


def some_lengths(count: int, seed: int = 0) -> Ints:
    random = np.random.default_rng(seed)
    return random.lognormal(6, 0.8, count).astype(np.int64).clip(50, 16000)


def planned(lengths: Ints, **options: Any) -> Plan:
    """Groups of one plain sequence and one pair each, unless `options` says more."""
    costs = POLAR_7B.flops(lengths, attended_pairs(lengths, lengths))
    return plan_epoch(**arguments_of(lengths, **{"costs": costs, "cap": TOKENS, **options}))


@pytest.mark.parametrize("wanted", [None, 30])
@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"seed": 1, "epoch": 1}])
def test_another_epoch_or_seed_is_another_order(other: dict[str, int], wanted: int | None) -> None:
    lengths = some_lengths(3 * packing.WINDOW)
    orders = [
        [pack.shares for pack in packs_of(planned(lengths, pairs_per_step=wanted, **more))]
        for more in ({}, {"seed": 0, "epoch": 0}, other)
    ]
    assert orders[0] == orders[1] != orders[2]
    first, second = ({frozenset(shares) for shares in order} for order in orders[1:])
    assert len(first & second) < 0.1 * len(first), "the same packs in another order"


def test_seed_and_epoch_are_not_added_up() -> None:
    lengths = some_lengths(200)
    plans = [
        packs_of(planned(lengths, seed=seed, epoch=epoch))
        for seed, epoch in ((1, 2), (2, 1), (3, 0), (0, 3))
    ]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (6, 1), (1, 6), (3, 4)])
def test_fewer_groups_than_packs_are_an_error_with_the_numbers(
    ranks: int, accumulation: int
) -> None:
    arguments = {"ranks": ranks, "accumulation": accumulation}
    packs = ranks * accumulation
    for count in range(packs):
        with pytest.raises(
            ValueError, match=rf"^{count} groups .* {ranks} ranks x {accumulation} "
        ):
            plan_epoch(**arguments_of([1] * count, **arguments))
    assert plan_epoch(**arguments_of([1] * packs, **arguments)).steps == 1


def test_a_group_above_the_cap_is_an_error_that_gives_its_length() -> None:
    with pytest.raises(ValueError, match=r"101 tokens .* 100"):
        plan_epoch(**arguments_of([5, 101, 7]))
    with pytest.raises(ValueError, match=r"101 tokens .* 100"):
        best_fit(np.array([5, 101, 7]), 100)
    assert plan_epoch(**arguments_of([5, 101, 7], cap=101)).steps


# With pairs_per_step.


def with_pairs(arguments: Arguments) -> Arguments:
    per_step = arguments["ranks"] * arguments.get("accumulation", 1)
    wanted = arguments.get("pairs_per_step", per_step)
    return arguments | {"pairs_per_step": wanted, "cap": CAP * (wanted // per_step + 2)}


@corners
def test_each_step_has_the_pairs_that_were_asked_for(arguments: Arguments) -> None:
    arguments = with_pairs(arguments)
    wanted = arguments["pairs_per_step"]
    *most, last = map(pairs_in, steps_of(plan_epoch(**arguments)))
    assert most == [wanted] * len(most) and 1 <= last <= wanted


@corners
def test_the_pairs_of_a_step_do_not_depend_on_its_packs(arguments: Arguments) -> None:
    arguments = with_pairs(arguments)
    alone = {"ranks": 1, "accumulation": 1, "cap": CAP * (arguments["pairs_per_step"] + 2)}
    one, other = (
        [sorted(trained_shares(packs)) for packs in steps_of(plan_epoch(**options))]
        for options in (arguments, arguments | alone)
    )
    assert one == other


@corners
def test_a_group_is_divided_only_where_no_whole_one_fits(arguments: Arguments) -> None:
    """All that are left have too many pairs, or so many of those that were looked at."""
    arguments = with_pairs(arguments)
    left = dict(enumerate(arguments["pairs"].tolist()))
    for packs in steps_of(plan_epoch(**arguments)):
        begun = trained_shares(packs)
        cut = [share for share in begun if share.stop < arguments["pairs"][share.group]]
        for share in begun:
            left.pop(share.group, None)
        assert len(cut) <= 1
        for share in cut:
            waiting = sum(pairs > share.stop - share.start for pairs in left.values())
            assert waiting == len(left) or waiting >= packing.WAITING


def test_fewer_pairs_than_packs_are_an_error_that_says_what_to_change() -> None:
    arguments = arguments_of([1] * 50, ranks=3, accumulation=4)
    for wanted in range(1, 12):
        match = rf"pairs_per_step={wanted} .* 3 ranks x 4 .*accumulative_counts"
        with pytest.raises(ValueError, match=match):
            plan_epoch(**arguments, pairs_per_step=wanted)
    assert plan_epoch(**arguments, pairs_per_step=12).steps == 5


def counts_named(arguments: Arguments) -> int | None:
    """The accumulative_counts that the error names; 0 if there is no error."""
    try:
        plan_epoch(**arguments)
    except ValueError as error:
        assert "max_packed_length" in str(error)
        named = re.search(r"set accumulative_counts=(\d+)", str(error))
        return int(named[1]) if named else None
    return 0


def works(arguments: Arguments, accumulation: int) -> bool:
    try:
        return bool(plan_epoch(**arguments | {"accumulation": accumulation}))
    except ValueError:
        return False


@given(
    lengths=st.lists(st.integers(1, CAP) | st.just(CAP), min_size=1, max_size=30),
    ranks=st.integers(1, 3),
    pairs=st.integers(1, 4),
    pairs_per_step=st.integers(3, 12),
)
@example(lengths=[CAP] * 5, ranks=2, pairs=1, pairs_per_step=3)  # four packs for three pairs
@example(lengths=[CAP] * 3, ranks=2, pairs=5, pairs_per_step=11)  # four packs for three groups
def test_pairs_that_do_not_fit_are_an_error_that_names_what_works(
    lengths: list[int], ranks: int, pairs: int, pairs_per_step: int
) -> None:
    """If anything does."""
    lengths += [CAP] * (ranks - len(lengths))
    arguments = arguments_of(lengths, ranks=ranks, pairs_per_step=pairs_per_step)
    arguments["pairs"] *= pairs
    counts = counts_named(arguments)
    if counts is None:
        assert not any(works(arguments, n) for n in range(1, pairs_per_step // ranks + 1))
    elif counts:
        assert works(arguments, counts) and not works(arguments, counts - 1)


@given(st.lists(st.integers(1, CAP), max_size=80), st.integers(CAP, 2 * CAP))
def test_best_fit_leaves_no_two_packs_that_fit_into_one(lengths: list[int], cap: int) -> None:
    packs = best_fit(np.array(lengths, dtype=np.int64), cap)
    assert sorted(i for pack in packs for i in pack) == [*range(len(lengths))]
    fill = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert all(total <= cap for total in fill)
    assert len(fill) < 2 or fill[0] + fill[1] > cap


# How full, how balanced, how fast.


def most_packs(lengths: Ints) -> int:
    return int(np.ceil(lengths.sum() / (0.985 * TOKENS)))


def imbalance(plan: Plan, costs: Ints) -> float:
    """Cost of a step's most loaded rank over its mean rank, mean of the steps."""
    starts = np.append(0, plan.ends[:-1])
    packs = np.add.reduceat(costs[plan.shares[:, 0]], starts)
    loads = packs.reshape(plan.steps, plan.accumulation, plan.ranks).sum(axis=1)
    return np.mean(loads.max(axis=1) / loads.mean(axis=1))


def mixed_lengths(count: int) -> Ints:
    random = np.random.default_rng(0)
    nearly_all = random.integers(TOKENS * 7 // 8, TOKENS + 1, count)
    return np.where(random.random(count) < 0.1, nearly_all, some_lengths(count))


@pytest.mark.parametrize("lengths_of", [some_lengths, mixed_lengths])
@pytest.mark.parametrize("count", [64, 1000, 10_000])
def test_packs_are_98_5_percent_full(lengths_of: Callable[[int], Ints], count: int) -> None:
    lengths = lengths_of(count)
    assert all(len(planned(lengths, epoch=e).ends) <= most_packs(lengths) for e in range(3))


def test_packs_of_two_to_four_groups_are_94_percent_full() -> None:
    lengths = np.random.default_rng(0).integers(TOKENS // 5, TOKENS * 3 // 5, 5000)
    assert lengths.sum() >= 0.94 * TOKENS * len(planned(lengths).ends)


@pytest.mark.parametrize("wanted", [None, 512])
def test_what_ranks_balance_is_the_cost_that_is_given(wanted: int | None) -> None:
    costs = some_lengths(20_000, seed=1)
    plan = planned(
        some_lengths(20_000), costs=costs, ranks=8, accumulation=2, pairs_per_step=wanted
    )
    assert imbalance(plan, costs) <= 1.03


@pytest.mark.parametrize(("shortest", "longest"), [(0.5, 1), (1, 1), (0.25, 0.45), (0, 1)])
def test_long_groups_are_planned_in_seconds_too(shortest: float, longest: float) -> None:
    """One a pack, two or three, or nearly any number."""
    for count in (5000, 20_000, 150_000):  # so that a planner that takes hours fails in seconds
        random = np.random.default_rng(0)
        lengths = np.ceil(random.uniform(shortest, longest, count) * TOKENS).astype(np.int64)
        start = time.process_time()
        plan = planned(lengths)
        # A second for what the collector finds to do in a long test session.
        assert time.process_time() - start < 1 + 30e-6 * count
        assert len(plan.ends) == count or shortest < 0.5


@pytest.mark.parametrize("wanted", [None, 320])
def test_150_000_groups_are_planned_in_two_seconds_and_stay_small(wanted: int | None) -> None:
    lengths = some_lengths(150_000)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        plan = planned(lengths, ranks=8, pairs_per_step=wanted)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2
    size = plan.shares.nbytes + plan.ends.nbytes + plan.pair_weights.nbytes
    assert size <= 32 * len(lengths)


Groups = dict[str, Ints]


def groups_of(groups: Iterable[tuple[Iterable[tuple[int, ...]], int]]) -> Groups:
    """Of groups given as distinct sequences and a number of pairs."""
    measured = []
    for sequences, pairs in groups:
        sequences = [*sequences]
        differ = (a != b for a, b in zip(min(sequences), max(sequences)))
        prefix = [*differ].index(True)
        first, *others = (len(sequence) - prefix for sequence in sequences)
        segments = [(prefix + first,) * 2, *((n, prefix + n) for n in others)]
        queries, keys = np.array(segments).T
        cost = POLAR_7B.flops(queries.sum(), attended_pairs(queries, keys).sum())
        measured.append((queries.sum(), cost, pairs))
    return dict(zip(("lengths", "costs", "pairs"), np.array(measured).T))


@pytest.fixture(scope="session")
def real_groups(shared_data: Path, internlm2_tokenizer: Any) -> dict[str, Groups]:
    """Each row of the real sets as a group, and all rows of one question as a group."""
    from polar_xtuner.template import Candidate, PolarTemplate

    template, found = PolarTemplate(internlm2_tokenizer), {}
    for name in DATA_SETS:
        asked, candidates = [], []
        for line in (shared_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            prompt, reference, *sides = (
                "\n".join(message["content"] for message in json.loads(line)[field])
                for field in ("prompt", "reference", "chosen", "rejected")
            )
            asked.append((prompt, reference))
            candidates += [Candidate(prompt, reference, side) for side in sides]
        ids = iter([tuple(sequence) for sequence in template.encode(candidates)])
        rows = [*zip(ids, ids)]
        questions = defaultdict(list)
        for question, pair in zip(asked, rows):
            questions[question] += pair
        found[f"rows of {name}"] = groups_of((pair, 1) for pair in rows)
        found[f"questions of {name}"] = groups_of(
            (dict.fromkeys(sequences), len(sequences) // 2) for sequences in questions.values()
        )
    for what in ("rows", "questions"):
        sets = [found[f"{what} of {name}"] for name in DATA_SETS]
        found[f"{what} of all"] = {k: np.concatenate([s[k] for s in sets]) for k in sets[0]}
    return found


@pytest.mark.parametrize("name", [*DATA_SETS, "all"])
@pytest.mark.parametrize("what", ["rows", "questions"])
def test_packs_of_real_data_are_full_and_ranks_balanced(
    what: str, name: str, real_groups: dict[str, Groups]
) -> None:
    groups = real_groups[f"{what} of {name}"]
    lengths = groups["lengths"]
    plan = plan_epoch(**groups, cap=TOKENS)
    on_8 = [plan_epoch(**groups, cap=TOKENS, ranks=8, accumulation=a) for a in (1, 2)]
    balance = [imbalance(p, groups["costs"]) for p in on_8]
    print(f"{what} of {name}: {len(lengths)} groups in {len(plan.ends)} packs", end=", ")
    print(f"{lengths.sum() / (len(plan.ends) * TOKENS):.2%} full", end="; 8 ranks x 1 and x 2: ")
    print(f"{[p.steps for p in on_8]} steps, max/mean rank cost {np.round(balance, 4)}")
    assert len(plan.ends) <= most_packs(lengths)
    assert max(balance) <= 1.03


# What decides where a group goes.


def step_of_group(plan: Plan, groups: int) -> Ints:
    packs = np.repeat(np.arange(len(plan.ends)), np.diff(plan.ends, prepend=0))
    trained = plan.pair_weights[packs] > 0
    when = np.empty(groups, np.int64)
    when[plan.shares[trained, 0]] = packs[trained] // (plan.ranks * plan.accumulation)
    return when


@pytest.mark.parametrize(("per_step", "bound"), [(1, 1.1), (4, 1.02), (16, 1.02)])
def test_what_a_pair_weighs_has_little_to_do_with_its_length(per_step: int, bound: float) -> None:
    """A pair in a step of few long pairs weighs more: packs must mix lengths.

    Packed longest first, the longest tenth weighed 12.8, 2.8 and 1.14 times the shortest.
    """
    lengths = some_lengths(20_000)
    weights = np.zeros(len(lengths))
    for epoch in range(6):
        plan = planned(lengths, epoch=epoch, ranks=per_step)
        weights[plan.shares[:, 0]] += np.repeat(plan.pair_weights, np.diff(plan.ends, prepend=0))
    short, long = np.quantile(lengths, [0.1, 0.9])
    ratio = weights[lengths >= long].mean() / weights[lengths <= short].mean()
    assert 1 / bound < ratio < bound


@pytest.mark.parametrize("wanted", [None, 256])
def test_length_has_nothing_to_do_with_when_a_group_is_trained_on(wanted: int | None) -> None:
    lengths = some_lengths(60_000)
    plan = planned(lengths, ranks=2, accumulation=3, pairs_per_step=wanted)
    when = step_of_group(plan, len(lengths))
    assert plan.steps > 150
    # Independent, |r| of 60,000 groups would stay below 4 / sqrt(60,000) = 0.016.
    assert abs(np.corrcoef(lengths, when)[0, 1]) < 0.02
    assert abs(np.corrcoef(lengths > np.quantile(lengths, 0.99), when)[0, 1]) < 0.03


@pytest.mark.parametrize("count", [1000, 20_000])
def test_steps_are_not_in_the_order_of_their_longest_groups(count: int) -> None:
    """Neither those of a small set nor those of a window."""
    lengths = some_lengths(count)
    when, falls = [], []
    for epoch in range(max(3, 40_000 // count)):
        plan = planned(lengths, epoch=epoch)
        steps = step_of_group(plan, count)
        when.append(steps[lengths.argmax()] / (plan.steps - 1))
        longest = np.zeros(plan.steps)
        np.maximum.at(longest, steps, lengths)
        falls += [*(np.diff(longest) < 0)]
    assert 0.4 < np.mean(falls) < 0.6
    assert count > 1000 or 0.3 < np.mean(when) < 0.7


def test_files_do_not_stay_together() -> None:
    """Row numbers are not kept in order either: steps mix all parts of the data."""
    lengths = some_lengths(20_000)
    plan = planned(lengths, ranks=2)
    when = step_of_group(plan, len(lengths))
    counts = np.bincount(when)
    means = np.bincount(when, np.arange(len(lengths))) / counts
    assert np.std(means) < 2 * (len(lengths) / np.sqrt(12)) / np.sqrt(counts.mean())
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


# Costs.


@given(st.integers(0, 40), st.integers(0, 40))
def test_attended_pairs_are_those_of_a_causal_mask(queries: int, more_keys: int) -> None:
    """Aligned bottom-right: the last query sees all keys."""
    keys = queries + more_keys
    mask = np.arange(keys) <= np.arange(queries)[:, None] + more_keys
    assert attended_pairs(queries, keys) == mask.sum()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flops_are_those_that_torch_counts(kv_heads: int) -> None:
    """Torch counts all of a masked attention matrix: every query then attends to every key."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from polar_xtuner.collate import PackLayout
    from polar_xtuner.modeling_internlm2 import InternLM2Config, InternLM2ForRewardModel

    tokens, shape = 13, ModelShape(3, 32, 56, 4, kv_heads)
    model = InternLM2ForRewardModel(InternLM2Config(50, bias=False, **asdict(shape)))
    ids = torch.arange(tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.model(ids, ids, PackLayout.of([[tokens - 1, 1]])).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts == {
        "aten.mm": shape.flops(tokens, 0),
        "aten.bmm": shape.flops(0, tokens**2),
    }
