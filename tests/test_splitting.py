import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_xtuner.splitting import split_pairs


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Pieces, chosen and rejected of a group, and a cap."""
    suffixes = draw(st.lists(st.integers(1, 20), min_size=2, max_size=12))
    numbers = st.integers(0, len(suffixes) - 1)
    pairs = draw(
        st.lists(
            st.tuples(numbers, numbers).filter(lambda p: p[0] != p[1]), min_size=1, max_size=30
        )
    )
    prefix, cap = draw(st.integers(1, 30)), draw(st.integers(3, 90))
    return [prefix, *suffixes], [c for c, _ in pairs], [r for _, r in pairs], cap


def tokens(pieces: list[int], chosen: list[int], rejected: list[int], part: Any) -> int:
    candidates = {side[pair] for pair in part for side in (chosen, rejected)}
    return pieces[0] + sum(pieces[1 + c] for c in candidates)


@given(groups())
def test_every_pair_is_in_one_part_that_fits_or_fits_no_pack(
    group: tuple[list[int], list[int], list[int], int],
) -> None:
    *lists, cap = group
    parts, unfit = split_pairs(*lists, cap)
    assert sorted([*unfit, *(pair for part in parts for pair in part)]) == [*range(len(lists[1]))]
    assert all(len(part) and tokens(*lists, part) <= cap for part in parts)
    assert all(tokens(*lists, [pair]) > cap for pair in unfit)


def complete(chosen: int, rejected: int) -> tuple[list[int], list[int]]:
    pairs = [(c, chosen + r) for c in range(chosen) for r in range(rejected)]
    return [c for c, _ in pairs], [r for _, r in pairs]


@pytest.mark.parametrize(("side", "block"), [(8, 4), (12, 3), (16, 8)])
def test_a_complete_group_is_split_into_square_blocks(side: int, block: int) -> None:
    """Blocks are the least work: a part of 2b candidates cannot hold more than b^2 pairs."""
    prefix, suffix = 50, 10
    chosen, rejected = complete(side, side)
    pieces = [prefix, *[suffix] * (2 * side)]
    parts, _ = split_pairs(pieces, chosen, rejected, prefix + 2 * block * suffix)
    assert [len(part) for part in parts] == [block**2] * (side // block) ** 2


def test_pairs_without_a_common_candidate_share_parts() -> None:
    chosen, rejected = [*range(0, 20, 2)], [*range(1, 20, 2)]
    parts, _ = split_pairs([30, *[5] * 20], chosen, rejected, 30 + 50)
    assert len(parts) == 2


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_splitting_repeats_less_than_cutting_the_list_of_pairs(density: float) -> None:
    """The plain way: pairs in order, a new part wherever the next pair does not fit."""
    random = np.random.default_rng(0)
    ours = plain = whole = 0
    for _ in range(20):
        pieces = [300, *random.integers(50, 400, 24).tolist()]
        sides = [(c, r) for c in range(24) for r in range(c) if random.random() < density]
        random.shuffle(sides)
        chosen, rejected = [c for c, _ in sides], [r for _, r in sides]
        cap = 2500
        parts, unfit = split_pairs(pieces, chosen, rejected, cap)
        assert not len(unfit)
        ours += sum(tokens(pieces, chosen, rejected, part) for part in parts)
        whole += sum(pieces)
        cut: list[list[int]] = [[]]
        for pair in range(len(sides)):
            if tokens(pieces, chosen, rejected, [*cut[-1], pair]) > cap:
                cut.append([])
            cut[-1].append(pair)
        plain += sum(tokens(pieces, chosen, rejected, part) for part in cut)
    print(f"density {density}: {ours / whole:.2f} of the group's tokens, {plain / whole:.2f} cut")
    assert ours < {0.1: 0.75, 0.3: 0.55, 1.0: 0.45}[density] * plain


def test_a_large_group_is_split_in_seconds() -> None:
    chosen, rejected = complete(300, 300)
    parts, unfit = split_pairs([500, *[300] * 600], chosen, rejected, 32768)
    assert not len(unfit)
    assert sum(map(len, parts)) == 90_000
    assert len(parts) <= 40


def test_many_pairs_without_a_common_candidate_are_split_in_seconds() -> None:
    chosen, rejected = [*range(0, 10_000, 2)], [*range(1, 10_000, 2)]
    start = time.process_time()
    parts, _ = split_pairs([500, *[300] * 10_000], chosen, rejected, 32768)
    assert time.process_time() - start < 10
    assert len(parts) == 95  # 53 pairs each
