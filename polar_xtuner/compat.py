"""Where xtuner 0.2.0 and mmengine 0.10.6 bite: every workaround, and nothing else.

Imported by each training module; importing it checks the versions and applies the patches once.
Each patch says what happens without it; `tests/test_compat.py` fails when upstream no longer
needs one.
"""

from __future__ import annotations

import ast
import atexit
import os
import re
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
import mmengine.runner.runner as mmengine_runner  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from torch import distributed  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # noqa: E402


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
    names = ("_reconstruct", "scalar")
    functions = {name: getattr(core.multiarray, name) for name in names}
    allowed = [HistoryBuffer, *functions.values()]
    # As numpy 1 and numpy 2 call them.
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(function, f"{module}.{name}") for name, function in functions.items()]
    allowed += [numpy.ndarray, numpy.dtype, ConfigDict]  # DeepSpeed keeps its config
    kinds = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
    allowed += [type(numpy.dtype(kind)) for kind in kinds]
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


def convert_checkpoints_of_any_kind() -> None:
    """xtuner's converter, the script that runs when it loads the config, loads the checkpoint with
    `weights_only=False`, its optimizer with it, and a DeepSpeed folder in float16; since the type's
    name has "Reward" in it, it reads the base model's weights, to replace them all.

    Without: `xtuner convert pth_to_hf` runs the code that a hostile checkpoint brings, takes the
    memory of several models, and rounds the weights of a DeepSpeed run to float16. With: tensors
    stay in their files until they are written; what is wrong with them is said in one line.
    """
    script = sys.modules["__main__"]
    if Path(getattr(script, "__file__", None) or "").name != "pth_to_hf.py" or not hasattr(
        script, "guess_load_checkpoint"
    ):
        return

    def load(path: str) -> Any:
        from polar_xtuner.conversion import open_checkpoint

        return open_checkpoint(path)

    def put(model: Any, name: str, device: str, stored: Any) -> None:
        model.take(name, stored)

    def build(model: ConfigDict) -> Any:
        from xtuner.registry import BUILDER

        from polar_xtuner.conversion import adds_unseen, open_model
        from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel as Reward

        name = f"{Reward.__module__}.{Reward.__qualname__}.from_pretrained"
        if model.llm.type in (name, Reward.from_pretrained):
            lora = model.get("lora")
            lora = BUILDER.build(lora) if isinstance(lora, dict) else lora
            changes: dict[str, Any]
            if lora is None:
                changes = {"llm": {**model.llm, "type": Reward.empty}}
            elif adds_unseen(lora):  # `peft_model` would be replaced, all of it
                changes = {"llm": {**model.llm, "type": open_model}, "peft_model": None}
            else:
                changes = {"llm": {**model.llm, "low_cpu_mem_usage": True}}
            model = ConfigDict({**model, "lora": lora, **changes})
        return BUILDER.build(model)

    script.__dict__.update(
        guess_load_checkpoint=load,
        set_module_tensor_to_device=put,
        BUILDER=SimpleNamespace(build=build),
    )
    _say_in_a_line("not converted")


def test_checkpoints_of_any_kind() -> None:
    """xtuner's test script loads the checkpoint with `weights_only=False` and into whatever has its
    tensors' names, which with several processes nothing has; the runner then loads the config's
    `load_from` over it, and has tokenised the training data before.

    Without: `xtuner test` runs the code that a hostile checkpoint brings; and with several
    processes, or with `load_from`, it tests other weights than those it was given.
    """
    script = sys.modules["__main__"]
    if Path(getattr(script, "__file__", None) or "").name != "test.py" or not hasattr(
        script, "guess_load_checkpoint"
    ):
        return
    runners: list[Any] = []

    def build(cfg: Config) -> Any:
        from mmengine.registry import RUNNERS

        from polar_xtuner.runners import PolarRunner

        if cfg.get("runner_type") in (None, "Runner", "PolarRunner", PolarRunner):
            cfg.runner_type = "PolarTestRunner"
        runners.append(RUNNERS.build(cfg))
        return runners[0]

    def load(path: str | None) -> dict[str, Any]:
        from polar_xtuner.runners import take_weights

        if path is not None:
            take_weights(runners[0].model, path)
        return {}  # nothing is left for the script to load

    script.__dict__.update(
        RUNNERS=SimpleNamespace(build=build),
        Runner=SimpleNamespace(from_cfg=build),
        guess_load_checkpoint=load,
    )
    _say_in_a_line("not tested")


