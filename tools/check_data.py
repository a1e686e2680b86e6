"""What is wrong or odd in training data: `check_data.py FILE... --tokenizer PATH`.

FILE is in any format that training reads. Rows are read, cut and packed as training would do it,
with the settings of --config, or with POLAR's published limits. Errors are what training refuses;
warnings are what it takes and what may spoil the model all the same. The exit status is 1 exactly
if training would refuse the files.

With --config there are estimates of what training takes: operations and, with --gpu, time, and the
memory of each GPU. They are computed, not measured on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from polar_xtuner.data_checks import KINDS, special_strings
from polar_xtuner.data_result import FIELDS, DataResult, Estimate, Lengths
from polar_xtuner.data_survey import PUBLISHED_LIMITS, Peak, survey
from polar_xtuner.records import find_files
from polar_xtuner.template import PolarTemplate
from polar_xtuner.tokenizer import CONFIG, FAST, SENTENCEPIECE, load_tokenizer, local_folder

LISTED = 20
GIB = 2**30


def open_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint; by transformers where only that knows its kind."""
    folder = local_folder(path)
    has = {name for name in (FAST, SENTENCEPIECE, CONFIG) if (folder / name).is_file()}
    if has != {CONFIG}:
        return load_tokenizer(folder)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return load_tokenizer(folder)  # says what is missing
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the files of a folder raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(
            f"--tokenizer {path}: has only {CONFIG}, of which transformers makes no tokenizer "
            f"({type(error).__name__}: {reason}): give the folder or hub name of the base"
        ) from error


def peak_of(args: argparse.Namespace) -> Peak:
    if args.gpu is None:
        return Peak(mfu=args.mfu)
    from polar_xtuner.metrics import PEAK_FLOPS, peak_flops

    peak = peak_flops(args.gpu)
    if peak is None:
        known = ", ".join(pattern.replace("$", "") for pattern in PEAK_FLOPS)
        raise ValueError(f"--gpu {args.gpu}: its peak is not known. Known are {known}")
    return Peak(args.gpu, peak, args.mfu)


def run(args: argparse.Namespace) -> DataResult:
    """The check that `args` ask for."""
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu {args.mfu}: must be a share, above 0 and at most 1")
    if args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: must be at least 1")
    if args.config is None:
        if not args.files:
            raise ValueError("give a FILE, or a --config that names its data_files")
        if args.tokenizer is None:
            raise ValueError(
                "give --tokenizer, the folder or hub name of the base, or a --config that names it"
            )
        for option in ("cfg_options", "gpu", "zero"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')} needs a --config")
        files = find_files(args.files)
        tokenizer = open_tokenizer(args.tokenizer)
        limits = replace(PUBLISHED_LIMITS, ranks=args.ranks)
        lengths = {
            "max_length": limits.max_length,
            "max_response_length": limits.max_response_length,
        }
        try:
            template = PolarTemplate(tokenizer, **lengths)
        except ValueError as error:
            raise ValueError(
                f"--tokenizer {args.tokenizer}: {error} (settings are given by a --config)"
            ) from error
        return survey(files, template, special_strings(tokenizer), limits)
    try:
        from xtuner.registry import BUILDER

        from polar_xtuner.data_settings import read_settings
        from polar_xtuner.dataset import find_sets
    except ImportError as error:
        raise ValueError(
            f"--config needs what training needs, {error.name or error} is missing: pip install "
            "'polar_xtuner[train]', or leave --config out and give --tokenizer"
        ) from error
    peak = peak_of(args)
    settings = read_settings(args.config, args.cfg_options, gpus=args.ranks, zero=args.zero)
    if not args.files and settings.data_files is None:
        raise ValueError("the config names no data_files: give a FILE")
    files = [file for file, _ in find_sets(args.files or settings.data_files)]
    tokenizer = (
        BUILDER.build(settings.tokenizer)
        if args.tokenizer is None
        else open_tokenizer(args.tokenizer)
    )
    return survey(
        files,
        PolarTemplate(tokenizer, **settings.template),
        special_strings(tokenizer),
        settings.limits,
        map_fn=settings.map_fn,
        group_candidates=settings.group_candidates,
        num_proc=settings.num_proc,
        seed=settings.seed,
        training=settings.training,
        peak=peak,
    )


def report_writer(folder: Path) -> Callable[[Path, DataResult], Path]:
    """What writes the page, once it is known that it can be written."""
    try:
        from polar_xtuner.report import write_data_report
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--report needs {error.name}: pip install 'polar_xtuner[eval]'"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--report {folder}: cannot be written to: {error.strerror}") from error
    return write_data_report


def say(text: str) -> None:
    """Prints a text; a reader that has gone away (`| head`) has seen enough of it."""
    if sys.stdout is None:  # closed from the start, by `>&-`
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed again
        if not isinstance(error, BrokenPipeError):
            raise


