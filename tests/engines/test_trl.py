"""A few steps of TRL's GRPO, with rewards from a running server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from polar_xtuner.integrations.trl import PolarReward
from polar_xtuner.rewards import candidate_of
from polar_xtuner.scoring import PolarScorer

STEPS = 3
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


class RecordedReward(PolarReward):
    """Keeps what TRL hands over, by step."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.items: list[list[dict[str, Any]]] = []

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        keys = ("prompt", "reference", "output")
        rows = zip(prompts, columns["reference"], completions)
        self.items.append([dict(zip(keys, row)) for row in rows])
        return super().__call__(prompts, completions, **columns)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    special = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_policy(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


@pytest.mark.parametrize("server", ["default flags"], indirect=True)
def test_grpo_trains_on_the_rewards_that_the_model_gives_its_completions(
    server: str, scored: Any, tmp_path: Path
) -> None:
    rows = [{key: item[key] for key in ("prompt", "reference")} for item in scored.items[:8]]
    tokenizer = byte_tokenizer()
    policy = tiny_policy(len(tokenizer))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    reward = RecordedReward(str(scored.folder), server_type="vllm", server_address=server)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=32,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()

    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert trainer.state.global_step == len(logs) == len(reward.items) == STEPS
    scorer = PolarScorer(str(scored.folder), device="cpu")
    for items, log in zip(reward.items, logs):
        truth = torch.tensor(scorer.score([candidate_of(item) for item in items]))
        assert len(truth) == 8
        assert truth.std() > 0.01  # something to learn from
        assert log["rewards/polar_reward/mean"] == pytest.approx(truth.mean().item(), abs=1e-4)
        assert log["reward"] == log["rewards/polar_reward/mean"]
        assert log["rewards/polar_reward/std"] == pytest.approx(truth.std().item(), abs=1e-4)
    after = trainer.model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
