"""The tokenizer that the benchmarks use."""

from __future__ import annotations

from typing import Any

from polar_xtuner.template import REWARD_TOKEN, SEPARATOR_TOKEN


def load_tokenizer(path: str) -> Any:
    """Of a Hugging Face folder, or InternLM2's fast one made of its sentencepiece `.model`."""
    from transformers import AutoTokenizer, LlamaTokenizerFast

    if not path.endswith(".model"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    tokenizer = LlamaTokenizerFast(
        vocab_file=path, legacy=False, add_prefix_space=False, add_bos_token=True
    )
    special = [SEPARATOR_TOKEN, REWARD_TOKEN]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer
