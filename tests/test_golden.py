"""Golden scores: what an export writes, and what holding rewards against them tells."""

import json
import logging
import math
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHARED_DATA
from tokenizers import Tokenizer, normalizers

from polar_xtuner.collate import PackLayout
from polar_xtuner.export import export_hf
from polar_xtuner.golden import (
    DTYPES,
    GOLDEN,
    Golden,
    GoldenRow,
    read_golden,
    rows_to_score,
    verify,
    write_golden,
)
from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel
from polar_xtuner.rewards import candidate_of
from polar_xtuner.scoring import PolarScorer, pack_of
from polar_xtuner.template import Candidate, PolarTemplate

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SHAPES = {
    "small": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "deep": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10},
}


@pytest.fixture(scope="module")
def weights_of(demo, tmp_path_factory):
    """A base folder and weights by the names of a POLAR checkpoint, of a shape and a seed."""

    def weights(shape="small", seed=0, head=0.5):
        base = tmp_path_factory.mktemp("bases") / "base"
        demo.write_base(base, demo.build_tokenizer(), seed, **SHAPES[shape])
        tensors = torch.load(base / "pytorch_model.bin")
        for name, tensor in tensors.items():
            if "norm" in name:
                tensor += 0.2 * torch.randn_like(tensor)
        tensors["v_head.weight"].normal_().mul_(head)
        return base, tensors

    return weights


@pytest.fixture(scope="module")
def exported(weights_of, tmp_path_factory):
    """The folder of an export of these weights."""

    def export(shape="small", seed=0, dtype=None, shard="2GB", head=0.5):
        base, tensors = weights_of(shape, seed, head)
        folder = tmp_path_factory.mktemp("exports") / "hf"
        export_hf(tensors, str(base), folder, dtype, shard)
        return folder

    return export


@pytest.fixture(scope="module")
def small_export(exported):
    return exported()


def candidates(golden):
    return [Candidate(*row[:4]) for row in golden.rows]


def ids_of(golden):
    return [row.ids for row in golden.rows]


@torch.no_grad()
def scores(model, sequences):
    """Rewards of sequences by themselves, read at the last id."""
    rewards = []
    for ids in sequences:
        data = pack_of([(list(ids), [len(ids) - 1, 1])])
        layout = PackLayout(**data["layout"])
        row = data["reward_rows_C"]
        rewards += model(data["input_ids_T"], data["position_ids_T"], layout, row).tolist()
    return rewards


def load(folder, dtype=torch.float32):
    return InternLM2ForRewardModel.from_pretrained(folder, torch_dtype=dtype)


# ---- The rows


def test_rows_are_few_short_and_of_all_kinds(internlm2_tokenizer):
    rows = rows_to_score()
    found = [candidate_of(row) for row in rows]
    assert all(isinstance(one, Candidate) for one in found)
    assert len({*found}) == len(rows)
    assert 24 <= len(rows) <= 40
    lengths = [len(ids) for ids in PolarTemplate(internlm2_tokenizer).encode(found)]
    assert sum(lengths) <= 5000 and max(lengths) <= 400 and min(lengths) <= 15
    assert max(lengths[:8]) <= 64, "a server is probed with the first"
    assert {row["wrapper"] for row in rows} == {"sft", "pretrain"}
    assert {type(row["output"]) for row in rows} == {str, list}
    assert any(isinstance(row["output"], list) and len(row["output"]) > 1 for row in rows)
    text = "\n".join("\n".join(one[:3]) for one in found)
    for kind in ("LATIN", "CJK", "HIRAGANA", "ARABIC", "CYRILLIC"):
        assert any(unicodedata.name(c, "").startswith(kind) for c in text), kind
    for part in ("<s>", "</s>", "<|reward|>", "[UNUSED_TOKEN_130]", "   ", "\n\n\n", "\t", "🌧"):
        assert part in text, part
    assert any(one.output == "" for one in found)
    assert any(one.output.startswith(" ") for one in found)


