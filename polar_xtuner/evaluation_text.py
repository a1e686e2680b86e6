"""An `Evaluation` as text: tables for a terminal, every share with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from polar_xtuner.model_evaluation import Comparison, Evaluation, Figures, ModelEvaluation

PAIRS = (
    *("pairs", "n", "accuracy", "95 % interval", "ties"),
    *("margin", "loss", "ECE", "T", "ECE at T"),
)
BEST_OF_N = (
    *("best of N", "rows", "top is best", "95 % interval", "at random"),
    *("label: top", "mean", "best", "NDCG", "Spearman", "Kendall"),
)


def evaluation_text(evaluation: Evaluation) -> str:
    """All figures of all models, and the differences."""
    blocks = ["\n".join(_of_model(model)) for model in evaluation.models]
    first = evaluation.models[0].name
    blocks += ["\n".join(_of_comparison(first, one)) for one in evaluation.comparisons]
    return "\n\n".join(blocks)


def _of_model(model: ModelEvaluation) -> Iterator[str]:
    yield model.name
    parts = {"all": model.figures}
    if len(model.by_file) > 1:
        parts |= {f"file {name}": part for name, part in model.by_file.items()}
    parts |= {f"source {name}": part for name, part in model.by_source.items()}
    if model.figures.pairs:
        yield from _table([PAIRS, *_pair_lines(parts, model)])
    if model.figures.best_of_n:
        if model.shuffled:
            parts["references shuffled"] = model.shuffled
        lines = [_best_of_n_line(n, p.best_of_n) for n, p in parts.items() if p.best_of_n]
        yield from _table([BEST_OF_N, *lines])
        equal = model.figures.best_of_n["rows_equal_labels"]
        if equal:
            yield f"  {_count(equal)} rows with equal labels are left out, but for their labels"
    if model.shuffled and model.figures.lengths:
        rewards, margins = (
            _signed(model.figures.lengths[f"{kind}_length_correlation"])
            for kind in ("score", "margin")
        )
        yield f"  correlation with length: of rewards {rewards}, of margins {margins}"


def _pair_lines(parts: Mapping[str, Figures], model: ModelEvaluation) -> Iterator[Sequence[str]]:
    figures = model.figures.pairs
    for name, part in parts.items():
        if part.pairs:
            yield _pair_line(name, part.pairs)
        if part is model.figures and figures["prompts"] < figures["pairs"]:
            low, high = figures["accuracy_prompts_low"], figures["accuracy_prompts_high"]
            yield "  over prompts", _count(figures["prompts"]), "", _interval(low, high)
    if model.shuffled:
        lengths = model.figures.lengths
        yield _pair_line("references shuffled", model.shuffled.pairs)
        yield _accuracy("always the longer", figures["pairs"], lengths, "longer_wins")
        wrong = lengths["pairs_longer_wrong"]
        yield _accuracy("where the longer is wrong", wrong, lengths, "accuracy_longer_wrong")


def _pair_line(name: str, figures: Mapping[str, float]) -> Sequence[str]:
    rest = ("ties", "margin", "loss", "ece", "temperature", "ece_at_temperature")
    accuracy = _accuracy(name, figures["pairs"], figures, "accuracy")
    return [*accuracy, *(_number(figures[figure]) for figure in rest)]


def _accuracy(name: str, n: float, figures: Mapping[str, float], share: str) -> list[str]:
    low, high = figures[f"{share}_low"], figures[f"{share}_high"]
    return [name, _count(n), _number(figures[share]), _interval(low, high)]


def _best_of_n_line(name: str, figures: Mapping[str, float]) -> Sequence[str]:
    rest = ("random_is_best", "label_of_top", "label_mean", "label_best", "ndcg")
    share = _accuracy(name, figures["rows"], figures, "top_is_best")
    ranks = (_signed(figures[figure]) for figure in ("spearman", "kendall"))
    return [*share, *(_number(figures[figure]) for figure in rest), *ranks]


def _of_comparison(first: str, comparison: Comparison) -> Iterator[str]:
    yield f"{first} less {comparison.against}"
    table: list[Sequence[str]] = [("difference", "", "95 % interval")]
    kinds = (
        ("accuracy", comparison.pairs, "accuracy_difference"),
        ("loss", comparison.pairs, "loss_difference"),
        ("top is best", comparison.best_of_n, "top_is_best"),
        ("label of top", comparison.best_of_n, "label_of_top"),
    )
    for name, figures, figure in kinds:
        if figures:
            low, high = figures[f"{figure}_low"], figures[f"{figure}_high"]
            interval = "-" if math.isnan(low) else f"{_signed(low)} to {_signed(high)}"
            table.append((name, _signed(figures[figure]), interval))
    yield from _table(table)
    if comparison.pairs:
        only_first = _count(comparison.pairs["only_first_right"])
        only_second = _count(comparison.pairs["only_second_right"])
        yield (
            f"  right alone: {only_first} pairs, the other {only_second}; McNemar's p "
            f"{comparison.pairs['mcnemar_p']:.2g}"
        )


def _table(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    count = max(map(len, lines))
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(count)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        yield "  " + "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()


def _count(n: float) -> str:
    return f"{int(n):,}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3f}"


def _interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{_number(low)} to {_number(high)}"
