"""`tools/check_server.py`: whether a server is the model that a folder holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from tokenizers import Tokenizer

from polar_xtuner.golden import Golden, GoldenRow, write_golden
from polar_xtuner.template import Candidate, PolarTemplate

servers = pytest.importorskip("protocol_servers")

ROWS = [
    Candidate("What is 6 x 7?", "42", output, wrapper)
    for output in ("42", "It is 42.", "", "forty two", "好" * 50)
    for wrapper in ("sft", "pretrain")
]


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A checkpoint whose golden scores are those of `hash_score`."""
    folder = tmp_path / "model"
    shutil.copytree(small / "base", folder)
    template = PolarTemplate(Tokenizer.from_file(str(folder / "tokenizer.json")), 2048, 512)
    ids = template.encode(ROWS)
    rows = [
        GoldenRow(*candidate, tuple(sequence), scores[-1])
        for candidate, sequence, scores in zip(ROWS, ids, servers.hash_score(ids))
    ]
    tolerances = {"float32": 1e-4, "bfloat16": 0.1}
    write_golden(folder, Golden(tuple(rows), tolerances, "float32", "this test"))
    return folder


def off_by(difference: float) -> Any:
    def score(sequences: list[list[int]]) -> list[list[float]]:
        return [[value + difference for value in s] for s in servers.hash_score(sequences)]

    return score


def running(engine: str, version: str, score: Any, model: Path, **options: Any) -> Any:
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    return servers.running(engine, version, score, vocab_size=vocab_size, **options)


def check(
    address: str, model: Path, engine: str, *options: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_server.py"), address]
    command += ["--model", str(model), "--server-type", engine, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("engine", [("vllm", "0.32.0"), ("sglang", "0.5.23")])
def test_the_right_server_passes(engine: tuple[str, str], model: Path) -> None:
    with running(*engine, servers.hash_score, model) as server:
        result = check(server.address, model, engine[0], "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert f"is {model}: 10 golden rewards are off by up to" in result.stdout


@pytest.mark.parametrize(
    ("score", "engine", "options", "reason"),
    [
        (servers.hash_score, ("vllm", "0.10.2"), {}, "sigmoid"),
        (off_by(3), ("vllm", "0.32.0"), {}, "another model"),
        (servers.drop_bos(servers.hash_score), ("vllm", "0.32.0"), {}, "BOS"),
        (off_by(0.01), ("vllm", "0.32.0"), {}, "bfloat16"),
    ],
)
def test_a_wrong_server_is_named_with_what_is_wrong(
    score: Any, engine: tuple[str, str], options: Any, reason: str, model: Path
) -> None:
    with running(*engine, score, model, **options) as server:
        result = check(server.address, model, engine[0], "--dtype", "float32")
        as_json = check(server.address, model, engine[0], "--dtype", "float32", "--json")
    assert result.returncode == as_json.returncode == 1
    assert f"is NOT {model}" in result.stdout
    assert reason in result.stdout
    figures = json.loads(as_json.stdout)
    assert not figures["ok"]
    assert any(reason in problem for problem in figures["problems"])


def test_what_is_off_in_one_precision_may_be_right_in_another(model: Path) -> None:
    with running("vllm", "0.32.0", off_by(0.01), model) as server:
        result = check(server.address, model, "vllm", "--dtype", "bfloat16", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["max_difference"] == pytest.approx(0.01, abs=1e-3)


def test_what_cannot_be_checked_ends_with_a_reason(small: Path, model: Path) -> None:
    with running("vllm", "0.32.0", servers.hash_score, model) as server:
        address = server.address
        other_engine = check(address, model, "sglang")
        not_golden = check(address, small / "base", "vllm")
        other_name = check(address, model, "vllm", "--served-model", "other", "--api-key", "secret")
    gone = check(address, model, "vllm")
    no_folder = check(address, model / "none", "vllm")
    for result in (other_engine, not_golden, other_name, gone, no_folder):
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith("check_server.py: ")
        assert "Traceback" not in result.stderr
        assert not result.stdout
    assert "vllm" in other_engine.stderr
    assert "polar_golden.json" in not_golden.stderr
    assert "other" in other_name.stderr
    assert "secret" not in other_name.stderr
