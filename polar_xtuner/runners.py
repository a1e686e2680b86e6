"""mmengine's runner, for training and for testing: data first, then the model.

What is wrong with rows is said in seconds, and no GPU waits for tokens.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

from typing import Any

from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from polar_xtuner.checks import shape_of, unwrapped
from polar_xtuner.conversion import ConversionError, open_checkpoint
from polar_xtuner.interruption import quieten
from polar_xtuner.modeling_internlm2 import first_names
from polar_xtuner.sampler import PackSampler
from polar_xtuner.validation import SHUFFLED, build_evaluation


def build_dataloader(runner: Any, config: Any, model: Any) -> Any:
    """The dataloader of packs, planned for a model or the config of one.

    Raises:
        ValueError: another sampler; the data cannot be planned for this many ranks.
    """
    dataloader = runner.build_dataloader(config, seed=runner.seed)
    sampler = dataloader.sampler
    if not isinstance(sampler, PackSampler):
        raise ValueError(
            "PolarTrainLoop needs train_dataloader.sampler.type=PackSampler, got "
            f"{type(sampler).__name__}"
        )
    quieten(dataloader, "train_dataloader")
    # Before the first plan, which balances what packs cost.
    sampler.model_shape = shape_of(model)
    return dataloader


@RUNNERS.register_module()
class PolarRunner(Runner):  # type: ignore[misc]
    """mmengine's runner, but it tokenises and plans before it loads the model.

    With `--deepspeed` mmengine's `FlexibleRunner` takes its place, and does so by itself.
    """

    def build_model(self, model: Any) -> Any:
        loader: Any = self._train_dataloader  # type: ignore[has-type]
        if isinstance(loader, dict) and loader["sampler"]["type"] in ("PackSampler", PackSampler):
            self._train_dataloader = build_dataloader(self, loader, model)
            len(self._train_dataloader.sampler)
        self._tokenise("val", self._val_dataloader)
        return super().build_model(model)

    def _tokenise(self, stage: str, given: Any) -> None:
        """What will be evaluated; the loop, which is built later, finds it in the cache."""
        if isinstance(given, dict):
            shuffled = (self.cfg.get(f"{stage}_cfg") or {}).get(SHUFFLED)
            for shuffle in (False, True) if shuffled else (False,):
                build_evaluation(self, stage, given, shuffled_references=shuffle)


TRAINING = (
    *("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "load_from"),
    *("val_dataloader", "val_cfg", "val_evaluator"),
)


@RUNNERS.register_module()
class PolarTestRunner(PolarRunner):
    """What `xtuner test` runs: it neither looks at training data nor builds an optimizer."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**{**parts, **dict.fromkeys(TRAINING), "resume": False})

    def build_model(self, model: Any) -> Any:
        self._tokenise("test", self._test_dataloader)
        return super().build_model(model)

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        """The model as it is: nothing is to be added up over processes."""
        return model.to(get_device())

    def dump_config(self) -> None:
        """Nothing: the work dir keeps the config that the run was trained with."""


def take_weights(model: Any, path: str) -> None:
    """Put the weights of a checkpoint of any kind (`conversion.open_checkpoint`) into a model.

    Raises:
        CheckpointError, ConversionError: it cannot be read, or is of another model.
    """
    tensors, stored = unwrapped(model).state_dict(), open_checkpoint(path)
    other = {n for n in stored.keys() & tensors if stored[n].shape != tensors[n].shape}
    for problem, names in (
        ("lacks", tensors.keys() - stored.keys()),
        ("has and the model lacks", stored.keys() - tensors.keys()),
        ("has other shapes of", other),
    ):
        if names:
            raise ConversionError(
                f"{path} and this model do not belong together: it {problem} {len(names)} "
                f"tensors, {first_names(sorted(names))}. Give the config and the --cfg-options "
                "of the run that wrote it"
            )
    for name, tensor in tensors.items():
        tensor.copy_(stored[name].read())
