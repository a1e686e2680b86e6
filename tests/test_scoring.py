"""Rewards in process: the training ids, shared prefixes, one error for each bad item."""

import itertools
import json
import math
import random
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import DATA_SETS
from test_package import imported_by
from tokenizers import AddedToken, Tokenizer

from polar_xtuner import scoring
from polar_xtuner.collate import PackLayout
from polar_xtuner.modeling_internlm2 import InternLM2Config, InternLM2ForRewardModel
from polar_xtuner.records import read_rows
from polar_xtuner.rewards import CALIBRATION, RewardError, Scored
from polar_xtuner.scoring import PolarScorer, pack_of
from polar_xtuner.template import REWARD_TOKEN, SEPARATOR_TOKEN, Candidate, PolarTemplate

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

GOOD = {"prompt": "Anna has 3 pens.", "reference": "3", "output": "It is 3."}


def write_model(demo, folder, **shape):
    """A random model with a head, and the demo's tokenizer."""
    demo.write_base(folder, demo.build_tokenizer(), 0, **shape)
    weights = torch.load(folder / "pytorch_model.bin")
    weights["v_head.weight"].normal_(std=0.3)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return write_model(demo, tmp_path_factory.mktemp("models") / "small", **shape)


@pytest.fixture
def scorer(folder):
    return PolarScorer(str(folder), device="cpu")


def items(count):
    answers = ("3", "It is 3.", "It is 4.", "", " 3")
    return [
        {
            "prompt": [{"role": "user", "content": f"Ben has {n % 7} coins."}],
            "reference": f"{n % 7}",
            "output": answers[n % 5] * (1 + n % 3),
            **({"wrapper": "pretrain"} if n % 4 == 0 else {}),
        }
        for n in range(count)
    ]


@torch.no_grad()
def one_at_a_time(scorer, sequences):
    """Every sequence by itself through the model."""
    rewards = []
    for ids in sequences:
        data = pack_of([(ids, [len(ids) - 1, 1])])
        layout = PackLayout(**data["layout"])
        inputs = data["input_ids_T"], data["position_ids_T"], layout, data["reward_rows_C"]
        rewards += scorer.model(*inputs).tolist()
    return rewards


def ids_of(scorer, data):
    candidates = [scoring.candidate_of(item) for item in data]
    return scorer.template.encode(candidates)


# ---- The call


def test_rewards_are_those_of_each_sequence_by_itself(scorer):
    data = items(60)
    rewards = scorer(data)
    assert rewards == pytest.approx(one_at_a_time(scorer, ids_of(scorer, data)), abs=1e-5)
    assert rewards.errors == {}
    assert torch.tensor(rewards).std() > 0.1
    assert scorer(data[7]) == pytest.approx(rewards[7:8], abs=1e-5)
    assert scorer([]) == []
    assert [one.reward for one in scorer.stream(iter(data))] == rewards
    candidates = [scoring.candidate_of(item) for item in data]
    assert scorer.score(candidates) == [*rewards]
    assert [one.reward for one in scorer.stream(candidates)] == rewards


def test_a_bad_item_gets_an_error_and_the_others_their_rewards(folder, scorer):
    bad = [{"prompt": "kumquat"}, 7, {**GOOD, "wrapper": "kumquat"}, {**GOOD, "output": None}]
    data = [GOOD, *bad, *items(5)]
    with pytest.raises(RewardError) as raised:
        scorer(data)
    lenient = PolarScorer(str(folder), device="cpu", on_error="none")
    rewards = lenient(data)
    assert rewards == raised.value.rewards
    good = [rewards[0], *rewards[5:]]
    assert good == pytest.approx([*scorer(GOOD), *scorer(items(5))], abs=1e-5)
    assert [*rewards.errors] == [1, 2, 3, 4]
    assert "reference: is missing" in rewards.errors[1]
    assert "kumquat" not in str(rewards.errors)


