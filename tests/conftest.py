"""Fixtures that several test files share."""

import copy
import importlib.util
import logging
import subprocess
from collections.abc import Callable, Iterator
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
    """Pairs (chosen, rejected, margin), with or without what follows, as a group has them."""
    fields = len(PAIR.names)
    return np.array([(*pair, *[0] * fields)[:fields] for pair in pairs], PAIR)


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
    return _tool("make_demo")


def _tool(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_tokenizer(demo: ModuleType) -> Any:
    return demo.build_tokenizer()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def small(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo rows and a very small base model."""
    folder = tmp_path_factory.mktemp("small")
    demo.write_data(folder, 400, 10, 0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    demo.write_base(folder / "base", demo.build_tokenizer(), 0, **shape)
    return folder


@pytest.fixture
def make(small: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a runner of `polar_tiny.py` with other settings; its work dir is `work_dir`."""
    made: list[Any] = []

    def runner(
        iterations: int | None = 8,
        optim_wrapper: Any = None,
        work_dir: Path | None = None,
        **options: Any,
    ) -> Any:
        from mmengine.config import Config
        from mmengine.registry import RUNNERS

        cfg = Config.fromfile(str(Path(__file__).parents[1] / "configs" / "polar_tiny.py"))
        cfg.merge_from_dict(
            {
                "pretrained_model_name_or_path": str(small / "base"),
                "data_files": str(small / "train.jsonl"),
                "cache_dir": str(small / "cache"),
                "max_packed_length": 512,
                "save_steps": 1000,
                **options,
            }
        )
        cfg.merge_from_dict({"optim_wrapper": copy.deepcopy(optim_wrapper or {})})
        if iterations is not None:
            cfg.train_cfg.update(max_epochs=None, max_iters=iterations)
        cfg.work_dir = str(work_dir or tmp_path / f"run{len(made)}")
        cfg.experiment_name = f"{tmp_path.name}_{len(made)}"  # mmengine keeps its logs by name
        made.append(RUNNERS.build(cfg))
        return made[-1]

    yield runner
    logging.shutdown([])


@pytest.fixture(scope="session")
def bench_convert() -> ModuleType:
    """`tools/bench_convert.py`, which writes checkpoints as DeepSpeed does."""
    return _tool("bench_convert")


CONFIG = """
custom_imports = dict(imports=["polar_xtuner.engine"])
model = dict(
    type="PolarRewardModel",
    use_activation_checkpointing=False,
    llm=dict(
        type="polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained",
        pretrained_model_name_or_path={base!r},
        torch_dtype="torch.float32",
    ),
)
"""


@pytest.fixture(scope="session")
def odd_config(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and a base model of odd sizes, so that parameters span partitions."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 40, "intermediate_size": 27, "num_hidden_layers": 2}
    demo.write_base(folder / "base", demo.build_tokenizer(), 0, **shape)
    (folder / "config.py").write_text(CONFIG.format(base=str(folder / "base")))
    return folder / "config.py"


@pytest.fixture(scope="session")
def zero_checkpoints(odd_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote with DeepSpeed (`zero_checkpoints.py`), and what it says it was."""
    from commands import run_ranks

    folder = tmp_path_factory.mktemp("checkpoints")
    script = Path(__file__).with_name("zero_checkpoints.py")
    for rank in run_ranks(2, script, odd_config, folder, OMP_NUM_THREADS="1"):
        assert rank.returncode == 0, rank.stderr
    return folder
