"""Every workaround: that upstream still needs it, and that it does what it says."""

import copy
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import mmengine.runner.runner as mmengine_runner
import numpy as np
import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner.checkpoint import save_checkpoint
from xtuner.model.utils import guess_load_checkpoint
from xtuner.tools import train
from xtuner.tools.model_converters import pth_to_hf
from xtuner.utils.zero_to_any_dtype import get_state_dict_from_zero_checkpoint

from polar_xtuner import compat
from polar_xtuner.checkpoint import CheckpointError

ROOT = Path(__file__).parents[1]

BASE = """
rate = 1e-3
size = 4
double = size * 2
files = "a.jsonl"
several = ["a", "b"]
betas = (0.9, 0.95)
flag = False
nothing = None
unused = 1
model = dict(
    width=size, inner=dict(depth=double, files=files, several=several, flag=flag), nothing=nothing
)
optimizer = dict(rate=rate, betas=betas)
hooks = [dict(every=size), dict(every=double)]


def half():
    size = 1
    return size / 2


constant = half()
del half
"""

CHILD = """
_base_ = "./base.py"

size = 6
model = dict(width=size)
"""


@pytest.fixture
def config_files(tmp_path):
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "child.py").write_text(CHILD)
    return tmp_path


def loaded(file, **options):
    config = Config.fromfile(str(file))
    config.merge_from_dict(options)
    return config


# ---- Versions


@pytest.mark.parametrize("package", sorted(compat.NEEDED))
@pytest.mark.parametrize("found", ["0.0.1", "9.0", "0.10.60", "4.480.1", None])
def test_another_version_is_refused_with_both_versions_and_what_to_do(monkeypatch, package, found):
    def other(name):
        if name != package:
            return version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(compat, "version", other)
    with pytest.raises(
        ImportError,
        match=rf"with {package} {compat.NEEDED[package]}, found {found or 'none'}\. Install it "
        r"with: pip install 'polar_xtuner\[train\]'",
    ):
        compat.check_versions()


def test_releases_of_a_needed_version_are_accepted(monkeypatch):
    found = {"xtuner": "0.2.0", "transformers": "4.48.3", "mmengine": "0.10.6"}
    monkeypatch.setattr(compat, "version", found.__getitem__)
    compat.check_versions()


# ---- Upstream as it is: a process of its own, with and without the workarounds


SCRIPT = """
import json, sys
from pathlib import Path

import mmengine.optim  # tries bitsandbytes, as every run of xtuner has by then
import xtuner.model

if sys.argv[1] == "with":
    from polar_xtuner import compat
    assert compat
import torch
from mmengine.config import Config
from mmengine.dist import init_dist

folder = Path(sys.argv[2])
happened = {}


def attempt(name, function):
    try:
        happened[name] = str(function())
    except Exception as error:
        happened[name] = f"{type(error).__name__}: {error}"


def config():
    config = Config.fromfile(str(folder / "base.py"))
    config.merge_from_dict({"rate": 5.0})
    return config.rate, config.optimizer.rate


def bitsandbytes():
    import bitsandbytes
    return bitsandbytes.nn.Linear4bit, bitsandbytes.optim.AdamW8bit


attempt("checkpoint", lambda: sorted(torch.load(folder / "checkpoint.pth")))
attempt("config", config)
if not torch.cuda.is_available():
    attempt("gloo", lambda: init_dist("pytorch", backend="gloo"))
attempt("bitsandbytes", bitsandbytes)
attempt("bfloat16", lambda: torch.cpu.is_bf16_supported())
assert ("polar_xtuner" in sys.modules) == (sys.argv[1] == "with")
print(json.dumps(happened))
"""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """What happens without and with the workarounds."""
    folder = tmp_path_factory.mktemp("upstream")
    (folder / "base.py").write_text(BASE)
    torch.save(checkpoint(), folder / "checkpoint.pth")
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    happened = {}
    for which in ("without", "with"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, which, str(folder)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **process, "MASTER_PORT": "0", "PYTHONPATH": str(ROOT)},
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        happened[which] = json.loads(run.stdout.splitlines()[-1])
    return happened


def checkpoint():
    """What mmengine puts in a checkpoint beside the weights."""
    hub = MessageHub("for a test")
    for value in (0.5, np.float64(0.25), torch.tensor(2.0)):
        hub.update_scalar("train/loss", value)
    hub.update_scalar("train/accuracy", np.float32(1), count=3)
    hub.update_info("iter", 3)
    return {
        "meta": {"iter": 3, "seed": 42, "dataset_meta": None},
        "message_hub": hub.state_dict(),
        "state_dict": {"v_head.weight": torch.ones(1, 4)},
    }


