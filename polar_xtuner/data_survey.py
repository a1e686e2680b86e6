"""Files of rows -> `DataResult`: what is wrong, what is odd, how long things are, what they make.

One pass reads, checks and measures the rows, on their way to where training would tokenise them
(`tokenise.py`); the groups that come out are planned as training would plan them (`packing.py`). So
the figures are those of the run, not of a model of it. Memory is about 500 bytes a row, most of it
the plan's, and every finding; texts and ids are in files of a temporary folder, which take about as
much room as the rows.
"""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polar_xtuner._checks import RawRow
from polar_xtuner.cache import StoreWriter, TokenStore
from polar_xtuner.data_checks import (
    KINDS,
    RAW,
    Giveaways,
    Odd,
    PairLedger,
    RowChecks,
    digest,
    keep_raw,
)
from polar_xtuner.data_result import FIELDS, DataResult, DataWarning, Lengths, Limits
from polar_xtuner.estimates import PUBLISHED, Training, estimate
from polar_xtuner.fitting import Fitted, fit
from polar_xtuner.packing import ModelShape, Plan, plan_epoch
from polar_xtuner.records import BadRow, MapFn, Row, RowError, read_rows
from polar_xtuner.template import Candidate, PartLengths, PolarTemplate
from polar_xtuner.tokenise import tokenise

BATCH = 256
"""Rows that are measured together: their texts are encoded in one go, equal ones once."""

LISTED = 10_000
"""Warnings of a kind that are kept; the others are counted."""

PUBLISHED_LIMITS = Limits(None, 16384, 4096, 32768, 1, None, 1, "error", "error")
"""POLAR's own (arXiv 2507.05197), on one GPU, a pack a step."""

NO_ROW = "there is no row to train on"


@dataclass(frozen=True, slots=True)
class Peak:
    """A GPU, and the share of its peak that is reached."""

    gpu: str | None = None
    flops: float | None = None
    """Operations a second in bfloat16; None if unknown."""
    mfu: float = 0.4


def survey(
    files: Sequence[Path],
    template: PolarTemplate,
    special: Iterable[str],
    limits: Limits = PUBLISHED_LIMITS,
    *,
    map_fn: MapFn | None = None,
    group_candidates: bool = True,
    num_proc: int | None = None,
    seed: int = 0,
    training: Training | None = None,
    peak: Peak | None = None,
) -> DataResult:
    """Look at files as training with these settings would.

    Args:
        files: what `find_files` gives.
        template: with the limits of `limits`.
        special: what `data_checks.special_strings` gives.
        map_fn, group_candidates, num_proc: see `PolarDataset`.
        seed: of the plan.
        training: the model and how it is trained, None leaves out what it would take.
        peak: of the GPU it is trained on, None leaves out the time.

    Raises:
        OSError: a file cannot be opened, or the temporary folder is full.
    """
    names = [str(file) for file in files]
    seen = _Seen(names, template, RowChecks(special))
    shape = PUBLISHED["POLAR-7B"][0] if training is None else training.shape
    with tempfile.TemporaryDirectory(prefix="polar_check_data_") as folder:
        writer = StoreWriter(Path(folder))
        rows = seen.pass_on(read_rows(files, keep_raw(map_fn)))
        done = tokenise(
            rows,
            template,
            writer,
            names=names,
            group_candidates=group_candidates,
            num_proc=num_proc,
        )
        assert done["bad_rows"] == 0, "equal candidates are found on the way"
        writer.finish(done)
        epoch = _Epoch(TokenStore(Path(folder)), limits, shape, seed)
    for pairs, tokens in epoch.unfit:
        seen.note_long(int(pairs["file"]), int(pairs["line"]), tokens, limits.max_packed_length)
    result = seen.result(epoch, limits)
    if training is None or epoch.plan is None:
        return result
    peak = peak or Peak()
    taken = estimate(
        training, epoch.tokens, epoch.attended, gpu=peak.gpu, peak=peak.flops, mfu=peak.mfu
    )
    return replace(result, estimate=taken)


class _Epoch:
    """What a store's groups make: numbers, once the store is gone."""

    def __init__(self, store: TokenStore, limits: Limits, shape: ModelShape, seed: int) -> None:
        self.plan: Plan | None = None
        self.refusal: str | None = NO_ROW
        self.groups = self.pairs = self.tokens = self.alone = self.attended = 0
        self.unfit: list[tuple[NDArray[Any], int]] = []
        if not len(store):
            return
        fitted = fit(store, limits.max_packed_length)
        self.unfit = fitted.unfit
        self.groups, self.pairs = len(fitted.lengths), int(fitted.pair_counts.sum())
        self.tokens, self.attended = int(fitted.lengths.sum()), int(fitted.attended.sum())
        self.alone = int(store.unshared_lengths().sum())
        if self.groups:
            self._lay_out(fitted, limits, shape, seed)

    def _lay_out(self, fitted: Fitted, limits: Limits, shape: ModelShape, seed: int) -> None:
        try:
            self.plan = plan_epoch(
                fitted.lengths,
                fitted.pair_counts,
                shape.flops(fitted.lengths, fitted.attended),
                limits.max_packed_length,
                pairs_per_step=limits.pairs_per_step,
                seed=seed,
                ranks=limits.ranks,
                accumulation=limits.accumulative_counts,
            )
            self.refusal = None
        except ValueError as error:  # what a run says at its start
            self.refusal = str(error)


