"""Write demo data and a tiny base model: `python tools/make_demo.py demo`.

The task needs the reference: the prompt is a sum in words, reference and chosen state the right
answer in two phrasings, rejected states a wrong one in the phrasing of chosen. Held-out rows have
prompts and answers that no training row has, so a model can only win by comparing the output
with the reference. The base model is random, in the file layout of a POLAR checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from xtuner.tools.model_converters import modeling_internlm2_reward

from polar_xtuner.modeling_internlm2 import InternLM2Config, InternLM2ForRewardModel
from polar_xtuner.template import REWARD_TOKEN, SEPARATOR_TOKEN

NAMES = ("Ada", "Ben", "Chen", "Dara", "Eli", "Fay", "Gus", "Hana", "Ivo", "Jun", "Kim", "Lea")
THINGS = ("apples", "books", "coins", "shells", "stamps", "marbles", "cards", "pens")
QUESTIONS = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in one box and {b} in another. How many {things} are there?",
    "What is {a} plus {b}? {name} wants to know.",
)
PHRASINGS = (
    "The answer is {n}.",
    "{n} in total.",
    "It makes {n} altogether.",
    "I count {n}.",
    "So {n} it is.",
    "That comes to {n}.",
)
ANSWERS = range(100, 1000)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
HELD_OUT_SHARE = 0.2
"""Of the answers: no training row has one of these, as right or as wrong answer."""


def in_words(n: int) -> str:
    """A number below 1000 in words: the only digits of a row are those of its answers."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" {in_words(n % 100)}" if n % 100 else "")


def rows(count: int, answers: Sequence[int], rng: random.Random, name: str) -> Iterator[dict]:
    """`count` rows whose right and wrong answers are all in `answers`."""
    for number in range(count):
        right, wrong = rng.sample(answers, 2)
        first = rng.randrange(1, right)
        prompt = rng.choice(QUESTIONS).format(
            name=rng.choice(NAMES),
            things=rng.choice(THINGS),
            a=in_words(first),
            b=in_words(right - first),
        )
        reference, style = rng.sample(PHRASINGS, 2)
        yield {
            "id": f"{name}-{number}",
            "prompt": [{"role": "user", "content": prompt}],
            "reference": [{"role": "assistant", "content": reference.format(n=right)}],
            "chosen": [{"role": "assistant", "content": style.format(n=right)}],
            "rejected": [{"role": "assistant", "content": style.format(n=wrong)}],
        }


def write_data(folder: Path, train: int, held_out: int, seed: int) -> None:
    """`train.jsonl` and `heldout.jsonl`, with no prompt and no answer in common."""
    rng = random.Random(seed)
    answers = rng.sample(ANSWERS, len(ANSWERS))
    split = int(len(answers) * HELD_OUT_SHARE)
    for name, count, own in (
        ("heldout", held_out, answers[:split]),
        ("train", train, answers[split:]),
    ):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows(count, own, rng, name):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, one token a digit, with POLAR's special tokens."""
    special = ["<unk>", "<s>", "</s>", SEPARATOR_TOKEN, REWARD_TOKEN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f" {word}" for word in (*NAMES, *THINGS, *ONES, *TENS, "hundred")]
    tokenizer.train_from_iterator([*NAMES, *THINGS, *QUESTIONS, *PHRASINGS, *words] * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )


def write_base(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, **shape: Any) -> None:
    """A random base model and its tokenizer, laid out like a POLAR checkpoint."""
    torch.manual_seed(seed)
    config = InternLM2Config(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000,
            "initializer_range": 0.08,
            "bias": False,
            "reward_token_id": tokenizer.convert_tokens_to_ids(REWARD_TOKEN),
            "pad_token_id": 2,
            **shape,
        }
    )
    model = InternLM2ForRewardModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    fields = {
        "architectures": ["InternLM2ForRewardModel"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
        },
        "model_type": "internlm2",
        "pretraining_tp": 1,
        "torch_dtype": "float32",
    }
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
        *("initializer_range", "rms_norm_eps", "bias", "rope_theta", "rope_scaling"),
        *("reward_token_id", "pad_token_id", "bos_token_id", "eos_token_id"),
    ):
        fields[name] = getattr(config, name)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    code = Path(modeling_internlm2_reward.__file__).parent
    for file in ("configuration_internlm2.py", "modeling_internlm2.py"):
        shutil.copyfile(code / file, folder / file)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl, heldout.jsonl and base/ go")
    parser.add_argument("--train", type=int, default=20000, help="training rows")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.folder.mkdir(parents=True, exist_ok=True)
    write_data(args.folder, args.train, args.held_out, args.seed)
    write_base(args.folder / "base", build_tokenizer(), args.seed)
    logging.info("wrote train.jsonl, heldout.jsonl and base/ to %s", args.folder)


if __name__ == "__main__":
    main()
