"""How good is a POLAR model on labelled rows? `python tools/evaluate.py MODEL FILE...`

MODEL is a Hugging Face folder or hub name, or a training checkpoint: an .pth file or a DeepSpeed
folder, which is converted into a temporary folder first. FILE is in any format that training reads.
Rows have chosen and rejected, or several candidates in `output` and as many numbers in `labels`
(docs/evaluation.md).

Prints accuracy, calibration and ranking figures with 95 % intervals: of all rows, of every file
and of every `source`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from polar_xtuner.printing import show
from polar_xtuner.records import BadRowsError, find_files
from polar_xtuner.tokenizer import local_folder


def evaluate(args: argparse.Namespace) -> None:
    try:
        from polar_xtuner import calibration, evaluation_text, model_evaluation
        from polar_xtuner.checkpoint_scorer import as_hf_folder, config_beside, is_checkpoint
        from polar_xtuner.scoring import PolarScorer

        if args.report:
            from polar_xtuner.report import write_evaluation_report
        if args.scores and args.scores.suffix.lower() == ".parquet":
            import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"needs {error.name}: pip install 'polar_xtuner[eval]'") from None
    check_outputs(args)
    names = [args.model, *args.against]
    checkpoints = [name for name in names if is_checkpoint(name)]
    if (args.config or args.cfg_options) and not checkpoints:
        raise ValueError("--config and --cfg-options are for training checkpoints; none is given")
    for name in names:  # what is wrong with the last one should not be told after hours
        if name not in checkpoints:
            local_folder(name)
        elif args.config is None:
            config_beside(Path(name))
    files = find_files(args.files)
    rows, bad_rows = model_evaluation.rows_to_evaluate(files, args.on_bad_row)
    try_outputs(args)
    models = []
    for name in names:
        with as_hf_folder(name, args.config, args.cfg_options) as folder:
            scorer = PolarScorer(folder, args.device, args.dtype, **lengths_of(args))
            models.append(
                model_evaluation.evaluate_model(name, scorer, rows, args.controls, args.seed)
            )
    comparisons = [
        model_evaluation.compare_models(models[0], other, args.seed) for other in models[1:]
    ]
    results = model_evaluation.Evaluation(
        [*map(str, files)], bad_rows, args.seed, models, comparisons
    )
    try:  # what took hours is written before anything can go wrong with the terminal
        if args.scores:
            model_evaluation.write_scores(models[0].rows, args.scores)
        if args.report:
            write_evaluation_report(args.report, results)
        if args.calibrate:
            found = calibration.calibration_of(models[0])
            calibration.write_calibration(Path(args.model), found)
            logging.info("%s/config.json: %s", args.model, found)
    finally:  # and shown, even if it could not be written
        show(
            json.dumps(results.to_json()) if args.json else evaluation_text.evaluation_text(results)
        )


def check_outputs(args: argparse.Namespace) -> None:
    """Raise for what could not be written, before hours of scoring."""
    if args.scores is not None:
        if not args.scores.name.lower().endswith((".jsonl", ".parquet")):
            raise ValueError(f"--scores {args.scores}: must be a .jsonl or .parquet file")
        if args.scores.exists():
            raise ValueError(f"--scores {args.scores} exists: remove it, or choose another file")
        if not args.scores.parent.is_dir():
            raise ValueError(f"--scores {args.scores}: there is no folder {args.scores.parent}")
    if args.report is not None and args.report.exists() and not args.report.is_dir():
        raise ValueError(f"--report {args.report}: is a file, give a folder")
    if args.calibrate and not Path(args.model, "config.json").is_file():
        raise ValueError(
            f"--calibrate writes into MODEL/config.json, and {args.model} is no Hugging Face "
            "folder: convert a checkpoint (docs/conversion.md), or fetch the model"
        )


def try_outputs(args: argparse.Namespace) -> None:
    """Raise if a new file cannot be made where one will be, before hours of scoring."""
    folders = {"--scores": args.scores and args.scores.parent, "--report": args.report}
    folders["--calibrate"] = Path(args.model) if args.calibrate else None
    for option, folder in folders.items():
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"{option}: {folder} cannot be written to: {error}") from None


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be a positive integer, got 0")
    return int(text)


def lengths_of(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_length", "max_response_length", "max_packed_length")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, name, or checkpoint")
    parser.add_argument("files", nargs="+", metavar="FILE", help="rows with labels")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="MODEL",
        help="another model, for the difference on the same rows; may be given several times",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="score again with the references shuffled, and show how far length explains it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument(
        "--scores", type=Path, metavar="OUT", help="write MODEL's rewards: .jsonl or .parquet"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write an HTML page there")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="write mean, deviation and temperature into MODEL/config.json, for normalize=True",
    )
    parser.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error", help="as in training"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of shuffling and bootstraps")
    parser.add_argument(
        "--config", help="of a checkpoint's run; default: the one that the run left beside it"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="for the config, as in training; put it last",
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in")
    parser.add_argument("--max-length", type=positive, help="see docs/configuration.md")
    parser.add_argument("--max-response-length", type=positive, help="see docs/configuration.md")
    parser.add_argument(
        "--max-packed-length",
        type=positive,
        help="tokens that are computed at once; no fewer than max_length",
    )
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        evaluate(args)
    except BadRowsError as error:
        sys.exit(
            f"evaluate.py: {error.report()}\nFix them, or leave them out with --on-bad-row skip."
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