class _Seen:
    """What is known of the rows that have passed."""

    def __init__(self, names: Sequence[str], template: PolarTemplate, checks: RowChecks) -> None:
        self._names = names
        self._numbers = {name: number for number, name in enumerate(names)}
        self._template, self._checks = template, checks
        self.rows = self.good = self.longer = self.as_long = self.cut = 0
        self.errors: list[tuple[int, RowError]] = []  # with the number of the row
        self._warnings: dict[str, list[tuple[int, DataWarning]]] = {kind: [] for kind in KINDS}
        self._counts: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._files, self._lines = array("i"), array("q")  # of every row
        self._prompts = array("Q")
        self._ids = {field: array("I") for field in FIELDS}
        self._characters = {field: array("I") for field in FIELDS}
        self._ledger, self._giveaways = PairLedger(), Giveaways()
        self._bad: set[int] = set()  # rows
        self._long: dict[tuple[int, int], list[int]] = {}  # tokens of pairs, by file and line

    def pass_on(self, rows: Iterable[Row | BadRow]) -> Iterator[Row]:
        """The rows that training would take, once they have been looked at."""
        rows = iter(rows)
        while batch := [*islice(rows, BATCH)]:
            good = [row for row in batch if isinstance(row, Row)]
            candidates = [
                Candidate(row.prompt, row.reference, text, row.wrapper)
                for row in good
                for text in (*row.chosen, *row.rejected)
            ]
            lengths = iter(self._template.part_lengths(candidates))
            for row in batch:
                number = self._number(row)
                if isinstance(row, BadRow):
                    self._note_errors(number, row.errors)
                    continue
                parts = [next(lengths) for _ in (*row.chosen, *row.rejected)]
                if equal := self._equal_once_cut(row, parts):
                    self._note_errors(number, [RowError(row.file, row.line, *equal)])
                    continue
                self._look_at(number, row, parts)
                yield row

    def _number(self, row: Row | BadRow) -> int:
        place = row if isinstance(row, Row) else row.errors[0]
        self._files.append(self._numbers[place.file])
        self._lines.append(place.line)
        self.rows += 1
        return self.rows - 1

    def _note_errors(self, number: int, errors: Iterable[RowError]) -> None:
        self.errors += [(number, error) for error in errors]
        self._bad.add(number)

    def _equal_once_cut(self, row: Row, parts: list[PartLengths]) -> tuple[str, str] | None:
        """Field and problem of a candidate that is the same as one of the other side in ids."""
        left = [part.kept[2] for part in parts]
        chosen, rejected = left[: len(row.chosen)], left[len(row.chosen) :]
        if set(chosen).isdisjoint(rejected):
            return None
        sequences = self._template.encode(
            [
                Candidate(row.prompt, row.reference, text, row.wrapper)
                for text in (*row.chosen, *row.rejected)
            ]
        )
        better, worse = sequences[: len(row.chosen)], sequences[len(row.chosen) :]
        for field, ids, part in zip(_names(row, "chosen"), better, parts):
            if ids in worse:
                other = _names(row, "rejected")[worse.index(ids)]
                cut = f"both are cut to {part.kept[2]} ids" if _is_cut(part, 2) else "tokenised"
                return field, f"equals {other} once {cut}"
        return None

    def _look_at(self, number: int, row: Row, parts: list[PartLengths]) -> None:
        self.good += 1
        self._sources[row.source or ""] += 1
        self._prompts.append(digest(row.prompt))
        self._ledger.add(number, row)
        self._giveaways.add(row)
        for odd in self._checks(row):
            self._warn(number, odd)
        chosen, rejected = parts[: len(row.chosen)], parts[len(row.chosen) :]
        for field, texts, lengths in (
            ("prompt", [row.prompt], [parts[0].whole[0]]),
            ("reference", [row.reference], [parts[0].whole[1]]),
            ("chosen", row.chosen, [part.whole[2] for part in chosen]),
            ("rejected", row.rejected, [part.whole[2] for part in rejected]),
        ):
            self._ids[field].extend(lengths)
            self._characters[field].extend(map(len, texts))
        for better in chosen:
            for worse in rejected:
                self.longer += better.whole[2] > worse.whole[2]
                self.as_long += better.whole[2] == worse.whole[2]
        cut = [*_cuts(row, parts)]
        self.cut += bool(cut)
        for odd in cut:
            self._warn(number, odd)

    def _warn(self, number: int, odd: Odd) -> None:
        kind, field, problem = odd
        self._counts[kind] += 1
        if self._counts[kind] <= LISTED:
            file, line = self._names[self._files[number]], self._lines[number]
            self._warnings[kind].append((number, DataWarning(kind, file, line, field, problem)))

    def note_long(self, file: int, line: int, tokens: int, cap: int) -> None:
        """A pair that no pack has room for."""
        self._long.setdefault((file, line), []).append(tokens)
        self._cap = cap

    def _place_of(self, number: int) -> str:
        return f"{self._names[self._files[number]]}:{self._lines[number]}"

    def result(self, epoch: _Epoch, limits: Limits) -> DataResult:
        """All that is known at the end; without what training would take."""
        for number, odd in self._ledger.findings(self._place_of):
            self._warn(number, odd)
        refusals = []
        if self._bad and limits.on_bad_row == "error":
            refusals.append(f"{len(self._bad)} of {self.rows} rows are bad")
        if self._long:
            count = sum(map(len, self._long.values()))
            self._note_long_rows()
            if limits.on_long_group == "error":
                cap = limits.max_packed_length
                refusals.append(f"{count} pairs do not fit a pack of {cap} tokens")
        if epoch.refusal is not None:
            refusals.append(epoch.refusal)
        pairs = max(len(self._ledger), 1)
        plan = epoch.plan
        packs = 0 if plan is None else len(plan.ends)
        warnings = sorted(
            (found for kind in self._warnings.values() for found in kind), key=lambda w: w[0]
        )
        return DataResult(
            files=tuple(self._names),
            rows=self.rows,
            bad_rows=len(self._bad),
            errors=tuple(error for _, error in sorted(self.errors, key=lambda e: e[0])),
            warnings=tuple(warning for _, warning in warnings),
            warning_counts=dict(self._counts.most_common()),
            refusals=tuple(refusals),
            prompts=len(np.unique(np.array(self._prompts))),
            groups=epoch.groups,
            pairs=epoch.pairs,
            sources=dict(self._sources.most_common()),
            ids=_lengths(self._ids),
            characters=_lengths(self._characters),
            chosen_longer=self.longer / pairs,
            as_long=self.as_long / pairs,
            cut_rows=self.cut,
            limits=limits,
            tokens=epoch.tokens,
            tokens_alone=epoch.alone,
            share_ratio=epoch.alone / max(epoch.tokens, 1),
            packs=packs,
            steps=0 if plan is None else plan.steps,
            fill=epoch.tokens / (packs * limits.max_packed_length) if packs else 0.0,
            estimate=None,
            giveaways=self._giveaways.found(),
        )

    def _note_long_rows(self) -> None:
        places = zip(self._files, self._lines)
        numbers = {place: n for n, place in enumerate(places) if place in self._long}
        for place, tokens in self._long.items():
            which = "its pair takes" if len(tokens) == 1 else f"{len(tokens)} of its pairs take"
            problem = f"{which} {max(tokens)} tokens, a pack holds {self._cap} (max_packed_length)"
            error = RowError(self._names[place[0]], place[1], "row", problem)
            self.errors.append((numbers[place], error))


