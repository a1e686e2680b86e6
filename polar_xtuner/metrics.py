"""What a training run reports: sums over the iterations of a logging interval.

An iteration only adds: on the device what its pairs scored, on the host what its pack cost. No one
waits for the device. When the interval is over (`Interval.reduce`), one all_reduce adds up the
ranks and one transfer brings the result to the host. Whether a loss or a gradient was not finite
travels with it, for each iteration since the last reduction.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce
from torch import Tensor

from polar_xtuner.packing import ModelShape, attended_pairs
from polar_xtuner.sequence_parallel import data_parallel_size, sequence_parallel_size

PAIR_SUMS = (
    *("pairs", "correct", "ties", "chosen", "rejected"),
    *("chosen_squares", "rejected_squares"),
)
HOST_SUMS = ("packs", "tokens", "tokens_alone", "flops", "data_seconds")

PEAK_FLOPS = {
    r"A[18]00": 312e12,
    r"H[18]00 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H[18]00": 989.4e12,
    r"H200": 989.4e12,
    r"H20": 148e12,
    r"B200": 2250e12,
    r"L40S": 362e12,
    r"A40": 149.7e12,
    r"RTX 4090$": 165.2e12,
}
"""Operations a second of a GPU in bfloat16 without sparsity, by name; NVIDIA's data sheets."""


def peak_flops(name: str) -> float | None:
    """Of a GPU by its name (`torch.cuda.get_device_name`); None if it is not in the table."""
    for pattern, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{pattern}(?!\w)", name):
            return peak
    return None


def pair_sums(rewards_C: Tensor, chosen_P: Tensor, rejected_P: Tensor, weights_P: Tensor) -> Tensor:
    """(len(PAIR_SUMS),) float64: what a pack adds to them; a pair of no weight counts for none.

    Float64, so that a standard deviation can be had from the sums of squares.
    """
    rewards_C = rewards_C.detach().double()
    r_c, r_r = rewards_C[chosen_P], rewards_C[rejected_P]
    pairs = torch.ones_like(r_c)
    per_pair = (pairs, (r_c > r_r).double(), (r_c == r_r).double(), r_c, r_r, r_c**2, r_r**2)
    return torch.stack(per_pair) @ (weights_P > 0).double()


@dataclass(frozen=True)
class NonFinite:
    """The first loss or gradient that is NaN or infinite."""

    iteration: int
    what: str
    """`loss` or `gradient`."""
    where: str
    """`on this rank`, `on another rank`, or `over all ranks`."""


