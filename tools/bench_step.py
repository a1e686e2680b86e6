"""Time one optimizer step on the same pairs in five layouts: `python tools/bench_step.py FILE...`.

    a  xtuner's RewardModel and its padded collator, batches of `--batch-size` pairs
    b  packs, every candidate of every pair by itself (the varlen layout of POLAR's recipe)
    c  packs, chosen and rejected of a pair share their prefix
    d  packs, all candidates of a prompt and reference share theirs, each computed once
    e  the bound: only the decoder of b to d, over as many tokens as d lays out, in plain batches of
       sequences of d's mean length; batched causal attention, sum().backward(); no layout, no
       head, no loss. As many tokens at once as in a pack.

The bound cannot be met: with lengths that differ, and suffixes that each see their whole prefix,
d has more pairs of query and key than e (1.5 to 1.7 times as many in samples of four sets).

A step is forward and backward of all pairs of a sample, over as many packs or batches as that
takes; collating is the data loader's work and is not timed. The sample is whole prompts, drawn
with a seed. All five have one shape (heads and ratios of POLAR-1.8B) and the same random weights,
in float32 on the CPU; the embedding has only the ids that occur. The losses of a to d, the mean of
-log sigmoid(r_c - r_r) without margins, must agree. Variants take turns; a time is the median of
`--repeats` turns after one that is not counted. Only ratios of one run mean anything, and beside
other busy processes only those of one thread (OMP_NUM_THREADS=1).

    python tools/bench_step.py --tokenizer MODEL train.jsonl
    python tools/bench_step.py --tokenizer MODEL --json train.jsonl > figures.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_tokenizer import load_tokenizer
from torch import Tensor
from torch.nn import functional as F
from xtuner.dataset.collate_fns.preference_collate_fn import preference_collate_fn
from xtuner.model.reward import RewardModel
from xtuner.tools.model_converters.modeling_internlm2_reward import (
    configuration_internlm2,
    modeling_internlm2,
)

from polar_xtuner.cache import PAIR, Group, lay_out
from polar_xtuner.collate import collate_pack
from polar_xtuner.modeling_internlm2 import InternLM2Config, InternLM2ForRewardModel
from polar_xtuner.packing import best_fit
from polar_xtuner.records import RowCheck, find_files, read_rows
from polar_xtuner.reward_model import PolarRewardModel
from polar_xtuner.template import Candidate, PolarTemplate

HEAD_SIZE = 128

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""The ids of chosen and rejected."""


class Variant(NamedTuple):
    """A way to compute a step: `run()` does it and returns the loss."""

    tokens: int
    run: Callable[[], float]


# ---- The sample: pairs by prompt


def sample_prompts(
    file: str, template: PolarTemplate, pairs: int, seed: int
) -> tuple[list[list[Pair]], int]:
    """The pairs of each drawn prompt, in ids numbered from 1, and how many ids there are."""
    rows: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for row in RowCheck().accept(read_rows(find_files(file))):
        key = (row.prompt, row.reference, row.wrapper)
        rows.setdefault(key, []).extend(product(row.chosen, row.rejected))
    keys = list(rows)
    random.Random(seed).shuffle(keys)
    drawn, count = [], 0
    while keys and count < pairs:
        drawn.append(keys.pop())
        count += len(rows[drawn[-1]])
    ids = iter(
        template.encode(
            [
                Candidate(prompt, reference, text, wrapper)
                for prompt, reference, wrapper in drawn
                for pair in rows[prompt, reference, wrapper]
                for text in pair
            ]
        )
    )
    numbers: dict[int, int] = {}

    def numbered() -> tuple[int, ...]:
        return tuple(numbers.setdefault(i, len(numbers) + 1) for i in next(ids))

    return [[(numbered(), numbered()) for _ in rows[key]] for key in drawn], len(numbers)


# ---- The model, ours and theirs


