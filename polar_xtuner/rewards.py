"""What goes into scoring and what comes out of it, by whatever way: over HTTP or in process.

An item is a dict as POLAR's own client takes it: `prompt`, `reference` and `output`, each a string
or a list of messages, and optionally `wrapper`. One item that cannot be scored costs no other its
reward: it gets an error in place of one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from polar_xtuner._checks import RawRow
from polar_xtuner.template import Candidate

ON_ERROR = ("raise", "none")

Item = Mapping[str, Any]

CALIBRATION = "polar_calibration"
"""The key of a checkpoint's `config.json` that holds its calibration."""


class Scored(NamedTuple):
    """One item's reward, or, where that is None, why it has none."""

    reward: float | None
    error: str | None = None


class Rewards(list[float | None]):
    """The rewards of a list of items, in their order; None for those in `errors`.

    Attributes:
        errors: what is wrong, by the number of the item, from 0.
    """

    def __init__(self, scored: Iterable[Scored]) -> None:
        super().__init__()
        self.errors: dict[int, str] = {}
        for number, (reward, error) in enumerate(scored):
            self.append(reward)
            if reward is None:
                self.errors[number] = error or "has no reward"


class RewardError(ValueError):
    """Some items have no reward. `rewards`: what the others have, and all errors."""

    def __init__(self, rewards: Rewards) -> None:
        super().__init__(rewards)
        self.rewards = rewards

    def __str__(self) -> str:
        errors = self.rewards.errors
        lines = [f"item {number}: {error}" for number, error in [*errors.items()][:5]]
        more = [f"... and {len(errors) - 5} more"] if len(errors) > 5 else []
        head = f"{len(errors)} of {len(self.rewards)} items have no reward:"
        tail = 'With on_error="none" they get None, and the others their rewards.'
        return "\n  ".join([head, *lines, *more]) + f"\n{tail}"


def gather(scored: Iterable[Scored], on_error: str) -> Rewards:
    """All rewards as a list.

    Raises:
        RewardError: an item has none, and `on_error` is "raise".
    """
    rewards = Rewards(scored)
    if rewards.errors and on_error == "raise":
        raise RewardError(rewards)
    return rewards


def check_on_error(on_error: str) -> None:
    """Raise ValueError for what is none of `ON_ERROR`."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")


def as_items(data: Item | Iterable[Item | Candidate]) -> list[Item | Candidate]:
    """A list of items, from one or several."""
    return [data] if isinstance(data, Mapping) else list(data)


def candidate_of(item: Item | Candidate) -> Candidate | Scored:
    """The candidate that an item holds, or what is wrong with the item.

    Errors name fields and types and show no content.
    """
    if isinstance(item, Candidate):
        return item
    if not isinstance(item, Mapping):
        kind = type(item).__name__
        return Scored(None, f"must be a dict with prompt, reference and output, found {kind}")
    row = RawRow(dict(item))
    candidate = Candidate(row.prompt(), row.text("reference"), row.text("output"), row.wrapper())
    if not row.problems:
        return candidate
    problems = [f"{field}: {_without_content(problem)}" for field, problem in row.problems]
    return Scored(None, "; ".join(problems))


def _without_content(problem: str) -> str:
    return re.sub(r"(found (?:the )?(?:lone surrogate|\w+)).*", r"\1", problem, flags=re.DOTALL)


class Calibration(NamedTuple):
    """How a checkpoint's raw rewards are spread, as `config.json` carries it.

    Attributes:
        mean, std: of the rewards on the data that it was calibrated with.
        temperature: by which margins are divided so that sigmoid(margin / temperature) is the
            probability that a pair is ranked right.
    """

    mean: float
    std: float
    temperature: float

    def apply(self, reward: float) -> float:
        """sigmoid((reward - mean) / temperature), in (0, 1): how probably this output is
        preferred to an average one."""
        x = (reward - self.mean) / self.temperature
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def read_calibration(folder: Path) -> Calibration:
    """What `config.json` in the folder says.

    Raises:
        ValueError: it has no calibration, or not a sound one.
    """
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = content.get(CALIBRATION) if isinstance(content, dict) else None
    if found is None:
        raise ValueError(
            f"normalize=True needs a calibrated checkpoint: {folder}/config.json has no "
            f"{CALIBRATION}"
        )
    try:
        calibration = Calibration(**{name: float(found[name]) for name in Calibration._fields})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json: {CALIBRATION} is not sound: {error!r}") from None
    if (
        not all(map(math.isfinite, calibration))
        or min(calibration.std, calibration.temperature) <= 0
    ):
        raise ValueError(f"{folder}/config.json: {CALIBRATION} is not sound: {found}")
    return calibration
