"""Checkpoints of every kind give the same tensors; those that cannot, and why."""

import copy
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CONVERT, run_forked
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from huggingface_hub import constants, split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mmengine.config import Config
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from polar_xtuner.checkpoint import CheckpointError
from polar_xtuner.conversion import (
    ConversionError,
    StoredTensor,
    _let_go,
    _of_base,
    adds_unseen,
    load_weights,
    open_checkpoint,
    open_model,
)
from polar_xtuner.modeling_internlm2 import HEAD, InternLM2ForRewardModel
from polar_xtuner.reward_model import PolarRewardModel

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

ROOT = Path(__file__).parents[1]
FULL = ("zero1", "zero2", "zero3", "bfloat16")
LORA = ("lora2", "lora3", "frozen3")
LORA_OPTIONS = ("model.lora.type=peft.LoraConfig", "model.lora.r=3", "model.lora.lora_alpha=8")


def convert(odd_config, checkpoint, out, *options):
    """The converter itself: `xtuner convert` drops its exit status."""
    options = ("--cfg-options", *options) if options else ()
    return run_forked(CONVERT, odd_config, checkpoint, out, *options)


def refused(odd_config, checkpoint, out, *options):
    """What the user sees last; nothing may have been written."""
    result = convert(odd_config, checkpoint, out, *options)
    assert result.returncode == 1, result.stderr
    assert not out.exists() or not any(out.iterdir())
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("not converted: ")
    return last


def pieces_of(stored):
    (pieces,) = stored.source.args
    return pieces


# ---- The same tensors


@pytest.mark.parametrize("kind", [*FULL, *LORA])
def test_a_deepspeed_folder_gives_the_float32_weights_bit_for_bit(zero_checkpoints, kind):
    stored = open_checkpoint(zero_checkpoints / kind)
    assert any(len(pieces_of(tensor)) > 1 for tensor in stored.values()), "none spans partitions"
    truth = torch.load(zero_checkpoints / f"{kind}.pth")["state_dict"]
    weights = load_weights(zero_checkpoints / kind)
    assert truth.keys() <= weights.keys()
    for name, tensor in truth.items():
        assert weights[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(weights[name], tensor), name
    frozen = weights.keys() - truth.keys()
    assert bool(frozen) == (kind == "frozen3")


def test_frozen_parameters_that_were_saved_are_those_of_the_base(zero_checkpoints, odd_config):
    base = torch.load(odd_config.parent / "base" / "pytorch_model.bin")
    weights = load_weights(zero_checkpoints / "frozen3")
    frozen = {
        name: t for name, t in weights.items() if "lora_" not in name and "v_head" not in name
    }
    assert len(frozen) == len(base) - 1
    for name, tensor in frozen.items():
        of_base = name.replace("llm.base_model.model.", "model.").replace(".base_layer", "")
        assert torch.equal(tensor, base[of_base]), name


@pytest.mark.parametrize("name", ["state_dict", "tensors alone"])
def test_a_file_gives_its_tensors_as_they_are(tmp_path, name):
    state = {
        "single": torch.randn(3, 5),
        "half": torch.randn(7, 2).bfloat16(),
        "turned": torch.randn(4, 6).t(),
        "scalar": torch.tensor(3.0),
    }
    content = {"state_dict": state, "optimizer": {}} if name == "state_dict" else state
    torch.save(content, tmp_path / "a.pth")
    weights = load_weights(tmp_path / "a.pth")
    assert weights.keys() == state.keys()
    for name, tensor in state.items():
        assert weights[name].dtype == tensor.dtype
        assert weights[name].is_contiguous()
        assert torch.equal(weights[name], tensor), name


@hypothesis_settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 7),
)
def test_any_sizes_and_processes_give_what_deepspeed_itself_gives(
    bench_convert, tmp_path_factory, sizes, stage, processes
):
    groups = [
        {f"{number}.{place}": torch.randn(size) for place, size in enumerate(of_group)}
        for number, of_group in enumerate(sizes)
    ]
    groups[0]["matrix"] = torch.randn(7, 11)
    groups[0]["vector"] = torch.randn(2 * 7 * 60)  # so that no process is left without a part
    folder = tmp_path_factory.mktemp("zero")
    bench_convert.write_zero(folder / "iter_1.pth", groups, stage, processes)
    truth = {name: tensor for group in groups for name, tensor in group.items()}
    weights = load_weights(folder / "iter_1.pth")
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), "iter_1.pth")
    assert weights.keys() == theirs.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(weights[name], tensor), name
    shutil.rmtree(folder)


