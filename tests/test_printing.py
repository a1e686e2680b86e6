"""The last print of a tool, where standard output does not take it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from polar_xtuner.printing import show
try:
    show(sys.argv[1] * int(sys.argv[2]))
except OSError as error:
    sys.exit(f"tool.py: {error}")
"""


def shown(redirection: str, text: str = "a", times: int = 1, encoding: str = "utf-8") -> tuple:
    command = f'"$0" -c "$1" "$2" "$3" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM, text, str(times)],
        capture_output=True,
        env={"PYTHONIOENCODING": encoding},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_what_is_printed_is_the_text() -> None:
    assert shown("", "é") == (0, "é\n", "")


def test_what_an_encoding_lacks_is_written_out() -> None:
    assert shown("", "aé好", encoding="ascii") == (0, "a\\xe9\\u597d\n", "")


@pytest.mark.parametrize("redirection", ["| true", "| head -c 1 >&2", ">&-"])
def test_an_output_that_nobody_reads_is_no_error(redirection: str) -> None:
    code, _, errors = shown(redirection, times=100_000)
    assert code == 0 and errors in ("", "a")


def test_an_output_that_cannot_be_written_is_told_in_a_line() -> None:
    code, _, errors = shown("> /dev/full")
    assert code == 1 and errors == "tool.py: [Errno 28] No space left on device\n"