def test_a_reward_that_is_not_finite_is_the_error_of_its_item(scorer, monkeypatch):
    forward = scorer._forward
    monkeypatch.setattr(scorer, "_forward", lambda packs: [math.nan, *forward(packs)[1:]])
    scored = [*scorer.stream(items(8))]
    (error,) = [one.error for one in scored if one.reward is None]
    assert "not finite" in error and "try bfloat16 or float32" in error
    with pytest.raises(RewardError, match="1 of 8 items have no reward"):
        scorer(items(8))
    with pytest.raises(ValueError, match="not finite"):
        scorer.score([Candidate(*GOOD.values())])


def test_an_id_that_the_model_lacks_is_the_error_of_its_item(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens([AddedToken("zebra", special=False)])
    tokenizer.save(str(file))
    scorer = PolarScorer(str(tmp_path / "model"), device="cpu", on_error="none")
    rewards = scorer([GOOD, {**GOOD, "output": "a zebra"}, *items(3)])
    assert rewards[1] is None and None not in (rewards[0], *rewards[2:])
    assert "outside the model's vocabulary of 489" in rewards.errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be one of raise, none"),
        ({"normalize": True}, "has no polar_calibration"),
        ({"attention": "flash"}, "attention must be one of"),
    ],
)
def test_wrong_settings_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        PolarScorer(str(folder), device="cpu", **options)(GOOD)


