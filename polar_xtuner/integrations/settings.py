"""What an RL run is told about its reward model, and the one client a process has for it.

Every setting can be given by keyword or, in its absence, by an environment variable: `model` by
POLAR_MODEL, `server_address` by POLAR_SERVER_ADDRESS, and so on. The client joins what is asked at
the same time into batches, so it matters that all calls of a process share one.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from polar_xtuner.client import RewardModelClient
from polar_xtuner.integrations.thinking import THINKING
from polar_xtuner.rewards import RewardError, Rewards

logger = logging.getLogger(__name__)

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    """What may be set.

    Raises:
        ValueError: no model is named, or a setting cannot be what it is.
    """

    model: str = ""
    """Folder or hub name of the reward model, for its tokenizer and to check the server with."""
    server_type: str = "sglang"
    server_address: str = "127.0.0.1:30000"
    """host:port, several separated by commas."""
    max_length: int = 16384
    max_response_length: int = 4096
    normalize: bool = False
    thinking: str = "remove"
    """See `thinking.answer_of`."""
    on_error: str | float = "raise"
    """What becomes of an output that no reward can be had for: "raise" stops the run; elsewhere
    "none" (TRL) or a number (verl) is its reward."""
    rules: Mapping[str, Rule] = field(default_factory=dict)
    """verl only: by data source, the function that scores its rows in POLAR's place."""
    dtype: str | None = None
    """In which the server computes, for how close golden scores must be; None: the checkpoint's."""
    verify: bool = True
    """Hold the server against the checkpoint's golden scores before its rewards count."""
    api_key: str | None = field(default=None, repr=False)
    served_model: str | None = None
    """The name that the server serves the model by; None: the one it tells."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError(
                "no reward model is named: give its folder or hub name as `model`, or in the "
                f"environment as {variable('model')}"
            )
        if self.thinking not in THINKING:
            raise ValueError(
                f"thinking must be one of {', '.join(THINKING)}, got {self.thinking!r}"
            )

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """From keywords and, where they say nothing, the environment.

        Raises:
            TypeError: a keyword is no setting.
            ValueError: see `Settings`; the setting is named.
        """
        if unknown := sorted(given.keys() - _READERS.keys()):
            raise TypeError(
                f"no such setting: {', '.join(unknown)}; there are {', '.join(_READERS)}"
            )
        values = {}
        for name, reader in _READERS.items():
            value, called = given.get(name), name
            if value is None:
                value, called = os.environ.get(variable(name)), variable(name)
            if value is not None and value != "":
                try:
                    values[name] = reader(value)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{called}: {error}") from None
        return cls(**values)

    def client(self) -> RewardModelClient:
        """The client of this process for these settings, made when it is first asked for."""
        wanted: dict[str, Any] = {
            "max_length": self.max_length,
            "max_response_length": self.max_response_length,
            "server_type": self.server_type,
            "server_address": self.server_address,
            "normalize": self.normalize,
            "dtype": self.dtype,
            "verify": self.verify,
            "api_key": self.api_key,
            "model": self.served_model,
        }
        key = (os.getpid(), self.model, *wanted.values())  # a fork's threads are not its parent's
        with _lock:
            if key not in _clients:
                _clients[key] = RewardModelClient(self.model, **wanted, on_error="none")
            return _clients[key]

    def settle(self, rewards: Rewards) -> list[float | None]:
        """What the outputs without a reward get by `on_error`, which the log then says; "none" is
        None.

        Raises:
            RewardError: outputs have no reward, and `on_error` is "raise".
        """
        if not rewards.errors:
            return list(rewards)
        if self.on_error == "raise":
            raise RewardError(rewards)
        missing = None if self.on_error == "none" else float(self.on_error)
        number, reason = next(iter(rewards.errors.items()))
        logger.warning(
            "%d of %d outputs have no reward and get %s; the first, output %d: %s",
            *(len(rewards.errors), len(rewards), missing, number, reason),
        )
        return [missing if reward is None else reward for reward in rewards]


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"POLAR_{name.upper()}"


def _addresses(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value))


def _truth(value: bool | str) -> bool:
    known = {"1": True, "true": True, "0": False, "false": False}
    if str(value).lower() not in known:
        raise ValueError(f"must be true or false, got {value!r}")
    return known[str(value).lower()]


def _on_error(value: str | float) -> str | float:
    if value in ("raise", "none"):
        return value
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number


def _rules(value: str | Mapping[str, str | Rule]) -> dict[str, Rule]:
    rules = json.loads(value) if isinstance(value, str) else value
    if not isinstance(rules, Mapping):
        raise ValueError(f'must be {{data source: "module:function"}}, got {value!r}')
    return {str(source): _function(rule) for source, rule in rules.items()}


def _function(rule: str | Rule) -> Rule:
    if not isinstance(rule, str):
        return rule
    module, _, name = rule.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'{rule!r} is no "module:function" that can be had: {error}') from None


_READERS: dict[str, Callable[[Any], Any]] = {
    "model": str,
    "server_type": str,
    "server_address": _addresses,
    "max_length": int,
    "max_response_length": int,
    "normalize": _truth,
    "thinking": str,
    "on_error": _on_error,
    "rules": _rules,
    "dtype": str,
    "verify": _truth,
    "api_key": str,
    "served_model": str,
}
assert _READERS.keys() == {setting.name for setting in fields(Settings)}

_clients: dict[tuple[Any, ...], RewardModelClient] = {}
_lock = threading.Lock()
