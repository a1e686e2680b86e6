"""Controls: what a reward model should not be able to do.

POLAR compares an output with a reference. Given the reference of another prompt it has nothing to
compare with: a model that still ranks the pairs right goes by the outputs alone, their length or
style. `shuffle_references` makes such rows out of sound ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from polar_xtuner.records import BadRow, Row

Unit = tuple[str, str]  # a prompt and its reference


def shuffle_references(rows: Iterable[Row | BadRow], seed: int) -> Iterator[Row | BadRow]:
    """The rows, in order, each with the reference of another prompt; holds them all in memory.

    Rows of one prompt and reference get one new reference together. References are handed round,
    so the set stays the same; only where more than half of them belong to one prompt, some are
    given to several. A row gets a text equal to its own only if that cannot be avoided by
    exchanging two. Bad rows pass through. The same rows and seed give the same result.

    Raises:
        ValueError: all rows are of one prompt.
    """
    held = [*rows]
    units = dict.fromkeys((row.prompt, row.reference) for row in held if isinstance(row, Row))
    new = _new_references([*units], random.Random(seed)) if units else {}
    for row in held:
        if isinstance(row, Row):
            row = replace(row, reference=new[row.prompt, row.reference])
        yield row


def _new_references(units: list[Unit], rng: random.Random) -> dict[Unit, str]:
    members: dict[str, list[Unit]] = {}
    for unit in units:
        members.setdefault(unit[0], []).append(unit)
    if len(members) < 2:
        raise ValueError(
            "references cannot be shuffled: all rows are of one prompt, and another prompt's "
            "reference is needed"
        )
    groups = [*members.values()]
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    order = [unit for group in groups for unit in group]
    # Shifted by the largest group, no group overlaps with itself, if that is half at most.
    largest = max(map(len, groups))
    given = [order[(i + largest) % len(order)] for i in range(len(order))]
    for i, unit in enumerate(order):
        if given[i][0] == unit[0]:
            given[i] = rng.choice([other for other in order if other[0] != unit[0]])
    _part_equal_texts(order, given, rng)
    return {unit: reference for unit, (_, reference) in zip(order, given)}


def _part_equal_texts(order: list[Unit], given: list[Unit], rng: random.Random) -> None:
    """Exchange what is given until no unit has its own text again, as far as exchanges help."""
    n = len(order)
    own, others = Counter(text for _, text in order), Counter(text for _, text in given)
    unavoidable = max(own[text] + others[text] - n for text in own)

    def same(i: int, j: int) -> bool:
        return order[i][1] == given[j][1]

    left = [i for i in range(n) if same(i, i)]
    equal = len(left)
    while left and equal > unavoidable:
        i, start = left.pop(), rng.randrange(n)
        for j in (k % n for k in range(start, start + n)):
            gain = same(i, i) + same(j, j) - same(i, j) - same(j, i)
            if gain > 0 and order[i][0] != given[j][0] and order[j][0] != given[i][0]:
                given[i], given[j] = given[j], given[i]
                equal -= gain
                break