def test_upstream_refuses_its_own_checkpoint(upstream):
    assert "HistoryBuffer" in upstream["without"]["checkpoint"]
    assert "UnpicklingError" in upstream["without"]["checkpoint"]
    assert upstream["with"]["checkpoint"] == str(["message_hub", "meta", "state_dict"])


def test_upstream_changes_the_variable_and_nothing_computed_from_it(upstream):
    assert upstream["without"]["config"] == "(5.0, 0.001)"
    assert upstream["with"]["config"] == "(5.0, 5.0)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream is right where there is a GPU")
def test_upstream_wants_cuda_for_gloo(upstream):
    assert "Error" in upstream["without"]["gloo"]
    assert upstream["with"]["gloo"] == "None"


@pytest.mark.skipif(find_spec("triton") is None, reason="only where triton is installed")
def test_upstream_pins_a_bitsandbytes_that_cannot_be_imported(upstream):
    assert "No module named 'triton.ops'" in upstream["without"]["bitsandbytes"]
    assert "Linear4bit" in upstream["with"]["bitsandbytes"]
    assert "AdamW8bit" in upstream["with"]["bitsandbytes"]


def test_upstream_asks_the_cpu_what_it_cannot_answer(upstream):
    assert "AttributeError" in upstream["without"]["bfloat16"]
    assert upstream["with"]["bfloat16"] == "True"


def test_upstream_compiles_an_op_for_cpus():
    deepspeed_comm = import_module("deepspeed.comm.torch")
    source = inspect.getsource(deepspeed_comm.TorchBackend)
    assert "self.shm_comm_op = build_shm_op()" in source
    assert torch.cuda.is_available() or deepspeed_comm.build_shm_op() is None


def test_upstream_writes_a_checkpoint_into_memory_first(tmp_path):
    assert "io.BytesIO()" in inspect.getsource(save_checkpoint)
    mmengine_runner.save_checkpoint(checkpoint(), str(tmp_path / "new" / "x.pth"))
    assert torch.load(tmp_path / "new" / "x.pth")["meta"] == checkpoint()["meta"]


def test_upstream_does_not_tell_torchrun_what_failed():
    assert "@record" not in Path(train.__file__).read_text()


def test_upstream_leaves_its_process_group_to_the_interpreter():
    assert "destroy_process_group" not in inspect.getsource(mmengine_runner)


