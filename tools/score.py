"""Score rows with a POLAR checkpoint: `python tools/score.py MODEL FILE...`.

Rows with an `output` give one JSON line each, in order; of rows with chosen and rejected the
accuracy is printed: the share of pairs whose chosen answer gets the higher reward.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any

import torch

from polar_xtuner.records import Row, RowCheck, find_files, read_rows
from polar_xtuner.scoring import PolarScorer, wilson_interval
from polar_xtuner.template import Candidate


def score_rows(scorer: PolarScorer, rows: list[Row], progress: bool) -> dict[str, Any]:
    """`rows` (of those with outputs: place, id and scores) and, of pairs, n and accuracy."""
    texts = [(*row.outputs, *row.chosen, *row.rejected) for row in rows]
    scores = iter(
        scorer.score(
            [
                Candidate(row.prompt, row.reference, text, row.wrapper)
                for row, row_texts in zip(rows, texts)
                for text in row_texts
            ],
            progress=progress,
        )
    )
    scored, margins = [], []
    for row in rows:
        outputs = [next(scores) for _ in row.outputs]
        chosen = [next(scores) for _ in row.chosen]
        rejected = [next(scores) for _ in row.rejected]
        margins += [c - r for c in chosen for r in rejected]
        if outputs:
            scored.append({"file": row.file, "line": row.line, "id": row.id, "scores": outputs})
    result: dict[str, Any] = {"n": len(margins), "rows": scored}
    if margins:
        right = sum(m > 0 for m in margins)
        low, high = wilson_interval(right, len(margins))
        result["accuracy"] = right / len(margins)
        result["accuracy_interval_95"] = [low, high]
        result["mean_margin"] = sum(margins) / len(margins)
        result["ties"] = sum(m == 0 for m in margins)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder of the model")
    parser.add_argument("files", nargs="+", help="rows, in any format that training reads")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the tokenizer code of the folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        check = RowCheck(args.on_bad_row)
        rows = list(check.accept(read_rows(find_files(args.files), scoring=True)))
        if not rows:
            raise ValueError(f"no row to score in {', '.join(args.files)}")
        scorer = PolarScorer(
            args.model,
            device=args.device,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            trust_remote_code=args.trust_remote_code,
        )
        result = score_rows(scorer, rows, progress=sys.stderr.isatty() and not args.json)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"score.py: {error}")
    if args.json:
        print(json.dumps({**result, "bad_rows": check.bad}))
        return
    for row in result["rows"]:
        print(json.dumps(row, ensure_ascii=False))
    if result["n"]:
        low, high = result["accuracy_interval_95"]
        print(
            f"accuracy {result['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {result['n']} pairs, "
            f"mean margin {result['mean_margin']:.3f}"
        )


if __name__ == "__main__":
    main()