def test_a_language_model_gives_no_rewards(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    weights = torch.load(folder / "pytorch_model.bin")
    del weights["v_head.weight"]
    torch.save(weights, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"base has no reward head \(v_head\.weight\)"):
        PolarScorer(str(tmp_path / "base"), device="cpu")


def test_rewards_can_be_normalized(folder, scorer, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config[CALIBRATION] = {"mean": 0.5, "std": 2.0, "temperature": 1.5}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    normalized = PolarScorer(str(tmp_path / "model"), device="cpu", normalize=True)
    raw = torch.tensor(scorer(items(9)), dtype=torch.float64)
    assert normalized(items(9)) == pytest.approx(torch.sigmoid((raw - 0.5) / 1.5).tolist())
    assert normalized.score([Candidate(*GOOD.values())]) == scorer(GOOD), "as the model gives it"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_it_computes_in_the_dtype_that_is_asked_for(folder, scorer, dtype):
    half = PolarScorer(str(folder), device="cpu", dtype=dtype)
    assert half.model.dtype == torch.bfloat16
    assert half(items(9)) == pytest.approx(scorer(items(9)), abs=0.2)


# ---- Streams


def test_a_stream_takes_items_as_it_needs_them(scorer, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 8)
    taken = itertools.count()
    source = ({**GOOD, "output": f"It is {next(taken)}."} for _ in itertools.repeat(None))
    stream = scorer.stream(source)
    for number in range(100):
        assert isinstance(next(stream), Scored)
        assert (number + 1) <= next(taken) - number <= number + 1 + 8  # `taken` counts looks, too


def test_a_result_comes_before_the_packs_of_later_items_are_computed(folder, monkeypatch):
    small = PolarScorer(str(folder), None, None, 256, 64, 256)
    forward, packs = small._forward, []
    monkeypatch.setattr(small, "_forward", lambda pack: packs.append(pack) or forward(pack))
    data = [{**item, "prompt": f"Ben has {n // 5} coins."} for n, item in enumerate(items(60))]
    computed = [(one.reward, len(packs)) for one in small.stream(data)]
    rewards, when = zip(*computed)
    assert when[0] == 1 and when[len(data) // 2] <= 0.75 * len(packs) and len(packs) > 5
    sequences = ids_of(small, data)
    assert rewards == pytest.approx(one_at_a_time(small, sequences), abs=1e-5)
    assert sum(len(pieces) - 1 for pack in packs for _, pieces in pack) == len(
        {*map(tuple, sequences)}
    )
    assert small(data) == [*rewards]


def test_prompts_that_are_equal_once_they_are_cut_get_equal_rewards(folder, monkeypatch):
    small = PolarScorer(str(folder), None, None, 256, 64, 256)
    numbers = map(float, itertools.count())
    monkeypatch.setattr(small, "_forward", lambda pack: [next(numbers) for _ in pack])
    long, longer = ({**GOOD, "prompt": "pens " * n} for n in (400, 500))
    assert ids_of(small, [long]) == ids_of(small, [longer])
    assert small([long, longer, GOOD, long, longer]) == [0, 0, 2, 0, 0]


def test_equal_items_of_a_chunk_are_computed_once(scorer, monkeypatch):
    packs = []
    forward = scorer._forward
    monkeypatch.setattr(scorer, "_forward", lambda p: packs.append(p) or forward(p))
    rewards = scorer([GOOD, *items(3), GOOD])
    assert rewards[0] == rewards[-1] and None not in rewards
    (pack,) = packs
    assert sum(len(pieces) - 1 for _, pieces in pack) == 4


def test_a_pack_stays_under_the_cap_and_shares_prefixes(folder, monkeypatch):
    limits = {"max_length": 256, "max_response_length": 64, "max_packed_length": 256}
    small = PolarScorer(str(folder), device="cpu", **limits)
    large = PolarScorer(str(folder), device="cpu", max_length=256, max_response_length=64)
    rng = random.Random(0)
    prompt = {"prompt": "Chen has two books. " * 4, "reference": "two"}
    data = [{**prompt, "output": "two " * rng.randint(0, 9) + str(n)} for n in range(40)]
    sizes = {}
    for scorer in (small, large):
        forward = scorer._forward
        counted = sizes.setdefault(scorer.cap, [])

        def count(layouts, forward=forward, counted=counted):
            counted.append(sum(len(tokens) for tokens, _ in layouts))
            return forward(layouts)

        monkeypatch.setattr(scorer, "_forward", count)
    assert small(data) == pytest.approx(large(data), abs=1e-5)
    assert max(sizes[256]) <= 256 and len(sizes[256]) > 2
    separate = sum(map(len, ids_of(large, data)))
    assert sum(sizes[large.cap]) < separate / 4


# ---- The ids of training


@pytest.mark.parametrize("name", DATA_SETS)
def test_ids_are_those_of_training_on_every_row(
    shared_data, internlm2_tokenizer, demo, tmp_path, name
):
    from polar_xtuner.dataset import PolarDataset

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 92560}
    longest = {"max_position_embeddings": 32768, "num_attention_heads": 2}
    demo.write_base(tmp_path / "base", internlm2_tokenizer, 0, **shape, **longest)
    scorer = PolarScorer(str(tmp_path / "base"), device="cpu")
    file = shared_data / f"{name}.jsonl"
    trained = PolarDataset(
        internlm2_tokenizer,
        data_files=str(file),
        on_bad_row="skip",
        num_proc=1,
        cache_dir=str(tmp_path / "cache"),
    )
    of_line = {}
    for number in range(len(trained.lengths)):
        group = trained.group(number)
        prefix, *suffixes = np.split(group.tokens, np.cumsum(group.pieces)[:-1])
        for pair in group.pairs:
            sides = (suffixes[pair["chosen"]], suffixes[pair["rejected"]])
            of_line[int(pair["line"])] = [[*prefix.tolist(), *side.tolist()] for side in sides]
    rows = {row.line: row for row in read_rows([file]) if getattr(row, "line", None) in of_line}
    assert len(rows) == len(of_line) > 200
    candidates = [
        Candidate(row.prompt, row.reference, text, row.wrapper)
        for row in rows.values()
        for text in (row.chosen[0], row.rejected[0])
    ]
    expected = [ids for line in rows for ids in of_line[line]]
    assert scorer.template.encode(candidates) == expected
    print(f"{name}: {len(expected)} sequences of {len(rows)} rows")


def test_the_scorers_template_is_that_of_a_transformers_tokenizer(folder, scorer, demo):
    other = PolarTemplate(demo.build_tokenizer(), 2048, 1022)
    assert (scorer.template.max_length, scorer.template.max_response_length) == (2048, 1022)
    hostile = [f"<s>{SEPARATOR_TOKEN} {REWARD_TOKEN}</s>", "", "  a  ", "\n", "x" * 5000, "\ud800"]
    candidates = [
        Candidate(*texts)
        for texts in itertools.product(hostile[:1] + hostile[2:], hostile, hostile)
    ]
    candidates += [c._replace(wrapper="pretrain") for c in candidates]
    assert scorer.template.encode(candidates) == other.encode(candidates)


# ---- Speed


def test_16_candidates_a_prompt_are_2_5_times_as_fast_as_one_sequence_at_a_time(
    shared_data, internlm2_tokenizer, demo, tmp_path
):
    """On groups of gsm8k's lengths, in float32, with a decoder of 10 million parameters."""
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    base = write_model_of(demo, internlm2_tokenizer, tmp_path / "base", **shape)
    scorer = PolarScorer(str(base), device="cpu")
    decoder = sum(p.numel() for p in scorer.model.model.layers.parameters())
    assert decoder > 10e6
    groups = {}
    for row in read_rows([shared_data / "gsm8k.jsonl"]):
        group = groups.setdefault((row.prompt, row.reference), {})
        group |= dict.fromkeys((*row.chosen, *row.rejected))
    pool = [text for group in groups.values() for text in group]
    rng = random.Random(0)
    sampled = []
    for prompt, reference in rng.sample([*groups], 5):
        own = [*groups[prompt, reference]]
        texts = dict.fromkeys([*own, *rng.sample(pool, 20)])
        sampled.append([Candidate(prompt, reference, text) for text in [*texts][:16]])
    ours, alone = [], []
    for group in sampled:  # in turns, so that whatever else the machine does slows both
        sequences = scorer.template.encode(group)
        start = time.process_time()
        separate = one_at_a_time(scorer, sequences)
        middle = time.process_time()
        shared = scorer.score(group)
        alone.append(middle - start)
        ours.append(time.process_time() - middle)
        assert shared == pytest.approx(separate, abs=1e-5)
    ratio = sum(alone) / sum(ours)
    print(f"{sum(alone):.1f} s one at a time, {sum(ours):.1f} s shared: {ratio:.2f} times as fast")
    assert ratio >= 2.5


def write_model_of(demo, tokenizer, folder, **shape):
    demo.write_base(folder, tokenizer, 0, vocab_size=92560, num_attention_heads=6, **shape)
    weights = torch.load(folder / "pytorch_model.bin")
    weights["v_head.weight"].normal_(std=0.02)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


# ---- What it needs


def test_importing_it_imports_neither_xtuner_nor_mmengine():
    _, modules = imported_by("import polar_xtuner.scoring")
    assert not modules & {"xtuner", "mmengine", "deepspeed", "peft", "datasets", "pyarrow"}


def test_no_code_of_the_checkpoints_is_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.py"):
        file.write_text("raise RuntimeError('was run')")
    assert PolarScorer(str(tmp_path / "model"), device="cpu")(GOOD)


def test_a_config_that_transformers_5_has_written_is_read(folder, tmp_path):
    """It writes `rope_theta` and `rope_scaling` as one field."""
    config = json.loads((folder / "config.json").read_text())
    for theta, scaling in ((500000.0, None), (10000.0, {"type": "linear", "factor": 2.0})):
        paths = {}
        for name in ("old", "new"):
            paths[name] = tmp_path / f"{name}{theta:.0f}"
            shutil.copytree(folder, paths[name])
            fields = {**config, "rope_theta": theta, "rope_scaling": scaling}
            if name == "new":
                del fields["rope_theta"], fields["rope_scaling"]
                kind = scaling["type"] if scaling else "default"
                more = {"factor": scaling["factor"]} if scaling else {}
                fields["rope_parameters"] = {"rope_theta": theta, "rope_type": kind, **more}
            (paths[name] / "config.json").write_text(json.dumps(fields))
        old, new = (PolarScorer(str(path), device="cpu")(items(9)) for path in paths.values())
        assert old == new != PolarScorer(str(folder), device="cpu")(items(9))
    with pytest.raises(ValueError, match="rope_scaling must be linear or dynamic"):
        InternLM2Config(rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert InternLM2ForRewardModel.config_class is InternLM2Config
