"""Policy discrimination on generated data: `python tools/demo_policies.py`.

Policies are made that answer sums in styles of their own, right or wrong as it comes. Their
trajectories become rows (`make_policy_pairs.py`), on which `xtuner train` trains a tiny model from
nothing. It must then tell, for prompts that no training row has, which of two outputs is of the
policy that the reference is of.

With the references of the held-out rows shuffled it cannot, since every policy is rejected as often
as it is chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from make_demo import build_tokenizer, write_base
from tiny_run import ROOT, XTUNER, environment, last_checkpoint

from polar_xtuner.policy_pairs import EXTRA, PolicyPairs, Trajectory
from polar_xtuner.records import Row, read_rows
from polar_xtuner.row_files import write_rows
from polar_xtuner.scored_lines import wilson_interval
from polar_xtuner.template import Candidate

CONFIG = ROOT / "configs" / "polar_pretrain_tiny.py"
LEAST_ACCURACY, MOST_SHUFFLED = 0.9, 0.65

PHRASES = ("The answer is", "It makes", "That comes to", "I count")
UNITS = ("apples", "books", "coins", "pens")
TAILS = (".", " altogether.", " in total.")


class Policy(NamedTuple):
    """A style: how it phrases an answer and what it counts in. The rest is not its own."""

    phrase: str
    unit: str

    def output(self, rng: random.Random) -> str:
        return f"{self.phrase} {rng.randrange(100, 1000)} {self.unit}{rng.choice(TAILS)}"


POLICIES = {f"{phrase} ... {unit}": Policy(phrase, unit) for phrase in PHRASES for unit in UNITS}


def prompts(count: int, rng: random.Random) -> list[str]:
    """Different sums."""
    sums = [(a, b) for a in range(100) for b in range(100)]
    return [f"What is {a} plus {b}?" for a, b in rng.sample(sums, count)]


def trajectories(of: list[str], policies: int, rng: random.Random) -> Iterator[Trajectory]:
    """Two outputs of each of so many policies to every prompt."""
    for prompt in of:
        for name in rng.sample([*POLICIES], policies):
            for _ in range(2):
                yield Trajectory(prompt, name, POLICIES[name].output(rng))


def write_data(folder: Path, train: int, held_out: int, seed: int) -> None:
    """`train.jsonl` and `heldout.jsonl`, with no prompt in common."""
    rng = random.Random(seed)
    drawn = prompts(train + held_out, rng)
    for name, of in (("train", drawn[:train]), ("heldout", drawn[train:])):
        pairs = PolicyPairs(seed=seed)
        rows = pairs.rows(trajectories(of, 4, rng))
        write_rows(rows, folder / f"{name}.jsonl", names=EXTRA, empty=pairs.empty)


def train(folder: Path) -> tuple[Path, float]:
    """A real `xtuner train`; its checkpoint and the seconds it took."""
    work_dir, log = folder / "work_dir", folder / "train.log"
    settings = {
        "pretrained_model_name_or_path": folder / "base",
        "data_files": folder / "train.jsonl",
        "cache_dir": folder / "cache",
    }
    command = [XTUNER, "train", CONFIG, "--work-dir", work_dir, "--cfg-options"]
    command += [f"{name}={value}" for name, value in settings.items()]
    start = time.monotonic()
    with open(log, "w") as out:
        subprocess.run(
            [str(c) for c in command], stdout=out, stderr=subprocess.STDOUT, env=environment()
        )
    checkpoint = last_checkpoint(work_dir)
    if checkpoint is None:  # the command exits with 0 all the same
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"{tail}\n\ntraining failed: no checkpoint in {work_dir}")
    return checkpoint, time.monotonic() - start


def open_scorer(checkpoint: Path, base: Path) -> Any:
    """A scorer with the weights of the training model, as its checkpoint holds them."""
    import torch
    from mmengine.config import Config
    from mmengine.runner import load_checkpoint
    from xtuner.registry import BUILDER

    from polar_xtuner.scoring import PolarScorer

    torch.set_num_threads(1)  # for a model this small a second one gains nothing
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict({"pretrained_model_name_or_path": str(base)})
    model: Any = BUILDER.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location="cpu", strict=True)
    scorer = PolarScorer(str(base), device="cpu")
    scorer.model.model, scorer.model.v_head = model.llm.eval(), model.v_head
    return scorer


def right(scorer: Any, rows: list[Row], references: list[str]) -> int:
    """Rows whose chosen output gets the higher reward."""
    scores = scorer.score(
        [
            Candidate(row.prompt, reference, text, row.wrapper)
            for row, reference in zip(rows, references)
            for text in (*row.chosen, *row.rejected)
        ]
    )
    return sum(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2]))


def demonstrate(folder: Path, prompts_to_train: int, held_out: int, seed: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)  # nothing of an earlier run can pass for this one's
    folder.mkdir(parents=True)
    logging.info("* trajectories of %d policies, rows of them, a tiny base model", len(POLICIES))
    write_data(folder, prompts_to_train, held_out, seed)
    write_base(folder / "base", build_tokenizer(), seed)
    logging.info("* xtuner train (log: %s)", folder / "train.log")
    checkpoint, seconds = train(folder)
    logging.info("* rewards of the held-out rows")
    scorer = open_scorer(checkpoint, folder / "base")
    rows = [row for row in read_rows([folder / "heldout.jsonl"]) if isinstance(row, Row)]
    references = [row.reference for row in rows]
    shuffled = random.Random(seed).sample(references, len(references))
    found, blind = right(scorer, rows, references), right(scorer, rows, shuffled)
    n = len(rows)
    return {
        "n": n,
        "accuracy": found / n,
        "accuracy_interval_95": [*wilson_interval(found, n)],
        "accuracy_shuffled_references": blind / n,
        "policies": len(POLICIES),
        "train_prompts": prompts_to_train,
        "train_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("demo/policies"))
    parser.add_argument("--train", type=int, default=800, help="prompts to train on")
    parser.add_argument("--held-out", type=int, default=150, help="prompts to test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where mmengine tells what it does
            result = demonstrate(args.folder, args.train, args.held_out, args.seed)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"demo_policies.py: {error}")
    low, high = result["accuracy_interval_95"]
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{'held-out rows, prompts unseen':34}{result['n']}")
        print(f"{'accuracy [95 % interval]':34}{result['accuracy']:.3f}  [{low:.3f}, {high:.3f}]")
        print(f"{'  with references shuffled':34}{result['accuracy_shuffled_references']:.3f}")
        print(f"{'training':34}{result['train_seconds']:.0f} s")
    failed = []
    if result["accuracy"] < LEAST_ACCURACY:
        failed.append(f"accuracy {result['accuracy']:.3f} is below {LEAST_ACCURACY}")
    if result["accuracy_shuffled_references"] > MOST_SHUFFLED:
        failed.append(
            f"accuracy with shuffled references {result['accuracy_shuffled_references']:.3f} is "
            f"above {MOST_SHUFFLED}"
        )
    if failed:
        sys.exit(f"demo_policies.py: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
