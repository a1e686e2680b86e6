"""Rows for policy discrimination: `python tools/make_policy_pairs.py FILE... --output OUT`.

FILE has trajectories, one a row: `prompt`, `policy` (a name) and `output`. In a row that is made,
reference and chosen are two outputs of one policy, rejected is an output of another one, all to the
same prompt: POLAR's pre-training data (docs/data.md). Every policy is rejected about as often as it
is chosen. OUT is .jsonl, .jsonl.gz or .parquet, and there once it is whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polar_xtuner.policy_pairs import EXTRA, PolicyPairs, read_trajectories
from polar_xtuner.printing import show
from polar_xtuner.records import WRAPPERS, BadRowsError, RowCheck, find_files
from polar_xtuner.row_files import check_output, write_rows


def make(args: argparse.Namespace) -> dict[str, Any]:
    files = find_files(args.files)
    check_output(args.output, files)
    pairs = PolicyPairs(args.wrapper, args.seed)
    check = RowCheck(args.on_bad_row)
    trajectories = tqdm(
        check.accept(read_trajectories(files)),
        "Reading",
        unit=" trajectories",
        delay=1,
        disable=not sys.stderr.isatty(),
    )
    rows = pairs.rows(trajectories)
    written = write_rows(rows, args.output, names=EXTRA, empty=pairs.empty)
    return {"rows": written, "output": str(args.output), "bad_rows": check.bad, **pairs.figures()}


def shown(done: dict[str, Any]) -> str:
    """The result for people; bad rows have been logged."""
    lines = [f"{done['rows']} rows in {done['output']}"]
    for name, times in done["policies"].items():
        lines.append(
            f"policy {name}: chosen {times['same']} times, rejected {times['rejected']} times"
        )
    lines += [f"left out: {count} {reason}" for reason, count in done["dropped"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json or .parquet")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT")
    parser.add_argument("--wrapper", choices=WRAPPERS, default="pretrain", help="of all rows")
    parser.add_argument("--seed", type=int, default=0, help="which outputs meet")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        done = make(args)
        show(json.dumps(done) if args.json else shown(done))
    except BadRowsError as error:
        advice = "Fix them, or leave them out with --on-bad-row skip."
        sys.exit(f"make_policy_pairs.py: {error.report()}\n{advice}")
    except (ValueError, OSError) as error:
        sys.exit(f"make_policy_pairs.py: {error}")


if __name__ == "__main__":
    main()
