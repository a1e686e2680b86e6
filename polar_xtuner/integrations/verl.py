"""POLAR as verl's reward function: `compute_score_batch` for verl 0.5, `compute_score` for main.

verl 0.5's batch manager calls with a batch, verl main's reward loop with one row at a time from
many coroutines, which the client joins into batches. A row is what `convert_data.py --to
verl-parquet` writes, or POLAR's own recipe: the reference in `reward_model.ground_truth`, the
prompt in `extra_info.prompt`, because verl gives a reward function only the output.

Every row gives one float, those of rules included: verl takes the names of what it logs from one
row of a batch, and a row that had other names would break the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from polar_xtuner.integrations.settings import Rule, Settings
from polar_xtuner.integrations.thinking import answer_of
from polar_xtuner.rewards import Rewards


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None],
    **settings: Any,
) -> list[float]:
    """The rewards of a batch, in order: verl 0.5, `reward_model.reward_manager=batch`.

    Args:
        data_sources, solution_strs, ground_truths, extra_infos: as verl gives them, one a row.
        settings: see `settings.Settings`.

    Raises:
        RewardError: rows have no reward, and `on_error` is "raise".
        ValueError: a row lacks the prompt or the reference; a setting is wrong.
    """
    chosen = _settings(settings)
    scores: dict[int, float] = {}
    items: dict[int, dict[str, Any]] = {}
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    for number, (data_source, solution_str, ground_truth, extra_info) in enumerate(rows):
        rule = chosen.rules.get(data_source)
        if rule is None:
            where = f"row {number} of the batch ({data_source}): "
            items[number] = _item(solution_str, ground_truth, extra_info, chosen, where)
        else:
            scores[number] = _ruled(rule, data_source, solution_str, ground_truth, extra_info)
    if items:
        rewards = chosen.client()([*items.values()])
        scores.update(zip(items, _numbers(rewards, chosen)))
    return [scores[number] for number in range(len(scores))]


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **settings: Any,
) -> float:
    """The reward of one row: verl main, `reward.custom_reward_function`.

    Args:
        data_source, solution_str, ground_truth, extra_info: as verl gives them.
        reward_router_address, reward_model_tokenizer: of a reward model that verl runs itself;
            not used.
        settings: see `settings.Settings`.

    Raises:
        RewardError, ValueError: as `compute_score_batch`.
    """
    chosen = _settings(settings)
    rule = chosen.rules.get(data_source)
    if rule is not None:
        row = (data_source, solution_str, ground_truth, extra_info)
        return await asyncio.to_thread(_ruled, rule, *row)
    item = _item(solution_str, ground_truth, extra_info, chosen, f"row of {data_source}: ")
    return _numbers(await chosen.client().ascore([item]), chosen)[0]


def _settings(given: Mapping[str, Any]) -> Settings:
    settings = Settings.read(given)
    if settings.on_error == "none":
        raise ValueError(
            'on_error="none": verl needs a number for every row; give "raise" or the number'
        )
    return settings


def _item(
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None,
    settings: Settings,
    where: str,
) -> dict[str, Any]:
    info = extra_info or {}
    needed = {"extra_info.prompt": info.get("prompt"), "reward_model.ground_truth": ground_truth}
    for field, value in needed.items():
        if value is None:
            raise ValueError(
                f"{where}{field} is missing: POLAR compares the output with a reference answer to "
                "the same prompt, and verl gives a reward function no other prompt. `python "
                "tools/convert_data.py --to verl-parquet` prepares data that has both; rows that "
                "are not for POLAR need a rule, rules={data source: function}"
            )
    return {
        "prompt": _plain(info["prompt"]),
        "reference": _plain(ground_truth),
        "output": answer_of(solution_str, settings.thinking),
        "wrapper": info.get("wrapper"),
    }


def _plain(text: Any) -> Any:
    """Message lists read through pandas are arrays."""
    return text.tolist() if isinstance(text, np.ndarray) else text


def _ruled(rule: Rule, data_source: str, solution_str: str, ground_truth: Any, info: Any) -> float:
    score = rule(
        data_source=data_source,
        solution_str=solution_str,
        ground_truth=ground_truth,
        extra_info=info,
    )
    return float(score["score"] if isinstance(score, Mapping) else score)


def _numbers(rewards: Rewards, settings: Settings) -> list[float]:
    return cast(list[float], settings.settle(rewards))  # on_error is not "none"
