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

from polar_xtuner.model_evaluation import ModelEvaluation, ScoredRow
from polar_xtuner.rewards import CALIBRATION, Calibration


def calibration_of(evaluation: ModelEvaluation) -> Calibration:
    """Mean and deviation (of a population) of the rewards of all candidates, and the temperature
    of all pairs. A candidate that stands in several rows counts once.

    Raises:
        ValueError: there is no temperature, or all rewards are equal; says why.
    """
    figures = evaluation.figures.pairs
    if not figures:
        raise ValueError("not calibrated: no row has chosen and rejected, for the temperature")
    if np.isnan(figures["temperature"]):
        raise ValueError(
            f"not calibrated: no temperature fits an accuracy of {figures['accuracy']:.4g} on "
            f"{figures['pairs']} pairs: {_why_none(figures['accuracy'])}"
        )
    rewards = np.array([*_rewards(evaluation.rows).values()])
    return Calibration(float(rewards.mean()), float(rewards.std()), figures["temperature"])


def _why_none(accuracy: float) -> str:
    if accuracy == 1:
        return "where every pair is right, the lower the better. Give harder pairs, or more"
    if accuracy <= 0.5:
        return "margins that are right no more often than wrong are no probabilities of any scale"
    return "the best one is at the bounds of the search (docs/evaluation.md)"


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
