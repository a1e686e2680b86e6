"""Rows from or for other programs: `python tools/convert_data.py FILE... --output OUT`.

`--from FORMAT`: published preference data into rows to train on (docs/data.md). OUT is .jsonl,
.jsonl.gz or .parquet.
`--to verl-parquet`: what verl reads, from the prompt and the reference of each row (docs/rl.md).

The output is there once it is whole. What gave no row is counted, with the reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polar_xtuner.integrations.verl_data import read_prompts, write_verl_parquet
from polar_xtuner.preference_formats import FORMATS, describe
from polar_xtuner.preference_rows import PAIRS, convert, reference_files
from polar_xtuner.printing import show
from polar_xtuner.records import BadRowsError, RowCheck, find_files
from polar_xtuner.row_files import check_output, write_rows

ONLY_FROM = ("reference", "pairs", "score")
ONLY_TO = ("data_source", "ability", "split")


def from_format(args: argparse.Namespace) -> dict[str, Any]:
    files = find_files(args.files)
    check_output(args.output, [*files, *reference_files(args.reference)])
    rows = convert(
        files,
        args.source_format,
        reference=args.reference,
        pairs=args.pairs or "paper",
        score=args.score,
    )
    check = RowCheck(args.on_bad_row)
    written = write_rows(
        check.accept(with_bar(rows)),
        args.output,
        several=args.pairs == "all",
        empty=rows.empty,
    )
    return result(args, written, check, rows.dropped)


def with_bar(rows: Iterable[Any]) -> Iterator[Any]:
    yield from tqdm(rows, "Converting", unit=" rows", delay=1, disable=not sys.stderr.isatty())


def to_verl(args: argparse.Namespace) -> dict[str, Any]:
    files = find_files(args.files)
    check_output(args.output, files, (".parquet",))
    check = RowCheck(args.on_bad_row)
    written = write_verl_parquet(
        check.accept(read_prompts(files)),
        args.output,
        args.data_source or "polar",
        args.ability or "general",
        args.split or "train",
    )
    return result(args, written, check, {})


def result(
    args: argparse.Namespace, written: int, check: RowCheck, dropped: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "rows": written,
        "output": str(args.output),
        "bad_rows": check.bad,
        "dropped": dict(dropped),
    }


def shown(done: dict[str, Any]) -> str:
    """The result for people; bad rows have been logged."""
    left_out = [f"left out: {count} {reason}" for reason, count in done["dropped"].items()]
    return "\n".join([f"{done['rows']} rows in {done['output']}", *left_out])


def main() -> None:
    formats = "\n".join(f"  {name:24}{describe(name)}" for name in FORMATS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json or .parquet")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source_format", choices=FORMATS, metavar="FORMAT")
    way.add_argument("--to", choices=("verl-parquet",))
    parser.add_argument("--output", required=True, type=Path, metavar="OUT")
    parser.add_argument(
        "--reference",
        metavar="best|field:NAME|file:PATH",
        help="which answer is the reference: the best one (default, where there are more than "
        "two), a field of each record, or that of a file of rows with the same prompts",
    )
    parser.add_argument("--pairs", choices=PAIRS, help="of the ranked answers; default: paper")
    parser.add_argument("--score", metavar="FIELD", help="to rank by; default: the format's own")
    parser.add_argument("--data-source", help="of rows without a `source`; default: polar")
    parser.add_argument("--ability", help="of all rows; default: general")
    parser.add_argument("--split", help="of all rows; default: train")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    other, way_taken = (ONLY_FROM, "--to") if args.to else (ONLY_TO, "--from")
    for name in other:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no meaning with {way_taken}")
    try:
        done = to_verl(args) if args.to else from_format(args)
        show(json.dumps(done) if args.json else shown(done))
    except BadRowsError as error:
        advice = "Fix them, or leave them out with --on-bad-row skip."
        sys.exit(f"convert_data.py: {error.report()}\n{advice}")
    except (ValueError, OSError) as error:
        sys.exit(f"convert_data.py: {error}")


if __name__ == "__main__":
    main()
