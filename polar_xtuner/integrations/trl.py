"""POLAR as a reward function of TRL's GRPO: `GRPOTrainer(reward_funcs=[PolarReward(...)], ...)`.

The dataset needs a column `reference` beside `prompt`: the reference answer, text or messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_xtuner.integrations.settings import Settings
from polar_xtuner.integrations.thinking import answer_of
from polar_xtuner.rewards import check_on_error

Text = str | Sequence[Mapping[str, Any]]


class PolarReward:
    """The rewards of completions, in order.

    Can be copied and pickled; every process makes its own client when it first needs it.

    Args:
        path: folder or hub name of the reward model, for its tokenizer and to check the server.
        server_type, server_address, max_length, max_response_length, normalize: see
            `RewardModelClient`.
        thinking: see `thinking.answer_of`.
        on_error: what becomes of a completion that no reward can be had for: "raise" stops the
            run, "none" gives it None, which TRL leaves out of its group.
        name: under which TRL logs the rewards.
        dtype, verify, api_key, served_model: `dtype`, `verify`, `api_key` and `model` of
            `RewardModelClient`.

    Raises:
        ValueError: `thinking` or `on_error` is none of the above.
    """

    def __init__(
        self,
        path: str,
        server_type: str = "sglang",
        server_address: str = "127.0.0.1:30000",
        max_length: int = 16384,
        max_response_length: int = 4096,
        normalize: bool = False,
        thinking: str = "remove",
        on_error: str = "raise",
        name: str = "polar_reward",
        dtype: str | None = None,
        verify: bool = True,
        api_key: str | None = None,
        served_model: str | None = None,
    ) -> None:
        check_on_error(on_error)
        self.settings = Settings(
            path,
            server_type,
            server_address,
            max_length,
            max_response_length,
            normalize,
            thinking,
            on_error,
            dtype=dtype,
            verify=verify,
            api_key=api_key,
            served_model=served_model,
        )
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        reference: Sequence[Text] | None = None,
        wrapper: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """What TRL calls, with every column of the dataset.

        Raises:
            RewardError: completions have no reward, and `on_error` is "raise".
            ValueError: the dataset has no column `reference`.
        """
        if reference is None:
            raise ValueError(
                "the dataset has no column `reference`: POLAR compares a completion with a "
                f"reference answer to the same prompt. Its other columns are {sorted(columns)}"
            )
        rows = zip(prompts, completions, reference, wrapper or [None] * len(prompts), strict=True)
        rewards = self.settings.client()(
            [
                {
                    "prompt": prompt,
                    "reference": answer,
                    "output": self._answer_of(completion),
                    "wrapper": row_wrapper,
                }
                for prompt, completion, answer, row_wrapper in rows
            ]
        )
        return self.settings.settle(rewards)

    def _answer_of(self, completion: Text) -> Text:
        if isinstance(completion, str):
            return answer_of(completion, self.settings.thinking)
        return [
            {**message, "content": answer_of(message["content"], self.settings.thinking)}
            if message.get("role") == "assistant" and isinstance(message.get("content"), str)
            else message
            for message in completion
        ]
