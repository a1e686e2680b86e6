"""Our decoder against the one that xtuner ships, and everything that loads a checkpoint."""

import json
import pickle
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pair_array
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.nn import functional as F
from xtuner.tools.model_converters.modeling_internlm2_reward import modeling_internlm2 as published
from xtuner.tools.model_converters.modeling_internlm2_reward.configuration_internlm2 import (
    InternLM2Config as PublishedConfig,
)

from polar_xtuner import modeling_internlm2
from polar_xtuner.attention import sdpa_attention
from polar_xtuner.cache import Group, lay_out
from polar_xtuner.collate import PackLayout, collate_pack
from polar_xtuner.modeling_internlm2 import (
    HEAD,
    InternLM2Config,
    InternLM2ForRewardModel,
    RewardHead,
    RotaryAngles,
)
from polar_xtuner.records import read_rows
from polar_xtuner.template import Candidate, PolarTemplate

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bias": False,
}


def random_model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    model = InternLM2ForRewardModel(InternLM2Config(**{**SHAPE, **changes}))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.2)
        if "norm" in name:
            parameter.data += 1
    return model.to(dtype)


def pack_of(*groups):
    """The tensors of a pack; a group is a list of distinct sequences."""
    packed = []
    for sequences in groups:
        tokens, pieces = lay_out(sequences)
        pairs = pair_array([(0, len(sequences) - 1, 0.0)])
        packed.append(Group(np.array(tokens), np.array(pieces), pairs))
    return collate_pack([{"groups": packed, "pair_weight": 1.0, "rows": []}])["data"]


def score(model, data):
    layout = PackLayout(**data["layout"])
    return model(data["input_ids_T"], data["position_ids_T"], layout, data["reward_rows_C"])


