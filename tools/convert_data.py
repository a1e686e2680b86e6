"""Rows for training or RL into another program's format: `python tools/convert_data.py FILE...`.

`--to verl-parquet`: what verl reads, from the prompt and the reference of each row (docs/rl.md).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from polar_xtuner.integrations.verl_data import read_prompts, write_verl_parquet
from polar_xtuner.records import find_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="rows, in any format that training reads")
    parser.add_argument("--to", required=True, choices=("verl-parquet",))
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.parquet")
    parser.add_argument("--data-source", default="polar", help="of rows without a `source`")
    parser.add_argument("--ability", default="general", help="of all rows")
    parser.add_argument("--split", default="train", help="of all rows")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        written = write_verl_parquet(
            read_prompts(find_files(args.files)),
            args.output,
            args.data_source,
            args.ability,
            args.split,
            args.on_bad_row,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"convert_data.py: {error}")
    print(f"{written} rows in {args.output}")


if __name__ == "__main__":
    main()
