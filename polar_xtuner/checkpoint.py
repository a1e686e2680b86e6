"""Checkpoints that are whole, sound and safe, or not there.

Writing: everything goes to `.iter_500.pth.partial` beside its place and is renamed once it is on
the disk, so a name without a dot in front is whole, whenever the writer was killed. A write that
fails is reported, leaves the earlier checkpoints alone, and training goes on.

Reading: `check_checkpoint` compares every record of a checkpoint with its CRC-32, which torch
writes and never looks at, and unpickles nothing but tensors, plain values and the types that
mmengine and DeepSpeed keep in theirs. What loads the file afterwards may then be less careful.

A checkpoint is one file, or with DeepSpeed a folder of files, one a process and more.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, broadcast_object_list, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
"""File of a work dir that names its newest checkpoint; mmengine's."""


class CheckpointError(ValueError):
    """A checkpoint is not whole, not sound or not safe, or could not be written."""


# ---- Reading


def check_checkpoint(path: str | Path, part: int = 0, parts: int = 1) -> None:
    """Look through a checkpoint, a file or a DeepSpeed folder, before anything loads it.

    Args:
        part, parts: look at every so manieth file of a folder only.

    Raises:
        CheckpointError: it is missing, truncated or damaged, or asks to run code; names the file.
    """
    path = Path(path)
    files = [path] if path.is_file() else _files_of_folder(path)
    for file in files[part::parts]:
        _check_records(file)
        load_safely(file)


def check_on_all_ranks(path: Path) -> None:
    """`check_checkpoint` by all ranks together, each node for itself; all of them raise."""
    rank, size = local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    failures = []
    try:
        check_checkpoint(path, rank, max(size, rank + 1))
    except CheckpointError as error:
        failures.append(str(error))
    failures = _of_all_ranks(failures)
    if failures:
        raise CheckpointError("; ".join(failures))


def local_rank() -> int:
    """Of this process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def load_safely(file: Path) -> Any:
    """What `torch.save` wrote, its tensors mapped from the file, never running code.

    Raises:
        CheckpointError: it asks to run code or cannot be read.
    """
    allow_deepspeed_types()
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, ValueError, RuntimeError, EOFError, LookupError) as error:
        asks = re.search(r"GLOBAL ([\w.]+)|asks for (.+): it is not safe", str(error))
        if asks is None:
            raise CheckpointError(f"{file} is damaged, it cannot be read: {error}") from error
        raise CheckpointError(
            f"{file} is refused: it asks for {asks[1] or asks[2]}, which a checkpoint of this "
            "trainer never does, and which may run code"
        ) from error


def load_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint tells about its run, without reading its tensors: `meta`, `message_hub`.

    Raises:
        CheckpointError: it cannot be read, or asks to run code.
    """
    state = load_safely(path if path.is_file() else _files_of_folder(path)[0])
    if not isinstance(state, dict) or "iter" not in state.get("meta", {}):
        raise CheckpointError(f"{path} has weights and no place in a run: it cannot be resumed")
    return state


def _files_of_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}")
    files = sorted(folder.glob("*.pt"))
    states = [file for file in files if file.name.endswith("model_states.pt")]
    if not states:
        raise CheckpointError(f"{folder} is not a DeepSpeed checkpoint: no *model_states.pt in it")
    state = load_safely(states[0])
    ranks = state.get("dp_world_size", 1)
    needs = {"optim_states.pt": 0 if state.get("optimizer") is not None else ranks}
    if states[0].name.startswith("zero_pp_rank_"):  # ZeRO-3 cuts the weights as well
        needs["model_states.pt"] = ranks
    if (state.get("ds_config") or {}).get("checkpoint", {}).get("use_node_local_storage"):
        needs = {}  # the rest lies on other nodes
    for ending, count in needs.items():
        there = sum(file.name.endswith(ending) for file in files)
        if there != count:
            raise CheckpointError(
                f"{folder} is not whole: it has *{ending} of {there} of {count} processes"
            )
    return sorted(files, key=lambda file: file not in states)


