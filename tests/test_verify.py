"""Golden scores through running servers: the right one is accepted, all others are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from protocol_servers import ENGINES, cut_last, drop_bos, running, tiny_model

from polar_xtuner.client import RewardModelClient
from polar_xtuner.connection import Limits
from polar_xtuner.export import export_hf
from polar_xtuner.golden import GOLDEN, read_golden
from polar_xtuner.protocols import ServerError
from polar_xtuner.tokenizer import TokenizerError

IMPATIENT = Limits(timeout=20.0, retry_delay=0.05, max_retries=2)
ITEMS = [{"prompt": "what is one plus one", "reference": "two", "output": f"so {i}"} for i in "123"]


def make(demo: ModuleType, folder: Path, seed: int, change: Any = None) -> Path:
    """A converted checkpoint with a head that tells outputs apart."""
    base, model = folder / "base", folder / "model"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    demo.write_base(base, demo.build_tokenizer(), seed, **shape)
    weights = torch.load(base / "pytorch_model.bin")
    torch.manual_seed(seed)
    weights["v_head.weight"].normal_()
    if change is not None:
        change(weights)
    export_hf(weights, str(base), model)
    return model


@pytest.fixture(scope="module")
def model(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(demo, tmp_path_factory.mktemp("model"), 0)


def vocab_size(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def connected(folder: Path, engine: str, address: str, **options: Any) -> RewardModelClient:
    return RewardModelClient(
        str(folder), 1024, 256, "right", engine, address, limits=IMPATIENT, **options
    )


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_the_right_server_is_accepted(engine: str, version: str, model: Path) -> None:
    size = vocab_size(model)
    with (
        running(engine, version, tiny_model(model), vocab_size=size, raw=True) as server,
        connected(model, engine, server.address) as client,
    ):
        found = client.verify()
        golden = read_golden(model)
        assert golden is not None
        assert found.ok, found.problems
        assert found.n == len(golden.rows) > 24
        assert found.max_difference < found.tolerance < 1e-3
        assert found.dtype == "float32"
        client(ITEMS)


def test_it_is_verified_once_unless_told_not_to(model: Path) -> None:
    size = vocab_size(model)
    golden = read_golden(model)
    assert golden is not None
    with running("vllm", "0.32.0", tiny_model(model), vocab_size=size) as server:
        with connected(model, "vllm", server.address) as client:
            for _ in range(3):
                client(ITEMS)
            assert server.items_answered == len(golden.rows) + 9
        with connected(model, "vllm", server.address, verify=False) as client:
            client(ITEMS)
            assert server.items_answered < len(golden.rows) + 9 + 3 + 10


def one_layer_off(weights: dict[str, Any], factor: Any) -> None:
    for name, tensor in weights.items():
        if name.startswith("model.layers.1."):
            tensor.mul_(factor(tensor))


WRONG = {
    "another model": (1, None),
    "a layer scaled by 1 %": (0, lambda weights: one_layer_off(weights, lambda t: 1.01)),
    "a layer with noise of 1 %": (
        0,
        lambda weights: one_layer_off(weights, lambda t: 1 + 0.01 * torch.randn(t.shape)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_weights_are_rejected(
    name: str, model: Path, demo: ModuleType, tmp_path: Path
) -> None:
    seed, change = WRONG[name]
    other = make(demo, tmp_path, seed, change)
    size = vocab_size(model)
    with (
        running("sglang", "0.5.23", tiny_model(other), vocab_size=size) as server,
        connected(model, "sglang", server.address) as client,
    ):
        found = client.verify()
        assert not found.ok
        assert any("weights" in problem for problem in found.problems)
        with pytest.raises(ServerError, match="does not give the golden scores"):
            client(ITEMS)


@pytest.mark.parametrize("lossy", [drop_bos, cut_last])
def test_lost_tokens_are_rejected(lossy: Any, model: Path) -> None:
    score = lossy(tiny_model(model))
    with (
        running("lmdeploy", "0.18.0", score, vocab_size=vocab_size(model)) as server,
        connected(model, "lmdeploy", server.address) as client,
    ):
        found = client.verify()
        assert not found.ok
        assert any("loses tokens" in problem for problem in found.problems)


def test_an_activation_is_rejected_and_the_flag_named(model: Path) -> None:
    size = vocab_size(model)
    with (
        running("vllm", "0.10.2", tiny_model(model), vocab_size=size, step=True) as server,
        connected(model, "vllm", server.address) as client,
    ):
        found = client.verify()
        assert not found.ok
        assert any("sigmoid" in problem for problem in found.problems)
        assert any("--override-pooler-config" in problem for problem in found.problems)


def test_a_tokenizer_that_drops_spaces_is_rejected(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    drop = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    before = [settings["normalizer"]] if settings["normalizer"] else []
    settings["normalizer"] = {"type": "Sequence", "normalizers": [drop, *before]}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="space"):
        connected(folder, "vllm", "127.0.0.1:9")


def test_half_precision_is_named(model: Path) -> None:
    golden = read_golden(model)
    assert golden is not None
    exact = tiny_model(model)
    step = golden.tolerances["bfloat16"] / 3

    def rounded(sequences: list[list[int]]) -> list[list[float]]:
        return [[round(value / step) * step for value in values] for values in exact(sequences)]

    with (
        running("vllm", "0.32.0", rounded, vocab_size=vocab_size(model)) as server,
        connected(model, "vllm", server.address) as client,
    ):
        assert client.verify("bfloat16").ok
        found = client.verify("float32")
        assert not found.ok
        assert "dtype='bfloat16'" in found.problems[0]


def test_a_checkpoint_without_golden_scores_cannot_verify(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / GOLDEN).unlink()
    with (
        connected(folder, "vllm", "127.0.0.1:9") as client,
        pytest.raises(ValueError, match="no golden scores"),
    ):
        client.verify()
