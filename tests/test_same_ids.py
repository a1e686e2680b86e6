"""One candidate has the same ids in training, through the client and in process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template import hostile_texts
from tokenizers import Tokenizer

from polar_xtuner.client import RewardModelClient
from polar_xtuner.dataset import PolarDataset
from polar_xtuner.rewards import Scored
from polar_xtuner.scoring import PolarScorer

LIMITS = {"max_length": 67, "max_response_length": 24}


def is_sound(text: str) -> bool:
    """Rows that have lone surrogates are refused everywhere."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


texts = hostile_texts.filter(is_sound)
long_texts = st.builds(lambda text, times: text * times, texts, st.integers(1, 20))
turns = st.lists(
    st.builds(
        lambda role, text: {"role": role, "content": text},
        st.sampled_from(["user", "assistant"]),
        texts,
    ),
    min_size=1,
    max_size=4,
)
answers = st.one_of(st.just(""), texts, long_texts, turns)


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    prompt = draw(st.one_of(texts, long_texts, turns))
    if not "".join(prompt if isinstance(prompt, str) else (t["content"] for t in prompt)):
        prompt = "x"
    chosen, rejected = draw(answers), draw(answers)
    wrapper = draw(st.sampled_from(["sft", "pretrain"]))
    return {
        "prompt": prompt,
        "reference": draw(answers),
        "chosen": chosen,
        "rejected": rejected,
        "wrapper": wrapper,
    }


def text_of(answer: Any) -> str:
    return answer if isinstance(answer, str) else "\n".join(turn["content"] for turn in answer)


@pytest.fixture(scope="module")
def client(small: Path) -> RewardModelClient:
    return RewardModelClient(str(small / "base"), **LIMITS)


@pytest.fixture(scope="module")
def scorer(small: Path) -> PolarScorer:
    return PolarScorer(str(small / "base"), **LIMITS)


@settings(max_examples=80)
@given(st.lists(rows(), min_size=1, max_size=4))
def test_ids_are_the_same_everywhere(
    client: RewardModelClient, scorer: PolarScorer, small: Path, data: list[dict[str, Any]]
) -> None:
    sides = [client._prepare([{**row, "output": row["chosen"]}]) for row in data]
    others = [client._prepare([{**row, "output": row["rejected"]}]) for row in data]
    # Training refuses pairs that are the same once they are cut.
    data = [row for row, one, other in zip(data, sides, others) if one != other]
    if not data:
        return
    items = [{**row, "output": row[side]} for row in data for side in ("chosen", "rejected")]
    asked = client._prepare(items)
    assert not any(isinstance(one, Scored) for one in asked)
    sent = [one.tolist() for one in asked if not isinstance(one, Scored)]
    assert [one.ids for one in client.encode(items)] == sent
    in_process = scorer.template.encode(
        [(text_of(i["prompt"]), text_of(i["reference"]), text_of(i["output"]), i["wrapper"])
         for i in items]
    )  # fmt: skip
    assert in_process == sent
    assert sorted(sent) == sorted(trained_on(small, data))


def trained_on(small: Path, data: list[dict[str, Any]]) -> list[list[int]]:
    """The sequences of every pair, out of the groups that training reads."""
    tokenizer = Tokenizer.from_file(str(small / "base" / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
        dataset = PolarDataset(tokenizer, str(file), num_proc=1, cache_dir=folder, **LIMITS)
        groups = [dataset.group(number) for number in range(len(dataset.store))]
        sequences = []
        for group in groups:
            prefix, *suffixes = group.pieces.tolist()
            tokens, start = group.tokens.tolist(), prefix
            candidates = []
            for suffix in suffixes:
                candidates.append(tokens[:prefix] + tokens[start : start + suffix])
                start += suffix
            for pair in group.pairs:
                sequences += [candidates[pair["chosen"]], candidates[pair["rejected"]]]
    return sequences
