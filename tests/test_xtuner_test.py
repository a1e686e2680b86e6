"""`xtuner test`, and that two processes find what one does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, TRAIN, run, run_forked, run_ranks

from polar_xtuner import compat, engine  # noqa: F401
from polar_xtuner.checkpoint import CheckpointError
from polar_xtuner.conversion import ConversionError
from polar_xtuner.runners import take_weights

from mmengine.config import Config  # isort: skip
from mmengine.registry import RUNNERS  # isort: skip

torch.set_num_threads(1)

TEST = TRAIN.with_name("test.py")


@pytest.fixture(scope="module")
def val_files(small: Path) -> dict[str, Path]:
    """Two sets of rows with sources and several candidates."""
    lines = [json.loads(line) for line in (small / "train.jsonl").read_text().splitlines()[:70]]
    for number, row in enumerate(lines):
        row["source"] = "web" if number % 3 else "books"
        if number % 4 == 0:
            row["rejected"] = [row["rejected"], lines[(number + 1) % 70]["prompt"]]
    for name, part in (("a", lines[:40]), ("b", lines[40:])):
        (small / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {name: small / f"{name}.jsonl" for name in ("a", "b")}


def options(small: Path, val_files: dict[str, Path], stage: str) -> list[str]:
    values = {
        "pretrained_model_name_or_path": small / "base",
        "data_files": small / "train.jsonl",
        "cache_dir": small / "cache",
        "max_packed_length": 512,
        **{f"{stage}_data_files.{name}": file for name, file in val_files.items()},
    }
    return ["--cfg-options", *(f"{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def trained(small: Path, val_files: dict[str, Path]) -> Path:
    """The work dir of two processes that have trained some steps and validated once."""
    work_dir = small / "trained"
    first, _ = run_ranks(
        *(2, TRAIN, TINY, "--launcher", "pytorch", "--work-dir", work_dir),
        *options(small, val_files, "val"),
        *("train_cfg.max_epochs=None", "train_cfg.max_iters=6", "lr=3e-3"),
        OMP_NUM_THREADS="1",
    )
    assert (work_dir / "iter_6.pth").exists(), first.stderr
    return work_dir


@pytest.fixture
def tests(small: Path, val_files: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """Makes the runner of `xtuner test`."""

    def build(**settings: Any) -> Any:
        cfg = Config.fromfile(str(TINY))
        given = dict(option.split("=", 1) for option in options(small, val_files, "test")[1:])
        cfg.merge_from_dict({**given, "max_packed_length": 512, **settings})
        cfg.runner_type = "PolarTestRunner"
        cfg.work_dir = str(tmp_path / "tested")
        cfg.experiment_name = f"{tmp_path.name}_tested"
        return RUNNERS.build(cfg)

    return build


def in_val_names(figures: dict[str, float]) -> dict[str, float]:
    return {name.replace("test/", "val/", 1): value for name, value in figures.items()}


def assert_same(a: dict[str, float], b: dict[str, float]) -> None:
    for name, value in a.items():
        if name.endswith(("temperature", "/ece")):  # steps of bins: a rounding may move a pair
            continue
        assert b[name] == pytest.approx(value, abs=2e-6, nan_ok=True), name


def test_two_processes_validate_to_the_figures_of_one(trained: Path, tests: Any) -> None:
    (log,) = trained.glob("*/vis_data/scalars.json")
    (logged,) = (
        line for line in map(json.loads, log.read_text().splitlines()) if "val/accuracy" in line
    )
    runner = tests()
    take_weights(runner.model, str(trained / "iter_6.pth"))
    alone = in_val_names(runner.test())
    assert alone["val/pairs"] == 88
    assert {"val/a/loss", "val/b/loss", "val/source/web/loss"} < alone.keys()
    assert alone.keys() <= logged.keys()
    assert_same(alone, logged)


def test_two_processes_test_the_checkpoint_they_are_given(
    trained: Path, small: Path, val_files: dict[str, Path], tests: Any, tmp_path: Path
) -> None:
    base = tests().test()
    result = run(
        *("xtuner", "test", TINY, "--work-dir", tmp_path),
        *("--checkpoint", trained / "iter_6.pth"),
        *options(small, val_files, "test"),
        "data_files=/nowhere.jsonl",  # training data are not looked at
        NPROC_PER_NODE="2",
        OMP_NUM_THREADS="1",
    )
    (written,) = tmp_path.glob("2*/2*.json")
    figures = json.loads(written.read_text())
    (log,) = trained.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert_same(lines[-1], {**lines[-1], **in_val_names(figures)})
    assert abs(figures["test/loss"] - base["test/loss"]) > 1e-3  # not the base's
    assert re.search(r"test/a +50 pairs  accuracy", result.stdout)
    assert not list(tmp_path.glob("*.py"))  # a work dir keeps the config it was trained with


def test_a_checkpoint_to_start_from_does_not_take_the_place_of_the_tested_one(
    trained: Path, tests: Any, tmp_path: Path
) -> None:
    state = torch.load(trained / "iter_6.pth")["state_dict"]
    other = tmp_path / "other.pth"
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, other)
    runner = tests(load_from=str(other))
    take_weights(runner.model, str(trained / "iter_6.pth"))
    assert runner.test()["test/ties"] < 1


def test_a_checkpoint_that_lacks_tensors_is_refused(
    trained: Path, tests: Any, tmp_path: Path
) -> None:
    state = torch.load(trained / "iter_6.pth")["state_dict"]
    lacking = {name: value for name, value in state.items() if "layers.1" not in name}
    torch.save(lacking, tmp_path / "lacking.pth")
    torch.save({**state, "llm.new": torch.ones(1)}, tmp_path / "unknown.pth")
    runner = tests()
    with pytest.raises(ConversionError, match=r"it lacks \d+ tensors, llm\.layers\.1"):
        take_weights(runner.model, str(tmp_path / "lacking.pth"))
    with pytest.raises(ConversionError, match=r"the model lacks 1 tensors, llm\.new"):
        take_weights(runner.model, str(tmp_path / "unknown.pth"))
    torch.save({**state, "llm.norm.weight": torch.ones(7)}, tmp_path / "other.pth")
    with pytest.raises(ConversionError, match=r"other shapes of 1 tensors, llm\.norm\.weight"):
        take_weights(runner.model, str(tmp_path / "other.pth"))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


def test_a_hostile_checkpoint_is_refused(
    tests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"llm.norm.weight": Hostile()}}, "hostile.pth")
    with pytest.raises(CheckpointError, match="refused: it asks for"):
        take_weights(tests().model, "hostile.pth")
    assert not Path("hacked").exists()


def test_adapters_are_tested_on_their_base(tests: Any, tmp_path: Path) -> None:
    lora = {"type": "peft.LoraConfig", "r": 2, "lora_alpha": 4}
    runner = tests(**{"model.lora": lora})
    state = runner.model.state_dict()
    assert all("lora_" in name or name == "v_head.weight" for name in state)
    generator = torch.Generator().manual_seed(0)
    head = {"v_head.weight": torch.randn(state["v_head.weight"].shape, generator=generator)}
    moved = {n: torch.full_like(v, 0.3) for n, v in state.items() if "lora_B" in n}
    losses = []
    for changes in (head, head | moved):
        torch.save({"state_dict": {**state, **changes}}, tmp_path / "adapters.pth")
        take_weights(runner.model, str(tmp_path / "adapters.pth"))
        losses.append(runner.test()["test/loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_without_data_to_test_on_it_says_so(tests: Any) -> None:
    with pytest.raises(ValueError, match="set test_data_files"):
        runner = tests()
        runner.cfg.test_data_files = {}
        runner.test()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_token_id": 99999}, "the reward token .* has id 99999"),
        ({"max_length": 99999}, "more than the 2048 positions of the model"),
        ({"test_dataloader.sampler.type": "DefaultSampler"}, "must be EvaluationSampler, got Def"),
        ({"test_dataloader.persistent_workers": True, "test_dataloader.num_workers": 1}, "never"),
    ],
)
def test_data_that_are_not_for_the_model_are_refused(
    options: dict[str, Any], message: str, tests: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        tests(**options).test()


def test_a_config_that_names_no_runner_is_tested_all_the_same(
    trained: Path, small: Path, val_files: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.py"
    cfg = Config.fromfile(str(TINY))
    given = dict(option.split("=", 1) for option in options(small, val_files, "test")[1:])
    cfg.merge_from_dict({**given, "max_packed_length": 512})
    config.write_text(re.sub(r"runner_type = .*\n", "", cfg.pretty_text))
    done = run_forked(
        *(TEST, config, "--work-dir", tmp_path / "w", "--checkpoint", trained / "iter_6.pth")
    )
    assert "88 pairs  accuracy" in done.stderr + done.stdout, done.stderr