def random_group(rng, vocab_size=SHAPE["vocab_size"], longest=20):
    """Distinct sequences that share a prefix; 0 is left out, the published padding id."""
    prefix = rng.integers(1, vocab_size - 1, rng.integers(1, longest // 2)).tolist()
    number, sequences = rng.integers(1, 5), set()
    while len(sequences) < number:
        suffix = rng.integers(1, vocab_size - 1, rng.integers(0, longest // 2)).tolist()
        sequences.add((*prefix, *suffix, vocab_size - 1))
    return sorted(map(list, sequences))


def relative(ours, truth):
    return ((ours - truth).norm() / truth.norm()).item()


# ---- Scores and gradients of the published code


def published_twin(model):
    """xtuner's implementation with the shape and weights of `model`."""
    names = (*SHAPE, "rope_scaling", "rope_theta", "rms_norm_eps")
    fields = {name: getattr(model.config, name) for name in names}
    twin = published.InternLM2ForRewardModel(PublishedConfig(pretraining_tp=1, **fields))
    twin.load_state_dict(model.state_dict())
    return twin.to(model.dtype)


@pytest.fixture
def published_in_float64(monkeypatch):
    """The published code computes norms, softmax and cosines in float32 even in a float64 model,
    which would hide every difference below 1e-7. Here only their precision is changed."""

    def norm(self, x):
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def rotary(self, x, position_ids):
        inverse = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        angles = (inverse @ position_ids[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1).to(x.dtype)
        return angles.cos(), angles.sin()

    softmax = F.softmax
    monkeypatch.setattr(published.InternLM2RMSNorm, "forward", norm)
    monkeypatch.setattr(published.InternLM2RotaryEmbedding, "forward", rotary)
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype: softmax(x, dim))


def scores_and_gradients(model, compute_rewards):
    """Rewards, and the gradients of a sum that weighs each of them differently."""
    model.zero_grad()
    rewards = compute_rewards()
    (rewards * torch.linspace(-1, 2, len(rewards), dtype=rewards.dtype)).sum().backward()
    return rewards.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def published_scores(twin, groups):
    rewards = [
        twin(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
        for group in groups
        for ids in group
    ]
    return torch.cat(rewards).flatten()


def assert_as_published(model, groups, tolerance):
    twin, data = published_twin(model), pack_of(*groups)
    ours, our_gradients = scores_and_gradients(model, lambda: score(model, data))
    truth, gradients = scores_and_gradients(twin, lambda: published_scores(twin, groups))
    assert relative(ours, truth) <= tolerance
    assert our_gradients.keys() == gradients.keys()
    worst = max((relative(our_gradients[name], gradients[name]), name) for name in gradients)
    assert worst[0] <= tolerance, worst


VARIANTS = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 4},
    "one KV head, bias": {"num_key_value_heads": 1, "bias": True},
    "KV heads by default, bias": {"num_key_value_heads": None, "bias": True},
    "linear RoPE": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic RoPE": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "theta and epsilon of POLAR": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_gradients_are_those_of_the_published_code(published_in_float64, variant, seed):
    rng = np.random.default_rng(seed)
    model = random_model(seed, **VARIANTS[variant])
    assert_as_published(model, [random_group(rng) for _ in range(3)], 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_scores_are_those_of_the_untouched_published_code(variant):
    rng = np.random.default_rng(7)
    model = random_model(7, torch.float32, **VARIANTS[variant])
    assert_as_published(model, [random_group(rng) for _ in range(3)], 1e-5)


@pytest.mark.parametrize("file", ["gsm8k", "pandalm", "mt_bench", "arena_hard"])
def test_real_rows_score_as_in_the_published_code(
    published_in_float64, shared_data, internlm2_tokenizer, file
):
    template = PolarTemplate(internlm2_tokenizer, max_length=300, max_response_length=60)
    groups = [
        template.encode(
            [Candidate(r.prompt, r.reference, text, r.wrapper) for text in (*r.chosen, *r.rejected)]
        )
        for r in islice(read_rows([shared_data / f"{file}.jsonl"]), 3)
    ]
    # The ids that occur, numbered from 1: spares the embedding of 92,546.
    number = {i: n for n, i in enumerate(sorted({i for g in groups for ids in g for i in ids}), 1)}
    groups = [[[number[i] for i in ids] for ids in group] for group in groups]
    model = random_model(
        vocab_size=len(number) + 1, max_position_embeddings=300, rope_theta=1e6, rms_norm_eps=1e-5
    )
    assert_as_published(model, groups, 1e-10)


def test_dynamic_rope_serves_up_to_its_limit_and_refuses_beyond():
    scaling = {"type": "dynamic", "factor": 2.0}
    model = random_model(max_position_embeddings=12, rope_scaling=scaling)
    plain = random_model(max_position_embeddings=12)
    ids = [*range(1, 12), 59]
    assert torch.equal(score(model, pack_of([ids])), score(plain, pack_of([ids])))
    # Many sequences within the limit are no reason to refuse a pack.
    score(model, pack_of(*[[[i, *ids[1:]]] for i in range(1, 5)]))
    with pytest.raises(ValueError, match="13 tokens is longer than max_position_embeddings=12"):
        score(model, pack_of([[1, *ids]]))


# ---- Configuration


def test_config_defaults_are_those_of_the_published_code():
    ours, theirs = vars(InternLM2Config()), vars(PublishedConfig())
    left_out = {"use_cache", "attn_implementation"}  # of generation, and of their attention
    assert ours.keys() | left_out == theirs.keys() | left_out
    different = {name for name in theirs if ours.get(name) != theirs[name]}
    assert different <= left_out


def test_a_published_config_means_the_same_here():
    theirs = PublishedConfig(
        **SHAPE,
        rope_theta=1e6,
        rope_scaling={"type": "dynamic", "factor": 3.0},
        reward_token_id=5,
        pad_token_id=2,
        attn_implementation="flash_attention_2",
    )
    ours = InternLM2Config.from_dict(json.loads(theirs.to_json_string()))
    for name, value in theirs.to_dict().items():
        if name not in ("attn_implementation", "transformers_version"):
            assert getattr(ours, name) == value, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=32"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "linear or dynamic.*yarn"),
        ({"rope_scaling": {"type": "linear"}}, "with a factor >= 1, got"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "with a factor >= 1, got"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InternLM2Config(**{**SHAPE, **changes})


# ---- Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reward_head_computes_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    head = RewardHead(64)
    head.weight.data.normal_(generator=generator)
    head.to(dtype)
    hidden = torch.randn(9, 64, generator=generator).to(dtype)
    truth = hidden.double() @ head.weight.double().flatten()
    assert head(hidden).dtype == torch.float32
    assert relative(head(hidden).double(), truth) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden).dtype == torch.float32
        assert relative(head(hidden).double(), truth) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rewards_are_float32_in_half_precision_and_under_autocast(dtype):
    model, data = random_model(dtype=dtype), pack_of([[1, 2, 3, 59], [1, 2, 4, 59]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        rewards = score(model, data)
    assert rewards.dtype == torch.float32
    assert relative(rewards.double(), score(random_model(), data)) < 0.1
    steps_of_bfloat16 = rewards - rewards.bfloat16().float()
    assert steps_of_bfloat16.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_gets_all_its_inputs_in_the_dtype_it_was_checked_in(monkeypatch, dtype):
    seen = []

    def choose(name, device, dtype, heads, kv_heads, head_dim):
        def spy(q, k, v, layout):
            seen.append((dtype, q.dtype, k.dtype, v.dtype))
            assert q.shape[1:] == (heads, head_dim)
            assert k.shape[1:] == v.shape[1:] == (kv_heads, head_dim)
            return sdpa_attention(q, k, v, layout)

        return spy

    monkeypatch.setattr(modeling_internlm2, "choose_backend", choose)
    model, data = random_model(dtype=dtype), pack_of([[1, 2, 3, 59], [1, 2, 4, 59]])
    score(model, data)
    assert set(seen) == {(dtype,) * 4}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        score(model, data)
    assert set(seen) == {(torch.bfloat16,) * 4}


class AnswersInItsInputsDtype(torch.nn.Linear):
    """As bitsandbytes' layers do, under autocast too."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


def test_attention_gets_one_dtype_from_quantised_layers_too(monkeypatch):
    seen = []

    def spy(q, k, v, layout):
        seen.append((q.dtype, k.dtype, v.dtype))
        return sdpa_attention(q, k, v, layout)

    monkeypatch.setattr(modeling_internlm2, "choose_backend", lambda *_: spy)
    model, data = random_model(dtype=torch.float32), pack_of([[1, 2, 3, 59], [1, 2, 4, 59]])
    for layer in model.model.layers:
        layer.attention.wqkv.__class__ = AnswersInItsInputsDtype
    with torch.autocast("cpu", torch.bfloat16):
        score(model, data)
    assert set(seen) == {(torch.bfloat16,) * 3}


def test_half_precision_weights_leave_the_rotary_angles_alone():
    config = InternLM2Config(**SHAPE)
    positions = torch.arange(5000)
    exact = RotaryAngles(config)(positions, 5000, torch.float32)
    for rotary in (RotaryAngles(config).half(), RotaryAngles(config).bfloat16()):
        for ours, truth in zip(rotary(positions, 5000, torch.bfloat16), exact):
            assert torch.equal(ours, truth.bfloat16())


# ---- Checkpoints


POLAR_CONFIG = {
    "architectures": ["InternLM2ForRewardModel"],
    "attn_implementation": "flash_attention_2",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 64,
    "model_type": "internlm2",
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "reward_token_id": 59,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    **{name: value for name, value in SHAPE.items() if name not in ("bias",)},
}

FORMATS = ("bin", "sharded bin", "safetensors", "sharded safetensors")


def write_checkpoint(folder, tensors, form="safetensors"):
    """A checkpoint in POLAR's file layout; its code files tell if they are run."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(POLAR_CONFIG))
    for file in ("configuration_internlm2.py", "modeling_internlm2.py"):
        (folder / file).write_text("raise RuntimeError('remote code was run')\n")
    name = "pytorch_model{suffix}.bin" if "bin" in form else "model{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern=name, max_shard_size="16KB" if "sharded" in form else "1GB"
    )
    assert plan.is_sharded == ("sharded" in form)
    for file, names in plan.filename_to_tensors.items():
        shard = {n: tensors[n].contiguous() for n in names}
        if "bin" in form:
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / (name.format(suffix="") + ".index.json")).write_text(json.dumps(index))
    return str(folder)


@pytest.fixture(scope="module")
def tensors():
    return random_model(dtype=torch.float16).state_dict()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_loads_without_running_its_code(tmp_path, tensors, form, low_cpu_mem_usage):
    path = write_checkpoint(tmp_path, tensors, form)
    before = set(sys.modules)
    model = InternLM2ForRewardModel.from_pretrained(path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not [name for name in set(sys.modules) - before if "transformers_modules" in name]
    loaded = model.state_dict()
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.float()), name
    assert not model.training
    assert torch.isfinite(score(model, pack_of([[1, 2, 59], [1, 3, 59]]))).all()


def test_trust_remote_code_trusts_nothing(tmp_path, tensors):
    path = write_checkpoint(tmp_path, tensors)
    InternLM2ForRewardModel.from_pretrained(path, trust_remote_code=True)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


def test_a_bin_that_carries_code_is_refused(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "checkpoint", tensors, "bin")
    ran = tmp_path / "ran"
    content = {**tensors, "model.extra": Payload(ran)}
    torch.save(content, Path(path) / "pytorch_model.bin")
    with pytest.raises((OSError, pickle.UnpicklingError)):
        InternLM2ForRewardModel.from_pretrained(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        ("float32", torch.float32),
    ],
)
def test_the_dtype_is_what_is_asked_for(tmp_path, tensors, asked, expected):
    options = {} if asked is None else {"torch_dtype": asked}
    path = write_checkpoint(tmp_path, tensors)
    model = InternLM2ForRewardModel.from_pretrained(path, **options)
    assert {p.dtype for p in model.parameters()} == {expected}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name].to(expected))


def assert_refused_without(name, tensors, folder, form, **options):
    path = write_checkpoint(folder, {n: t for n, t in tensors.items() if n != name}, form)
    with pytest.raises(ValueError, match=f"lacks 1 tensors .*: {name}$"):
        InternLM2ForRewardModel.from_pretrained(path, **options)


def test_a_checkpoint_that_lacks_any_one_tensor_is_refused_by_name(tmp_path, tensors):
    for name in set(tensors) - {HEAD}:
        assert_refused_without(name, tensors, tmp_path / name, "bin")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", ["bin", "sharded safetensors"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.attention.wqkv.weight"])
