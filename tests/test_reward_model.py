"""The mmengine model: how it is built, what it trains, what it logs and saves."""

import copy

import numpy as np
import pytest
import torch
from conftest import pair_array
from mmengine.registry import MODELS
from peft import LoraConfig
from torch.nn import functional as F
from xtuner.registry import BUILDER

from polar_xtuner.cache import Group, lay_out
from polar_xtuner.collate import collate_pack
from polar_xtuner.losses import BradleyTerryLoss
from polar_xtuner.metrics import PAIR_SUMS
from polar_xtuner.modeling_internlm2 import (
    InternLM2Config,
    InternLM2ForRewardModel,
    InternLM2MLP,
)
from polar_xtuner.reward_model import PolarRewardModel

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

REWARD = 39
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bias": False,
}
TASK_TYPES = (None, "FEATURE_EXTRACTION")


def random_llm(seed=0):
    torch.manual_seed(seed)
    llm = InternLM2ForRewardModel(InternLM2Config(**SHAPE))
    for name, parameter in llm.named_parameters():
        parameter.data.normal_(std=0.25)
        if "norm" in name:
            parameter.data += 1
    return llm


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_llm().save_pretrained(folder)
    return str(folder)


def pack(pair_weight=0.25, seed=0):
    """Three groups of three candidates, two pairs each."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(3):
        prefix = rng.integers(1, REWARD, 5).tolist()
        sequences = [[*prefix, number + 1, 2 * i + 1, REWARD] for i in range(3)]
        tokens, pieces = lay_out(sequences)
        pairs = pair_array([(0, 1, 0.0), (2, 0, 0.5)])
        groups.append(Group(np.array(tokens), np.array(pieces), pairs))
    return collate_pack([{"groups": groups, "pair_weight": pair_weight, "rows": []}])["data"]


def lora(task_type=None, **options):
    return LoraConfig(r=4, lora_alpha=8, bias="none", task_type=task_type, **options)


def with_lora(task_type=None, seed=0, **options):
    """A model whose adapters are not the identity."""
    model = PolarRewardModel(random_llm(seed), lora=lora(task_type), **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- Building


@pytest.mark.parametrize("registry", [BUILDER, MODELS], ids=["BUILDER", "MODELS"])
@pytest.mark.parametrize("style", ["classes", "names"])
def test_a_config_builds_it_by_class_and_by_name_in_both_registries(base, registry, style):
    llm_type = InternLM2ForRewardModel.from_pretrained
    types = {"classes": (PolarRewardModel, llm_type, BradleyTerryLoss, LoraConfig)}
    types["names"] = (
        "PolarRewardModel",
        "polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained",
        "BradleyTerryLoss",
        "peft.LoraConfig",
    )
    model_type, llm_type, loss_type, lora_type = types[style]
    config = {
        "type": model_type,
        "llm": {
            "type": llm_type,
            "pretrained_model_name_or_path": base,
            "torch_dtype": "torch.float32",
        },
        "loss": {"type": loss_type, "label_smoothing": 0.125},
        "attention": "sdpa",
        "lora": {"type": lora_type, "r": 4, "target_modules": None},
    }
    model = registry.build(copy.deepcopy(config))
    assert isinstance(model, PolarRewardModel)
    assert model.loss.label_smoothing == 0.125
    assert model.decoder.attention_backend == "sdpa"
    assert any("lora" in name for name in trained_names(model))
    without = registry.build({k: v for k, v in config.items() if k in ("type", "llm")})
    assert isinstance(without.loss, BradleyTerryLoss)
    truth = random_llm().state_dict()
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, truth[name.replace("llm.", "model.", 1)]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "eager"}, "attention must be one of auto, flash_attn, sdpa, got 'eager'"),
        ({"llm": torch.nn.Linear(1, 1)}, "must build an InternLM2ForRewardModel .* got Linear"),
        ({"peft_model": "adapters.pth"}, "peft_model is a checkpoint of adapters"),
        ({"loss": {"type": "BradleyTerryLoss", "loss_type": "dpo"}}, "loss_type must be one of"),
    ],
)
def test_an_option_with_no_such_value_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        PolarRewardModel(**{"llm": random_llm(), **options})


# ---- Forward


def test_forward_without_a_layout_is_an_error():
    data = pack()
    del data["layout"]
    for mode in ("tensor", "loss"):
        with pytest.raises(ValueError, match="no layout: a pack must come from"):
            PolarRewardModel(random_llm())(data, mode=mode)


def test_another_mode_is_an_error():
    with pytest.raises(ValueError, match="'predict' or 'loss', got 'scores'"):
        PolarRewardModel(random_llm())(pack(), mode="scores")


def test_mode_predict_gives_the_rewards_of_the_pairs():
    model, data = PolarRewardModel(random_llm()).eval(), pack()
    rewards = model(data)
    (of_pairs,) = model(data, mode="predict")
    assert torch.equal(of_pairs["chosen"], rewards[data["chosen_P"]])
    assert torch.equal(of_pairs["rejected"], rewards[data["rejected_P"]])


@pytest.mark.parametrize("options", [{}, {"loss_type": "focal", "penalty_type": "L2"}], ids=str)
def test_mode_loss_gives_the_loss_of_the_rewards_and_its_gradient(options):
    loss_of = BradleyTerryLoss(**options)
    model, data = PolarRewardModel(random_llm(), loss=loss_of).train(), pack()
    rewards = model(data)
    truth = loss_of(
        rewards, *(data[n] for n in ("chosen_P", "rejected_P", "pair_weights_P", "margins_P"))
    )
    gradients = torch.autograd.grad(truth, [*model.parameters()])
    loss = model(data, mode="loss")["loss"]
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    for ours, gradient in zip(torch.autograd.grad(loss, [*model.parameters()]), gradients):
        torch.testing.assert_close(ours, gradient)


def test_what_it_reports_is_sums_over_pairs_and_holds_no_graph():
    model, data = PolarRewardModel(random_llm()), pack()
    losses = model(data, mode="loss")
    assert losses.keys() == {"loss", "sums"}
    rewards = model(data).detach().double()
    r_c, r_r = rewards[data["chosen_P"]], rewards[data["rejected_P"]]
    truth = {
        "pairs": torch.tensor(6.0).double(),
        "correct": (r_c > r_r).sum().double(),
        "ties": (r_c == r_r).sum().double(),
        "chosen": r_c.sum(),
        "rejected": r_r.sum(),
        "chosen_squares": r_c.square().sum(),
        "rejected_squares": r_r.square().sum(),
    }
    assert tuple(truth) == PAIR_SUMS
    torch.testing.assert_close(losses["sums"], torch.stack([*truth.values()]))
    loss, reported = model.parse_losses(losses)
    assert loss is losses["loss"]
    assert loss.requires_grad
    assert not any(value.requires_grad for value in reported.values())
    assert torch.equal(reported["loss"], loss.detach())
    assert torch.equal(model.pack_loss, loss.detach())


def test_a_packs_tensors_go_to_the_device_and_its_lists_stay():
    model, batch = PolarRewardModel(random_llm()), {"data": pack(), "data_samples": {"rows": ["a"]}}
    model.data_preprocessor.to("meta")
    moved = model.data_preprocessor(batch, training=True)
    tensors = [v for v in moved["data"].values() if isinstance(v, torch.Tensor)]
    layout = moved["data"]["layout"]
    tensors += [layout["cu_seqlens_q"], layout["cu_seqlens_k"]]
    assert len(tensors) == 9
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert layout["query_lengths"] is batch["data"]["layout"]["query_lengths"]
    assert moved["data_samples"] == {"rows": ["a"]}


def test_training_makes_it_prefer_what_is_chosen():
    model, data = PolarRewardModel(random_llm()).train(), pack(pair_weight=1 / 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = F.softplus(-(model(data)[data["chosen_P"]] - model(data)[data["rejected_P"]])).mean()
    for _ in range(30):
        optimizer.zero_grad()
        model(data, mode="loss")["loss"].backward()
        optimizer.step()
    rewards = model(data)
    assert (rewards[data["chosen_P"]] > rewards[data["rejected_P"]]).all()
    assert model(data, mode="loss")["loss"] < 0.2 * before


# ---- State


def test_the_state_holds_every_tensor_under_the_names_of_xtuner():
    llm = random_llm()
    state = PolarRewardModel(llm).state_dict()
    expected = {name.replace("model.", "llm.", 1) for name in llm.state_dict()}
    assert set(state) == expected
    assert {"llm.tok_embeddings.weight", "llm.layers.1.attention.wqkv.weight", "v_head.weight"} <= (
        expected
    )


def test_a_state_loads_into_another_model():
    data, model, other = pack(), PolarRewardModel(random_llm(1)), PolarRewardModel(random_llm(2))
    assert not torch.allclose(model(data), other(data))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(data), other(data))


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_with_lora_only_adapters_and_head_train_and_are_saved(task_type):
    model = with_lora(task_type)
    linear = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
              "feed_forward.w3")  # fmt: skip
    expected = {"v_head.weight"} | {
        f"llm.base_model.model.layers.{layer}.{name}.lora_{side}.default.weight"
        for layer in range(2)
        for name in linear
        for side in "AB"
    }
    assert trained_names(model) == expected
    assert set(model.state_dict()) == expected

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(pack(), mode="loss")["loss"].backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == expected


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_a_state_of_adapters_and_head_is_the_whole_difference_to_the_base(task_type, tmp_path):
    data, model = pack(), with_lora(task_type)
    model.v_head.weight.data.add_(0.5)
    other = PolarRewardModel(random_llm(), lora=lora(task_type))
    assert not torch.allclose(model(data), other(data))
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not set(missing) & trained_names(other)
    assert torch.equal(model(data), other(data))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "adapters.pth")
    resumed = PolarRewardModel(
        random_llm(), lora=lora(task_type), peft_model=str(tmp_path / "adapters.pth")
    )
    assert torch.equal(model(data), resumed(data))


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_checkpointing_with_lora_computes_layers_again_to_the_same_gradients(
    monkeypatch, task_type
):
    calls = []
    forward = InternLM2MLP.forward
    monkeypatch.setattr(InternLM2MLP, "forward", lambda *x: calls.append(x) or forward(*x))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = with_lora(task_type, use_activation_checkpointing=checkpointing).double().train()
        calls.clear()
        torch.manual_seed(1)
        model(pack(), mode="loss")["loss"].backward()
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trained_names(model)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-15)
        assert gradient.abs().max() > 0, name


def test_lora_keeps_frozen_weights_in_their_dtype_and_trains_in_float32():
    model = PolarRewardModel(random_llm().bfloat16(), lora=lora())
    dtypes = {True: set(), False: set()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(pack(), mode="loss")["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_takes_the_layers_it_is_told():
    model = PolarRewardModel(random_llm(), lora=lora(target_modules=["wqkv"]))
    assert all("wqkv" in n for n in trained_names(model) - {"v_head.weight"})
    assert len(trained_names(model)) == 1 + 2 * 2


def test_adapters_that_lack_a_tensor_are_refused_by_name(tmp_path):
    state = with_lora().state_dict()
    name = next(n for n in state if "lora_B" in n)
    del state[name]
    torch.save({"state_dict": state}, tmp_path / "adapters.pth")
    with pytest.raises(ValueError, match=f"lacks 1 of the adapters' tensors: {name}"):
        PolarRewardModel(random_llm(), lora=lora(), peft_model=str(tmp_path / "adapters.pth"))


def test_a_pack_that_only_fills_a_step_counts_no_pair():
    filling = PolarRewardModel(random_llm())(pack(pair_weight=0.0), mode="loss")
    assert filling["loss"] == 0
    assert not filling["sums"].any()


def test_the_init_that_mmengine_asks_for_leaves_every_tensor_alone():
    model = with_lora()
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
