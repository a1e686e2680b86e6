"""Time and memory from rows to ready packs, beside xtuner 0.2.0's own code on the same rows.

    python tools/bench_data.py FILE... --tokenizer PATH [--rows 50000] [--json]

Each side runs in processes of its own, in turn: `ours` is a `PolarDataset` and the plan of an
epoch, `xtuner` is `build_preference_dataset` with its reference-aware options; both tokenise in
`--num-proc` processes. What is timed is that call alone, not imports. `ours` is run a second time
with the cache that the first has left; xtuner has none.

`--rows N` takes that many rows, those of the file over and over, with a running number put into
every text (message lists, that is) so that no two are the same. No prompt comes twice then, so only
the two answers of a row share their prefix. Memory is the sum of what all processes of a side hold
at its peak (resident set; memory that several share counts once for each).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench_tokenizer import load_tokenizer

MEBIBYTE = 1 << 20


def main() -> None:
    args = parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    for file in args.files:
        with tempfile.TemporaryDirectory() as folder:
            path = numbered(file, args.rows, Path(folder)) if args.rows else file
            result = {"file": file.name, **compare(path, Path(folder), args)}
        print(json.dumps(result) if args.json else table(result), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--tokenizer", required=True, help="a Hugging Face folder, or a sentencepiece .model file"
    )
    parser.add_argument("--rows", type=int, help="distinct rows to make of each file")
    parser.add_argument("--num-proc", type=int, default=2, help="processes that tokenise")
    parser.add_argument("--repeats", type=int, default=1, help="medians are over so many runs")
    parser.add_argument("--max-packed-length", type=int, default=32768)
    parser.add_argument("--only-ours", action="store_true", help="leave xtuner out")
    parser.add_argument("--json", action="store_true", help="one JSON object a file")
    parser.add_argument("--side", choices=["ours", "xtuner"], help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for path in (*args.files, Path(args.tokenizer)):
        if not path.exists():
            parser.error(f"no such file: {path}")
    return args


def numbered(file: Path, count: int, folder: Path) -> Path:
    """So many distinct rows made of those of a file."""
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = rows[number % len(rows)]
            marked = {
                field: [{**m, "content": f"{number} {m['content']}"} for m in row[field]]
                for field in ("prompt", "reference", "chosen", "rejected")
            }
            out.write(json.dumps({**row, **marked}, ensure_ascii=False) + "\n")
    return path


def compare(path: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure by side, medians over the repeats."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "xtuner": [], "cached": []}
    for repeat in range(args.repeats):
        cache = folder / f"cache{repeat}"
        runs["ours"].append(run("ours", path, cache, args))
        runs["cached"].append(run("ours", path, cache, args))
        if not args.only_ours:
            runs["xtuner"].append(run("xtuner", path, cache, args))
    sides = ["ours"] if args.only_ours else ["ours", "xtuner"]

    def figures(name: str, digits: int) -> dict[str, float]:
        return {s: round(median(r[name] for r in runs[s]), digits) for s in sides}

    ours = runs["ours"][0]
    cap = args.max_packed_length
    cached = {"ours": round(median(r["seconds"] for r in runs["cached"]), 4)}
    if not args.only_ours:
        cached["xtuner"] = figures("seconds", 4)["xtuner"]
    return {
        "rows": ours["rows"],
        "rows_per_s": figures("rows_per_s", 0),
        "seconds": figures("seconds", 4),
        "seconds_cached": cached,
        "peak_rss_mb": figures("peak_rss_mb", 0),
        "bytes_per_token": figures("bytes_per_token", 1),
        "cache_mb": round(ours["cache_mb"], 1),
        "tokens_per_pair": figures("tokens_per_pair", 1),
        "packs": figures("packs", 0),
        "packs_lower_bound": {s: math.ceil(runs[s][0]["tokens"] / cap) for s in sides},
        "pack_fill": {s: round(runs[s][0]["tokens"] / cap / runs[s][0]["packs"], 4) for s in sides},
    }


def run(side: str, path: Path, cache: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, and the peak memory of it and those it starts."""
    command = [sys.executable, __file__, str(path), "--side", side, "--cache", str(cache)]
    command += ["--tokenizer", args.tokenizer, "--num-proc", str(args.num_proc)]
    command += ["--max-packed-length", str(args.max_packed_length)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        peak = Peak(process.pid)
        out, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{side} failed on {path}:\n{errors[-3000:]}")
    return {**json.loads(out.splitlines()[-1]), "peak_rss_mb": peak.stop() / MEBIBYTE}


class Peak:
    """Largest memory of a process and all below it, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._ended.wait(0.1):
            total = 0
            try:
                own = psutil.Process(self._pid)
                for process in (own, *own.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.Error:  # one ended meanwhile
                continue
            self._peak = max(self._peak, total)

    def stop(self) -> float:
        self._ended.set()
        self._thread.join()
        return self._peak


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side on one file: seconds, packs, tokens, pairs and memory held."""
    import psutil

    tokenizer = load_tokenizer(args.tokenizer)
    build = {"ours": build_ours, "xtuner": build_xtuner}[args.side]
    build_now = build(tokenizer, args)
    own = psutil.Process()
    before, start = own.memory_info().rss, time.perf_counter()
    figures = build_now()
    seconds = time.perf_counter() - start
    held = own.memory_info().rss - before
    return {
        "seconds": seconds,
        "rows_per_s": figures["rows"] / seconds,
        "bytes_per_token": held / figures["tokens"],
        "tokens_per_pair": figures["tokens"] / figures["pairs"],
        **figures,
    }


def build_ours(tokenizer: Any, args: argparse.Namespace) -> Any:
    from polar_xtuner.dataset import PolarDataset
    from polar_xtuner.sampler import PackSampler

    def build() -> dict[str, Any]:
        data = PolarDataset(
            tokenizer,
            [str(f) for f in args.files],
            max_packed_length=args.max_packed_length,
            num_proc=args.num_proc,
            cache_dir=args.cache,
        )
        stored = sum(f.stat().st_size for f in Path(args.cache).rglob("*") if f.is_file())
        return {
            "rows": data.store.meta["rows"],
            "pairs": int(data.pair_counts.sum()),
            "tokens": int(data.lengths.sum()),
            "packs": len(PackSampler(data)),
            "cache_mb": stored / MEBIBYTE,
        }

    return build


def build_xtuner(tokenizer: Any, args: argparse.Namespace) -> Any:
    from xtuner.dataset.preference_dataset import build_preference_dataset, load_jsonl_dataset

    from polar_xtuner.template import REWARD_TOKEN

    def build() -> dict[str, Any]:
        data = build_preference_dataset(
            dataset=dict(type=load_jsonl_dataset, data_files=[str(f) for f in args.files]),
            tokenizer=tokenizer,
            max_length=16384,
            is_dpo=False,
            is_reward=True,
            is_reference=True,
            reward_token_id=tokenizer.convert_tokens_to_ids(REWARD_TOKEN),
            num_proc=args.num_proc,
            use_varlen_attn=True,
            max_packed_length=args.max_packed_length,
            shuffle_before_pack=True,
        )
        rows = sum(map(len, data.data))
        packs, tokens = len(data), sum(data.lengths)
        return {"rows": rows, "pairs": rows, "tokens": tokens, "packs": packs}

    return build


def table(result: dict[str, Any]) -> str:
    return "\n".join(lines_of(result))


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['file']}: {result['rows']} rows"
    for name, value in result.items():
        if isinstance(value, dict):
            shown = "   ".join(f"{side} {number:>10g}" for side, number in value.items())
            yield f"  {name:<18} {shown}"
    yield f"  {'cache_mb':<18} ours {result['cache_mb']:>10g}"


if __name__ == "__main__":
    main()
