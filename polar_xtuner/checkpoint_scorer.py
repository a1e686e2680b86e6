"""Any model that a user may name, as a folder that `PolarScorer` opens.

A Hugging Face folder or hub name is one. A training checkpoint, a file or a DeepSpeed folder, is
converted into a temporary folder first, by the converter that users call, in a process of its own:
so what is scored is what would be released, damaged and unsafe files are refused alike, and of
training's packages nothing stays behind in this process. It takes the disk space of the model in
`TMPDIR` and the time of a conversion: to evaluate a checkpoint often, convert it once.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

logger = logging.getLogger(__name__)

DEEPSPEEDS_SCRIPT = "zero_to_fp32.py"
"""That DeepSpeed leaves in a work dir."""

CONVERTER = "xtuner.tools.model_converters.pth_to_hf"


@contextmanager
def as_hf_folder(
    model: str, config: str | None = None, cfg_options: Sequence[str] = ()
) -> Iterator[str]:
    """`model` itself, or for a checkpoint the folder with its conversion, removed at the end.

    Args:
        model: Hugging Face folder or hub name, `.pth` file, or DeepSpeed folder.
        config: of the run that wrote the checkpoint; None is the one that the run left beside it.
        cfg_options: NAME=VALUE, as the converter takes them.

    Raises:
        ValueError: there is no config, or the checkpoint cannot be converted; says why.
    """
    if not is_checkpoint(model):
        yield model
        return
    if find_spec("xtuner") is None:
        raise ValueError(
            f"{model} is a training checkpoint, to be converted with xtuner, which is not "
            "installed: pip install 'polar_xtuner[train]', or give the converted folder"
        )
    config = config or str(config_beside(Path(model)))
    with TemporaryDirectory(prefix="polar_hf_") as folder:
        logger.info("converting %s by %s", model, config)
        _convert(model, config, cfg_options, folder)
        yield folder


def is_checkpoint(model: str) -> bool:
    """Whether this is a file or folder of a training run, not a Hugging Face folder or name.

    Raises:
        ValueError: a folder that is none of these.
    """
    path = Path(model)
    if not path.is_dir() or (path / "config.json").is_file():
        return path.is_file()
    if any(path.glob("*_model_states.pt")):
        return True
    inside = sorted(entry.name for entry in path.glob("*.pth"))
    advice = f": give one of those in it: {', '.join(inside)}" if inside else ""
    raise ValueError(
        f"{model} is neither a Hugging Face folder, for it has no config.json, nor a DeepSpeed "
        f"checkpoint, for it has no *_model_states.pt{advice}"
    )


def config_beside(checkpoint: Path) -> Path:
    """The config that a run dumps into its work dir, where its checkpoints are.

    Raises:
        ValueError: there is none, or several.
    """
    folder = checkpoint.resolve().parent
    found = sorted(file for file in folder.glob("*.py") if file.name != DEEPSPEEDS_SCRIPT)
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:8])
    problem = f"{folder} has several: {names}" if found else f"there is none in {folder}"
    raise ValueError(f"{checkpoint} needs the config of its run, and {problem}: name it (--config)")


def _convert(checkpoint: str, config: str, cfg_options: Sequence[str], folder: str) -> None:
    command = [sys.executable, "-m", CONVERTER, config, checkpoint, folder]
    command += ["--cfg-options", *cfg_options] if cfg_options else []
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode or not Path(folder, "config.json").is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("not converted: ")]
        reason = (said or lines or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"{checkpoint}: {reason.removeprefix('not converted: ')}")
