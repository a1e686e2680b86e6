"""Results to write reports of: made up, with texts that would do harm in a page that let them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polar_xtuner.data_result import (
    FIELDS,
    DataResult,
    DataWarning,
    Estimate,
    Giveaway,
    Lengths,
    Limits,
    Memory,
)
from polar_xtuner.model_evaluation import Evaluation, compare_models, evaluate_model
from polar_xtuner.records import Row, RowError
from polar_xtuner.rewards import Scored

ALARM = "document.title='run'"
HOSTILE = (
    f"<script>{ALARM}</script>",
    f'<img src=x onerror="{ALARM}"><svg onload="{ALARM}"></svg>',
    f"</div></details></style></svg><iframe srcdoc='<script>{ALARM}</script>'></iframe>",
    f'" onmouseover="{ALARM}" style="position:fixed;inset:0" autofocus onfocus="{ALARM}',
    f"<a href='javascript:{ALARM}'>&lt;&amp;</a>{{{{ 7 * 7 }}}}{{% raw %}}",
    "a\x00b\x07\x1b[31m\x7f\u202egnp.exe\u2066\u200f\ufeff",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u4f60 \U0001f469\u200d\U0001f52c",
    "e" + "\u0301" * 300,
    "$\\frac{a}{b}$ $unbalanced \\alpha",
    "x" * 100_000,
    "\n".join(["line"] * 3000),
)
"""Markup, attributes, templates, control and direction marks, mathematics, and sheer size."""


class MadeUp:
    """Rewards of a model of some skill, which goes by length too and dislikes hostile texts."""

    def __init__(self, skill: float, seed: int) -> None:
        self.skill, self.random = skill, random.Random(seed)

    def stream(self, items: Iterable[Any]) -> Iterator[Scored]:
        for item in items:
            fits = item.output.startswith(item.reference[:3])
            reward = self.skill * fits + 0.002 * len(item.output[:500]) + self.random.gauss(0, 1)
            yield Scored(reward - 10 * (item.output in HOSTILE), None)


def rows(number: int, hostile: bool = True) -> list[Row]:
    """Rows of two files and some sources, several candidates in some, best of N in some."""
    rng = random.Random(0)
    made = []
    for i in range(number):
        word = rng.choice(["yes", "no", "forty-two", "blue"])
        chosen = [word + " because" * rng.randrange(1, 60)]
        rejected = ["perhaps" + " so" * rng.randrange(1, 90)]
        if i % 9 == 0:
            rejected.append("never mind")
        prompt, source = f"Question {i // 2}?", ("short", "long", "web")[i % 3]
        if hostile and i < len(HOSTILE):
            nasty = HOSTILE[i]
            prompt, chosen, rejected, source = nasty + "?", [nasty], [nasty + "."], nasty[:300]
        outputs: tuple[str, ...] = ()
        extra = {}
        if i % 10 == 5 and i > len(HOSTILE):
            outputs = (*chosen, *rejected, word)
            extra = {"labels": [1, *[0] * len(rejected), 0.5]}
            chosen, rejected = [], []
        name = f"data/{'train' if i % 2 else HOSTILE[0].replace('/', '_')}.jsonl"
        made.append(
            Row(
                prompt,
                word,
                tuple(chosen),
                tuple(rejected),
                outputs,
                "sft",
                source,
                f"row-{i}",
                0.0,
                name,
                i + 1,
                extra,
            )
        )
    return made


def evaluation(models: int = 1, number: int = 400, hostile: bool = True) -> Evaluation:
    """Of made-up models, of which the later ones are worse."""
    of = rows(number, hostile)
    names = ["hf/polar-tiny", f"work_dirs/{HOSTILE[0]}/iter_500.pth", "third $x_1$", "fourth"]
    scored = [
        evaluate_model(names[i], MadeUp(2.0 - 0.6 * i, i), of, controls=True) for i in range(models)
    ]
    files = list(dict.fromkeys(row.file for row in of))
    comparisons = [compare_models(scored[0], other) for other in scored[1:]]
    return Evaluation(files, 3, 0, scored, comparisons)


def data_result(estimate: bool = True) -> DataResult:
    """A check that has found a great deal."""
    files = ("data/train.jsonl", HOSTILE[0])
    errors = [RowError(files[i % 2], i, "chosen[0].content", HOSTILE[i % 9]) for i in range(1, 231)]
    warnings = [
        DataWarning(kind, files[0], i, "rejected", HOSTILE[i % 9])
        for kind in ("contradiction", "cut", "mojibake")
        for i in range(1, 15)
    ]
    return DataResult(
        files=files,
        rows=123_456,
        bad_rows=229,
        errors=tuple(errors),
        warnings=tuple(warnings),
        warning_counts={"cut": 12_345, "contradiction": 14, "mojibake": 14},
        refusals=("229 of 123456 rows are bad", HOSTILE[1]),
        prompts=90_000,
        groups=91_000,
        pairs=150_000,
        sources={"gsm8k": 100_000, HOSTILE[1]: 23_000, "": 456},
        ids={name: lengths(i) for i, name in enumerate(FIELDS)},
        characters={name: lengths(i + 2) for i, name in enumerate(FIELDS)},
        chosen_longer=0.6432,
        as_long=0.0123,
        cut_rows=12_345,
        limits=Limits(None, 16384, 4096, 32768, 2, None, 8, "skip", "split"),
        tokens=51_234_567,
        tokens_alone=91_234_567,
        share_ratio=1.781,
        packs=1_568,
        steps=98,
        fill=0.9912,
        estimate=Estimate(
            7_000_000_000,
            7_000_000_000,
            2.1e18,
            1,
            8,
            "H100",
            0.4,
            6_612.0,
            2,
            Memory(14e9, 3.5e9, 10.5e9, 22e9),
        )
        if estimate
        else None,
        giveaways=(
            Giveaway("ends with white space", 40_123, 0),
            Giveaway("has a code block", 210, 23_456),
        ),
    )


def lengths(seed: int) -> Lengths:
    values = np.random.default_rng(seed).lognormal(5 + 0.3 * seed, 1, 5000).astype(int)
    edges = [0, *(2**i for i in range(int(values.max()).bit_length() + 1))]
    return Lengths(
        len(values),
        int(values.min()),
        float(values.mean()),
        float(np.median(values)),
        float(np.quantile(values, 0.9)),
        float(np.quantile(values, 0.99)),
        int(values.max()),
        tuple(edges),
        tuple(np.histogram(values, edges)[0].tolist()),
    )


def write_start(
    work_dir: Path, start: str, training: Iterable[int], validation: Iterable[int] = (), **more: Any
) -> Path:
    """A start of a run as mmengine logs it: the iterations with a line, and those validated after.

    `more` are figures of every line of training, a number or a function of the step.
    """
    log = work_dir / start / "vis_data" / "scalars.json"
    log.parent.mkdir(parents=True)
    lines = []
    after = set(validation)
    for step in training:
        values = {
            "lr": 1e-4,
            "data_time": 0.01,
            "time": 1.0,
            "loss": 0.7 / (1 + step / 50),
            "accuracy": 1 - 0.5 / (1 + step / 50),
            "margin": step / 100,
            "tokens_per_s": 4000.0 + step,
            **{name: value(step) if callable(value) else value for name, value in more.items()},
        }
        lines.append({**values, "iter": step, "step": step})
        if step in after:
            figures = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "loss": 0.5}
            found = {f"{p}/{k}": v for p in ("val", "val/web") for k, v in figures.items()}
            lines.append({**found, "data_time": 0.1, "time": 9.0, "step": step})
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return log


def no_lengths() -> Lengths:
    """Of no text."""
    return Lengths(0, 0, 0.0, 0.0, 0.0, 0.0, 0, (0, 1), (0,))
