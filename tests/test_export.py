"""From a checkpoint to a folder that `AutoModel` and the servers know."""

import errno
import json
import multiprocessing
import os
import resource
import signal

import numpy as np
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from mmengine.config import Config
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, dynamic_module_utils
from xtuner.registry import BUILDER

from polar_xtuner import export
from polar_xtuner.cache import PAIR, Group, lay_out
from polar_xtuner.collate import collate_pack
from polar_xtuner.conversion import ConversionError
from polar_xtuner.golden import read_golden, verify
from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel
from polar_xtuner.reward_model import PolarRewardModel  # registers its name
from polar_xtuner.template import Candidate, PolarTemplate

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LORA = {"type": "peft.LoraConfig", "r": 4, "lora_alpha": 8, "target_modules": None}

CANDIDATES = [
    Candidate("What is two plus three?", "It makes 5.", output)
    for output in ("The answer is 5.", "The answer is 6.", "")
]


@pytest.fixture(scope="module")
def base(demo, tmp_path_factory):
    """A base checkpoint in POLAR's file layout."""
    folder = tmp_path_factory.mktemp("models") / "base"
    demo.write_base(folder, demo.build_tokenizer(), 0, **SHAPE)
    return folder


def config(base, dtype="torch.float32", **model):
    llm = {
        "type": "polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained",
        "pretrained_model_name_or_path": str(base),
        "torch_dtype": dtype,
    }
    return Config({"model": {"type": "PolarRewardModel", "llm": llm, **model}})


def trained(cfg, seed=1):
    """A model that training has moved away from its base, head and adapters included."""
    model = BUILDER.build(cfg.model)
    assert isinstance(model, PolarRewardModel)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def convert(cfg, state, save_dir, fp32=False, max_shard_size="2GB"):
    """What `xtuner convert pth_to_hf` does with a checkpoint."""
    model = BUILDER.build(cfg.model)
    for name, tensor in state.items():
        set_module_tensor_to_device(model, name, "cpu", tensor)
    model.llm.config.use_cache = True
    model.to_hf(
        cfg=cfg,
        save_dir=str(save_dir),
        fp32=fp32,
        save_pretrained_kwargs={"max_shard_size": max_shard_size, "safe_serialization": False},
        save_format="xtuner",
    )


