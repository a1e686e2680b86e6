"""Policy pairs: whose outputs meet, how often, and what is left out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

from polar_xtuner.policy_pairs import PolicyPairs, Trajectory, read_trajectories
from polar_xtuner.records import BadRow, Row, read_rows, text_of


def pairs_of(trajectories: list[Trajectory], **options: Any) -> tuple[PolicyPairs, list[Any]]:
    pairs = PolicyPairs(**options)
    return pairs, [*pairs.rows(trajectories)]


def some(prompts: int, outputs: dict[str, int], seed: int = 0) -> list[Trajectory]:
    """So many outputs of each policy to each prompt, in any order."""
    made = [
        Trajectory(f"prompt {p}", policy, f"{policy} says {i} to {p}")
        for p in range(prompts)
        for policy, count in outputs.items()
        for i in range(count)
    ]
    random.Random(seed).shuffle(made)
    return made


@given(
    st.lists(
        st.builds(
            Trajectory, st.sampled_from("xyz"), st.sampled_from("ABC"), st.sampled_from("12345")
        ),
        max_size=40,
    ),
    st.integers(0, 3),
)
def test_reference_and_chosen_are_of_one_policy_and_rejected_of_another(
    trajectories: list[Trajectory], seed: int
) -> None:
    pairs, rows = pairs_of(trajectories, seed=seed)
    used: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        prompt, reference, chosen, rejected = (
            text_of(row[name]) for name in ("prompt", "reference", "chosen", "rejected")
        )
        assert Trajectory(prompt, row["policy"], reference) in trajectories
        assert Trajectory(prompt, row["policy"], chosen) in trajectories
        assert Trajectory(prompt, row["rejected_policy"], rejected) in trajectories
        assert row["policy"] != row["rejected_policy"]
        assert len({reference, chosen, rejected}) == 3
        used.update([(prompt, row["policy"], reference), (prompt, row["policy"], chosen)])
    assert max(used.values(), default=1) == 1  # none is reference or chosen twice
    assert sum(pairs.same.values()) == sum(pairs.rejected.values()) == len(rows)
    assert pairs.trajectories == len(trajectories)
    assert bool(pairs.dropped) or not trajectories or bool(rows)


@pytest.mark.parametrize("outputs", [{"A": 2, "B": 2}, dict.fromkeys("ABCDEFG", 4)])
def test_every_policy_is_rejected_as_often_as_it_is_chosen(outputs: dict[str, int]) -> None:
    pairs, rows = pairs_of(some(50, outputs))
    assert len(rows) == 50 * sum(count // 2 for count in outputs.values())
    assert {pairs.same[name] for name in outputs} == {50 * next(iter(outputs.values())) // 2}
    assert all(abs(pairs.rejected[name] - pairs.same[name]) <= 1 for name in outputs)
    if len(outputs) > 2:  # and not by one and the same policy
        met = Counter((row["policy"], row["rejected_policy"]) for row in rows)
        expected = len(rows) / (len(outputs) * (len(outputs) - 1))
        assert all(0.5 * expected < times < 2 * expected for times in met.values())
        assert len(met) == len(outputs) * (len(outputs) - 1)


def test_a_policy_of_single_outputs_does_not_become_the_one_that_is_rejected() -> None:
    pairs, rows = pairs_of(some(200, {"A": 2, "B": 2, "single": 1}))
    assert len(rows) == 400
    assert pairs.same["single"] == 0
    assert pairs.rejected["single"] <= 2


def test_policies_with_other_numbers_of_outputs_are_balanced_where_they_can_be() -> None:
    pairs, rows = pairs_of(some(100, {"A": 6, "B": 4, "C": 2}))
    assert len(rows) == 600
    assert all(abs(pairs.rejected[n] - pairs.same[n]) <= 0.02 * len(rows) for n in "ABC")


def test_a_seed_gives_the_same_rows_and_another_others() -> None:
    trajectories = some(20, {"A": 4, "B": 4, "C": 4})
    assert pairs_of(trajectories, seed=1)[1] == pairs_of(trajectories, seed=1)[1]
    assert pairs_of(trajectories, seed=1)[1] != pairs_of(trajectories, seed=2)[1]


def test_what_is_too_little_for_a_row_is_counted() -> None:
    trajectories = [
        *(Trajectory("one policy", "A", text) for text in "ab"),
        *(Trajectory("single outputs", policy, "a") for policy in "AB"),
        *(Trajectory("repeated", policy, "a") for policy in "AAB"),
        *(Trajectory("three", "A", text) for text in "abc"),
        *(Trajectory("three", "B", text) for text in "x"),
        *(Trajectory("copies", "A", text) for text in "ab"),
        *(Trajectory("copies", "B", text) for text in "b"),
    ]
    pairs, rows = pairs_of(trajectories)
    assert [text_of(row["prompt"]) for row in rows] == ["three"]
    assert pairs.dropped == {
        "prompts with outputs of one policy only": 1,
        "prompts to which no policy has two different outputs": 2,
        "outputs that repeat another of their policy to the prompt": 1,
        "outputs without a second one of their policy to the prompt": 1,
        "pairs of outputs that every other policy repeats": 1,
    }
    assert pairs.prompts == 5


def test_bad_trajectories_are_named(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    rows = [
        {"prompt": "p", "policy": "A", "output": "a"},
        {"prompt": "p", "output": "a"},
        {"prompt": "p", "policy": 3, "output": [{"content": 3}]},
        ["p"],
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *others = read_trajectories([file])
    assert first == Trajectory("p", "A", "a")
    found = [(e.line, e.field) for bad in others if isinstance(bad, BadRow) for e in bad.errors]
    assert found == [(2, "policy"), (3, "output[0].content"), (3, "policy"), (4, "row")]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_tool_writes_rows_that_training_reads(ending: str, tmp_path: Path) -> None:
    file, out = tmp_path / "t.jsonl", tmp_path / f"out.{ending}"
    trajectories = some(5, {"A": 2, "B": 2})
    file.write_text("".join(json.dumps(t._asdict()) + "\n" for t in trajectories))
    tool = [sys.executable, str(ROOT / "tools" / "make_policy_pairs.py"), str(file)]
    done = subprocess.run(
        [*tool, "--output", str(out), "--json"], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    rows = [row for row in read_rows([out]) if isinstance(row, Row)]
    assert told["rows"] == len(rows) == 10
    assert told["policies"]["A"] == {"same": 5, "rejected": 5}
    assert {row.wrapper for row in rows} == {"pretrain"}
    assert {row.extra["policy"] for row in rows} == {"A", "B"}
    onto_itself = subprocess.run([*tool, "--output", str(file)], capture_output=True, text=True)
    assert onto_itself.stderr.startswith(f"make_policy_pairs.py: {file} is read too")
    assert len(file.read_text().splitlines()) == len(trajectories)
    file.write_text(json.dumps(trajectories[0]._asdict()))
    failed = subprocess.run([*tool, "--output", str(out)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("make_policy_pairs.py: there is no row to write")
    assert len([*read_rows([out])]) == 10


def test_the_tool_counts_bad_trajectories_and_ends_quietly_where_no_one_reads(
    tmp_path: Path,
) -> None:
    file, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    trajectories = [t._asdict() for t in some(5, {"A": 2, "B": 2})]
    file.write_text("".join(json.dumps(t) + "\n" for t in [*trajectories, {"prompt": "p"}]))
    tool = [sys.executable, str(ROOT / "tools" / "make_policy_pairs.py"), str(file)]
    tool += ["--output", str(out)]
    failed = subprocess.run(tool, capture_output=True, text=True)
    assert failed.stderr.endswith("leave them out with --on-bad-row skip.\n")
    tool += ["--on-bad-row", "skip"]
    done = subprocess.run([*tool, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["bad_rows"] == 1
    out.unlink()
    unread, stdout = os.pipe()
    os.close(unread)
    quiet = subprocess.run(tool, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    assert quiet.returncode == 0
    assert quiet.stderr.startswith("Bad rows are left out: 1 of 21 rows")
    assert "Error" not in quiet.stderr
    assert len([*read_rows([out])]) == 10