def shown(result: DataResult) -> str:
    """The result for people."""
    lines = [f"{result.rows:,} rows in {len(result.files)} files, {result.bad_rows:,} of them bad"]
    lines += listed("errors", result.errors, len(result.errors))
    lines += listed("warnings", result.warnings, sum(result.warning_counts.values()))
    for kind, count in result.warning_counts.items():
        lines.append(f"  {count:7,} {kind}: {KINDS[kind]}")
    lines += ["", f"{'':10} {'':10} " + " ".join(f"{name:>8}" for name in STATISTICS)]
    for unit, by_field in (("ids", result.ids), ("characters", result.characters)):
        lines += [row_of(field, unit, by_field[field]) for field in FIELDS]
    limits = result.limits
    lines += [
        "",
        f"{result.prompts:,} prompts, {result.groups:,} groups, {result.pairs:,} pairs; the chosen "
        f"answer is the longer one in {result.chosen_longer:.1%} of them, as long in "
        f"{result.as_long:.1%}",
        *(
            f"giveaway: of {one.chosen_only + one.rejected_only:,} pairs whose answers differ in "
            f"it, the chosen one {one.feature} in {one.chosen_only:,}"
            for one in result.giveaways
        ),
        f"{result.cut_rows:,} rows are cut to max_length={limits.max_length} and "
        f"max_response_length={limits.max_response_length}",
        f"{result.tokens:,} tokens an epoch, {result.tokens_alone:,} without shared prefixes: "
        f"{result.share_ratio:.2f} times as many",
        f"{result.packs:,} packs of {limits.max_packed_length:,} tokens, {result.fill:.1%} full; "
        f"{result.steps:,} optimizer steps on {limits.ranks} ranks, with accumulative_counts="
        f"{limits.accumulative_counts}, pairs_per_step={limits.pairs_per_step}",
    ]
    if result.estimate is not None:
        lines += ["", *shown_estimate(result.estimate)]
    lines += ["", *(f"training would refuse this: {reason}" for reason in result.refusals)]
    return "\n".join(lines).rstrip()


STATISTICS = ("count", "min", "mean", "median", "p90", "p99", "max")


def row_of(field: str, unit: str, lengths: Lengths) -> str:
    numbers = " ".join(f"{getattr(lengths, name):8,.0f}" for name in STATISTICS)
    return f"{field:10} {unit:10} {numbers}"


def listed(what: str, findings: Any, total: int) -> list[str]:
    lines = [f"{total:,} {what}" + (":" if total else "")]
    lines += [f"  {finding}" for finding in islice(findings, LISTED)]
    if total > LISTED:
        lines.append(f"  ... and {total - LISTED:,} more (--json has them)")
    return lines


def shown_estimate(e: Estimate) -> list[str]:
    trained = "" if e.trained_parameters == e.parameters else f", {e.trained_parameters:,} trained"
    memory = e.memory
    time = "its time needs --gpu"
    if e.seconds is not None:
        time = f"{shown_time(e.seconds)} on {e.gpus} x {e.gpu}, if mfu is {e.mfu:g}"
    return [
        "Estimates, not measured on a GPU:",
        f"  {e.parameters:,} parameters{trained}",
        f"  an epoch (of {e.epochs}): {e.flops:.3g} operations; {time}",
        f"  memory of each GPU, {f'ZeRO stage {e.zero}' if e.zero else 'without DeepSpeed'}: "
        f"{memory.total / GIB:.1f} GiB, buffers and CUDA's own on top",
        f"    weights {memory.weights / GIB:.1f}, gradients {memory.gradients / GIB:.1f}, "
        f"optimizer {memory.optimizer / GIB:.1f}, activations of a full pack "
        f"{memory.activations / GIB:.1f}",
    ]


def shown_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="rows; default: the config's")
    parser.add_argument("--tokenizer", metavar="PATH", help="of the base; default: the config's")
    parser.add_argument("--config", help="of the training, for its limits and estimates")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of the training")
    parser.add_argument("--gpu", metavar="NAME", help="for the time, such as 'A100' or 'H100'")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak, assumed")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), help="stage, with --deepspeed")
    parser.add_argument("--json", action="store_true", help="one object with all findings")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a page there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        write_report = report_writer(args.report) if args.report else None
        with contextlib.redirect_stdout(sys.stderr):  # deepspeed tells stdout of its import
            result = run(args)
        if write_report:
            write_report(args.report, result)
        say(json.dumps(result.as_dict()) if args.json else shown(result))
    except (ValueError, OSError) as error:
        sys.exit(f"check_data.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(int(result.refused))


if __name__ == "__main__":
    main()
