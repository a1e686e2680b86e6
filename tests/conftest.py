"""Fixtures that several test files share."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from polar_xtuner.cache import PAIR

settings.register_profile("polar", deadline=None, print_blob=True)
settings.load_profile("polar")  # a busy machine is no failure

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
DATA_SETS = ("gsm8k", "pandalm", "mt_bench", "arena_hard")


def pair_array(pairs: Any) -> Any:
    """Pairs (chosen, rejected, margin), with or without file and line, as a group has them."""
    return np.array([(*pair, 0, 0)[:5] for pair in pairs], PAIR)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows and InternLM2's tokenizer, which is not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real data, which is not part of the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def internlm2_tokenizer(shared_data: Path) -> Any:
    """The tokenizer of the published checkpoints: `<|reward|>` 92544, reward token 92527."""
    from transformers import LlamaTokenizerFast

    return with_polar_tokens(
        LlamaTokenizerFast(
            vocab_file=str(shared_data / "internlm2_tokenizer.model"),
            legacy=False,
            add_prefix_space=False,
            add_bos_token=True,
        )
    )


def with_polar_tokens(tokenizer: Any) -> Any:
    special = ["<|reward|>", "[UNUSED_TOKEN_130]"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    """`tools/make_demo.py`: rows, a small tokenizer, a tiny base model."""
    path = Path(__file__).parents[1] / "tools" / "make_demo.py"
    spec = importlib.util.spec_from_file_location("make_demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_tokenizer(demo: ModuleType) -> Any:
    return demo.build_tokenizer()
