"""Score rows with a POLAR checkpoint: `python tools/score.py MODEL FILE...`.

In process, or with --server through servers of the checkpoint; MODEL is then for its tokenizer and
to check the servers with. FILE is in any format that training reads; - is JSON lines from stdin.

Every row gives one JSON line, in order: the `scores` of its outputs, or the `chosen_scores` and
`rejected_scores` of a pair, of which the accuracy is told in the end, the share of pairs whose
chosen answer gets the higher reward. Where something cannot be scored there is an `error`, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polar_xtuner.golden import GOLDEN
from polar_xtuner.records import BadRow, Row, find_files, parse_row, read_rows
from polar_xtuner.scored_lines import Summary, scored_lines, take_scored, write_parquet
from polar_xtuner.tokenizer import local_folder

STDIN = "-"


def open_scorer(args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    lengths = {"max_length": args.max_length, "max_response_length": args.max_response_length}
    lengths = {name: length for name, length in lengths.items() if length is not None}
    if args.server:  # needs no torch
        from polar_xtuner.client import RewardModelClient

        if args.max_length is not None:  # as in process
            lengths.setdefault("max_response_length", min(4096, (args.max_length - 3) // 2))
        return RewardModelClient(
            args.model,
            server_type=args.server_type,
            server_address=args.server,
            model=args.served_model,
            api_key=args.api_key or None,
            dtype=args.dtype,
            **lengths,
        )
    from polar_xtuner.scoring import PolarScorer

    return contextlib.nullcontext(
        PolarScorer(args.model, device=args.device, dtype=args.dtype, **lengths)
    )


def settings_of(args: argparse.Namespace, scorer: Any) -> str:
    """What a reward depends on beside its row."""
    model = Path(args.model)
    name = str(model.resolve()) if model.is_dir() else args.model
    route = "server" if args.server else str(scorer.model.dtype)
    template = scorer.template
    lengths = [template.max_length, template.max_response_length]
    return json.dumps([name, weights_of(model), route, lengths])


def weights_of(model: Path) -> str:
    """Changes where other weights are put into the folder; of a hub name, its commit."""
    folder = local_folder(model)
    if not model.is_dir():
        return folder.name
    golden = folder / GOLDEN
    if golden.is_file():
        return hashlib.sha256(golden.read_bytes()).hexdigest()
    files = sorted([*folder.glob("*.safetensors*"), *folder.glob("*.bin*")])
    stats = [(file.name, file.stat()) for file in files]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def read_stdin() -> Iterator[Row | BadRow]:
    from polar_xtuner.records import read_lines

    for line, raw in read_lines(Path("/dev/stdin")):
        yield raw if isinstance(raw, BadRow) else parse_row(raw, "/dev/stdin", line, scoring=True)


def files_of(args: argparse.Namespace, output: Path | None) -> list[Path]:
    """The files to read: a folder among them may be where the output is too."""
    own = {path.resolve() for path in (args.output, output) if path is not None}
    for name in args.files:
        if Path(name).resolve() in own:
            raise ValueError(f"{name} is the output: it cannot be read as rows too")
    return [file for file in find_files(args.files) if file.resolve() not in own]


def check_parquet() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(
            "a .parquet output needs pyarrow, which is not installed: pip install pyarrow, or "
            "'polar_xtuner[score]', or give a .jsonl output"
        ) from None


def run(args: argparse.Namespace) -> Summary:
    """Scores, writes and prints what `args` ask for."""
    output = args.output
    as_parquet = output is not None and output.name.lower().endswith(".parquet")
    if as_parquet:  # cannot be continued: lines are collected beside it
        check_parquet()
        output = output.with_name(f"{output.name}.jsonl")
        if args.output.exists() and not output.exists():
            raise ValueError(f"{args.output} is complete: remove it to score again")
    has_lines = output is not None and output.exists() and output.stat().st_size > 0
    if has_lines and not args.resume:
        raise ValueError(f"{output} exists: continue it with --resume, or remove it")
    rows = (
        read_stdin() if args.files == [STDIN] else read_rows(files_of(args, output), scoring=True)
    )
    summary = Summary()
    listed = []
    with open_scorer(args) as scorer, contextlib.ExitStack() as stack:
        settings = settings_of(args, scorer)
        if has_lines:
            for line in take_scored(scorer, output, rows, settings):
                summary.add(line)
        stream = sys.stdout
        if output is not None:
            stream = stack.enter_context(output.open("a", encoding="utf-8", buffering=1))
        bar = tqdm(
            scored_lines(scorer, rows, settings),
            desc="Scoring",
            unit=" rows",
            initial=summary.rows,
            disable=not sys.stderr.isatty() or stream.isatty(),
        )
        for line in bar:
            summary.add(line)
            if args.json and output is None:
                listed.append(line)
            else:
                print(json.dumps(line), file=stream)
    if not summary.rows:
        raise ValueError(f"no row to score in {', '.join(args.files)}")
    if as_parquet:
        write_parquet(output, args.output)
        if not summary.errors:  # else --resume needs it
            output.unlink()
    figures = summary.figures()
    if args.json:
        print(json.dumps({**figures, "rows": listed} if output is None else figures))
    elif summary.n:
        low, high = figures["accuracy_interval_95"]
        print(
            f"accuracy {figures['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {summary.n} pairs, "
            f"mean margin {figures['mean_margin']:.3f}",
            file=sys.stderr,
        )
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder of the model")
    parser.add_argument("files", nargs="+", metavar="FILE", help="rows")
    parser.add_argument("--output", type=Path, help="a .jsonl or .parquet file; default: stdout")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the output of an interrupted run; lines that have an error are done again",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object and no more; without --output it holds all lines as `rows`",
    )
    parser.add_argument("--server", metavar="ADDRESS", help="host:port, several with commas")
    parser.add_argument("--server-type", default="sglang", help="sglang, vllm or lmdeploy")
    parser.add_argument("--served-model", metavar="NAME", help="default: the one the server tells")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("POLAR_API_KEY"),
        help="sent to the server as a bearer token; default: $POLAR_API_KEY",
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in; with --server, what the server computes in",
    )
    parser.add_argument("--max-length", type=int, help="see docs/configuration.md")
    parser.add_argument("--max-response-length", type=int, help="see docs/configuration.md")
    args = parser.parse_args()
    if args.resume and args.output is None:
        parser.error("--resume needs --output")
    if args.server and args.device:
        parser.error("--device is for scoring without --server")
    if args.served_model and not args.server:
        parser.error("--served-model is for scoring with --server")
    if STDIN in args.files and len(args.files) > 1:
        parser.error("stdin (-) goes with no other file")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        summary = run(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"score.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if summary.errors:
        sys.stdout.flush()
        sys.exit(
            f"score.py: {summary.errors} of {summary.rows} rows have an error, the first: "
            f"{summary.first_error}{'; --resume tries them again' if args.output else ''}"
        )


if __name__ == "__main__":
    main()
