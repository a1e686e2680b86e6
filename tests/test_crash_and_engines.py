"""The tools that kill runs and compare engines, in a short form."""

from __future__ import annotations

import json

from commands import ROOT, run_forked

SEED = 69
"""Of a run that is killed once, when it writes a checkpoint."""


def test_deepspeed_trains_to_the_weights_of_one_process() -> None:
    tool = ROOT / "tools" / "compare_engines.py"
    result = run_forked(tool, "--steps", 6, "--engines", "zero3", "--json")
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert (line["engine"], line["steps"]) == ("zero3", 6)
    assert line["loss"] < 1e-5


def test_a_run_that_is_killed_loses_nothing() -> None:
    tool = ROOT / "tools" / "crash_test.py"
    result = run_forked(tool, "--runs", 1, "--seed", SEED, "--json")
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["identical"], found["lost"]) == (1, 0), result.stderr
    assert found["kills"] >= 1
