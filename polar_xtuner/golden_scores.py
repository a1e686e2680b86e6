"""The golden scores of a checkpoint, from its files, in the memory of about one decoder layer.

All rows go through the decoder as one pack, a layer at a time: one layer is in memory and is given
the weights of each in turn. Three times, side by side: in float32, which makes the golden rewards,
and rounded after every step to float16 and to bfloat16, as a GPU computes in these. How far off
that leaves the rewards says what a server may be off, whose kernels round in another order. (Some
CPUs' own kernels for these dtypes are very slow.)

The cost is 3 times 2 operations a parameter and token of the pack, 1,900 with InternLM2's
tokenizer: for 7B about 8e13.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from polar_xtuner.attention import sdpa_attention
from polar_xtuner.cache import lay_out
from polar_xtuner.collate import PackLayout
from polar_xtuner.golden import Golden, GoldenRow, rows_to_score
from polar_xtuner.modeling_internlm2 import (
    HEAD,
    InternLM2Config,
    InternLM2DecoderLayer,
    RewardHead,
    RMSNorm,
    RotaryAngles,
)
from polar_xtuner.rewards import candidate_of
from polar_xtuner.scoring import pack_of
from polar_xtuner.template import Candidate, PolarTemplate, check_vocabulary
from polar_xtuner.tokenizer import load_tokenizer

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)

SAFETY = 6
"""What a server may be off in half precision, over what rounding after every step has left here."""

FLOOR = 1e-4
"""Least tolerance, over the standard deviation of the rewards. Kernels of float32 differ by 1e-6 of
it, a layer whose weights are 1 % off makes 1e-3 and more."""

WIDER = 256
"""What a server may be off in float32, over 2**-16 of what rounding to bfloat16 has left here, by
which its own rounding is finer: it also adds up rounded products."""

LEAST = 1e-6
"""Least tolerance where all rewards are equal, those of a head that is zero."""

INDEX = "model.safetensors.index.json"


def golden_scores(folder: Path) -> Golden:
    """The golden scores of the InternLM2 reward model that the folder holds as safetensors.

    Raises:
        ValueError: its tokenizer cannot be read or is not the model's, or a reward is not finite.
    """
    config = InternLM2Config.from_pretrained(folder)
    kept = _encoded(folder, config)
    weights = _Weights(folder)
    exact_C, *rounded = (rewards_C.double() for rewards_C in _rewards(weights, config, kept))
    if not exact_C.isfinite().all():
        raise ValueError("the weights give rewards that are not finite")
    off = [float((rewards_C - exact_C).abs().max()) for rewards_C in rounded]
    spread = float(exact_C.std(correction=0))
    least = max(LEAST, FLOOR * spread, WIDER * off[-1] / 2**16)
    tolerances = {"float32": least}
    for dtype, difference in zip(PRECISIONS[1:], off):
        if math.isfinite(difference):  # else the weights overflow
            tolerances[_name(dtype)] = max(least, SAFETY * difference)
    rows = tuple(GoldenRow(*c, ids, reward) for (c, ids), reward in zip(kept, exact_C.tolist()))
    return Golden(rows, tolerances, _name(weights.dtype), str(folder))


Rows = Sequence[tuple[Candidate, tuple[int, ...]]]


def _encoded(folder: Path, config: InternLM2Config) -> Rows:
    """The rows that are not too long for the model, and their ids."""
    template = PolarTemplate(load_tokenizer(str(folder)))
    found = [candidate_of(item) for item in rows_to_score()]
    candidates = [one for one in found if isinstance(one, Candidate)]
    encoded = zip(candidates, map(tuple, template.encode(candidates)))
    kept = [(c, ids) for c, ids in encoded if len(ids) <= config.max_position_embeddings]
    if not kept:
        raise ValueError(f"max_position_embeddings={config.max_position_embeddings} fits no row")
    largest = max(max(ids) for _, ids in kept)
    check_vocabulary({**template.special_ids, "last of the rows": largest}, config.vocab_size)
    return kept


@torch.inference_mode()
def _rewards(weights: _Weights, config: InternLM2Config, rows: Rows) -> list[Tensor]:
    """(rows,) rewards in each of `PRECISIONS`."""
    by_prompt = groupby(rows, lambda row: (row[0].prompt, row[0].reference))
    data = pack_of(lay_out([ids for _, ids in group]) for _, group in by_prompt)
    layout = PackLayout(**data["layout"])
    parts = _Parts(config)
    embedded_TE = weights.read("model.tok_embeddings.weight", data["input_ids_T"]).float()
    states, angles = [], []
    for dtype in PRECISIONS:
        cos_sin = RotaryAngles(config)(data["position_ids_T"], layout.max_seqlen_k, dtype)
        angles.append([values.float() for values in cos_sin])
        states.append(embedded_TE.to(dtype).float())
    numbers = range(config.num_hidden_layers)
    for number in tqdm(numbers, desc="Golden scores", unit=" layers", delay=5):
        for i, dtype in enumerate(PRECISIONS):
            layer = parts.load(parts.layer, weights, f"model.layers.{number}.", dtype)
            states[i] = layer(states[i], *angles[i], layout, sdpa_attention)
    rewards = []
    for states_TE, dtype in zip(states, PRECISIONS):
        norm = parts.load(parts.norm, weights, "model.norm.", dtype)
        head = parts.load(parts.head, weights, HEAD.removesuffix("weight"), dtype)
        rewards.append(head(norm(states_TE[data["reward_rows_C"]])))
    return rewards


class _Parts:
    """One layer, the norm and the head: float32, with all that they compute rounded to `dtype`."""

    def __init__(self, config: InternLM2Config) -> None:
        self.dtype = torch.float32
        with torch.device("meta"):  # not to draw values that are not used
            parts = [
                InternLM2DecoderLayer(config),
                RMSNorm(config.hidden_size, config.rms_norm_eps),
                RewardHead(config.hidden_size),
            ]
        self.layer, self.norm, self.head = (part.to_empty(device="cpu") for part in parts)
        for part in parts:
            for module in part.modules():
                if isinstance(module, (nn.Linear, RMSNorm)):
                    module.register_forward_pre_hook(lambda _, inputs: self._round(inputs[0]))
                    module.register_forward_hook(lambda _, inputs, output: self._round(output))
        self.layer.register_forward_hook(lambda _, inputs, output: self._round(output))

    def _round(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).float()

    def load(
        self, part: nn.Module, weights: _Weights, prefix: str, dtype: torch.dtype
    ) -> nn.Module:
        """`part` with the weights of that prefix, to compute in `dtype`."""
        self.dtype = dtype
        for name, parameter in part.named_parameters():
            parameter.copy_(self._round(weights.read(prefix + name)))
        return part


class _Weights:
    """Tensors by name, read from their files one at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
            self._files = {name: folder / file for name, file in files.items()}
        else:
            (file,) = folder.glob("*.safetensors")
            with safe_open(file, "pt") as content:
                self._files = dict.fromkeys(content.keys(), file)
        self.dtype = self.read("model.norm.weight").dtype

    def read(self, name: str, rows: Tensor | slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows."""
        with safe_open(self._files[name], "pt") as content:
            return content.get_tensor(name)[rows]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