def test_pages_that_are_let_go_come_back_from_the_file(tmp_path):
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    torch.save({"a": tensor}, tmp_path / "a.pth")
    (stored,) = open_checkpoint(tmp_path / "a.pth").values()
    for _ in range(3):
        assert torch.equal(stored.read(), tensor)
        _let_go(pieces_of(stored)[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells resident pages")
@pytest.mark.parametrize("name", ["a.pth", "pytorch_model.bin", "model.safetensors"])
def test_reading_leaves_none_of_a_checkpoint_or_base_in_memory(tmp_path, name):
    write = save_file if name == "model.safetensors" else torch.save
    write({str(n): torch.ones(1 << 22) for n in range(16)}, tmp_path / name)

    def resident():
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").open())
        return int(fields["RssFile"].split()[0]) / 1024

    stored = open_checkpoint(tmp_path / name) if name == "a.pth" else _of_base(str(tmp_path))
    assert len(stored) == 16
    before = resident()
    for tensor in stored.values():
        tensor.read()
        assert resident() - before < 32  # of 256 MB


def test_a_tensor_is_read_in_the_dtype_asked_for():
    values = torch.randn(5, 3)
    stored = StoredTensor.of(values).to(torch.bfloat16)
    assert stored.nbytes == 30
    assert torch.equal(stored.read(), values.bfloat16())


# ---- The same model


def test_a_folder_converts_to_the_model_of_the_file(zero_checkpoints, odd_config, tmp_path):
    """By the real command; the other kinds of folder are compared above, tensor by tensor."""
    of_kind = {}
    kinds = ("zero2", LORA[0])
    for kind in kinds:
        for form in ("", ".pth"):
            out = tmp_path / f"{kind}{form}"
            options = LORA_OPTIONS if kind in LORA else ()
            result = convert(odd_config, zero_checkpoints / f"{kind}{form}", out, *options)
            assert result.returncode == 0, result.stderr
            of_kind[kind + form] = load_file(out / "model.safetensors")
    for kind in kinds:
        folder, file = of_kind[kind], of_kind[f"{kind}.pth"]
        assert folder.keys() == file.keys()
        for name in folder:
            assert folder[name].dtype == torch.float32
            assert torch.equal(folder[name], file[name]), (kind, name)
    trained = torch.load(zero_checkpoints / "zero2.pth")["state_dict"]
    for name, tensor in of_kind["zero2"].items():
        assert torch.equal(tensor, trained[name.replace("model.", "llm.", 1)]), name


# ---- LoRA: the values of the base stay in its files

FORMS = ("bin", "safetensors", "sharded bin", "sharded safetensors")


@pytest.fixture(scope="module")
def of_base(odd_config):
    """A base's weights, with biases, and no two of the same values."""
    torch.manual_seed(5)
    base = odd_config.parent / "base"
    fields = json.loads((base / "config.json").read_text()) | {"bias": True}
    config_class = InternLM2ForRewardModel.config_class
    state = InternLM2ForRewardModel(config_class(**fields)).state_dict()
    return {name: torch.randn(tensor.shape) for name, tensor in state.items()}


def write_base(folder, odd_config, weights, form="bin"):
    """The base model of `odd_config` with other weights, as files of that form."""
    shutil.copytree(odd_config.parent / "base", folder, ignore=shutil.ignore_patterns("*.bin"))
    fields = json.loads((folder / "config.json").read_text()) | {"bias": True}
    (folder / "config.json").write_text(json.dumps(fields))
    is_bin, is_sharded = "bin" in form, "sharded" in form
    name = "pytorch_model{suffix}.bin" if is_bin else "model{suffix}.safetensors"
    size = "40KB" if is_sharded else "1GB"
    plan = split_torch_state_dict_into_shards(weights, filename_pattern=name, max_shard_size=size)
    assert plan.is_sharded == is_sharded
    for file, names in plan.filename_to_tensors.items():
        shard = {n: weights[n] for n in names}
        if is_bin:
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file, metadata={"format": "pt"})
    if is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{name.format(suffix='')}.index.json").write_text(json.dumps(index))
    return str(folder)


def on_meta(model):
    (is_meta,) = {parameter.is_meta for parameter in model.parameters()}
    return is_meta


def assert_merges_as_peft_does(base, out, dtype, **lora):
    """By the files of the export, bit for bit: our sums and those of a model that peft filled."""
    lora = LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": None, **lora})
    assert adds_unseen(lora)
    loaded = InternLM2ForRewardModel.from_pretrained(base, torch_dtype=dtype)
    model = PolarRewardModel(loaded, lora=copy.deepcopy(lora))
    torch.manual_seed(6)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, strict=False)
    model.llm = model.llm.merge_and_unload()
    truth = {n.replace("llm.", "model.", 1): t for n, t in model.named_parameters()}

    stored = PolarRewardModel(open_model(base, torch_dtype=dtype), lora=copy.deepcopy(lora))
    for name, tensor in state.items():
        stored.take(name, StoredTensor.of(tensor))
    assert all(p.is_meta for name, p in stored.named_parameters() if name not in state)
    cfg = Config({"model": {"llm": {"pretrained_model_name_or_path": base}}})
    stored.to_hf(cfg, out)
    written = load_file(out / "model.safetensors")
    assert written.keys() == truth.keys()
    for name, tensor in truth.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    return written


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.float32) for form in FORMS), ("bin", torch.bfloat16), ("bin", torch.float16)],
    ids=str,
)
def test_adapters_are_merged_as_peft_does_in_a_loaded_model(
    odd_config, of_base, tmp_path, form, dtype
):
    weights = {name: tensor.half() for name, tensor in of_base.items()}
    base = write_base(tmp_path / "base", odd_config, weights, form)
    written = assert_merges_as_peft_does(base, tmp_path / "hf", dtype)
    changed = {n for n, t in written.items() if not torch.equal(t, weights[n].to(t.dtype))}
    assert changed == {n for n in weights if ".layers." in n and weights[n].dim() == 2} | {HEAD}


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"wo": 5}, "alpha_pattern": {"w1": 2}},
        {"target_modules": ["wqkv", "w2"], "exclude_modules": ["layers.0.attention.wqkv"]},
        {"target_modules": ["tok_embeddings", "wo"]},
        {"target_modules": ["wqkv", "wo"], "lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_every_plain_configuration_is_merged_as_peft_does(odd_config, of_base, tmp_path, lora):
    base = write_base(tmp_path / "base", odd_config, of_base)
    assert_merges_as_peft_does(base, tmp_path / "hf", torch.bfloat16, **lora)


@pytest.mark.parametrize(
    "lora",
    [
        *({"init_lora_weights": init} for init in ("pissa", "olora", "corda", "orthogonal")),
        *({"use_dora": True}, {"modules_to_save": ["norm"]}, {"layer_replication": [(0, 2)]}),
        *({"trainable_token_indices": [1]}, {"target_parameters": ["w"]}),
    ],
    ids=str,
)
def test_what_starts_from_the_weights_or_changes_the_model_is_not_plain(lora):
    assert not adds_unseen(LoraConfig(**lora))


def test_what_is_no_lora_is_not_plain():
    assert not adds_unseen(None)
    assert not adds_unseen(type("Other", (LoraConfig,), {})())


def test_the_values_stay_in_the_files_of_the_base(odd_config, of_base, tmp_path):
    base = write_base(tmp_path / "base", odd_config, of_base)
    model = open_model(base, torch_dtype=torch.bfloat16, trust_remote_code=True, rope_theta=2.0)
    assert on_meta(model)
    assert model.config.rope_theta == 2
    assert model.stored.keys() == of_base.keys()
    for name, tensor in of_base.items():
        assert torch.equal(model.stored[name].read(), tensor.bfloat16()), name


@pytest.mark.parametrize("form", FORMS)
def test_a_base_that_lacks_a_tensor_is_refused_by_name(odd_config, of_base, tmp_path, form):
    name = "model.norm.weight" if "bin" in form else "model.layers.1.attention.wqkv.bias"
    weights = {n: t for n, t in of_base.items() if n != name}
    base = write_base(tmp_path / "base", odd_config, weights, form)
    with pytest.raises(ValueError, match=f"{base} lacks 1 tensors of .*: {name}$"):
        open_model(base, torch_dtype=torch.float32)


def test_a_base_may_lack_the_reward_head(odd_config, of_base, tmp_path):
    weights = {n: t for n, t in of_base.items() if n != HEAD}
    base = write_base(tmp_path / "base", odd_config, weights)
    model = open_model(base)
    assert on_meta(model)
    assert of_base.keys() - model.stored.keys() == {HEAD}
    written = assert_merges_as_peft_does(base, tmp_path / "hf", torch.float32)
    assert written.keys() == of_base.keys()


def test_what_is_out_of_the_ordinary_is_loaded_as_in_training(odd_config, of_base, tmp_path):
    base = write_base(tmp_path / "base", odd_config, of_base)
    old = write_base(tmp_path / "old", odd_config, {})
    torch.save(of_base, Path(old, "pytorch_model.bin"), _use_new_zipfile_serialization=False)
    decoder = {n.removeprefix("model."): t for n, t in of_base.items() if n != HEAD}
    decoder_only = write_base(tmp_path / "decoder", odd_config, decoder)
    for path, options in ((base, {"torch_dtype": "auto"}), (base, {"revision": "main"}), (old, {})):
        model = open_model(path, **options)
        assert not on_meta(model)
        assert all(torch.equal(t, of_base[n]) for n, t in model.state_dict().items())
    decoder = open_model(decoder_only).model
    assert all(torch.equal(t, of_base[f"model.{n}"]) for n, t in decoder.state_dict().items())


def test_a_base_of_another_shape_than_its_config_is_refused_by_name(odd_config, of_base, tmp_path):
    other = {**of_base, "model.norm.weight": torch.ones(41)}
    base = write_base(tmp_path / "base", odd_config, other)
    with pytest.raises(
        ConversionError, match=r"norm\.weight has shape \(41,\), by its config \(40,"
    ):
        open_model(base)


def test_a_damaged_or_hostile_base_is_refused(odd_config, of_base, tmp_path):
    base = write_base(tmp_path / "base", odd_config, of_base)
    torch.save({**of_base, "hook": Payload(tmp_path / "ran")}, Path(base, "pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=f"{base}/pytorch_model.bin is refused"):
        open_model(base)
    assert not (tmp_path / "ran").exists()


def test_a_base_of_the_hub_is_read_where_it_was_downloaded_to(
    odd_config, of_base, tmp_path, monkeypatch
):
    folder = tmp_path / "models--polar--base"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    write_base(folder / "snapshots" / ("0" * 40), odd_config, of_base, "sharded safetensors")
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stored = _of_base("polar/base")
    assert stored.keys() == of_base.keys()
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in of_base.items())


# ---- What is refused


@pytest.fixture
def folder(zero_checkpoints, tmp_path):
    """A DeepSpeed checkpoint to do damage to."""
    shutil.copytree(zero_checkpoints / "zero3", tmp_path / "iter_1.pth")
    return tmp_path / "iter_1.pth"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


@pytest.mark.parametrize("where", ["file", "model_states", "optim_states"])
def test_a_hostile_checkpoint_is_refused_and_does_not_run(folder, odd_config, tmp_path, where):
    ran = tmp_path / "ran"
    if where == "file":
        checkpoint = hostile = tmp_path / "hostile.pth"
        torch.save({"state_dict": {"a": torch.ones(1)}, "hook": Payload(ran)}, hostile)
    else:
        checkpoint, hostile = folder, folder / f"zero_pp_rank_1_mp_rank_00_{where}.pt"
        torch.save({**torch.load(hostile, weights_only=False), "hook": Payload(ran)}, hostile)
    message = refused(odd_config, checkpoint, tmp_path / "hf")
    assert f"{hostile} is refused" in message
    assert "may run code" in message
    assert not ran.exists()


def test_a_missing_path_is_named(odd_config, tmp_path):
    assert str(tmp_path / "none.pth") in refused(odd_config, tmp_path / "none.pth", tmp_path / "hf")


def test_a_work_dir_is_refused_with_the_checkpoints_in_it(folder):
    with pytest.raises(CheckpointError, match=r"no \*_model_states\.pt: give one .* iter_1\.pth$"):
        open_checkpoint(folder.parent)


@pytest.mark.parametrize("file", ["model.safetensors", "a.txt", "plain.pkl", "strings.pth"])
def test_what_is_no_checkpoint_is_refused(tmp_path, file):
    path = tmp_path / file
    if file == "strings.pth":
        torch.save({"state_dict": {"a": "b"}}, path)
    elif file == "plain.pkl":
        path.write_bytes(pickle.dumps({"a": np.ones(3)}))
    else:
        path.write_bytes(b"nothing")
    with pytest.raises((CheckpointError, ConversionError), match=str(path)):
        open_checkpoint(path)


def test_one_file_of_a_folder_is_refused_with_the_folder(folder):
    for file in folder.iterdir():
        with pytest.raises(ConversionError, match=f"one file of a DeepSpeed .*: give {folder}$"):
            open_checkpoint(file)


def test_each_file_that_a_folder_lacks_is_named(folder):
    for name in ("model", "optim"):
        for rank in (0, 1):
            file = folder / f"zero_pp_rank_{rank}_mp_rank_00_{name}_states.pt"
            if (name, rank) == ("model", 1):
                continue  # not needed for the weights
            content = file.read_bytes()
            file.unlink()
            with pytest.raises(CheckpointError, match=f"not whole: it lacks {file.name}"):
                open_checkpoint(folder)
            file.write_bytes(content)
    assert open_checkpoint(folder)


def test_a_damaged_value_is_found(folder):
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with zipfile.ZipFile(file) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(file.read_bytes())
    content[record.header_offset + record.file_size // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        open_checkpoint(folder)


def test_a_truncated_file_is_found(folder):
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=str(file)):
        open_checkpoint(folder)


@pytest.mark.parametrize("stage", [1, 3])
def test_files_of_different_runs_are_refused(bench_convert, tmp_path, stage):
    for name, size in (("a", 100), ("b", 200)):
        bench_convert.write_zero(tmp_path / name, [{"x": torch.randn(size, 3)}], stage, 2)
    file = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copyfile(tmp_path / "a" / file, tmp_path / "b" / file)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'b'} mixes the files of several runs"):
        open_checkpoint(tmp_path / "b")


@pytest.fixture
def state(zero_checkpoints):
    return torch.load(zero_checkpoints / "zero2.pth")["state_dict"]


def test_another_shape_is_refused_with_both(state, odd_config, tmp_path):
    name = "llm.layers.1.attention.wo.weight"
    torch.save({**state, name: torch.ones(40, 41)}, tmp_path / "a.pth")
    message = refused(odd_config, tmp_path / "a.pth", tmp_path / "hf")
    assert f"{name} has shape (40, 41) in the checkpoint and (40, 40) in the model" in message


def test_unexpected_tensors_are_refused_by_name(zero_checkpoints, state, odd_config, tmp_path):
    torch.save({**state, "llm.extra.weight": torch.ones(3)}, tmp_path / "a.pth")
    assert "model lacks: llm.extra.weight." in refused(
        odd_config, tmp_path / "a.pth", tmp_path / "hf"
    )
    message = refused(
        odd_config, zero_checkpoints / "lora2", tmp_path / "hf"
    )  # without the run's options
    assert "that this model lacks: llm.base_model.model." in message
    assert "model.lora" in message


def test_lacking_tensors_are_refused_by_name(state, odd_config, tmp_path):
    name = "llm.layers.0.ffn_norm.weight"
    torch.save({n: t for n, t in state.items() if n != name}, tmp_path / "a.pth")
    message = refused(odd_config, tmp_path / "a.pth", tmp_path / "hf")
    assert f"lacks 1 of the {len(state)} tensors of this model: {name}." in message


# ---- The tool that measures


def test_the_benchmark_converts_exactly(tmp_path):
    result = run_forked(
        *(ROOT / "tools" / "bench_convert.py", "--json", "--folder", tmp_path, "--kinds", "zero3"),
        *("--hidden-size", 64, "--layers", 1, "--vocab-size", 300),
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["kind"] == "zero3"
    assert figures["exact"]
    assert figures["peak_gb"] > figures["anonymous_gb"] > 0
    assert not any(tmp_path.iterdir())
