"""What a run says before its first step: what will happen, and which setting each number is from.

A wrong number here costs a look, at the end of the run it costs the run.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.hooks import CheckpointHook

from polar_xtuner.attention import backend_for
from polar_xtuner.checks import deepspeed_config, polar_model
from polar_xtuner.optim import WarmupCosineLR, autocast_dtype
from polar_xtuner.sequence_parallel import data_parallel_size, sequence_parallel_size


def overview(runner: Any, loop: Any) -> str:
    """What a `PolarTrainLoop` of the runner is about to do, as lines of a name and its text."""
    lines = [
        *_data_lines(loop),
        *_model_lines(runner),
        *_run_lines(runner, loop),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(["this run:", *(f"  {name:{width}}  {text}" for name, text in lines)])


def _data_lines(loop: Any) -> Iterator[tuple[str, str]]:
    data, sampler = loop.dataloader.dataset, loop.dataloader.sampler
    files, meta = data.metainfo["files"], data.store.meta
    pairs, tokens = int(data.pair_counts.sum()), int(data.lengths.sum())
    alone = int(data.store.unshared_lengths().sum())
    yield (
        "data",
        f"{meta['rows']:,} rows in {_of(files)} (data_files), {meta['bad_rows']:,} left out "
        f"(on_bad_row): {len(data.lengths):,} groups, {pairs:,} pairs",
    )
    yield (
        "tokens",
        f"{tokens:,} an epoch, {tokens / alone:.0%} of the {alone:,} of whole sequences "
        "(group_candidates)",
    )
    counts, ranks = sampler.accumulative_counts, data_parallel_size()
    packs = sampler.iterations(1) * ranks
    yield (
        "packs",
        f"{packs:,} an epoch, of at most {data.max_packed_length:,} tokens (max_packed_length), "
        f"{tokens / (packs * data.max_packed_length):.1%} full",
    )
    steps = loop.max_iters // counts
    length = f"max_epochs={loop.epochs}" if loop.epochs else f"max_iters={loop.max_iters}"
    size = sequence_parallel_size()
    shared = f" of {size} GPUs (sequence_parallel_size)" if size > 1 else ""
    wanted = sampler.pairs_per_step
    held = (
        f"{wanted:,} pairs (pairs_per_step)"
        if wanted
        else f"about {pairs * counts / sampler.iterations(1):,.1f} pairs (full packs)"
    )
    yield (
        "steps",
        f"{steps:,} ({length}) of {held} each, on {ranks} x {counts} packs: ranks{shared} x "
        "accumulative_counts",
    )


def _model_lines(runner: Any) -> Iterator[tuple[str, str]]:
    model, deepspeed = polar_model(runner), deepspeed_config(runner)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    adapters = hasattr(model.llm, "peft_config")
    yield (
        "parameters",
        f"{trained:,} trained of {total:,} ("
        + ("model.lora: adapters and head" if adapters else "all weights")
        + f"), from {_start(runner)}",
    )
    weights = next(p.dtype for p in model.parameters() if p.requires_grad)
    if deepspeed is None:
        computes = _short(autocast_dtype(runner.cfg) or weights)
        text = f"{_short(weights)} weights (torch_dtype), computed in {computes} (autocast_dtype)"
    else:
        half = [name for name in ("bf16", "fp16") if deepspeed.get(name, {}).get("enabled")]
        computes = {"bf16": "bfloat16", "fp16": "float16"}[half[0]] if half else _short(weights)
        stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
        text = f"computed in {computes}, ZeRO stage {stage} (--deepspeed)"
    yield "precision", text
    device = model.data_preprocessor.device
    dtype = getattr(torch, computes)
    backend, reason = backend_for(model.decoder.attention_backend, torch.device(device), dtype)
    yield "attention", f"{backend} (attention{f': {reason}' if reason else ''})"


def _run_lines(runner: Any, loop: Any) -> Iterator[tuple[str, str]]:
    for scheduler in runner.param_schedulers or []:
        if isinstance(scheduler, WarmupCosineLR):
            peak = max(scheduler.base_values)
            yield (
                "lr",
                f"up to {peak:g} (lr) over {scheduler.warmup:,} steps (warmup_ratio), then down "
                f"to {peak * scheduler.final:g} (final_lr_ratio)",
            )
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            yield "checkpoints", _checkpoints(hook, loop)
    validation = loop.validation
    if validation is None:
        yield "validation", "none: no val_data_files"
    else:
        data = validation.dataloader.dataset
        sets = [name for name in dict.fromkeys(data.metainfo["sets"]) if name]
        named = f" in {len(sets)} sets ({', '.join(sets)})" if sets else ""
        yield (
            "validation",
            f"{int(data.pair_counts.sum()):,} pairs{named} (val_data_files), "
            f"{_when(loop.val_interval, loop.max_iters)} (val_steps)",
        )
    yield "curves", f"tensorboard --logdir {runner.work_dir}"


def _checkpoints(hook: Any, loop: Any) -> str:
    at_end = hook.save_last and (hook.interval <= 0 or loop.max_iters % hook.interval > 0)
    count = (loop.max_iters // hook.interval if hook.interval > 0 else 0) + at_end
    kept = "all" if hook.max_keep_ckpts < 0 else min(count, hook.max_keep_ckpts)
    best = f", and the best by {', '.join(hook.save_best)} (save_best)" if hook.save_best else ""
    return (
        f"{count:,}, {_when(hook.interval, loop.max_iters)} (save_steps); {kept} kept "
        f"(save_total_limit){best}, in {hook.out_dir}"
    )


def _when(interval: int, last: int) -> str:
    return f"every {interval:,} iterations and at the end" if 0 < interval < last else "at the end"


def _start(runner: Any) -> str:
    if runner._load_from:
        what = "resumed" if runner._resume else "load_from"
        return f"{runner._load_from} ({what})"
    llm = (runner.cfg.get("model") or {}).get("llm") or {}
    return f"{llm.get('pretrained_model_name_or_path')} (pretrained_model_name_or_path)"


def _of(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{len(files)} files, {files[0]} to {files[-1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