class Interval:
    """What the iterations since the last log line did, over all ranks.

    Args:
        shape: of the model, for what a pack costs.
        max_packed_length: most tokens of a pack.
        frozen: the model's weights get no gradients (only adapters do): a third of the operations
            on them is not done.
        peak: operations a second of one device, None if unknown (then there is no `mfu`).
    """

    def __init__(
        self,
        shape: ModelShape,
        max_packed_length: int,
        *,
        frozen: bool = False,
        peak: float | None = None,
    ) -> None:
        self._shape = shape
        self._cap = max_packed_length
        self._frozen = frozen
        self._peak = peak
        self._started: float | None = None
        self._total: defaultdict[str, float] = defaultdict(float)
        self._forget()

    def _forget(self) -> None:
        """Start anew to collect what the next reduction adds up."""
        self._iterations: list[int] = []
        self._losses: list[Tensor] = []
        self._steps: list[int] = []
        self._norms: list[Tensor] = []
        self._sums: Tensor | None = None
        self._host: defaultdict[str, float] = defaultdict(float)

    def start(self) -> None:
        """The clock runs from here to the end of the next reduction."""
        if self._started is None:
            self._started = time.perf_counter()

    def add_wait(self, seconds: float) -> None:
        """Time that this rank waited for a pack."""
        self._host["data_seconds"] += seconds

    def add(
        self,
        iteration: int,
        data: dict[str, Any],
        outputs: dict[str, Tensor],
        norm: Tensor | float | None,
    ) -> None:
        """Add an iteration.

        Args:
            iteration: its number.
            data: the pack as `collate_pack` gave it, on the host.
            outputs: `loss`, a scalar, and `sums`, of `pair_sums`, of this rank.
            norm: of all ranks' gradients, a scalar, if the optimizer stepped.
        """
        self._iterations.append(iteration)
        self._losses.append(outputs["loss"])
        self._sums = outputs["sums"] + (0 if self._sums is None else self._sums)
        if norm is not None:
            self._steps.append(iteration)
            self._norms.append(torch.as_tensor(norm, device=outputs["loss"].device).double())
        self._host["packs"] += 1
        if not data["pair_weights_P"].numpy().any():
            return  # it only fills a step
        queries, keys = data["layout"]["query_lengths"], data["layout"]["key_lengths"]
        tokens, attended = sum(queries), sum(map(attended_pairs, queries, keys))
        self._host["tokens"] += tokens
        whole = np.array(keys)  # lengths of the candidates' sequences
        self._host["tokens_alone"] += sum(
            int(whole[data[side].numpy()].sum()) for side in ("chosen_P", "rejected_P")
        )
        self._host["flops"] += self._shape.flops(tokens, attended)
        if self._frozen:
            self._host["flops"] -= self._shape.flops(tokens, 0) / 3

    def reduce(self) -> NonFinite | None:
        """Add up the ranks' iterations since the last reduction, and stop the clock.

        What is not finite in them is the answer: the same iteration on every rank.
        """
        if self._sums is None:
            return None
        losses = torch.stack(self._losses).double()
        norms = torch.stack(self._norms) if self._norms else losses[:0]
        own = torch.cat([losses, norms])
        host = losses.new_tensor([self._host[name] for name in HOST_SUMS])
        shared = torch.cat([self._sums, losses.sum()[None], host, (~own.isfinite()).double()])
        all_reduce(shared)
        numbers = torch.cat([shared, own]).tolist()  # waits for the device

        places = [*self._iterations, *self._steps]
        kinds = ["loss"] * len(losses) + ["gradient"] * len(norms)
        bad, values = numbers[-2 * len(own) : -len(own)], numbers[-len(own) :]
        found = [
            NonFinite(place, kind, _where(kind, value))
            for place, kind, ranks, value in zip(places, kinds, bad, values)
            if ranks
        ]
        for name, number in zip((*PAIR_SUMS, "loss", *HOST_SUMS), numbers):
            self._total[name] += number / sequence_parallel_size()  # whose ranks share a pack
        self._total["iterations"] += len(losses)
        self._total["steps"] += len(norms)
        self._total["norm"] += sum(values[len(losses) :])
        if self._started is not None:
            self._total["seconds"] += time.perf_counter() - self._started
            self._started = None
        self._forget()
        return min(found, key=lambda bad: bad.iteration, default=None)  # the first: its loss

    def values(self) -> dict[str, float]:
        """What the reductions since the last call add up to: docs/configuration.md has the units.

        Per pair where a name is of pairs, and 0 for an interval without one.
        """
        total, ranks = self._total, data_parallel_size()
        self._total = defaultdict(float)
        pairs, tokens = max(total["pairs"], 1), total["tokens"]
        seconds, iterations = total["seconds"], total["iterations"]
        chosen, rejected = total["chosen"] / pairs, total["rejected"] / pairs
        values = {
            "loss": total["loss"] / (iterations * ranks),
            "accuracy": total["correct"] / pairs,
            "ties": total["ties"] / pairs,
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "chosen_reward_std": _deviation(total["chosen_squares"] / pairs, chosen),
            "rejected_reward": rejected,
            "rejected_reward_std": _deviation(total["rejected_squares"] / pairs, rejected),
            "pairs": total["pairs"],
            "pairs_per_s": total["pairs"] / seconds,
            "tokens_per_s": tokens / seconds,
            "tokens_saved_per_s": (total["tokens_alone"] - tokens) / seconds,
            "pack_fill": tokens / (total["packs"] * self._cap),
            "share_ratio": total["tokens_alone"] / max(tokens, 1),
            "time": seconds / iterations,
            "data_time": total["data_seconds"] / (iterations * ranks),
        }
        if total["steps"]:
            values["grad_norm"] = total["norm"] / total["steps"]
        if self._peak is not None:
            devices = ranks * sequence_parallel_size()
            values["mfu"] = total["flops"] / (seconds * devices * self._peak)
        return values


def _where(kind: str, own: float) -> str:
    if kind == "gradient":
        return "over all ranks"
    return "on another rank" if math.isfinite(own) else f"on this rank ({own})"


def _deviation(mean_square: float, mean: float) -> float:
    return math.sqrt(max(0.0, mean_square - mean**2))
