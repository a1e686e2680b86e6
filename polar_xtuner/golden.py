"""Golden scores: rows and the rewards that a checkpoint's own weights give them.

An export writes them beside the weights (`golden_scores`). Whoever scores with the checkpoint, a
server above all, can then be held against them: that it has these weights, reads these ids, and
answers raw rewards. Each precision has a tolerance of its own, measured on the weights.

    {"version", "dtype", "tolerances": {dtype: most that a reward may be off},
     "rows": [{"prompt", "reference", "output", "wrapper", "ids", "reward"}]}

The released POLAR-7B has no such file: for it the rewards that its README publishes are built in.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

GOLDEN = "polar_golden.json"
"""The file's name in a checkpoint's folder."""

VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")

DATA = Path(__file__).with_name("golden_data")
PUBLISHED = "POLAR-7B"
"""Last part of the name of the released checkpoint whose published rewards are built in.

The checkpoint is float16, and what servers answered are multiples of float16's steps, 0.008 near
-10. So they are off the exact rewards by some of these; a tenth is allowed, and half a unit in
bfloat16, which rounds eight times as coarsely. The rewards are up to 11 units apart.
"""


class GoldenRow(NamedTuple):
    """One scored sequence: its texts, its ids where they are known, and its reward."""

    prompt: str
    reference: str
    output: str
    wrapper: str
    ids: tuple[int, ...] | None
    reward: float


@dataclass(frozen=True)
class Golden:
    """A checkpoint's golden scores.

    Attributes:
        tolerances: by precision, how far off a reward may be that was computed in it; a precision
            in which the weights overflow has none.
        dtype: of the written weights.
        source: the file, or what else they come from.
    """

    rows: tuple[GoldenRow, ...]
    tolerances: dict[str, float]
    dtype: str
    source: str


@dataclass(frozen=True)
class Verification:
    """What came of holding rewards against golden ones.

    Attributes:
        problems: why not `ok`, a sentence each.
        n: rows that were compared.
        max_difference: of a reward from its golden one; infinite where there is none.
        tolerance: the largest difference allowed in `dtype`.
        warnings: what the comparison cannot tell.
    """

    ok: bool
    problems: list[str]
    n: int
    max_difference: float
    tolerance: float
    dtype: str
    warnings: list[str] = field(default_factory=list)


def rows_to_score() -> list[dict[str, Any]]:
    """The rows that an export scores, as items; short ones first, all in under 5,000 tokens."""
    groups = json.loads((DATA / "rows.json").read_text(encoding="utf-8"))
    return [
        {"wrapper": "sft", **{k: v for k, v in group.items() if k != "outputs"}, "output": output}
        for group in groups
        for output in group["outputs"]
    ]


def read_golden(folder: Path) -> Golden | None:
    """A checkpoint's golden scores; None if it has none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / GOLDEN
    if file.is_file():
        return _read(file, str(file))
    if PUBLISHED in (folder.name, _hub_name(folder)):
        return _read(DATA / f"{PUBLISHED}.json", f"published rewards of {PUBLISHED}")
    return None


def _hub_name(folder: Path) -> str:
    """Of a snapshot in the hub's cache, `models--OWNER--NAME/snapshots/COMMIT`: the NAME."""
    name = folder.parent.parent.name
    return name.rpartition("--")[2] if name.startswith("models--") else ""


def _read(file: Path, source: str) -> Golden:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, this release reads {VERSION}")
        tolerances = {str(name): float(t) for name, t in content["tolerances"].items()}
        if "float32" not in tolerances or not all(0 < t < math.inf for t in tolerances.values()):
            raise ValueError(
                f"tolerances must be positive, one of float32 among them: {tolerances}"
            )
        rows = tuple(map(_row, content["rows"]))
        if not rows:
            raise ValueError("no rows")
        return Golden(rows, tolerances, str(content["dtype"]), source)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}): copy it again from where the checkpoint came from, or "
            "remove it to do without golden scores"
        ) from error


def _row(fields: dict[str, Any]) -> GoldenRow:
    row = GoldenRow(**{**fields, "reward": float(fields["reward"])})
    if not all(isinstance(text, str) for text in row[:4]) or not math.isfinite(row.reward):
        raise ValueError("a row must have four texts and a finite reward")
    if row.ids is None:
        return row
    if not all(isinstance(token_id, int) for token_id in row.ids):
        raise ValueError("ids must be integers")
    return row._replace(ids=tuple(row.ids))


def write_golden(folder: Path, golden: Golden) -> None:
    """Write `golden` to the folder, whole or not at all."""
    head = {"version": VERSION, "dtype": golden.dtype, "tolerances": golden.tolerances}
    rows = ",\n".join(json.dumps(row._asdict(), ensure_ascii=False) for row in golden.rows)
    text = f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n'
    unfinished = folder / f".{GOLDEN}.{os.getpid()}"
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / GOLDEN)
    finally:
        unfinished.unlink(missing_ok=True)