def _check_records(file: Path) -> None:
    """Compare every record of a file of `torch.save` with its CRC-32."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} ({size} bytes) is truncated, damaged or not a file of torch.save: {error}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{file} is damaged: its record {damaged!r} is not what was written")


def allow_deepspeed_types() -> None:
    """Let `torch.load` take the types that DeepSpeed keeps in its checkpoints; they run nothing."""
    if _SAFE:
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    _SAFE.extend([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    torch.serialization.add_safe_globals(_SAFE)


_SAFE: list[Any] = []


def newest_sound(work_dir: str | Path) -> Path | None:
    """The newest checkpoint of a work dir that can be resumed from; None if there is none at all.

    Called by all ranks together.

    Raises:
        CheckpointError: there are checkpoints and none of them is sound.
    """
    if is_main_process():
        _clear(Path(work_dir))
    candidates: list[Any] = [_newest_first(Path(work_dir))]
    broadcast_object_list(candidates)  # a rank may see the folder a moment later
    reasons = []
    for path in candidates[0]:
        try:
            check_on_all_ranks(path)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            reasons.append(str(error))
        else:
            return path
    if reasons:
        raise CheckpointError(f"no checkpoint in {work_dir} is sound: {'; '.join(reasons)}")
    return None


def _newest_first(work_dir: Path) -> list[Path]:
    """Checkpoints written after `last_checkpoint`, what that names, then the rest by their number.

    A writer may be killed after a checkpoint and before it is named.
    """
    pointer = work_dir / LAST
    found = [path for path in work_dir.glob("iter_*.pth") if re.match(r"iter_\d+\.pth$", path.name)]
    found.sort(key=lambda path: int(re.sub(r"\D", "", path.name)), reverse=True)
    if not pointer.is_file():
        return found
    named = Path(pointer.read_text().strip())
    if not named.exists():
        named = work_dir / named.name  # the work dir was moved
    since = pointer.stat().st_mtime_ns
    later = [path for path in found if path != named and path.stat().st_mtime_ns > since]
    return [*later, named, *(path for path in found if path not in (*later, named))]


# ---- Writing


@contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path` when the block ends well.

    Raises:
        OSError: it could not be written; then `path` is what it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save's writer hides what the disk said
        raise


RULES = {
    **dict.fromkeys(("accuracy", "accuracy_low", "margin", "accuracy_longer_wrong"), "greater"),
    **dict.fromkeys(("loss", "ece", "ece_at_temperature", "ties"), "less"),
}
"""Which is better of the figures that a best checkpoint can be kept by."""


@HOOKS.register_module()
class PolarCheckpointHook(CheckpointHook):  # type: ignore[misc]
    """mmengine's hook, whose checkpoints are whole or not there.

    It removes an old checkpoint only after a newer one is on the disk, and says so when one could
    not be written; the last one of a run must be. Takes the arguments of mmengine's; of the figures
    of `PolarMetric` it knows whether more or less is better (`save_best`).

    Raises:
        ValueError: `save_best` names a figure that is not known, and there is no `rule`.
        CheckpointError: after the run, if its last checkpoint could not be written.
    """

    def __init__(self, *args: Any, save_best: Any = None, rule: Any = None, **options: Any) -> None:
        if save_best is not None and rule is None:
            names = [save_best] if isinstance(save_best, str) else save_best
            rule = [RULES.get(name.rpartition("/")[2]) for name in names]
            unknown = [name for name, of_it in zip(names, rule) if of_it is None]
            if unknown:
                raise ValueError(
                    f"save_best={unknown[0]}: whether more or less of it is better is not known. "
                    f"Known are {', '.join(RULES)}, as in val/accuracy or val/SET/accuracy; for "
                    "another one set default_hooks.checkpoint.rule to 'greater' or 'less'"
                )
        super().__init__(*args, save_best=save_best, rule=rule, **options)

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        self._saved: int | None = None
        """Iteration (or epoch) of the last good checkpoint of this run."""
        self._failure = ""
        if is_main_process():
            _clear(Path(self.out_dir))

    def after_train(self, runner: Any) -> None:
        if self._failure:
            raise CheckpointError(self._failure)
        super().after_train(runner)

    def save(self, runner: Any) -> bool:
        """Write a checkpoint now, unless this iteration has one; whether there is one."""
        if self._saved != runner.iter + 1:
            self._save_checkpoint(runner)
        return not self._failure

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        name = self.filename_tmpl.format(step)
        before = runner.message_hub.runtime_info.get("keep_ckpt_ids", [])
        kept = [*(number for number in before if number != step), step]
        # A checkpoint names those that are kept with it.
        runner.message_hub.update_info("keep_ckpt_ids", kept[-max(self.max_keep_ckpts, 0) :])
        options = {
            "save_optimizer": self.save_optimizer,
            "save_param_scheduler": self.save_param_scheduler,
            "by_epoch": self.by_epoch,
            **self.args,
        }
        if not self._write(runner, name, meta=meta, **options):
            runner.message_hub.update_info("keep_ckpt_ids", before)
            return
        self._saved = step
        self.last_ckpt = str(Path(self.out_dir, name))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        if not is_main_process():
            return
        try:
            with atomic_file(Path(runner.work_dir, LAST)) as file:
                file.write(self.last_ckpt.encode())
        except OSError as error:
            logger.error("%s could not be written: %s", LAST, error)
        if self.max_keep_ckpts > 0:
            for number in kept[: -self.max_keep_ckpts]:
                _remove(Path(self.out_dir, self.filename_tmpl.format(number)))

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        """As mmengine's, but the best one so far stays until a better one is on the disk."""
        if not self.save_best:
            return
        if "auto" in self.key_indicators:
            self._init_rule(self.rules, [next(iter(metrics))])
        updated = False
        for key, rule in zip(self.key_indicators, self.rules):
            suffix = "" if len(self.key_indicators) == 1 else f"_{key}"
            info, score = runner.message_hub.runtime_info, metrics[key]
            best = info.get(f"best_score{suffix}", self.init_value_map[rule])
            if score is None or not self.is_better_than[key](score, best):
                continue
            name = f"best_{key}_{self.filename_tmpl.format(runner.iter)}".replace("/", "_")
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            options = {"save_optimizer": False, "save_param_scheduler": False, "by_epoch": False}
            if not self._write(runner, name, meta=meta, **options):
                continue
            earlier = info.get(f"best_ckpt{suffix}")
            path = Path(self.out_dir, name)
            runner.message_hub.update_info(f"best_score{suffix}", score)
            runner.message_hub.update_info(f"best_ckpt{suffix}", str(path))
            updated = True
            is_own = earlier and Path(earlier).parent == path.parent  # or of the run it resumes
            if is_own and Path(earlier) != path and is_main_process():
                _remove(Path(earlier))
            runner.logger.info(f"best {key} so far: {score:0.4f}, saved to {name}")
        if updated and self._saved == runner.iter:
            # The one of this iteration has to know the best, so that a resumed run can replace it.
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            self._save_checkpoint_with_step(runner, runner.iter, meta)

    def _write(self, runner: Any, name: str, **options: Any) -> bool:
        """Write a checkpoint of that name, on all ranks; whether all of it is on the disk."""
        folder = Path(self.out_dir)
        partial = folder / f".{name}.partial"
        if is_main_process():
            _remove(partial)
        barrier()
        loop, meta = runner.train_loop, options.pop("meta")
        before, loop._iter = loop._iter, meta["iter"] - 1  # what DeepSpeed's runner counts from
        with _careful_writes(runner) as failures:
            try:
                runner.save_checkpoint(str(folder), partial.name, meta=meta, **options)
            except OSError as error:  # on the main process; DeepSpeed's are in `failures`
                failures.append(str(error))
        loop._iter = before
        if not failures and is_main_process():
            failures += _unreadable(partial)
        failures = _of_all_ranks(failures)
        if not failures:
            failures = _of_all_ranks(_move(partial, folder / name) if is_main_process() else [])
        if not failures:
            late = []
            if local_rank() == 0 and not is_main_process():
                late = _move(partial, folder / name)  # a node may have a disk of its own
            failures = _of_all_ranks(late if partial.exists() else [])
        if not failures:
            self._failure = ""
            return True
        if local_rank() == 0 and partial.exists():
            _remove(partial)
        good = self.last_ckpt or "none of this run"
        self._failure = (
            f"the checkpoint {folder / name} could not be written: {'; '.join(failures)}. The last "
            f"good one is {good}"
        )
        logger.error("%s; training goes on", self._failure)
        return False


