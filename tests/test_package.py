"""What an install promises: a light import, clear versions, two commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "xtuner", "mmengine", "deepspeed", "datasets", "pyarrow")


def imported_by(statement: str) -> tuple[float, set[str]]:
    """Seconds of CPU time and top-level modules that a statement costs a fresh interpreter."""
    code = (
        f"import json, sys, time\nstart = time.process_time()\n{statement}\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps([seconds, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(out.stdout)
    return seconds, set(modules)


def test_the_package_imports_in_less_than_0_3_seconds() -> None:
    assert min(imported_by("import polar_xtuner")[0] for _ in range(3)) < 0.3


@pytest.mark.parametrize("module", ["records", "template", "packing"])
def test_what_a_client_needs_imports_no_training_package(module: str) -> None:
    _, modules = imported_by(f"import polar_xtuner.{module}")
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("module", ["engine", "dataset", "reward_model"])
@pytest.mark.parametrize(
    ("package", "found", "needed"),
    [("xtuner", "0.1.23", "0.2.0"), ("transformers", "5.0.0", "4.48"), ("xtuner", None, "0.2.0")],
)
def test_training_modules_name_the_version_they_need_and_how_to_get_it(
    module: str, package: str, found: str | None, needed: str
) -> None:
    code = (
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        f"    if name == {package!r}:\n"
        f"        if {found!r} is None: raise m.PackageNotFoundError(name)\n"
        f"        return {found!r}\n"
        "    return real(name)\n"
        "m.version = version\n"
        f"import polar_xtuner.{module}\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode != 0
    message = out.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    assert f"{package} {needed}, found {found or 'none'}" in message
    assert "pip install 'polar_xtuner[train]'" in message


def test_a_second_make_does_not_install_again() -> None:
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("this environment was not made by `make venv`")
    out = subprocess.run(
        ["make", "--dry-run", "venv"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip" not in out.stdout