def verify(
    golden: Golden,
    ids: Sequence[Sequence[int]],
    rewards: Sequence[float | None],
    dtype: str,
) -> Verification:
    """Hold the rewards that `golden.rows` were given against the golden ones.

    Args:
        ids: (rows,) what was scored.
        rewards: (rows,) what came back; None for a row that has none.
        dtype: in which they were computed, one of `DTYPES`.

    Raises:
        ValueError: `dtype` is not one of these.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    assert len(ids) == len(rewards) == len(golden.rows)
    tolerance = golden.tolerances.get(dtype, min(golden.tolerances.values()))
    problems = [*_wrong_ids(golden.rows, ids)]
    # Rows with other ids have other rewards, which says nothing about who computed them.
    right = [row.ids is None or row.ids == tuple(i) for row, i in zip(golden.rows, ids)]
    expected = [row.reward for row, is_right in zip(golden.rows, right) if is_right]
    given = [reward for reward, is_right in zip(rewards, right) if is_right]
    answered = [
        (e, reward)
        for e, reward in zip(expected, given)
        if reward is not None and math.isfinite(reward)
    ]
    if not golden.rows:
        problems.append("There is no golden row to compare: all are too long for the server.")
    if len(answered) < len(given):
        problems.append(
            f"{len(given) - len(answered)} of {len(given)} golden rows got no finite reward: see "
            "the server's log."
        )
    difference = max((abs(e - reward) for e, reward in answered), default=math.inf)
    if answered and difference > tolerance:
        problems.append(_why_off(golden, answered, difference, tolerance, dtype))
    if problems and dtype not in golden.tolerances:
        other = "bfloat16" if "bfloat16" in golden.tolerances else "float32"
        problems.append(f"The weights overflow in {dtype}: start the server with --dtype {other}.")
    warnings = []
    if expected and max(expected) - min(expected) <= 2 * tolerance:
        warnings.append(
            f"The golden rewards differ from each other by no more than {dtype}'s rounding: they "
            "hardly tell this model from another."
        )
    return Verification(
        not problems, problems, len(answered), difference, tolerance, dtype, warnings
    )


def _wrong_ids(rows: Sequence[GoldenRow], ids: Sequence[Sequence[int]]) -> list[str]:
    known = [(row, tuple(given)) for row, given in zip(rows, ids) if row.ids is not None]
    wrong = [(row, given) for row, given in known if row.ids != given]
    if not wrong:
        return []
    texts = [(" " in row.prompt + row.reference + row.output, row) for row, _ in known]
    with_spaces = [row for has_space, row in texts if has_space]
    if all(given == row.ids[1:] for row, given in wrong if row.ids):
        what = "they lack the BOS: send the ids that the template makes, as they are"
    elif all(given == row.ids[:-1] for row, given in wrong if row.ids):
        what = "they lack the reward token: send the ids that the template makes, as they are"
    elif len(with_spaces) < len(known) and with_spaces == [row for row, _ in wrong]:
        what = (
            "those with spaces, which this tokenizer loses or reads otherwise: load the "
            "checkpoint's own tokenizer.json"
        )
    else:
        what = (
            "the tokenizer is not the one that the checkpoint was exported with: load the "
            "checkpoint's own tokenizer.json (or max_length, max_response_length cut these rows)"
        )
    return [f"{len(wrong)} of {len(known)} golden rows have other ids than at the export; {what}."]


def _why_off(
    golden: Golden,
    answered: Sequence[tuple[float, float]],
    difference: float,
    tolerance: float,
    dtype: str,
) -> str:
    """What best explains rewards that are off by more than the tolerance."""
    off = sum(abs(e - reward) > tolerance for e, reward in answered)
    head = (
        f"{off} of {len(answered)} rewards are off by up to {difference:.2g}, where "
        f"{tolerance:.2g} is allowed in {dtype}"
    )
    # A sigmoid is nowhere steeper than 1/4; the rest is a half-precision answer's rounding near 1.
    allowed = max(golden.tolerances.values()) / 4 + 4e-3
    if all(abs(_sigmoid(e) - reward) <= allowed for e, reward in answered):
        return (
            f"{head}: they are sigmoid(reward), not rewards. The server applies an activation: "
            "start it without one."
        )
    if all(reward == 1 for _, reward in answered):
        return (
            f"{head}: all are 1, a softmax over one label. The server applies an activation: start "
            "it without one."
        )
    coarser = sorted((t, name) for name, t in golden.tolerances.items() if t > tolerance)
    fitting = next((name for t, name in coarser if difference <= t), None)
    if fitting:
        return (
            f"{head}: so far off is {fitting}, or weights that were changed a little. Start the "
            f"server with --dtype {dtype}, or verify with dtype={fitting!r} if that is meant."
        )
    return (
        f"{head}: the server has another model or other weights, or loses tokens on the way (BOS, "
        "the reward token, the end of long rows). Check which folder it serves."
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
