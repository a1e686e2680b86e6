"""A checkpoint's calibration: how its rewards are spread, written into its `config.json`.

Raw rewards have no scale of their own. With the mean and the deviation of rewards on known rows,
and the temperature at which margins are probabilities, `normalize=True` of `PolarScorer` and
`RewardModelClient` turns a reward into one (`rewards.Calibration`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polar_xtuner.evaluation import likeliest_temperature
from polar_xtuner.model_evaluation import ModelEvaluation, ScoredRow
from polar_xtuner.rewards import CALIBRATION, Calibration


def calibration_of(evaluation: ModelEvaluation) -> Calibration:
    """Mean and deviation (of a population) of the rewards of all candidates, and the temperature
    at which all pairs are likeliest. A candidate that stands in several rows counts once.

    Raises:
        ValueError: there is no temperature, or all rewards are equal; says why.
    """
    figures = evaluation.figures.pairs
    if not figures:
        raise ValueError("not calibrated: no row has chosen and rejected, for the temperature")
    temperature = likeliest_temperature(evaluation.pairs.chosen, evaluation.pairs.rejected)
    if np.isnan(temperature):
        raise ValueError(
            f"not calibrated: no temperature fits an accuracy of {figures['accuracy']:.4g} and a "
            f"mean margin of {figures['margin']:.4g} on {figures['pairs']} pairs: "
            + (
                "where no pair is wrong, the lower the better. Give harder pairs, or more"
                if figures["margin"] > 0
                else "margins that point to the rejected output are no probabilities of any scale"
            )
        )
    rewards = np.array([*_rewards(evaluation.rows).values()])
    return Calibration(float(rewards.mean()), float(rewards.std()), temperature)


def _rewards(rows: Sequence[ScoredRow]) -> dict[tuple[str, ...], float]:
    """Of every distinct candidate."""
    return {
        (row.row.prompt, row.row.reference, row.row.wrapper, text): reward
        for row in rows
        for texts, rewards in (
            (row.row.outputs, row.scores),
            (row.row.chosen, row.chosen_scores),
            (row.row.rejected, row.rejected_scores),
        )
        for text, reward in zip(texts, rewards)
    }


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Put it into the folder's `config.json`, in place of one that is there; all else stays.

    The file is replaced as a whole, so that whoever reads it meanwhile finds the old or the new.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[CALIBRATION] = calibration._asdict()
    unfinished = folder / f".{file.name}.unfinished"
    try:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        unfinished.write_text(f"{text}\n", encoding="utf-8")
        shutil.copymode(file, unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
