"""Rewards in process: a checkpoint and rows in, numbers out.

The ids are the template's, the forward is training's: candidates of one prompt and reference form
a group that shares its prefix, groups are packed under a token cap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer

from polar_xtuner.cache import PAIR, Group, lay_out
from polar_xtuner.collate import PackLayout, collate_pack
from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel
from polar_xtuner.packing import best_fit
from polar_xtuner.template import Candidate, PolarTemplate, check_vocabulary

CHUNK = 4096
"""Candidates that are tokenised and packed together; equal ones among them are computed once."""


class PolarScorer:
    """Scores candidates with a POLAR checkpoint, on one device.

    Args:
        path: a Hugging Face folder or hub name.
        device: None is the first GPU, or the CPU where there is none.
        dtype: None is float32 on the CPU, elsewhere what the checkpoint holds.
        max_length, max_response_length: see `PolarTemplate`; None is 16384 and 4096, or what the
            model's `max_position_embeddings` leaves room for.
        max_packed_length: tokens that go through the model at once.
        attention: see `attention.choose_backend`.
        trust_remote_code: of the tokenizer; the model never needs it.

    Raises:
        ValueError: the checkpoint lacks tensors, or the tokenizer is not the model's.
    """

    def __init__(
        self,
        path: str,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
        max_response_length: int | None = None,
        max_packed_length: int = 16384,
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None and self.device.type == "cpu":
            dtype = torch.float32
        model = InternLM2ForRewardModel.from_pretrained(path, torch_dtype=dtype or "auto")
        self.model = model.to(self.device).eval()
        self.model.model.attention_backend = attention
        longest = self.model.config.max_position_embeddings
        max_length = max_length or min(16384, longest)
        self.template = PolarTemplate(
            _load_tokenizer(path, trust_remote_code),
            max_length,
            max_response_length or min(4096, (max_length - 3) // 2),
        )
        check_vocabulary(self.template.special_ids, self.model.config.vocab_size)
        self.cap = max(max_packed_length, max_length)

    def score(self, candidates: Sequence[Candidate], progress: bool = False) -> list[float]:
        """The reward of every candidate, in order.

        Raises:
            ValueError: a reward is not finite.
        """
        scores: list[float] = []
        with tqdm(total=len(candidates), desc="Scoring", disable=not progress) as bar:
            for start in range(0, len(candidates), CHUNK):
                chunk = candidates[start : start + CHUNK]
                scores += self._score(chunk)
                bar.update(len(chunk))
        bad = [number for number, score in enumerate(scores) if not math.isfinite(score)]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(scores)} rewards are not finite, the first that of candidate "
                f"{bad[0]}: the weights are damaged, or {self.model.dtype} overflows: try bfloat16 "
                "or float32"
            )
        return scores

    def _score(self, candidates: Sequence[Candidate]) -> list[float]:
        sequences = [tuple(ids) for ids in self.template.encode(candidates)]
        prompts: dict[tuple[str, str, str], dict[tuple[int, ...], None]] = {}
        for c, ids in zip(candidates, sequences):
            prompts.setdefault((c.prompt, c.reference, c.wrapper), {})[ids] = None
        groups = [group for members in prompts.values() for group in self._fitting(list(members))]
        layouts = [lay_out(group) for group in groups]
        lengths = np.array([len(tokens) for tokens, _ in layouts])
        rewards: dict[tuple[int, ...], float] = {}
        for pack in best_fit(lengths, self.cap):
            scores = iter(self._forward([layouts[i] for i in pack]))
            rewards.update((ids, next(scores)) for i in pack for ids in groups[i])
        return [rewards[ids] for ids in sequences]

    def _fitting(self, members: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """The candidates of one prompt in as many groups as fit the cap."""
        groups: list[list[tuple[int, ...]]] = []
        room = 0
        for ids in sorted(members):  # those that begin alike go together
            if len(ids) > room:
                groups.append([])
                room = self.cap
            groups[-1].append(ids)
            room -= len(ids)
        return groups

    @torch.inference_mode()
    def _forward(self, layouts: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        groups = [
            Group(np.array(tokens), np.array(pieces), np.empty(0, PAIR))
            for tokens, pieces in layouts
        ]
        data = collate_pack([{"groups": groups, "pair_weight": 0.0, "rows": []}])["data"]
        rewards = self.model(
            data["input_ids_T"].to(self.device),
            data["position_ids_T"].to(self.device),
            PackLayout(**data["layout"]).to(self.device),
            data["reward_rows_C"].to(self.device),
        )
        return rewards.tolist()


def _load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """From `tokenizer.json` where there is one, which needs no code of the checkpoint's."""
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