def test_reading_and_verifying_needs_no_torch():
    code = (
        "import sys, polar_xtuner.golden as g\n"
        "g.rows_to_score(), g.read_golden(g.Path('POLAR-7B'))\n"
        "print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ---- What an export writes


@pytest.mark.parametrize("shard", ["2GB", "40KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_export_brings_the_rewards_of_its_own_weights(exported, dtype, shard):
    folder = exported(dtype=dtype, shard=shard)
    assert len([*folder.glob("*.safetensors")]) == 1 or shard == "40KB"
    golden = read_golden(folder)
    assert golden.dtype == str(dtype).removeprefix("torch.")
    assert golden.source == str(folder / GOLDEN)
    assert candidates(golden) == [candidate_of(row) for row in rows_to_score()]
    scorer = PolarScorer(str(folder), device="cpu")
    assert scorer.template.encode(candidates(golden)) == [[*row.ids] for row in golden.rows]
    expected = scorer.score(candidates(golden))
    assert torch.tensor(expected).std() > 0.1
    assert [row.reward for row in golden.rows] == pytest.approx(expected, abs=1e-5)
    assert verify(golden, ids_of(golden), expected, "float32").ok


def test_rewards_are_of_the_written_weights_not_of_those_that_were_given(exported):
    written, given = (read_golden(exported(dtype=d)) for d in (torch.bfloat16, torch.float32))
    pairs = zip(written.rows, given.rows)
    assert max(abs(a.reward - b.reward) for a, b in pairs) > given.tolerances["float32"]


def test_rows_too_long_for_the_model_are_left_out(weights_of, tmp_path):
    base, tensors = weights_of()
    config = json.loads((base / "config.json").read_text())
    config["max_position_embeddings"] = 100
    (base / "config.json").write_text(json.dumps(config))
    export_hf(tensors, str(base), tmp_path / "hf")
    lengths = [len(row.ids) for row in read_golden(tmp_path / "hf").rows]
    assert 5 < len(lengths) < len(rows_to_score()) and max(lengths) <= 100


def test_an_export_over_another_has_the_golden_scores_of_its_own_weights(weights_of, tmp_path):
    base, tensors = weights_of()
    export_hf(tensors, str(base), tmp_path / "hf")
    first = read_golden(tmp_path / "hf")
    tensors["v_head.weight"] *= 2
    export_hf(tensors, str(tmp_path / "hf"), tmp_path / "second")
    assert read_golden(tmp_path / "second").rows[0].reward == 2 * first.rows[0].reward
    export_hf(tensors, str(base), tmp_path / "hf")
    assert read_golden(tmp_path / "hf").rows == read_golden(tmp_path / "second").rows


@pytest.mark.parametrize("lacks", ["tokenizer", "reward token"])
def test_an_export_without_a_readable_tokenizer_has_none_and_says_why(
    weights_of, tmp_path, caplog, lacks
):
    base, tensors = weights_of()
    folder = tmp_path / "hf"
    export_hf(tensors, str(base), folder)
    assert (folder / GOLDEN).is_file()
    if lacks == "tokenizer":
        for file in base.glob("*token*"):
            file.unlink()
    else:
        for file in base.glob("*token*.json"):
            file.write_text(file.read_text().replace("[UNUSED_TOKEN_130]", "[OTHER]"))
    with caplog.at_level(logging.WARNING):
        export_hf(tensors, str(base), folder)
    assert f"there will be no {GOLDEN}" in caplog.text
    assert ("UNUSED_TOKEN_130" if lacks == "reward token" else "tokenizer.json") in caplog.text
    assert not (folder / GOLDEN).exists(), "that of the earlier export is not true any more"
    assert load(folder).v_head.weight.equal(tensors["v_head.weight"])


MEASURE = """
import re, sys
from pathlib import Path
from polar_xtuner import golden, golden_scores

def resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", status)[1])

rows = golden.rows_to_score()[:3]
golden_scores.rows_to_score = lambda: rows
before = resident("VmRSS")
golden_scores.golden_scores(Path(sys.argv[1]))
print(resident("VmHWM") - before)
"""


def test_a_layer_at_a_time_is_in_memory(demo, tmp_path, monkeypatch):
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs a Linux that tells peaks of memory")
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 40}
    demo.write_base(tmp_path / "base", demo.build_tokenizer(), 0, **shape)
    tensors = torch.load(tmp_path / "base" / "pytorch_model.bin", mmap=True)
    size = sum(tensor.nbytes for tensor in tensors.values())
    few = rows_to_score()[:3]
    monkeypatch.setattr("polar_xtuner.golden_scores.rows_to_score", lambda: few)
    export_hf(tensors, str(tmp_path / "base"), tmp_path / "hf")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "hf")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(out.stdout.splitlines()[-1])
    print(f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB")
    assert 4e6 < grown < 0.25 * size


# ---- Tolerances


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("written", [torch.float32, torch.float16, torch.bfloat16])
def test_each_precision_is_within_its_tolerance_with_room_to_spare(exported, shape, written):
    folder = exported(shape, seed=3, dtype=written)
    golden = read_golden(folder)
    for dtype in DTYPES:
        # The kernels of this machine, another order of rounding, no shared prefixes.
        rewards = scores(load(folder, getattr(torch, dtype)), ids_of(golden))
        found = verify(golden, ids_of(golden), rewards, dtype)
        print(shape, written, dtype, f"{found.max_difference:.2e} of {found.tolerance:.2e}")
        assert found.ok, found.problems
        assert found.max_difference <= found.tolerance / (8 if dtype == "float32" else 1.5)
    exact = scores(load(folder, torch.float64), ids_of(golden))
    assert verify(golden, ids_of(golden), exact, "float32").max_difference <= (
        golden.tolerances["float32"] / 8
    )
    order = [golden.tolerances[dtype] for dtype in DTYPES]
    assert order == sorted(order)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["noise", "scale"])
def test_one_layer_that_is_1_percent_off_is_outside_the_tolerance_of_float32(exported, shape, kind):
    folder = exported(shape, seed=4)
    golden = read_golden(folder)
    for number in range(SHAPES[shape]["num_hidden_layers"]):
        model = load(folder)
        torch.manual_seed(number)
        for parameter in model.model.layers[number].parameters():
            change = torch.randn_like(parameter) if kind == "noise" else 1.0
            parameter.data += 0.01 * parameter.data * change
        found = verify(golden, ids_of(golden), scores(model, ids_of(golden)), "float32")
        assert not found.ok
        assert found.max_difference > 5 * found.tolerance, number
        (problem,) = found.problems
        assert "weights" in problem


def test_weights_that_overflow_in_float16_have_no_tolerance_for_it(weights_of, tmp_path):
    base, tensors = weights_of()
    tensors["model.layers.1.feed_forward.w2.weight"] *= 3e6
    export_hf(tensors, str(base), tmp_path)
    golden = read_golden(tmp_path)
    assert set(golden.tolerances) == {"float32", "bfloat16"}
    infinite = [math.inf] * len(golden.rows)
    found = verify(golden, ids_of(golden), infinite, "float16")
    assert not found.ok
    assert "33 of 33 golden rows got no finite reward" in found.problems[0]
    assert "overflow in float16: start the server with --dtype bfloat16" in found.problems[1]


def test_a_head_that_is_zero_passes_with_a_warning(exported):
    golden = read_golden(exported(head=0.0))
    assert {row.reward for row in golden.rows} == {0.0}
    assert all(tolerance > 0 for tolerance in golden.tolerances.values())
    found = verify(golden, ids_of(golden), [0.0] * len(golden.rows), "float32")
    assert found.ok and not found.problems
    assert "hardly tell this model from another" in found.warnings[0]
    assert not verify(golden, ids_of(golden), [1e-3] * len(golden.rows), "float32").ok


# ---- What is told apart


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_what_is_right_is_right(small_export):
    golden = read_golden(small_export)
    rewards = [row.reward for row in golden.rows]
    for dtype in DTYPES:
        found = verify(golden, ids_of(golden), rewards, dtype)
        assert (found.ok, found.n, found.max_difference) == (True, len(rewards), 0.0)
        assert (found.tolerance, found.dtype) == (golden.tolerances[dtype], dtype)
        assert found.problems == found.warnings == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_is_told_in_every_precision(small_export, dtype):
    golden = read_golden(small_export)
    rewards = scores(load(small_export, getattr(torch, dtype)), ids_of(golden))
    step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    rounded = [round(sigmoid(reward) / step) * step for reward in rewards]
    for activated, name in ((rounded, "sigmoid"), ([1.0] * len(rewards), "softmax")):
        (problem,) = verify(golden, ids_of(golden), activated, dtype).problems
        assert name in problem and "start it without one" in problem


@pytest.mark.parametrize("what", ["another model", "no BOS", "no reward token", "cut short"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_weights_and_lost_tokens_are_told(exported, small_export, what, dtype):
    """What a server has made of the right ids is seen by its rewards alone."""
    golden = read_golden(small_export)
    folder = exported(seed=1) if what == "another model" else small_export
    cut = {"no BOS": slice(1, None), "no reward token": slice(-1), "cut short": slice(-8, None)}
    sequences = [ids[cut.get(what, slice(None))] for ids in ids_of(golden)]
    found = verify(golden, ids_of(golden), scores(load(folder), sequences), dtype)
    assert not found.ok
    (problem,) = found.problems
    if dtype == "float32":
        assert "another model or other weights, or loses tokens" in problem
    assert re.search(rf"\d+ of {len(golden.rows)} rewards are off by up to", problem)


@pytest.mark.parametrize("served", ["float16", "bfloat16"])
def test_a_lower_precision_than_asked_for_is_told(small_export, served):
    golden = read_golden(small_export)
    rewards = scores(load(small_export, getattr(torch, served)), ids_of(golden))
    (problem,) = verify(golden, ids_of(golden), rewards, "float32").problems
    assert "--dtype float32" in problem
    assert f"dtype={served!r}" in problem
    assert verify(golden, ids_of(golden), rewards, served).ok


def test_a_tokenizer_that_drops_spaces_is_told(small_export):
    golden = read_golden(small_export)
    tokenizer = Tokenizer.from_file(str(small_export / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(" ", "")
    ids = PolarTemplate(tokenizer).encode(candidates(golden))
    rewards = scores(load(small_export), ids)
    found = verify(golden, ids, rewards, "float32")
    assert not found.ok
    (problem,) = found.problems
    assert "those with spaces" in problem and "tokenizer.json" in problem
    assert found.max_difference <= found.tolerance, "the server itself is right"


def test_ids_that_differ_are_told_and_say_nothing_about_the_server(small_export):
    golden = read_golden(small_export)
    rewards = [row.reward for row in golden.rows]
    for ids, name in (
        ([row.ids[1:] for row in golden.rows], "lack the BOS"),
        ([row.ids[:-1] for row in golden.rows], "lack the reward token"),
        ([row.ids[:5] + row.ids for row in golden.rows], "the tokenizer is not the one"),
    ):
        found = verify(golden, ids, rewards, "float32")
        (problem,) = found.problems
        assert problem.startswith("33 of 33 golden rows have other ids") and name in problem
        assert (found.n, found.max_difference) == (0, math.inf)
    one = [golden.rows[0].ids, golden.rows[0].ids, *ids_of(golden)[2:]]
    found = verify(golden, one, [*rewards[:1], 99.0, *rewards[2:]], "float32")
    assert found.problems[0].startswith("1 of 33") and found.n == 32
    assert found.max_difference == 0


def test_rows_without_a_reward_are_told(small_export):
    golden = read_golden(small_export)
    rewards = [row.reward for row in golden.rows]
    found = verify(golden, ids_of(golden), [None, math.nan, *rewards[2:]], "float32")
    assert not found.ok and found.n == len(rewards) - 2
    assert "2 of 33 golden rows got no finite reward" in found.problems[0]
    found = verify(replace(golden, rows=()), [], [], "float32")
    assert not found.ok and "no golden row to compare" in found.problems[0]
    with pytest.raises(ValueError, match=r"dtype must be one of .*got 'int8'"):
        verify(golden, ids_of(golden), rewards, "int8")


# ---- The file


ROW = GoldenRow("你好 \n", "ref\u2028", "", "pretrain", (1, 5, 9), -0.1)
MADE = Golden((ROW, ROW._replace(ids=None)), {"float32": 1e-4, "bfloat16": 0.5}, "bfloat16", "x")


def test_what_is_written_is_read(tmp_path):
    write_golden(tmp_path, MADE)
    assert read_golden(tmp_path) == replace(MADE, source=str(tmp_path / GOLDEN))
    assert [file.name for file in tmp_path.iterdir()] == [GOLDEN]


def test_a_folder_without_the_file_has_none(tmp_path):
    assert read_golden(tmp_path) is None
    assert read_golden(tmp_path / "nowhere") is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_golden(tmp_path, MADE)
    before = (tmp_path / GOLDEN).read_bytes()
    write = Path.write_text

    def full(self, text, **options):
        write(self, text[:20], **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_golden(tmp_path, replace(MADE, dtype="float16"))
    assert (tmp_path / GOLDEN).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [GOLDEN]


def broken(change):
    content = json.loads(
        json.dumps(
            {
                "version": 1,
                "dtype": "float32",
                "tolerances": {"float32": 1e-4},
                "rows": [{**ROW._asdict(), "ids": [1, 2]}],
            }
        )
    )
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 1, "dty',
        broken(lambda c: c.update(version=2)),
        broken(lambda c: c.pop("dtype")),
        broken(lambda c: c["tolerances"].clear()),
        broken(lambda c: c["tolerances"].update(bfloat16=0)),
        broken(lambda c: c["tolerances"].update(bfloat16="wide")),
        broken(lambda c: c["rows"].clear()),
        broken(lambda c: c["rows"][0].pop("output")),
        broken(lambda c: c["rows"][0].update(prompt=7)),
        broken(lambda c: c["rows"][0].update(reward=None)),
        broken(lambda c: c["rows"][0].update(reward=math.nan)),
        broken(lambda c: c["rows"][0].update(ids=["a"])),
        broken(lambda c: c["rows"][0].update(extra=1)),
        broken(lambda c: c.update(rows=[3])),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / GOLDEN).write_text(text)
    with pytest.raises(ValueError, match=rf"{GOLDEN} is damaged .*copy it again"):
        read_golden(tmp_path)


# ---- The released checkpoint


@pytest.mark.parametrize("folder", ["POLAR-7B", "models--internlm--POLAR-7B/snapshots/0123abc"])
def test_the_released_checkpoint_has_the_published_rewards(tmp_path, folder):
    golden = read_golden(tmp_path / folder)
    assert golden.source == "published rewards of POLAR-7B"
    assert all(row.ids is None for row in golden.rows)
    rewards = [row.reward for row in golden.rows]
    assert verify(golden, [()] * len(rewards), rewards, "float16").ok
    halves = [torch.tensor(reward).bfloat16().item() for reward in rewards]
    assert verify(golden, [()] * len(rewards), halves, "bfloat16").ok
    (problem,) = verify(golden, [()] * len(rewards), [*map(sigmoid, rewards)], "bfloat16").problems
    assert "sigmoid" in problem
    for wrong in ([0.0] * len(rewards), rewards[1:] + rewards[:1]):
        (problem,) = verify(golden, [()] * len(rewards), wrong, "bfloat16").problems
        assert "another model" in problem
    for other in ("POLAR-7B-Base", "POLAR-1_8B"):
        assert read_golden(tmp_path / folder.replace("POLAR-7B", other)) is None


def test_a_file_counts_more_than_what_is_built_in(tmp_path):
    folder = tmp_path / "POLAR-7B"
    folder.mkdir()
    write_golden(folder, MADE)
    assert read_golden(folder).rows == MADE.rows


def test_the_built_in_rewards_are_the_published_ones():
    """Of the texts as POLAR's README has them, whose Chinese punctuation is full-width."""
    file = SHARED_DATA.parent / "polar_examples.json"
    if not file.is_file():
        pytest.skip("needs the published examples, which are not part of the repository")
    published = [
        (candidate_of({**example, **output}), output["reward"])
        for example in json.loads(file.read_text())["examples"]
        for output in example["outputs"]
    ]
    rows = read_golden(Path("POLAR-7B")).rows
    assert [row.reward for row in rows] == [reward for _, reward in published]
    for row, (candidate, _) in zip(rows, published):
        folded = [unicodedata.normalize("NFKC", text) for text in row[:3]]
        assert folded == [*candidate[:3]]
    assert "？" in rows[2].prompt and "，" in rows[-1].prompt
