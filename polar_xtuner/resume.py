"""Where a run stands, and whether it may go on there.

The packs of a run follow from what its *record* holds: data, template, limits, seed, the ranks. A
checkpoint carries the record of its run, in mmengine's message hub, so that going on with another
one is refused, with what differs. Ranks and accumulation may differ: from there on the rest of the
epoch is planned for those there are (`sampler.py`).
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polar_xtuner.checkpoint import CheckpointError, check_on_all_ranks, load_meta, newest_sound
from polar_xtuner.packing import PLAN_VERSION
from polar_xtuner.sampler import PackSampler, Stretch

logger = logging.getLogger(__name__)

RECORD = "polar_run"
"""Key of the record in mmengine's message hub."""


def find_checkpoint(runner: Any, is_deepspeed: bool) -> Path | None:
    """The sound checkpoint that the runner is going to resume from, None if it starts anew.

    What it is going to load is checked here, before the runner does; with `resume=True` and no name
    it gets the name of the newest one that is sound.

    Raises:
        CheckpointError: the checkpoint is not sound, or not of this kind of run.
    """
    if runner._load_from is None:
        if not runner._resume:
            return None
        runner._load_from = newest = newest_sound(runner.work_dir)
        if newest is None:
            logger.info("no checkpoint in %s to resume from: the run starts anew", runner.work_dir)
            return None
        runner._load_from = str(newest)
    elif "://" in runner._load_from:
        raise CheckpointError(
            f"{runner._load_from} would be loaded unseen, with the code it may bring: copy it to a "
            "folder first"
        )
    else:
        check_on_all_ranks(Path(runner._load_from))
    path = Path(runner._load_from)
    if not runner._resume:
        return None
    needed = "optimizer" if path.is_file() else "param_schedulers"
    if needed not in load_meta(path) and runner.param_schedulers is not None:
        raise CheckpointError(
            f"{path} has weights alone, as a best checkpoint has, and no {needed}: it cannot be "
            "resumed. Start anew from them (load_from without resume)"
        )
    if path.is_dir() != is_deepspeed:
        kind, option = ("a folder", "with") if path.is_dir() else ("a file", "without")
        raise CheckpointError(
            f"{path} is {kind}, written {option} --deepspeed: go on {option} it, or start anew "
            "from its weights (load_from without resume)"
        )
    return path


def settle(
    path: Path, sampler: PackSampler, record: dict[str, Any], *, seed_is_set: bool, changed: bool
) -> int:
    """Put `sampler` where the run of a checkpoint stands; the iteration to go on from.

    Args:
        record: of this run (`record_of`).
        seed_is_set: by the config; else mmengine has drawn one, and the checkpoint's is taken.
        changed: go on although the records differ, at the same optimizer step of the new plan.

    Raises:
        ValueError: the records differ and `changed` is False.
    """
    checkpoint = load_meta(path)
    done = int(checkpoint["meta"]["iter"])
    info = checkpoint.get("message_hub", {}).get("runtime_info", {})
    before = info.get(RECORD, {})
    if not before:
        logger.warning("%s does not tell what its run was like: nothing is compared", path)
    elif not seed_is_set:
        sampler.seed = record["seed"] = before["seed"]
    history = [Stretch(*stretch) for stretch in before.get("history", [sampler.now(0)])]
    last = history[-1]
    if done % last.accumulation:
        raise ValueError(
            f"{path} stands at iteration {done}, within an optimizer step of {last.accumulation}: "
            "resume from one at a multiple of accumulative_counts"
        )
    step = done // last.accumulation
    changes = [
        f"{name}: {_shown(before.get(name))} in the checkpoint, {_shown(value)} now"
        for name, value in record.items()
        if before and before.get(name) != value
    ]
    if changes and not changed:
        raise ValueError(
            f"{path} cannot be gone on from: the order of its packs is another one, for this run "
            f"differs in\n  " + "\n  ".join(changes) + "\nUndo the change; or start anew from its "
            "weights (load_from without resume); or set train_cfg.resume_changed=True to go on at "
            "the same optimizer step of the new plan"
        )
    if changes:
        sampler.follow([sampler.now(0)])
        logger.warning("resumed although the run has changed:\n  %s", "\n  ".join(changes))
        return step * sampler.accumulative_counts
    now = sampler.now(step)
    if now[1:] != last[1:]:
        logger.info(
            "the epoch goes on with %d ranks x %d packs a step; up to step %d it had %d x %d",
            *now[1:],
            step,
            *last[1:],
        )
        history = [stretch for stretch in history if stretch.step < step] + [now]
    sampler.follow(history)
    return step * sampler.accumulative_counts


def record_of(sampler: PackSampler) -> dict[str, Any]:
    """What the order of a run's packs follows from, but for ranks and accumulation."""
    shape = sampler.model_shape
    return {
        **sampler.dataset.identity,
        "plan": PLAN_VERSION,
        "pairs_per_step": sampler.pairs_per_step,
        "seed": sampler.seed,
        "model": None if shape is None else asdict(shape),
    }


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}..."