def _names(row: Row, field: str) -> list[str]:
    return RawRow(row.extra[RAW]).names(field)


def _is_cut(part: PartLengths, place: int) -> bool:
    return part.kept[place] < part.whole[place]


def _cuts(row: Row, parts: list[PartLengths]) -> Iterator[Odd]:
    """Which parts of a row are cut; the prompt as the longest answer leaves it."""
    least = min(parts, key=lambda part: part.kept[0])
    fields = [("prompt", 0, least), ("reference", 1, least)]
    answers = (*_names(row, "chosen"), *_names(row, "rejected"))
    for field, place, part in [*fields, *((a, 2, part) for a, part in zip(answers, parts))]:
        if _is_cut(part, place):
            end = "first" if place else "last"
            yield (
                "cut",
                field,
                f"is cut from {part.whole[place]} ids to its {end} {part.kept[place]}",
            )


def _lengths(values: Mapping[str, array[int]]) -> dict[str, Lengths]:
    return {field: lengths_of(np.array(lengths)) for field, lengths in values.items()}


def lengths_of(lengths: NDArray[Any]) -> Lengths:
    """Statistics and histogram; percentiles are lengths that occur."""
    if not len(lengths):
        return Lengths(0, 0, 0.0, 0.0, 0.0, 0.0, 0, (0, 1), (0,))
    _, bins = np.frexp(lengths)  # of n the number of its binary digits
    counts = np.bincount(bins)
    median, p90, p99 = np.percentile(lengths, [50, 90, 99], method="inverted_cdf").tolist()
    return Lengths(
        count=len(lengths),
        min=int(lengths.min()),
        mean=float(lengths.mean()),
        median=float(median),
        p90=float(p90),
        p99=float(p99),
        max=int(lengths.max()),
        edges=(0, *(1 << place for place in range(len(counts)))),
        counts=tuple(counts.tolist()),
    )