def _say_in_a_line(what: str) -> None:
    """What is wrong with a checkpoint is no matter for a traceback."""

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        from polar_xtuner.checkpoint import CheckpointError
        from polar_xtuner.conversion import ConversionError

        if issubclass(kind, (CheckpointError, ConversionError, OSError)):
            print(f"\n{what}: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def let_cpus_compute_in_bfloat16() -> None:
    """xtuner asks `torch.cpu.is_bf16_supported`, which does not exist, where a DeepSpeed file
    leaves the precision to it. torch computes in bfloat16 on every CPU.

    Without: `xtuner train --deepspeed deepspeed_zero2` fails on a machine that has no GPU.
    """
    if not hasattr(torch.cpu, "is_bf16_supported"):
        torch.cpu.is_bf16_supported = lambda: True  # type: ignore[attr-defined]


def leave_deepspeeds_shared_memory_op_unbuilt() -> None:
    """DeepSpeed compiles a C++ op for the communication of CPU processes, which training never
    calls.

    Without: the first run with `--deepspeed` on a machine that has no GPU compiles for minutes, in
    every process, and fails where there is no compiler.
    """
    if not torch.cuda.is_available():
        # Not `import ... as`: deepspeed.comm has an attribute `torch`, which is torch itself.
        import_module("deepspeed.comm.torch").__dict__["build_shm_op"] = lambda: None


def read_seed_of_sound_checkpoint() -> None:
    """xtuner's training script loads the whole checkpoint for its seed, before anything else.

    Without: `xtuner train --resume` takes as long again as loading does, and one that is damaged
    ends in torch's own words.
    """
    script = sys.modules["__main__"]
    if hasattr(script, "get_seed_from_checkpoint"):

        def seed(path: str) -> Any:
            from polar_xtuner.checkpoint import load_meta

            return load_meta(Path(path))["meta"]["seed"]

        script.__dict__["get_seed_from_checkpoint"] = seed


def write_checkpoints_without_copies() -> None:
    """mmengine writes a checkpoint into memory, copies that, and then writes it to the disk.

    Without: a checkpoint of all weights takes three times its size of the host's memory.
    """
    write = mmengine_runner.save_checkpoint

    def save_checkpoint(checkpoint: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        from polar_xtuner.checkpoint import atomic_file

        if "://" in filename:
            write(checkpoint, filename, *args, **kwargs)
            return
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(filename)) as file:
            torch.save(checkpoint, file)

    mmengine_runner.save_checkpoint = save_checkpoint


def tell_launcher_what_failed() -> None:
    """xtuner's training script does not tell torchrun what a process ended with.

    Without: the last thing that a run of several processes says is that one exited with status 1,
    and often not the one that failed first. With: the error itself; a process that has only lost
    another waits until the launcher has seen that one.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    show = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        show(kind, error, trace)
        if re.search(LOST_PEER, f"{kind.__name__}: {error}"):
            sys.stderr.flush()
            time.sleep(SECONDS_TO_SEE_A_DEAD_RANK)
        elif not issubclass(kind, KeyboardInterrupt):
            try:
                raise error.with_traceback(trace)  # it records what is being handled
            except BaseException as handled:
                get_error_handler().record_exception(handled)

    sys.excepthook = report


def end_gloo_before_exit() -> None:
    """mmengine leaves the process group to the end of the interpreter.

    Without: about every other run of several processes on CPUs ends in SIGABRT once it is done,
    since gloo's threads still run then (torch 2.14).
    """

    @atexit.register
    def end() -> None:
        if distributed.is_initialized() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()


LOST_PEER = r"Connection (closed|reset|refused)|Broken pipe|gloo|NCCL|Dist\w*Error|Timed out"
"""What an error of torch.distributed says where another process is gone."""

SECONDS_TO_SEE_A_DEAD_RANK = 15


allow_set_device_without_cuda()
allow_checkpoint_globals()
stand_in_for_triton_ops()
let_settings_follow_cfg_options()
convert_checkpoints_of_any_kind()
test_checkpoints_of_any_kind()
let_cpus_compute_in_bfloat16()
leave_deepspeeds_shared_memory_op_unbuilt()
read_seed_of_sound_checkpoint()
write_checkpoints_without_copies()
tell_launcher_what_failed()
end_gloo_before_exit()
