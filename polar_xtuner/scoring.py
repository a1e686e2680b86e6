"""Rewards in process, by the same call as over HTTP (`client`): items in, numbers out.

The ids are the template's, the forward is training's: candidates of one prompt and reference form
a group that shares its prefix, groups are packed under a token cap.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from polar_xtuner.cache import PAIR, Group, lay_out
from polar_xtuner.collate import PackLayout, collate_pack
from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel
from polar_xtuner.packing import best_fit
from polar_xtuner.rewards import (
    Item,
    Rewards,
    Scored,
    as_items,
    candidate_of,
    check_on_error,
    gather,
    read_calibration,
)
from polar_xtuner.template import Candidate, PolarTemplate, check_vocabulary
from polar_xtuner.tokenizer import load_tokenizer, local_folder

logger = logging.getLogger(__name__)

CHUNK = 4096
"""Items that are tokenised and packed together; equal ones among them are computed once."""

Ids = tuple[int, ...]


class PolarScorer:
    """Scores items with a POLAR checkpoint, on one device.

    Args:
        path: a Hugging Face folder or hub name. No code of the checkpoint's is run.
        device: None is the first GPU, or the CPU where there is none.
        dtype: to compute in, as "bfloat16"; None is float32 on the CPU, elsewhere what the
            checkpoint holds.
        max_length, max_response_length: see `PolarTemplate`; None is 16384 and 4096. Both are made
            to fit the model's `max_position_embeddings`, as `RewardModelClient` does.
        max_packed_length: tokens that go through the model at once.
        attention: see `attention.choose_backend`.
        on_error: what becomes of items without a reward: "raise" a `RewardError` once the others
            are done, or "none": they get None, and `Rewards.errors` says why.
        normalize: give `Calibration.apply` of rewards, in (0, 1), in place of rewards.

    Raises:
        ValueError: a setting is wrong, the checkpoint is of another model, damaged, or lacks
            tensors or the reward head, or the tokenizer is not the model's.
    """

    def __init__(
        self,
        path: str,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        max_response_length: int | None = None,
        max_packed_length: int = 16384,
        attention: str = "auto",
        on_error: str = "raise",
        normalize: bool = False,
    ) -> None:
        check_on_error(on_error)
        self.on_error = on_error
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = "float32" if self.device.type == "cpu" else "auto"
        self._calibration = read_calibration(local_folder(path)) if normalize else None
        tokenizer = load_tokenizer(path)
        model = InternLM2ForRewardModel.from_pretrained(path, torch_dtype=dtype, needs_head=True)
        self.model = model.to(self.device).eval()
        self.model.model.attention_backend = attention
        asked = 16384 if max_length is None else max_length
        longest = min(asked, self.model.config.max_position_embeddings)
        if max_length is not None and longest < max_length:
            logger.warning("max_length=%d: the model takes no more ids", longest)
        if max_response_length is None:
            max_response_length = min(4096, (longest - 3) // 2)
        elif longest < asked:
            max_response_length = min(max_response_length, (longest - 3) // 2)
        self.template = PolarTemplate(tokenizer, longest, max_response_length)
        check_vocabulary(self.template.special_ids, self.model.config.vocab_size)
        self.cap = max(max_packed_length, longest)

    def __call__(self, data: Item | Iterable[Item]) -> Rewards:
        """The reward of every item, in order.

        Args:
            data: a dict or several, with `prompt`, `reference` and `output`, each a string or a
                list of messages, and optionally `wrapper`.

        Raises:
            RewardError: an item has no reward, and `on_error` is "raise".
        """
        return gather(self.stream(as_items(data)), self.on_error)

    def stream(self, items: Iterable[Any]) -> Iterator[Scored]:
        """What every item gets, in order, in constant memory, as soon as it is known.

        Takes `CHUNK` items at a time.
        """
        for scored in self._stream(items):
            if self._calibration is None or scored.reward is None:
                yield scored
            else:
                yield Scored(self._calibration.apply(scored.reward))

    def score(self, candidates: Sequence[Candidate], progress: bool = False) -> list[float]:
        """The reward of every candidate, in order, as the model gives it.

        Raises:
            RewardError: a reward is not finite.
        """
        scored = self._stream(candidates)
        bar = tqdm(scored, desc="Scoring", total=len(candidates), disable=not progress)
        return [reward for reward in gather(bar, "raise") if reward is not None]

    def _stream(self, items: Iterable[Any]) -> Iterator[Scored]:
        source = iter(items)
        while chunk := [*islice(source, CHUNK)]:
            found = [candidate_of(item) for item in chunk]
            scored = self._score([one for one in found if isinstance(one, Candidate)])
            yield from (one if isinstance(one, Scored) else next(scored) for one in found)

    def _score(self, candidates: Sequence[Candidate]) -> Iterator[Scored]:
        sequences = [tuple(ids) for ids in self.template.encode(candidates)]
        prompts: dict[tuple[str, str, str], dict[Ids, None]] = {}
        vocabulary = self.model.config.vocab_size
        for c, ids in zip(candidates, sequences):
            if max(ids) < vocabulary:
                prompts.setdefault((c.prompt, c.reference, c.wrapper), {})[ids] = None
        groups = [group for members in prompts.values() for group in self._fitting([*members])]
        layouts = [lay_out(group) for group in groups]
        lengths = np.array([len(tokens) for tokens, _ in layouts])
        rewards: dict[Ids, float] = {}
        packs = iter(best_fit(lengths, self.cap))  # in the order of their first groups
        for ids in sequences:
            while ids not in rewards and max(ids) < vocabulary:
                pack = next(packs)
                scores = iter(self._forward([layouts[i] for i in pack]))
                for found in (found for i in pack for found in groups[i]):
                    rewards.setdefault(found, next(scores))  # two prompts, cut, may have equal ids
            yield self._scored(ids, rewards.get(ids))

    def _fitting(self, members: list[Ids]) -> list[list[Ids]]:
        """The candidates of one prompt in as many groups as fit the cap."""
        _, (prefix, *suffixes) = lay_out(members)
        parts = best_fit(np.array(suffixes), self.cap - prefix)
        return [[members[i] for i in part] for part in parts]

    def _scored(self, ids: Ids, reward: float | None) -> Scored:
        if reward is None:
            return Scored(
                None,
                f"has id {max(ids)}, outside the model's vocabulary of "
                f"{self.model.config.vocab_size}: the tokenizer has tokens that the model lacks",
            )
        if not math.isfinite(reward):
            return Scored(
                None,
                f"its reward is not finite: the weights are damaged, or {self.model.dtype} "
                "overflows: try bfloat16 or float32",
            )
        return Scored(reward)

    @torch.inference_mode()
    def _forward(self, layouts: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        data = pack_of(layouts)
        rewards = self.model(
            data["input_ids_T"].to(self.device),
            data["position_ids_T"].to(self.device),
            PackLayout(**data["layout"]).to(self.device),
            data["reward_rows_C"].to(self.device),
        )
        return rewards.tolist()


def pack_of(layouts: Iterable[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """The tensors (`collate_pack`) of groups that only have candidates, as `lay_out` gives them."""
    groups = [
        Group(np.array(tokens), np.array(pieces), np.empty(0, PAIR)) for tokens, pieces in layouts
    ]
    return collate_pack([{"groups": groups, "pair_weight": 0.0, "rows": []}])["data"]
