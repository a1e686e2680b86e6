"""Draw the curves of training runs: `python tools/plot_run.py WORK_DIR...`.

Reads what mmengine has logged, of runs that are over, stopped, resumed or still going, and writes
an HTML page and a PNG: loss, accuracy, margin, learning rate, throughput, and validation.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path

from polar_xtuner.printing import show
from polar_xtuner.run_logs import read_runs

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dirs", nargs="+", type=Path, metavar="WORK_DIR", help="of a run")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: the first work dir")
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="of an exponential moving average of training's curves, in [0, 1); default: 0, none",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: paths and last values"
    )
    args = parser.parse_args()
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth must be at least 0 and below 1, got {args.smooth}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        from polar_xtuner.report.runs import last_values, write_run_report
    except ModuleNotFoundError as error:
        sys.exit(f"plot_run.py: needs {error.name}: pip install 'polar_xtuner[eval]'")
    try:
        runs = read_runs(args.work_dirs)
        page, picture = write_run_report(args.output or args.work_dirs[0], runs, args.smooth)
        if args.json:
            last = last_values(runs)
            values = {
                run.name: {name: _plain(of[i]) for name, of in last.items() if of[i] is not None}
                for i, run in enumerate(runs)
            }
            show(json.dumps({"html": str(page), "png": str(picture), "runs": values}))
        else:
            logger.info("wrote %s and %s", page, picture)
    except (ValueError, OSError) as error:
        sys.exit(f"plot_run.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _plain(value: float | None) -> float | None:
    """JSON has no nan."""
    return value if value is not None and math.isfinite(value) else None


if __name__ == "__main__":
    main()
