"""Trajectories of several policies -> rows for policy discrimination, POLAR's pre-training.

No one labels anything: two outputs of one policy to a prompt are the reference and the chosen
answer, an output of another policy to the same prompt is the rejected one (arXiv 2507.05197). The
model learns to tell whether two outputs come from one policy.

It must not learn which policies tend to be rejected. So every policy is rejected about as often as
it is chosen: each row takes the rejected output from the policy that is furthest behind in that,
among those with an output to the prompt, and of several such from the one it has met least.

Outputs are put aside in a temporary file; memory is some 60 bytes a trajectory.
"""

from __future__ import annotations

import marshal
import random
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from polar_xtuner._checks import RawRow, found
from polar_xtuner.data_checks import digest
from polar_xtuner.records import BadRow, RowError, read_raw, text_of
from polar_xtuner.row_files import Raw, Text, as_messages

EXTRA = ("wrapper", "source", "policy", "rejected_policy")
"""Fields of a row beside its texts."""


class Trajectory(NamedTuple):
    """An output of a policy to a prompt."""

    prompt: Text
    policy: str
    output: Text


def read_trajectories(files: Iterable[Path]) -> Iterator[Trajectory | BadRow]:
    """Rows with `prompt` and `output`, texts or message lists, and `policy`, a name."""
    for file, line, raw in read_raw(files):
        if isinstance(raw, BadRow):
            yield raw
        elif not isinstance(raw, dict):
            problem = f"must be an object, found {found(raw)}"
            yield BadRow((RowError(file, line, "row", problem),))
        else:
            yield _checked(raw, file, line)


def _checked(raw: Raw, file: str, line: int) -> Trajectory | BadRow:
    row = RawRow(raw)
    row.prompt()
    row.text("output")
    policy = raw.get("policy")
    if not isinstance(policy, str) or not policy:
        given = "is missing" if "policy" not in raw else f"must be a name, found {found(policy)}"
        row.note("policy", given)
    if row.problems:
        return BadRow(tuple(RowError(file, line, *problem) for problem in row.problems))
    return Trajectory(raw["prompt"], str(policy), raw["output"])


class PolicyPairs:
    """Makes the rows; afterwards the counts say of what.

    Args:
        wrapper: of the rows.
        seed: another one gives other rows.

    Attributes:
        same, rejected: rows in which each policy is that of reference and chosen, and is rejected.
        dropped: trajectories and prompts without a row, by reason.
        trajectories, prompts: that were read.
    """

    def __init__(self, wrapper: str = "pretrain", seed: int = 0) -> None:
        self._wrapper = wrapper
        self._random = random.Random(seed)
        self.same: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._met: Counter[tuple[str, str]] = Counter()
        self.trajectories = self.prompts = 0

    def rows(self, trajectories: Iterable[Trajectory]) -> Iterator[Raw]:
        """Rows of all prompts, in the order in which these are first met."""
        with tempfile.TemporaryFile(prefix="polar_policy_pairs_") as file:
            keys, starts = _put_aside(trajectories, file)
            self.trajectories = len(keys)
            _, first, numbers = np.unique(np.array(keys), return_index=True, return_inverse=True)
            self.prompts = len(first)
            ranks = np.argsort(np.argsort(first))  # prompts by where they are first met
            prompts = ranks[numbers] if len(keys) else numbers
            order = np.argsort(prompts, kind="stable")
            borders = np.flatnonzero(np.diff(prompts[order])) + 1
            for members in np.split(order, borders) if len(order) else []:
                yield from self._of_prompt([_load(file, starts[i]) for i in members.tolist()])

    def _of_prompt(self, trajectories: list[Trajectory]) -> Iterator[Raw]:
        outputs: defaultdict[str, dict[str, Text]] = defaultdict(dict)  # by policy, by their text
        for _, policy, output in trajectories:
            text = text_of(output)
            if text in outputs[policy]:
                self.dropped["outputs that repeat another of their policy to the prompt"] += 1
            outputs[policy].setdefault(text, output)
        if len(outputs) < 2:
            self.dropped["prompts with outputs of one policy only"] += 1
            return
        if all(len(texts) < 2 for texts in outputs.values()):
            self.dropped["prompts to which no policy has two different outputs"] += 1
            return
        prompt = as_messages(trajectories[0].prompt, "user")
        for policy, reference, chosen in self._twos(outputs):
            other = self._other(policy, {reference, chosen}, outputs)
            if other is None:
                self.dropped["pairs of outputs that every other policy repeats"] += 1
                continue
            self.same[policy] += 1
            self.rejected[other[0]] += 1
            yield {
                "prompt": prompt,
                "reference": as_messages(outputs[policy][reference], "assistant"),
                "chosen": as_messages(outputs[policy][chosen], "assistant"),
                "rejected": as_messages(other[1], "assistant"),
                "wrapper": self._wrapper,
                "source": "policy-pairs",
                "policy": policy,
                "rejected_policy": other[0],
            }

    def _twos(self, outputs: dict[str, dict[str, Text]]) -> list[tuple[str, str, str]]:
        """A policy and two outputs of it, for every row that there can be."""
        twos = []
        for policy, texts in outputs.items():
            drawn = [*texts]
            self._random.shuffle(drawn)
            if len(drawn) % 2 and len(drawn) > 1:
                self.dropped["outputs without a second one of their policy to the prompt"] += 1
            twos += [(policy, *two) for two in zip(drawn[::2], drawn[1::2])]
        self._random.shuffle(twos)
        return twos

    def _other(
        self, policy: str, taken: set[str], outputs: dict[str, dict[str, Text]]
    ) -> tuple[str, Text] | None:
        """The policy that is furthest behind in being rejected, and a new output of it."""
        others = {
            name: free
            for name, texts in outputs.items()
            if name != policy and (free := [t for t in texts if t not in taken])
        }
        if not others:
            return None
        order = self._random.sample([*others], len(others))
        name = max(order, key=lambda n: (self.same[n] - self.rejected[n], -self._met[policy, n]))
        self._met[policy, name] += 1
        return name, outputs[name][self._random.choice(others[name])]

    def empty(self) -> str:
        """What is wrong if there is no row."""
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return (
            "there is no row to write: a row takes two different outputs of one policy and one of "
            f"another, to one prompt ({reasons or 'there is no trajectory'})"
        )

    def figures(self) -> dict[str, Any]:
        """Counts, for JSON."""
        policies = sorted({*self.same, *self.rejected})
        return {
            "trajectories": self.trajectories,
            "prompts": self.prompts,
            "policies": {
                name: {"same": self.same[name], "rejected": self.rejected[name]}
                for name in policies
            },
            "dropped": dict(self.dropped.most_common()),
        }


def _put_aside(
    trajectories: Iterable[Trajectory], file: IO[bytes]
) -> tuple[array[int], array[int]]:
    """Write trajectories; a hash of the prompt of each, and where it begins."""
    keys, starts = array("Q"), array("q")
    for trajectory in trajectories:
        keys.append(digest(text_of(trajectory.prompt)))
        starts.append(file.tell())
        marshal.dump(tuple(trajectory), file)
    file.flush()
    return keys, starts


def _load(file: IO[bytes], start: int) -> Trajectory:
    file.seek(start)
    return Trajectory(*marshal.load(file))
