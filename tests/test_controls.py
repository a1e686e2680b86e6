"""References shuffled among prompts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_xtuner.controls import shuffle_references
from polar_xtuner.records import BadRow, Row, RowError, map_rows

BAD = BadRow((RowError("rows", 9, "prompt", "is missing"),))
UNITS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("xyzuv")), min_size=1)


def rows_of(units: Any) -> list[Row | BadRow]:
    raw = [
        {"prompt": p, "reference": r, "chosen": "c", "rejected": f"{i}", "id": i}
        for i, (p, r) in enumerate(units)
    ]
    return [*map_rows(raw, "rows")]


def shuffled(units: Any, seed: int = 0) -> list[tuple[str, str]]:
    """The new references with the old."""
    rows = rows_of(units)
    return [
        (new.reference, old.reference)
        for new, old in zip(shuffle_references(rows, seed), rows, strict=True)
        if isinstance(new, Row) and isinstance(old, Row)
    ]


@given(UNITS, st.integers(0, 3))
def test_every_row_gets_the_reference_of_another_prompt(units: Any, seed: int) -> None:
    if len({p for p, _ in units}) < 2:
        with pytest.raises(ValueError, match="one prompt"):
            shuffled(units, seed)
        return
    new = shuffled(units, seed)
    given_to: dict[tuple[str, str], set[str]] = {}
    for unit, (reference, _) in zip(units, new):
        assert any(p != unit[0] and r == reference for p, r in units)
        given_to.setdefault(unit, set()).add(reference)
    assert all(len(references) == 1 for references in given_to.values())
    assert new == shuffled(units, seed)
    of_prompt = Counter(p for p, _ in given_to)
    if 2 * max(of_prompt.values()) <= len(given_to):  # then they are handed round
        assert Counter(r for _, r in given_to) == Counter(r for (r,) in given_to.values())


@given(st.lists(st.sampled_from("uvwxyz"), min_size=2, max_size=30), st.integers(0, 3))
def test_no_prompt_gets_its_own_text_more_often_than_must_be(texts: Any, seed: int) -> None:
    equal = sum(new == old for new, old in shuffled([*zip(map(str, range(99)), texts)], seed))
    most = max(Counter(texts).values())
    assert equal == max(0, 2 * most - len(texts))


def test_all_else_stays_and_bad_rows_pass() -> None:
    rows = [*rows_of([("a", "x"), ("b", "y")]), BAD]
    first, second, last = shuffle_references(rows, 0)
    assert isinstance(first, Row) and isinstance(second, Row) and last is BAD
    assert (first.prompt, first.reference, first.rejected) == ("a", "y", ("0",))
    assert (second.prompt, second.reference, second.line) == ("b", "x", 2)
    assert [*shuffle_references([BAD], 0)] == [BAD]


def test_seeds_differ_and_large_sets_are_quick() -> None:
    units = [(f"p{i}", f"r{i % 7}" if i % 2 else f"r{i}") for i in range(8_000)]
    one, other = shuffled(units, 1), shuffled(units, 2)
    assert one != other and all(new != old for new, old in one)