def build_models(ids: int, layers: int, hidden_size: int) -> tuple[PolarRewardModel, RewardModel]:
    """Ours and xtuner's, with one shape (that of POLAR-1.8B, made smaller) and one set of weights.

    The head is not zero: rewards of about 1 have losses that tell layouts apart.

    Raises:
        ValueError: `hidden_size` does not make whole heads, two to a KV head.
    """
    if hidden_size % (2 * HEAD_SIZE):
        raise ValueError(f"--hidden-size must be a multiple of {2 * HEAD_SIZE}, got {hidden_size}")
    shape = {
        "vocab_size": ids + 1,  # 0 is xtuner's padding
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // HEAD_SIZE,
        "num_key_value_heads": hidden_size // HEAD_SIZE // 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000,
        "bias": False,
    }
    torch.manual_seed(0)
    ours = InternLM2ForRewardModel(InternLM2Config(**shape))
    ours.v_head.weight.data.normal_(std=hidden_size**-0.5)
    config = configuration_internlm2.InternLM2Config(
        **shape, pretraining_tp=1, attn_implementation="sdpa"
    )
    theirs = modeling_internlm2.InternLM2ForRewardModel(config)
    theirs.load_state_dict(ours.state_dict())
    return (
        PolarRewardModel(ours, use_activation_checkpointing=False).train(),
        RewardModel(theirs, penalty_type="none", use_activation_checkpointing=False).train(),
    )


# ---- The layouts


def padded(model: RewardModel, pairs: Sequence[Pair], batch_size: int) -> Variant:
    """a: batches of pairs in the order of the sample."""
    batches = [
        preference_collate_fn([_upstream_pair(p) for p in pairs[start : start + batch_size]])
        for start in range(0, len(pairs), batch_size)
    ]

    def run() -> float:
        total = 0.0
        for batch in batches:
            # xtuner's loss is a batch's mean, and takes the labels out of the dict.
            weight = len(batch["data"]["labels"]) / 2 / len(pairs)
            loss = weight * model(dict(batch["data"]), mode="loss")["loss"]
            loss.backward()
            total += loss.item()
        return total

    return Variant(sum(batch["data"]["input_ids"].numel() for batch in batches), run)


def _upstream_pair(pair: Pair) -> dict[str, list[int]]:
    fields: dict[str, list[int]] = {}
    for label, (name, ids) in enumerate(zip(("chosen", "rejected"), pair)):
        fields[f"{name}_ids"] = list(ids)
        fields[f"{name}_labels"] = [-100] * (len(ids) - 1) + [label]
    return fields


def alone(pair: Pair) -> Group:
    """b: chosen and rejected in full; they share a prefix of no token."""
    chosen, rejected = pair
    return _group([*chosen, *rejected], [0, len(chosen), len(rejected)], [(0, 1)])


def shared(pairs: Iterable[Pair]) -> Group:
    """c, d: the distinct candidates of `pairs`, with their prefix once."""
    numbers: dict[tuple[int, ...], int] = {}
    numbered = [
        (numbers.setdefault(c, len(numbers)), numbers.setdefault(r, len(numbers))) for c, r in pairs
    ]
    return _group(*lay_out(list(numbers)), numbered)


def _group(tokens: Sequence[int], pieces: Sequence[int], numbered: list[tuple[int, int]]) -> Group:
    pairs = np.zeros(len(numbered), PAIR)
    pairs["chosen"], pairs["rejected"] = np.array(numbered).T
    return Group(np.array(tokens), np.array(pieces), pairs)


def packed(model: PolarRewardModel, groups: Sequence[Group], cap: int) -> Variant:
    """b, c, d: groups in packs of at most `cap` tokens."""
    lengths = np.array([len(group.tokens) for group in groups])
    weight = 1 / sum(len(group.pairs) for group in groups)
    packs = [
        collate_pack([{"groups": [groups[i] for i in pack], "pair_weight": weight, "rows": []}])[
            "data"
        ]
        for pack in best_fit(lengths, cap)
    ]

    def run() -> float:
        total = 0.0
        for data in packs:
            loss = model(data, mode="loss")["loss"]
            loss.backward()
            total += loss.item()
        return total

    return Variant(int(lengths.sum()), run)