@contextmanager
def _careful_writes(runner: Any) -> Iterator[list[str]]:
    """What DeepSpeed's writing of files fails with in the block.

    Raised, it would leave the other ranks waiting for this one.
    """
    failures: list[str] = []
    writer = getattr(runner.model, "checkpoint_engine", None)  # of DeepSpeed
    if writer is None:
        yield failures
        return
    engine = runner.model.model
    copy_script = engine._copy_recovery_script

    def save(state: Any, path: str) -> None:
        with atomic_file(Path(path)) as file:
            torch.save(state, file)

    def makedirs(path: str, exist_ok: bool = False) -> None:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def collected(write: Callable[..., None]) -> Callable[..., None]:
        def collect(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except OSError as error:
                failures.append(str(error))

        return collect

    writer.__dict__.update(save=collected(save), makedirs=collected(makedirs))
    engine.__dict__["_copy_recovery_script"] = collected(copy_script)
    try:
        yield failures
    finally:
        del writer.__dict__["save"], writer.__dict__["makedirs"]
        del engine.__dict__["_copy_recovery_script"]


def _of_all_ranks(failures: list[str]) -> list[str]:
    if get_world_size() == 1:
        return failures
    gathered: list[Any] = [None] * get_world_size()
    torch.distributed.all_gather_object(gathered, failures)
    return [*dict.fromkeys(failure for rank in gathered for failure in rank)]


def _unreadable(partial: Path) -> list[str]:
    """Why a checkpoint that was just written could not be read: a hook has put something in it."""
    try:
        for file in [partial] if partial.is_file() else sorted(partial.glob("*.pt")):
            load_safely(file)
    except CheckpointError as error:
        return [str(error)]
    return []


def _move(partial: Path, final: Path) -> list[str]:
    """Give what was written its name; what this fails with."""
    old = final.with_name(f".{final.name}.old")
    try:
        if not partial.is_dir():
            _sync(partial)
        elif final.is_dir():
            final.rename(old)  # a folder cannot take the place of another in one step
        partial.replace(final)
    except OSError as error:
        if old.exists():
            old.rename(final)
        return [str(error)]
    _remove(old)
    with suppress(OSError):  # not every file system knows how to sync a folder
        _sync(final.parent)
    return []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Remove what a killed run left half written, and put back what it was about to replace."""
    for partial in folder.glob(".*.partial"):
        _remove(partial)
    for old in folder.glob(".*.pth.old"):
        final = old.with_name(old.name[1 : -len(".old")])
        if final.exists():
            _remove(old)
        else:
            old.rename(final)


def _remove(path: Path) -> None:
    """Remove a file or folder; a folder in such a way that it is never seen in parts."""
    try:
        if path.is_dir():
            hidden = path.with_name(f".{path.name.strip('.')}.removed.partial")
            path.replace(hidden)
            shutil.rmtree(hidden)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
