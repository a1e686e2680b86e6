"""Where xtuner 0.2.0 and mmengine 0.10.6 bite: every workaround, and nothing else.

Imported by each training module; importing it checks the versions and applies the patches once.
Each patch says what happens without it; `tests/test_compat.py` fails when upstream no longer
needs one.
"""

from __future__ import annotations

import ast
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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
from mmengine.config import Config  # noqa: E402


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

    core = numpy._core if hasattr(numpy, "_core") else numpy.core
    scalars = {type(numpy.dtype(t)) for t in ("f8", "f4", "i8", "i4", "b1")}
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            core.multiarray._reconstruct,
            core.multiarray.scalar,
            numpy.ndarray,
            numpy.dtype,
            *scalars,
        ]
    )


def let_settings_follow_cfg_options() -> None:
    """mmengine merges `--cfg-options` after the config file has run.

    Without: `--cfg-options lr=1e-5` changes the variable `lr` and nothing that was computed from
    it, so the run goes on with the old value and does not say so. With: the file and its bases
    are run again as if the assignment to that name said the new value.
    """
    merge = Config.merge_from_dict
    if getattr(merge, "follows_settings", False):
        return

    def merge_from_dict(self: Config, options: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        settings = {
            name: value
            for name, value in options.items()
            if name in self and not isinstance(self[name], (dict, list))
        }
        # A list is a setting too where the file gives one path and the user several.
        if settings and self.filename and not Config._is_lazy_import(self.filename):
            _rerun(self, settings)
        merge(self, options, *args, **kwargs)

    merge_from_dict.follows_settings = True  # type: ignore[attr-defined]
    Config.merge_from_dict = merge_from_dict


class _WithSettings(mmengine_config.RemoveAssignFromAST):  # type: ignore[misc]
    """Replaces what is assigned to a setting, in the pass in which mmengine drops `_base_`."""

    settings: dict[str, Any] = {}

    def visit_Assign(self, node: ast.Assign) -> Any:
        match node.targets:
            case [ast.Name(id=name)] if name in self.settings:
                new = ast.parse(repr(self.settings[name]), mode="eval").body
                node.value = ast.copy_location(new, node.value)
                return ast.fix_missing_locations(node)
        return super().visit_Assign(node)


def _rerun(config: Config, settings: dict[str, Any]) -> None:
    original = mmengine_config.RemoveAssignFromAST
    replaced = type("WithSettings", (_WithSettings,), {"settings": settings})
    mmengine_config.RemoveAssignFromAST = replaced
    try:
        again = Config.fromfile(config.filename, lazy_import=False)
    finally:
        mmengine_config.RemoveAssignFromAST = original
    object.__setattr__(config, "_cfg_dict", again._cfg_dict)


allow_set_device_without_cuda()
allow_checkpoint_globals()
let_settings_follow_cfg_options()