def exported(folder):
    """All tensors of a folder, each of which must stand in one file only."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            assert content.metadata() == {"format": "pt"}
            assert not tensors.keys() & set(content.keys())
            tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return tensors


def encoded(folder):
    template = PolarTemplate(AutoTokenizer.from_pretrained(folder), 512, 128)
    return template.encode(CANDIDATES)


@torch.no_grad()
def rewards(model, sequences):
    tokens, pieces = lay_out(sequences)
    group = Group(np.array(tokens), np.array(pieces), np.empty(0, PAIR))
    return model(collate_pack([{"groups": [group], "pair_weight": 0.0, "rows": []}])["data"])


def checkpoint_names(model):
    return {name.replace("llm.", "model.", 1): t for name, t in model.state_dict().items()}


# ---- Tensors


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_names_shapes_values_and_dtype_are_those_of_the_trained_weights(
    base, tmp_path, dtype, fp32
):
    cfg = config(base, f"torch.{dtype}")
    model = trained(cfg)
    convert(cfg, model.state_dict(), tmp_path, fp32)
    expected, written = checkpoint_names(model), exported(tmp_path)
    of_base = torch.load(base / "pytorch_model.bin")
    assert written.keys() == expected.keys() == of_base.keys()
    for name, tensor in written.items():
        assert tensor.shape == of_base[name].shape
        assert tensor.dtype == (torch.float32 if fp32 else getattr(torch, dtype))
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        assert not torch.equal(tensor, of_base[name].to(tensor.dtype)), name
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["torch_dtype"] == ("float32" if fp32 else dtype)


def test_large_weights_are_sharded_with_an_index(base, tmp_path):
    cfg = config(base)
    model = trained(cfg)
    convert(cfg, model.state_dict(), tmp_path, max_shard_size="40KB")
    written = exported(tmp_path)
    expected = checkpoint_names(model)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 1
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as content:
            assert name in content.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    again = InternLM2ForRewardModel.from_pretrained(tmp_path)
    assert torch.equal(again.v_head.weight, model.v_head.weight)


# ---- Files


def test_everything_of_the_base_but_its_weights_comes_along(base, tmp_path):
    cfg = config(base)
    convert(cfg, trained(cfg).state_dict(), tmp_path)
    of_base = {file.name for file in base.iterdir()}
    assert {"configuration_internlm2.py", "modeling_internlm2.py", "tokenizer.json"} <= of_base
    here = {file.name for file in tmp_path.iterdir()}
    made = {"model.safetensors", "polar_golden.json"}
    assert here == of_base - {"pytorch_model.bin"} | made
    for name in here - made - {"config.json"}:
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes(), name
    fields, fields_of_base = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, base)
    )
    assert fields == fields_of_base
    assert "AutoModel" in fields["auto_map"]


def test_no_weights_and_no_index_of_the_base_are_left_beside_the_new_ones(base, tmp_path):
    sharded = tmp_path / "sharded"
    cfg = config(base)
    convert(cfg, trained(cfg, 1).state_dict(), sharded, max_shard_size="40KB")
    (sharded / "pytorch_model.bin.index.json").write_text("{}")
    cfg = config(sharded)
    convert(cfg, trained(cfg, 2).state_dict(), tmp_path / "export")
    assert [file.name for file in (tmp_path / "export").glob("*.index.json")] == []
    assert [file.name for file in (tmp_path / "export").glob("*.bin")] == []
    assert [file.name for file in (tmp_path / "export").glob("*.safetensors")] == [
        "model.safetensors"
    ]


def test_an_export_over_another_leaves_no_weights_that_would_be_loaded_in_its_place(base, tmp_path):
    cfg = config(base)
    first, second = trained(cfg, 1).state_dict(), trained(cfg, 2).state_dict()
    convert(cfg, first, tmp_path)
    with pytest.raises(ValueError, match=r"weights of another export: model\.safetensors"):
        convert(cfg, second, tmp_path, max_shard_size="40KB")
    loaded = InternLM2ForRewardModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.v_head.weight, first["v_head.weight"]), "nothing was written"
    convert(cfg, second, tmp_path)
    loaded = InternLM2ForRewardModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.v_head.weight, second["v_head.weight"])
    sharded = tmp_path / "sharded"
    convert(cfg, first, sharded, max_shard_size="40KB")
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"another export: model\.safetensors\.index\.json\."):
        convert(cfg, second, sharded)


# ---- Scores


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("max_shard_size", ["2GB", "40KB"])
def test_automodel_loads_the_export_and_gives_the_same_scores(
    base, tmp_path, monkeypatch, lora, max_shard_size
):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    cfg = config(base, **({"lora": lora} if lora else {}))
    model = trained(cfg)
    folder = tmp_path / "export"
    convert(cfg, model.state_dict(), folder, max_shard_size=max_shard_size)
    sequences = encoded(folder)
    truth = rewards(model, sequences)
    assert truth.std() > 1e-2

    published = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(published).__module__.startswith("transformers_modules.")

    @torch.no_grad()
    def scores(sequences):
        return [
            published(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits.item()
            for ids in sequences
        ]

    torch.testing.assert_close(torch.tensor(scores(sequences)), truth, rtol=1e-5, atol=1e-5)
    golden = read_golden(folder)
    ids = [row.ids for row in golden.rows]
    assert verify(golden, ids, scores(ids), "float32").ok

    ours = PolarRewardModel(InternLM2ForRewardModel.from_pretrained(folder))
    torch.testing.assert_close(rewards(ours, sequences), truth, rtol=1e-5, atol=1e-5)


def test_merged_adapters_are_in_the_dtype_of_their_base(base, tmp_path):
    cfg = config(base, "torch.bfloat16", lora=LORA)
    model = trained(cfg)
    convert(cfg, model.state_dict(), tmp_path)
    written = exported(tmp_path)
    of_base = torch.load(base / "pytorch_model.bin")
    assert written.keys() == of_base.keys()
    decoder = {name: t for name, t in written.items() if name != "v_head.weight"}
    assert {tensor.dtype for tensor in decoder.values()} == {torch.bfloat16}
    changed = {n for n, t in decoder.items() if not torch.equal(t, of_base[n].bfloat16())}
    assert changed == {n for n in decoder if "attention.w" in n or "feed_forward.w" in n}


# ---- An export that does not come to its end


def is_no_model(folder):
    with pytest.raises((OSError, ValueError)):
        InternLM2ForRewardModel.from_pretrained(folder)
    return not list(folder.glob("*.safetensors"))


def test_a_disk_that_fills_up_is_reported_and_leaves_nothing(base, tmp_path):
    cfg = config(base)
    state = trained(cfg).state_dict()
    folder = tmp_path / "export"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an OSError
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(
            ConversionError, match=rf"no model was written to {folder}: .*too large"
        ):
            convert(cfg, state, folder, max_shard_size="40KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(folder.iterdir())


def test_a_killed_export_leaves_no_model_and_the_next_one_clears_up(base, tmp_path):
    cfg = config(base)
    state = trained(cfg).state_dict()
    folder = tmp_path / "export"

    def killed():
        written = []

        def write(file, tensors, write=export._write_safetensors):
            if len(written) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, tensors)
            written.append(file)

        export._write_safetensors = write
        convert(cfg, state, folder, max_shard_size="40KB")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert is_no_model(folder)
    convert(cfg, state, folder)
    names = {file.name for file in folder.iterdir()}
    made = {"model.safetensors", "polar_golden.json"}
    assert names == {file.name for file in base.iterdir()} - {"pytorch_model.bin"} | made
    loaded = InternLM2ForRewardModel.from_pretrained(folder)
    assert torch.equal(loaded.v_head.weight, state["v_head.weight"])


def test_an_earlier_export_stays_whole_if_the_next_one_fails(base, tmp_path, monkeypatch):
    cfg = config(base)
    first, second = trained(cfg, 1).state_dict(), trained(cfg, 2).state_dict()
    convert(cfg, first, tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(file, tensors):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(export, "_write_safetensors", full)
    with pytest.raises(ConversionError, match="No space left on device"):
        convert(cfg, second, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


# ---- What is refused


def test_a_weight_that_overflows_the_written_dtype_is_refused_by_name(base, tmp_path):
    cfg = config(base)
    tensors = checkpoint_names(trained(cfg))
    tensors["model.norm.weight"] = torch.full((32,), 1e5)
    with pytest.raises(ConversionError, match=r"infinity: model\.norm\.weight$"):
        export.export_hf(tensors, str(base), tmp_path / "export", torch.float16)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_a_checkpoint_that_lacks_any_one_tensor_is_refused_by_name(base, tmp_path, lora):
    cfg = config(base, **({"lora": lora} if lora else {}))
    state = trained(cfg).state_dict()
    folder = tmp_path / "export"
    for name in state:
        less = {n: t for n, t in state.items() if n != name}
        with pytest.raises(ValueError, match=rf"lacks 1 of the {len(state)} tensors.*: {name}\. "):
            convert(cfg, less, folder)
    with pytest.raises(
        ValueError, match=rf"lacks {len(state)} of the {len(state)} tensors.*\.\.\."
    ):
        convert(cfg, {}, folder)
    assert not folder.exists()
    convert(cfg, state, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused_by_name(base, tmp_path, value):
    cfg = config(base)
    state = trained(cfg).state_dict()
    state["llm.layers.1.ffn_norm.weight"][3] = value
    folder = tmp_path / "export"
    with pytest.raises(ValueError, match=r"infinity: model\.layers\.1\.ffn_norm\.weight$"):
        convert(cfg, state, folder)
    assert not folder.exists()