def test_no_format_and_no_way_of_loading_hides_a_missing_tensor(
    tmp_path, tensors, name, form, low_cpu_mem_usage
):
    # The final norm has the size of other tensors.
    assert_refused_without(name, tensors, tmp_path, form, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_head_it_starts_at_zero(tmp_path, tensors, dtype, low_cpu_mem_usage):
    language_model = {name: t for name, t in tensors.items() if name != HEAD}
    language_model["output.weight"] = torch.ones(60, 32)
    path = write_checkpoint(tmp_path, language_model)
    torch.manual_seed(1)
    model = InternLM2ForRewardModel.from_pretrained(
        path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(model.v_head.weight, torch.zeros(1, 32, dtype=dtype))
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"].to(dtype))


def test_what_has_to_give_rewards_is_refused_without_a_head(tmp_path, tensors):
    language_model = {name: t for name, t in tensors.items() if name != HEAD}
    path = write_checkpoint(tmp_path / "base", language_model)
    with pytest.raises(ValueError, match=f"base has no reward head \\({HEAD}\\)"):
        InternLM2ForRewardModel.from_pretrained(path, needs_head=True)
    path = write_checkpoint(tmp_path / "reward", tensors)
    assert InternLM2ForRewardModel.from_pretrained(path, needs_head=True)


@pytest.mark.parametrize("load", ["from_pretrained", "empty"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**POLAR_CONFIG, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "gpt2"),
        ({**POLAR_CONFIG, "model_type": "qwen2", "architectures": None}, "qwen2"),
        ({"architectures": 3}, "of model_type None, not internlm2"),
        ({}, "of model_type None, not internlm2"),
        ([POLAR_CONFIG], "config.json must hold a JSON object"),
        (None, "config.json must hold a JSON object"),
        ("internlm2", "config.json must hold a JSON object"),
    ],
)
def test_another_models_config_is_refused_by_name(tmp_path, monkeypatch, load, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.delattr(InternLM2ForRewardModel, "__init__")  # of 7 billion parameters
    with pytest.raises(ValueError, match=message) as raised:
        getattr(InternLM2ForRewardModel, load)(str(tmp_path))
    assert str(raised.value).startswith(f"{tmp_path}/config.json ")


def test_a_config_is_known_by_its_type_or_its_architecture(tmp_path):
    for config in (
        {**POLAR_CONFIG, "architectures": ["InternLM2ForCausalLM"]},
        {**POLAR_CONFIG, "model_type": "polar"},
        {name: value for name, value in POLAR_CONFIG.items() if name != "architectures"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert InternLM2ForRewardModel.empty(str(tmp_path)).config.hidden_size == 32


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors"])
@pytest.mark.parametrize("left", [-1, 20, 0])
def test_a_damaged_file_is_named(tmp_path, tensors, form, left):
    path = write_checkpoint(tmp_path, tensors, form)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError) as raised:
        InternLM2ForRewardModel.from_pretrained(path)
    assert str(raised.value).startswith(f"{file} is damaged")


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, tensors):
    path = write_checkpoint(tmp_path, {**tensors, "model.norm.weight": torch.ones(31)})
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        InternLM2ForRewardModel.from_pretrained(path)


def test_a_saved_model_loads_again(tmp_path):
    model = random_model(dtype=torch.float32, bias=True, rope_theta=1e6)
    model.save_pretrained(tmp_path)
    again = InternLM2ForRewardModel.from_pretrained(tmp_path)
    data = pack_of([[1, 2, 3, 59], [1, 2, 4, 59]])
    assert torch.equal(score(again, data), score(model, data))


def test_our_weights_have_the_names_shapes_and_order_of_the_published_code():
    for changes in ({}, {"bias": True}, {"num_key_value_heads": 4}):
        model = random_model(**changes)
        theirs = published_twin(model).state_dict()
        ours = model.state_dict()
        assert [(n, t.shape) for n, t in ours.items()] == [(n, t.shape) for n, t in theirs.items()]


# ---- What a call needs


def test_there_is_no_call_without_a_layout():
    model, data = random_model(), pack_of([[1, 2, 59], [1, 3, 59]])
    with pytest.raises(TypeError):
        model(data["input_ids_T"], data["position_ids_T"])
    with pytest.raises(TypeError):
        model.model(data["input_ids_T"])


def test_the_backend_is_settled_once_for_a_device_and_dtype(monkeypatch):
    asked = []

    def choose(*arguments):
        asked.append(arguments)
        return sdpa_attention

    monkeypatch.setattr(modeling_internlm2, "choose_backend", choose)
    model, data = random_model(dtype=torch.float32), pack_of([[1, 2, 59], [1, 3, 59]])
    for _ in range(3):
        score(model, data)
    assert asked == [("auto", torch.device("cpu"), torch.float32, 4, 2, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        score(model, data)
    assert asked[1:] == [("auto", torch.device("cpu"), torch.bfloat16, 4, 2, 8)]
    model.model.attention_backend = "sdpa"
    score(model, data)
    assert asked[2:] == [("sdpa", torch.device("cpu"), torch.float32, 4, 2, 8)]