FAILS = """
import sys
from polar_xtuner import compat
compat.SECONDS_TO_SEE_A_DEAD_RANK = 0
raise RuntimeError(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("message", "told"),
    [("a tensor is odd", True), ("Connection closed by peer [127.0.0.1]:1", False)],
)
def test_torchrun_is_told_of_errors_but_not_of_lost_peers(message, told, tmp_path):
    file = tmp_path / "error.json"
    env = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(file), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", FAILS, message], env=env, capture_output=True)
    assert run.returncode == 1
    assert message in run.stderr.decode()
    assert file.exists() == told
    assert not told or message in file.read_text()


def test_the_seed_to_resume_with_is_read_without_the_tensors(monkeypatch, tmp_path):
    torch.save(checkpoint(), tmp_path / "iter_3.pth")
    script = ModuleType("__main__")
    script.get_seed_from_checkpoint = None
    monkeypatch.setitem(sys.modules, "__main__", script)
    compat.read_seed_of_sound_checkpoint()
    assert script.get_seed_from_checkpoint(str(tmp_path / "iter_3.pth")) == 42
    (tmp_path / "iter_3.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"iter_3\.pth"):
        script.get_seed_from_checkpoint(str(tmp_path / "iter_3.pth"))


# ---- The converter


def test_upstream_runs_what_a_checkpoint_asks_for(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"state_dict": {}, "hook": Payload(ran)}, tmp_path / "hostile.pth")
    guess_load_checkpoint(str(tmp_path / "hostile.pth"))
    assert ran.exists()


def test_upstream_rounds_a_deepspeed_folder_to_float16():
    options = inspect.signature(get_state_dict_from_zero_checkpoint).parameters
    assert options["dtype"].default == torch.float16
    assert "get_state_dict_from_zero_checkpoint(\n" in inspect.getsource(guess_load_checkpoint)


def test_upstream_builds_reward_models_with_values():
    source = inspect.getsource(pth_to_hf.main)
    assert 'if "Reward" in model_name:\n        use_meta_init = False' in source


@pytest.fixture
def converter(monkeypatch):
    """A script that looks like the converter, patched."""
    names = ("guess_load_checkpoint", "set_module_tensor_to_device", "BUILDER")
    script = ModuleType("__main__")
    script.__dict__.update({name: getattr(pth_to_hf, name) for name in names})
    script.__file__ = pth_to_hf.__file__
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    compat.convert_checkpoints_of_any_kind()
    return script


def test_the_converter_is_given_our_loading(converter, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "a.pth")
    state = converter.guess_load_checkpoint(str(tmp_path / "a.pth"))
    assert torch.equal(state["a"].read(), torch.ones(3))


@pytest.mark.parametrize("style", ["name", "class"])
@pytest.mark.parametrize("dtype", ["torch.bfloat16", "bfloat16", "auto", None])
def test_the_converter_builds_models_without_values(converter, demo, tmp_path, dtype, style):
    from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel as Reward
    from polar_xtuner.reward_model import PolarRewardModel

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    demo.write_base(tmp_path / "base", demo.build_tokenizer(), 0, **shape)
    name = "polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained"
    llm = {
        "type": name if style == "name" else Reward.from_pretrained,
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "torch_dtype": dtype,
        "max_position_embeddings": 99,
    }
    model = {"type": "PolarRewardModel", "llm": llm}
    plain = PolarRewardModel(Config({"llm": llm}).llm)
    empty = converter.BUILDER.build(Config(model)._cfg_dict)
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = {n: (p.shape, p.dtype) for n, p in plain.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == shapes
    assert empty.config.max_position_embeddings == plain.config.max_position_embeddings == 99
    lora = {"type": "peft.LoraConfig", "r": 2, "lora_alpha": 2, "target_modules": None}
    for options in ({}, {"init_lora_weights": "pissa_niter_2"}):
        adapted = Config({**model, "lora": {**lora, **options}, "peft_model": None})._cfg_dict
        with_base = converter.BUILDER.build(adapted)
        weights = {n.replace(".base_layer", ""): p for n, p in with_base.named_parameters()}
        for name, parameter in plain.named_parameters():
            name = name.replace("llm.", "llm.base_model.model.", 1)
            value = weights[name]
            assert value.is_meta == (dtype != "auto" and not options)
            if value.is_meta:
                value = with_base._stored[value].read()
            if not options or ".w" not in name:  # PiSSA moves a part of them to the adapters
                assert torch.equal(value.to(parameter.dtype), parameter), name


def test_adapters_to_start_from_are_not_read_to_convert_others(converter, small):
    llm = {
        "type": "polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained",
        "pretrained_model_name_or_path": str(small / "base"),
    }
    lora = {"type": "peft.LoraConfig", "target_modules": None}
    model = {"type": "PolarRewardModel", "llm": llm, "lora": lora, "peft_model": "gone.pth"}
    assert converter.BUILDER.build(Config(model)._cfg_dict).v_head.weight.is_meta


def test_other_scripts_are_left_alone(monkeypatch):
    script = ModuleType("__main__")
    script.__file__ = "/a/pth_to_hf.py"
    monkeypatch.setitem(sys.modules, "__main__", script)
    hook = sys.excepthook
    compat.convert_checkpoints_of_any_kind()
    assert "BUILDER" not in vars(script)
    assert sys.excepthook is hook


# ---- Checkpoints


def test_a_log_history_comes_back_as_it_was(tmp_path):
    torch.save(checkpoint(), tmp_path / "checkpoint.pth")
    again = torch.load(tmp_path / "checkpoint.pth")
    hub = MessageHub("for another test")
    hub.load_state_dict(again["message_hub"])
    assert hub.get_scalar("train/loss").current() == 2
    assert hub.get_scalar("train/loss").mean() == pytest.approx(2.75 / 3)
    assert hub.get_info("iter") == 3


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


class Attribute:
    """Unpickles as an attribute of what is allowed itself."""

    def __init__(self, owner, name):
        self.of = owner, name

    def __reduce__(self):
        return (getattr, self.of)


@pytest.mark.parametrize(
    "hostile",
    [
        Payload,
        lambda path: os.path.join,
        lambda path: Attribute(np.ndarray, "tofile"),
        lambda path: Attribute(np.ndarray, "max"),
        lambda path: Attribute(HistoryBuffer, "__init__"),
        lambda path: Attribute(HistoryBuffer, "register_statistics"),
    ],
)
def test_no_other_code_is_let_in_with_it(tmp_path, hostile):
    ran = tmp_path / "ran"
    torch.save({**checkpoint(), "extra": hostile(ran)}, tmp_path / "checkpoint.pth")
    with pytest.raises(Exception, match=r"Weights only load failed|it is not safe"):
        torch.load(tmp_path / "checkpoint.pth")
    assert not ran.exists()


# ---- Settings of a config


def test_a_setting_reaches_all_that_is_computed_from_it(config_files):
    config = loaded(config_files / "base.py", size=10, rate=0.5, flag=True, nothing="x")
    assert config.model == {
        "width": 10,
        "inner": {"depth": 20, "files": "a.jsonl", "several": ["a", "b"], "flag": True},
        "nothing": "x",
    }
    assert (config.size, config.double) == (10, 20)
    assert config.optimizer == {"rate": 0.5, "betas": (0.9, 0.95)}
    assert config.hooks == [{"every": 10}, {"every": 20}]


def test_without_options_nothing_changes(config_files):
    for file in ("base.py", "child.py"):
        plain = Config.fromfile(str(config_files / file))
        assert loaded(config_files / file).to_dict() == plain.to_dict()
        # Nor with a value that a setting has already.
        assert loaded(config_files / file, rate=1e-3).to_dict() == plain.to_dict()


def test_a_setting_goes_through_the_base_and_through_what_overrides_it(config_files):
    plain = Config.fromfile(str(config_files / "child.py"))
    assert (plain.model.width, plain.model.inner.depth, plain.hooks[0].every) == (6, 8, 4)
    config = loaded(config_files / "child.py", size=10, rate=0.5)
    assert config.model.width == 10
    assert config.model.inner.depth == 20
    assert config.hooks[0].every == 10
    assert config.optimizer.rate == 0.5
    config = loaded(config_files / "child.py", double=3)
    assert (config.model.width, config.model.inner.depth) == (6, 3)


def test_lists_and_tuples_are_settings_too(config_files):
    config = loaded(config_files / "base.py", files=["b", "c"], betas=[0.8, 0.9], several="d")
    assert config.model.inner.files == ["b", "c"]
    assert config.model.inner.several == "d"
    assert config.optimizer.betas == [0.8, 0.9]
    config = loaded(config_files / "base.py", several=["e"])
    assert config.model.inner.several == ["e"]


def test_nested_keys_still_work_and_win(config_files):
    config = loaded(
        config_files / "child.py", **{"model.inner.depth": 1, "size": 10, "hooks.0.every": 7}
    )
    assert config.model.inner.depth == 1
    assert config.model.width == 10
    assert [hook.every for hook in config.hooks] == [7, 20]
    config = loaded(config_files / "base.py", model={"inner": {"depth": 1}})
    assert config.model.inner.depth == 1
    assert config.model.width == 4


def test_a_new_name_is_added(config_files):
    assert loaded(config_files / "base.py", work_dir="here").work_dir == "here"


def test_later_options_and_what_was_set_in_between_stay(config_files):
    config = loaded(config_files / "base.py", size=10, **{"optimizer.rate": 9})
    config.work_dir = "here"
    config.model.nothing = "replaced"
    config.merge_from_dict({"files": "b.jsonl"})
    assert (config.model.width, config.model.inner.depth) == (10, 20)
    assert config.model.inner.files == "b.jsonl"
    assert config.optimizer.rate == 9
    assert (config.work_dir, config.model.nothing) == ("here", "replaced")
    copied = copy.deepcopy(config)
    copied.merge_from_dict({"size": 11})
    assert (copied.model.inner.depth, copied.model.inner.files) == (22, "b.jsonl")
    assert config.model.inner.depth == 20


def test_a_variable_of_a_function_is_no_setting(config_files):
    assert loaded(config_files / "base.py", size=10).constant == 0.5


def test_a_config_without_a_file_merges_as_ever():
    for config in (Config.fromstring("a = 1\nb = a", ".py"), Config({"a": 1, "b": 1})):
        config.merge_from_dict({"a": 2})
        assert config.to_dict() == {"a": 2, "b": 1}


def test_the_patch_is_applied_once():
    patched = Config.merge_from_dict
    compat.let_settings_follow_cfg_options()
    assert Config.merge_from_dict is patched


def test_options_as_they_are_typed():
    config = Config.fromfile(str(ROOT / "configs" / "polar_1_8b.py"), import_custom_modules=False)
    typed = {
        "data_files": "a.jsonl,b.jsonl",
        "lr": "3e-6",
        "max_length": "8192",
        "accumulative_counts": "5",
        "betas": "(0.9,0.99)",
        "pretrained_model_name_or_path": "/models/polar",
        "model.attention": "sdpa",
    }
    config.merge_from_dict({name: DictAction._parse_iterable(v) for name, v in typed.items()})
    data = config.train_dataloader.dataset
    assert data.data_files == ["a.jsonl", "b.jsonl"]
    assert (data.max_length, data.max_packed_length) == (8192, 16384)
    assert config.optim_wrapper.optimizer.lr == 3e-6
    assert tuple(config.optim_wrapper.optimizer.betas) == (0.9, 0.99)
    assert config.optim_wrapper.accumulative_counts == 5
    assert config.train_dataloader.sampler.accumulative_counts == 5
    assert config.model.llm.pretrained_model_name_or_path == "/models/polar"
    assert data.tokenizer.pretrained_model_name_or_path == "/models/polar"
    assert config.model.attention == "sdpa"