def bare(model: PolarRewardModel, groups: Sequence[Group], cap: int) -> Variant:
    """e: plain batches of equal sequences; their loss means nothing."""
    tokens = sum(len(group.tokens) for group in groups)
    lengths = [int(group.pieces[0]) + int(n) for group in groups for n in group.pieces[1:]]
    rows = max(1, round(tokens * len(lengths) / sum(lengths)))
    length = round(tokens / rows)
    batches = torch.full((rows, length), 1).split(max(1, cap // length))

    def run() -> float:
        for ids in batches:
            bare_decoder(model.decoder, ids).sum().backward()
        return 0.0

    return Variant(rows * length, run)


def bare_decoder(decoder: Any, ids_BL: Tensor) -> Tensor:
    """(B * L, E): a decoder's states of plain sequences."""
    batch, length = ids_BL.shape

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: None) -> Tensor:
        q_BHLD, k_BGLD, v_BGLD = (
            x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            q_BHLD, k_BGLD, v_BGLD, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    x = decoder.tok_embeddings(ids_BL.flatten())
    cos, sin = decoder.rotary(torch.arange(length).repeat(batch), length, x.dtype)
    for layer in decoder.layers:
        x = layer(x, cos, sin, None, attention)
    return decoder.norm(x)


# ---- Timing


def measure(variants: dict[str, Variant], models: Sequence[Any], repeats: int) -> dict[str, Any]:
    """Seconds, tokens and losses of the variants, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, float] = {}
    for _ in range(1 + repeats):
        for name, variant in variants.items():
            for model in models:
                model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            losses[name] = variant.run()
            seconds[name].append(time.perf_counter() - start)
    real = [losses[name] for name in "abcd"]
    return {
        **{f"tokens_{name}": variant.tokens for name, variant in variants.items()},
        **{f"seconds_{name}": median(times[1:]) for name, times in seconds.items()},
        "loss_max_diff": max(real) - min(real),
    }


def bench(file: str, template: PolarTemplate, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one file."""
    prompts, ids = sample_prompts(file, template, args.pairs, args.seed)
    if not prompts:
        raise ValueError(f"{file} has no row")
    pairs = [pair for prompt in prompts for pair in prompt]
    ours, theirs = build_models(ids, args.layers, args.hidden_size)
    groups = [shared(prompt) for prompt in prompts]
    cap = args.max_packed_length
    variants = {
        "a": padded(theirs, pairs, args.batch_size),
        "b": packed(ours, [alone(pair) for pair in pairs], cap),
        "c": packed(ours, [shared([pair]) for pair in pairs], cap),
        "d": packed(ours, groups, cap),
        "e": bare(ours, groups, cap),
    }
    figures = measure(variants, (ours, theirs), args.repeats)
    return {
        "file": Path(file).name,
        "prompts": len(prompts),
        "pairs": len(pairs),
        "parameters": sum(p.numel() for p in ours.parameters()),
        "threads": torch.get_num_threads(),
        **figures,
        "ratio_a_d": figures["seconds_a"] / figures["seconds_d"],
        "ratio_b_d": figures["seconds_b"] / figures["seconds_d"],
        "token_ratio_b_d": figures["tokens_b"] / figures["tokens_d"],
        "ratio_d_e": figures["seconds_d"] / figures["seconds_e"],
    }


NAMES = {
    "a": "xtuner, padded",
    "b": "packs, nothing shared",
    "c": "packs, pairs share",
    "d": "packs, groups share",
    "e": "bare decoder on d's tokens",
}


def table(figures: dict[str, Any]) -> str:
    lines = [
        "{file}: {pairs} pairs of {prompts} prompts, {parameters:,} parameters, "
        "{threads} threads".format(**figures)
    ]
    for key, name in NAMES.items():
        tokens, seconds = figures[f"tokens_{key}"], figures[f"seconds_{key}"]
        lines.append(
            f"  {key}  {name:26} {tokens:9,} tokens {seconds:8.2f} s "
            f"{seconds / figures['seconds_d']:6.2f} x d"
        )
    lines.append("  b has {token_ratio_b_d:.2f} times the tokens of d".format(**figures))
    lines.append("  losses of a to d differ by at most {loss_max_diff:.1e}".format(**figures))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="rows, in any format that training reads")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="Hugging Face folder, or InternLM2's sentencepiece .model file",
    )
    parser.add_argument("--pairs", type=int, default=8, help="whole prompts until there are N")
    parser.add_argument("--repeats", type=int, default=3, help="turns whose median is taken")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of prompts")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a padded batch")
    parser.add_argument("--max-packed-length", type=int, default=16384, help="tokens of a pack")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=768, help=f"multiple of {2 * HEAD_SIZE}")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    args = parser.parse_args()
    try:
        if args.pairs < 1 or args.repeats < 1:
            raise ValueError(
                f"--pairs and --repeats must be at least 1, got {args.pairs} and {args.repeats}"
            )
        template = PolarTemplate(load_tokenizer(args.tokenizer))
        for file in args.files:
            figures = bench(file, template, args)
            print(json.dumps(figures) if args.json else table(figures), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"bench_step.py: {error}")


if __name__ == "__main__":
    main()
