"""Configs as users meet them: they load, name what exists, and settings reach what uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.registry import (
    DATA_SAMPLERS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
)
from xtuner.registry import BUILDER

import polar_xtuner.engine  # noqa: F401

from mmengine.config import Config  # isort: skip

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
BASES = [path for path in CONFIGS if "_base_" not in path.read_text()]
REGISTRIES = (
    *(BUILDER, MODELS, MODEL_WRAPPERS, DATA_SAMPLERS, FUNCTIONS, LOOPS, HOOKS, PARAM_SCHEDULERS),
    *(OPTIMIZERS, OPTIM_WRAPPERS, VISBACKENDS, VISUALIZERS, METRICS, LOG_PROCESSORS),
)
NOT_SETTINGS = {"load_from", "resume", "log_level", "runner_type", "sequence_parallel_size"}
"""Top-level names that xtuner reads itself."""


def parts(config: Config) -> dict[str, Any]:
    """A config without its settings: what the runner builds from."""
    return {k: v for k, v in config.to_dict().items() if isinstance(v, dict)}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v)]
    return [value]


def types(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["type"]] if "type" in value else []
        return own + [t for v in value.values() for t in types(v)]
    return [t for v in value for t in types(v)] if isinstance(value, list) else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_type_that_a_config_names_exists(path: Path) -> None:
    named = types(parts(Config.fromfile(path)))
    assert len(named) > 10
    for name in named:
        assert any(registry.get(name) for registry in REGISTRIES), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_setting_given_on_the_command_line_reaches_what_uses_it(path: Path) -> None:
    plain = Config.fromfile(path)
    settings = [
        name
        for name, value in plain.items()
        if not isinstance(value, dict) and name not in NOT_SETTINGS
    ]
    assert len(settings) > 25
    for name in settings:
        old = plain[name]
        new = "something-else"
        if isinstance(old, bool):
            new = not old
        elif isinstance(old, int | float):
            new = old + 1
        config = Config.fromfile(path)
        config.merge_from_dict({name: new})
        assert parts(config) != parts(plain), f"{name} changes nothing"
        if isinstance(old, str) and "/" in old:
            assert old not in leaves(parts(config)), f"{old} is still used somewhere"


def test_a_nested_option_wins_over_the_setting_it_was_computed_from() -> None:
    config = Config.fromfile(CONFIGS[0])
    config.merge_from_dict({"lr": 1.0, "optim_wrapper.optimizer.lr": 2.0})
    assert config.lr == 1.0
    assert config.optim_wrapper.optimizer.lr == 2.0


@pytest.mark.parametrize("path", BASES, ids=lambda p: p.stem)
def test_every_setting_of_a_config_carries_its_line_of_explanation(path: Path) -> None:
    settings = path.read_text().split("PART 1")[1].split("PART 2")[0]
    assignments = [line for line in settings.splitlines() if " = " in line]
    assert len(assignments) > 25
    assert all("#" in line for line in assignments)
