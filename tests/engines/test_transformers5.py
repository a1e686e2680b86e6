"""Scoring in process on transformers 5, and the client's ids there."""

from __future__ import annotations

from typing import Any

import transformers

from polar_xtuner.client import RewardModelClient
from polar_xtuner.rewards import candidate_of
from polar_xtuner.scoring import PolarScorer


def test_the_scorer_gives_the_rewards_of_the_training_environment(
    scored: Any, record_property: Any
) -> None:
    assert transformers.__version__.startswith("5.")
    sample = scored.sample
    scorer = PolarScorer(str(sample.folder), device="cpu")
    candidates = [candidate_of(item) for item in sample.items]
    assert scorer.template.encode(candidates) == sample.ids
    off = sample.off(scorer.score(candidates))
    record_property("off by", f"{off:.1e}")
    assert off <= 1e-5


def test_the_client_makes_the_ids_of_the_training_environment(scored: Any) -> None:
    client = RewardModelClient(str(scored.folder), server_type="vllm")
    assert [encoded.ids for encoded in client.encode(scored.items)] == scored.ids
