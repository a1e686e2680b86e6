"""Where xtuner 0.2.0 and mmengine 0.10.6 bite: every workaround, and nothing else.

Imported by each training module; importing it checks the versions and applies the patches once.
Each patch says what happens without it; `tests/test_compat.py` fails when upstream no longer
needs one.
"""

from __future__ import annotations

import ast
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

NEEDED = {"xtuner": "0.2.0", "transformers": "4.48", "mmengine": "0.10.6"}


def check_versions() -> None:
    """Raise ImportError if a package of `NEEDED` is missing or of another version."""
    for name, needed in NEEDED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found != needed and not found.startswith(f"{needed}."):
            raise ImportError(
                f"polar_xtuner trains with {name} {needed}, found {found}. Install it with: "
                "pip install 'polar_xtuner[train]' (best in an environment of its own)"
            )


check_versions()

import mmengine.config.config as mmengine_config  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402


def allow_set_device_without_cuda() -> None:
    """mmengine calls `torch.cuda.set_device` for every launcher, gloo on a CPU machine included.

    Without: `NPROC_PER_NODE=2 xtuner train` fails on a machine that has no GPU.
    """
    if not torch.cuda.is_available():
        torch.cuda.set_device = lambda device: None


def allow_checkpoint_globals() -> None:
    """Since torch 2.6, `torch.load` takes only tensors and plain types.

    Without: resuming fails on the log history that mmengine keeps in a checkpoint.
    """
    import numpy
    from mmengine.logging.history_buffer import HistoryBuffer

    def statistic(owner: Any, name: str) -> Any:
        """What a pickle may ask `getattr` for: a HistoryBuffer's way of summing up."""
        if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
            raise ValueError(f"the checkpoint asks for {name!r} of {owner!r}: it is not safe")
        return getattr(owner, name)

    core = numpy._core if hasattr(numpy, "_core") else numpy.core
    allowed = [HistoryBuffer, core.multiarray._reconstruct, core.multiarray.scalar]
    allowed += [numpy.ndarray, numpy.dtype, ConfigDict]  # DeepSpeed keeps its config
    allowed += [type(numpy.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "b1")]
    torch.serialization.add_safe_globals([*allowed, (statistic, "builtins.getattr")])


def stand_in_for_triton_ops() -> None:
    """bitsandbytes 0.45.0, which xtuner pins, imports two functions that triton has dropped in
    3.2 (torch 2.6); they tune an int8 kernel that nothing here uses.

    Without: LoRA, quantised or not, stops at `No module named 'triton.ops'`.
    """
    triton = find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or []
    if triton is None or any(Path(folder, "ops").is_dir() for folder in folders):
        return
    ops, perf_model = ModuleType("triton.ops"), ModuleType("triton.ops.matmul_perf_model")
    perf_model.__dict__.update(early_config_prune=None, estimate_matmul_time=None)
    sys.modules.update({module.__name__: module for module in (ops, perf_model)})
    if "bitsandbytes" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("bitsandbytes.")]:
            del sys.modules[name]  # mmengine may have tried before, and left it half imported


def let_settings_follow_cfg_options() -> None:
    """mmengine merges `--cfg-options` after the config file has run.

    Without: `--cfg-options lr=1e-5` changes the variable `lr` and nothing that was computed from
    it, so the run goes on with the old value and does not say so. With: the file and its bases
    are run again as if the assignment to that name said the new value, and what comes out
    otherwise is taken over.
    """
    merge = Config.merge_from_dict
    if getattr(merge, "follows_settings", False):
        return

    def merge_from_dict(self: Config, options: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        settings = {
            name: value
            for name, value in options.items()
            if name in self and not isinstance(self[name], dict)
        }
        # `Config.fromstring` names a file that is gone.
        has_file = self.filename and Path(self.filename).is_file()
        if settings and has_file and not Config._is_lazy_import(self.filename):
            _follow(self, settings)
        merge(self, options, *args, **kwargs)

    merge_from_dict.follows_settings = True  # type: ignore[attr-defined]
    Config.merge_from_dict = merge_from_dict


class _WithSettings(mmengine_config.RemoveAssignFromAST):  # type: ignore[misc]
    """Replaces what is assigned to a setting, in the pass in which mmengine drops `_base_`."""

    settings: ClassVar[dict[str, Any]] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return node  # its variables are its own

    def visit_Assign(self, node: ast.Assign) -> Any:
        match node.targets:
            case [ast.Name(id=name)] if name in self.settings:
                new = ast.parse(repr(self.settings[name]), mode="eval").body
                node.value = ast.copy_location(new, node.value)
                return ast.fix_missing_locations(node)
        return super().visit_Assign(node)


def _follow(config: Config, settings: dict[str, Any]) -> None:
    """Give `config` what `settings` change; what was set since the file ran stays."""
    earlier = config.__dict__.get("_settings", {})
    settings = {**earlier, **settings}
    object.__setattr__(config, "_settings", settings)
    _take_over(config._cfg_dict, _run(config, earlier), _run(config, settings))


def _run(config: Config, settings: dict[str, Any]) -> ConfigDict:
    original = mmengine_config.RemoveAssignFromAST
    replaced = type("WithSettings", (_WithSettings,), {"settings": settings})
    mmengine_config.RemoveAssignFromAST = replaced
    try:
        return Config.fromfile(config.filename, lazy_import=False)._cfg_dict
    finally:
        mmengine_config.RemoveAssignFromAST = original


def _take_over(current: ConfigDict, before: ConfigDict, after: ConfigDict) -> None:
    for name in before.keys() - after.keys():
        current.pop(name, None)
    for name, new in after.items():
        old, own = before.get(name), current.get(name)
        if isinstance(new, dict) and isinstance(old, dict) and isinstance(own, dict):
            _take_over(own, old, new)
        elif name not in before or new != old:
            current[name] = new


allow_set_device_without_cuda()
allow_checkpoint_globals()
stand_in_for_triton_ops()
let_settings_follow_cfg_options()
