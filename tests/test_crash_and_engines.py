"""The tools that kill runs and compare engines, in a short form."""

from __future__ import annotations

import json
import subprocess
import sys

from commands import ROOT


def test_deepspeed_trains_to_the_weights_of_one_process() -> None:
    tool = ROOT / "tools" / "compare_engines.py"
    command = [sys.executable, tool, "--steps", "6", "--engines", "zero3", "--json"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert (line["engine"], line["steps"]) == ("zero3", 6)
    assert line["loss"] < 1e-5


def test_a_run_that_is_killed_loses_nothing() -> None:
    tool = ROOT / "tools" / "crash_test.py"
    command = [sys.executable, tool, "--runs", 1, "--json"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["identical"], found["lost"]) == (1, 0), result.stderr
    assert found["kills"] >= 1
