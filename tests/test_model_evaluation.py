"""From rows to an `Evaluation`, its JSON and its text, with a scorer that is told its rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.parquet import read_table

from polar_xtuner.best_of_n import best_of_n_figures
from polar_xtuner.calibration import calibration_of, write_calibration
from polar_xtuner.comparison import compare_pairs
from polar_xtuner.evaluation import (
    by_source,
    length_figures,
    likeliest_temperature,
    pair_figures,
)
from polar_xtuner.evaluation_text import evaluation_text
from polar_xtuner.model_evaluation import (
    Evaluation,
    ModelEvaluation,
    compare_models,
    evaluate_model,
    rows_to_evaluate,
    write_scores,
)
from polar_xtuner.records import BadRowsError
from polar_xtuner.rewards import Scored, read_calibration
from polar_xtuner.template import Candidate


class Told:
    """Rewards by a function of the candidate; no reward where that gives None."""

    def __init__(self, reward: Callable[[Candidate], float | None]) -> None:
        self.reward = reward

    def stream(self, items: Iterable[Candidate]) -> Iterator[Scored]:
        for one in items:
            reward = self.reward(one)
            yield Scored(reward, None if reward is not None else "is not finite")


def by_reference(c: Candidate) -> float:
    """What a model that reads the reference does: counts the characters in common, in order."""
    return float(sum(a == b for a, b in zip(c.reference, c.output))) + len(c.output) / 1000


BY_REFERENCE = Told(by_reference)
BY_LENGTH = Told(lambda c: float(len(c.output)))


def pair(prompt: str, reference: str, chosen: Any, rejected: Any, **fields: Any) -> dict[str, Any]:
    return {
        **{"prompt": prompt, "reference": reference, "chosen": chosen, "rejected": rejected},
        **fields,
    }


def rated(prompt: str, reference: str, output: list[str], labels: list[float]) -> dict[str, Any]:
    return {"prompt": prompt, "reference": reference, "output": output, "labels": labels}


ROWS = [
    pair("p", "abc", "abc", "xyzzy", source="s"),
    pair("p", "abc", ["abd", "xbc"], ["xyc", "q"], source="t"),
    pair("q", "hello", "hello", "world", source="s"),
    pair("r", "good", "food", "good!", id=7),
    rated("q", "hello", ["hello", "help", "no"], [3, 2, 1]),
    rated("r", "good", ["x", "y"], [1, 1]),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(files: list[Path], scorer: Any = BY_REFERENCE, **options: Any) -> ModelEvaluation:
    rows, _ = rows_to_evaluate(files, "error")
    return evaluate_model("model", scorer, rows, **options)


def same(a: Any, b: Any) -> bool:
    return json.dumps(a) == json.dumps(b)  # NaN equals NaN there


def test_pairs_are_all_combinations_and_know_their_places(file: Path) -> None:
    model = evaluated([file])
    texts = [
        (row.chosen[c], row.rejected[r]) for i, c, r in model.places for row in [model.rows[i].row]
    ]
    assert texts == [
        *[("abc", "xyzzy"), ("abd", "xyc"), ("abd", "q"), ("xbc", "xyc"), ("xbc", "q")],
        *[("hello", "world"), ("food", "good!")],
    ]
    assert [*model.pairs.sources] == ["s", "t", "t", "t", "t", "s", ""]
    assert [*model.pairs.rejected_lengths] == [len(rejected) for _, rejected in texts]
    references = [model.rows[i].row.reference for i, _, _ in model.places]
    for n, (reference, two) in enumerate(zip(references, texts)):
        rewards = [by_reference(Candidate("", reference, text)) for text in two]
        assert [model.pairs.chosen[n], model.pairs.rejected[n]] == rewards


def test_figures_are_of_all_rows_of_each_file_and_of_each_source(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", ROWS[:2]), write(tmp_path / "2.jsonl", ROWS[2:])
    model = evaluated([one, two])
    pairs = model.pairs
    alone = pair_figures(pairs.chosen, pairs.rejected)
    assert same({name: model.figures.pairs[name] for name in alone}, alone)
    assert model.figures.pairs["prompts"] == 3
    low, high = (model.figures.pairs[f"accuracy_prompts_{end}"] for end in ("low", "high"))
    assert low <= alone["accuracy"] <= high
    assert same(model.figures.lengths, length_figures(pairs))
    ranking = best_of_n_figures([model.rows[4].scores, model.rows[5].scores], [[3, 2, 1], [1, 1]])
    assert same(model.figures.best_of_n, ranking)
    parts = {str(one): pairs.only(slice(0, 5)), str(two): pairs.only(slice(5, None))}
    assert [*model.by_file] == [*parts]
    for name, part in parts.items():
        assert same(model.by_file[name].pairs, pair_figures(part.chosen, part.rejected))
    assert model.by_file[str(one)].best_of_n == {}
    found = {name: part.pairs for name, part in model.by_source.items()}
    assert same(found, by_source(pairs))


def test_a_model_that_reads_the_reference_falls_to_chance_without_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice([*"abcd"], 12)) for _ in range(400)]
    rows = [pair(f"p{i}", text, text, texts[i - 1]) for i, text in enumerate(texts)]
    file = write(tmp_path / "rows.jsonl", rows)

    def in_common(c: Candidate) -> float:  # without ties, which count as wrong
        return sum((i + 1) ** 1.5 for i, (a, b) in enumerate(zip(c.reference, c.output)) if a == b)

    model = evaluated([file], Told(in_common), controls=True)
    assert model.figures.pairs["accuracy"] > 0.95
    assert model.shuffled is not None and model.shuffled.pairs["pairs"] == 400
    assert model.shuffled.pairs["accuracy_low"] < 0.5 < model.shuffled.pairs["accuracy_high"]
    by_length = evaluated([file], BY_LENGTH, controls=True)
    assert by_length.shuffled_pairs is not None
    assert np.array_equal(by_length.pairs.margins, by_length.shuffled_pairs.margins)


def test_comparisons_are_paired(file: Path) -> None:
    first, other = evaluated([file]), evaluated([file], BY_LENGTH)
    found = compare_models(first, other, seed=3)
    prompts = [0, 0, 0, 0, 0, 1, 2]
    assert same(found.pairs, compare_pairs(first.pairs, other.pairs, prompts, 3))
    assert found.best_of_n["top_is_best"] == 0.0 and found.best_of_n["label_of_top"] == 0.0
    worse = evaluated([file], Told(lambda c: -by_reference(c)))
    assert compare_models(first, worse).best_of_n["label_of_top"] == pytest.approx((3 - 1 + 0) / 2)


def test_only_pairs_or_only_labels_are_enough(tmp_path: Path) -> None:
    for part, empty in ((ROWS[:4], "best_of_n"), (ROWS[4:], "pairs")):
        file = write(tmp_path / "part.jsonl", part)
        model = evaluated([file], controls=True)
        results = Evaluation([str(file)], 0, 0, [model, model], [compare_models(model, model)])
        assert getattr(model.figures, empty) == {} == getattr(results.comparisons[0], empty)
        json.dumps(results.to_json(), allow_nan=False)
        assert evaluation_text(results)


def test_rows_that_cannot_be_evaluated_are_named(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "p", "reference": "r"}, rated("p", "r", ["a", "b"], [1])]
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadRowsError) as raised:
        rows_to_evaluate([file], "error")
    assert [(e.line, e.field) for e in raised.value.errors] == [(7, "output"), (8, "labels")]
    good, bad = rows_to_evaluate([file], "skip")
    assert (len(good), bad) == (len(ROWS), 2)
    with pytest.raises(ValueError, match=r"no row to evaluate in .*empty.jsonl"):
        rows_to_evaluate([write(tmp_path / "empty.jsonl", [])], "error")


def test_a_text_without_a_reward_is_an_error(file: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:2: rejected\[1\]: is not finite"):
        evaluated([file], Told(lambda c: None if c.output == "q" else 1.0))


def test_one_prompt_is_no_control_and_said_before_scoring(tmp_path: Path) -> None:
    def fail(c: Candidate) -> float:
        raise AssertionError("scored")

    with pytest.raises(ValueError, match="one prompt"):
        evaluated([write(tmp_path / "one.jsonl", ROWS[:2])], Told(fail), controls=True)


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.parquet"])
def test_scores_are_written_whole(file: Path, name: str) -> None:
    model = evaluated([file], Told(lambda c: by_reference(c) / 3))
    output = file.parent / name
    write_scores(model.rows, output)
    if name.endswith("parquet"):
        lines = read_table(output).to_pylist()
    else:
        lines = [*map(json.loads, output.read_text().splitlines())]
    assert [line["line"] for line in lines] == [*range(1, 7)] and lines[3]["id"] == "7"
    for row, line in zip(model.rows, lines):
        for field in ("scores", "chosen_scores", "rejected_scores"):
            assert [*(line.get(field) or ())] == [*getattr(row, field)]
    assert {*file.parent.iterdir()} == {file, output}


def test_json_has_every_figure_and_no_nan(file: Path) -> None:
    first, other = evaluated([file], controls=True), evaluated([file], BY_LENGTH)
    results = Evaluation([str(file)], 1, 5, [first, other], [compare_models(first, other)])
    found = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert found["pairs"]["accuracy"] == first.figures.pairs["accuracy"]
    assert (found["bad_rows"], found["seed"], found["model"]) == (1, 5, "model")
    assert found["files"][str(file)]["pairs"]["pairs"] == 7
    assert [*found["sources"]] == ["s", "t"]
    assert found["shuffled_references"]["pairs"]["pairs"] == 7
    [against] = found["against"]
    assert against["lengths"]["longer_wins"] == other.figures.lengths["longer_wins"]
    assert against["difference"]["pairs"]["mcnemar_p"] <= 1
    assert against["shuffled_references"] is None


def test_the_text_shows_the_figures_with_their_intervals(file: Path) -> None:
    first, other = evaluated([file], controls=True), evaluated([file], BY_LENGTH)
    other = ModelEvaluation(**{**vars(other), "name": "other"})
    results = Evaluation([str(file)], 0, 0, [first, other], [compare_models(first, other)])
    of_first, _, difference = evaluation_text(results).split("\n\n")
    lines = {line.strip().split("  ")[0]: " ".join(line.split()) for line in of_first.splitlines()}
    pairs = first.figures.pairs
    low, high = pairs["accuracy_prompts_low"], pairs["accuracy_prompts_high"]
    assert lines["over prompts"] == f"over prompts 3 {low:.3f} to {high:.3f}"
    assert difference.startswith("model less other") and "McNemar" in difference
    assert first.shuffled is not None and of_first.count("references shuffled") == 2
    assert f"{first.shuffled.pairs['accuracy']:.3f}" in of_first
    for name in ("source s", "always the longer", "where the longer is wrong"):
        assert " to " in lines[name]
    assert "-" in lines["source s"].split()  # no temperature, where every pair is right


# --- calibration ---------------------------------------------------------------------------------


def noisy(c: Candidate) -> float:
    return by_reference(c) + (2.5 if c.output == "good!" else 0.0)


def test_a_calibration_is_of_every_candidate_once_and_is_read_again(file: Path) -> None:
    rows = [*ROWS, ROWS[0]]
    model = evaluated([write(file, rows)], Told(noisy))
    found = calibration_of(model)
    rewards = {
        (row.row.prompt, text): reward
        for row in model.rows
        for text, reward in zip(
            (*row.row.outputs, *row.row.chosen, *row.row.rejected),
            (*row.scores, *row.chosen_scores, *row.rejected_scores),
        )
    }
    assert found.mean == pytest.approx(np.mean([*rewards.values()]))
    assert found.std == pytest.approx(np.std([*rewards.values()]))
    assert found.temperature == likeliest_temperature(model.pairs.chosen, model.pairs.rejected) > 0

    config = file.parent / "config.json"
    config.write_text('{"b": 1, "polar_calibration": {"mean": 3}, "a": "ü"}')
    config.chmod(0o640)
    write_calibration(file.parent, found)
    assert read_calibration(file.parent) == found
    content = json.loads(config.read_text(encoding="utf-8"))
    assert [*content] == ["b", "polar_calibration", "a"] and content["a"] == "ü"
    assert config.stat().st_mode & 0o777 == 0o640
    assert {*file.parent.iterdir()} == {file, config}

    config.write_text("[]")
    with pytest.raises(ValueError, match="has no polar_calibration"):
        read_calibration(file.parent)


def test_a_calibration_without_a_temperature_is_refused(tmp_path: Path) -> None:
    for rows, scorer, reason in (
        (ROWS[:3], BY_REFERENCE, "an accuracy of 1 .* on 6 pairs: where no pair is wrong"),
        (ROWS[:1], BY_LENGTH, "an accuracy of 0 .* on 1 pairs: margins that point to the rejected"),
        (ROWS[4:], BY_LENGTH, "no row has chosen and rejected"),
    ):
        model = evaluated([write(tmp_path / "rows.jsonl", rows)], scorer)
        with pytest.raises(ValueError, match=f"not calibrated: .*{reason}"):
            calibration_of(model)
    assert math.isnan(likeliest_temperature([1.0], [0.0]))
