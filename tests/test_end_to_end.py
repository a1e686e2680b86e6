"""The commands that users type, run for real on tiny models.

One of each kind is what is typed, from a bare interpreter; the others are the scripts that it runs,
in forks of a process that has done the imports.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import CONVERT, LOG_DATASET, ROOT, TINY, TRAIN, run, run_forked, run_ranks
from safetensors.torch import load_file

SCORE = ROOT / "tools" / "score.py"


def logged(work_dir: Path, field: str) -> list[float]:
    """A field of mmengine's own log of the one run of a work dir, in order."""
    (log,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line[field] for line in lines if field in line]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo data and a tiny base model, and a cache of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    tool = ROOT / "tools" / "make_demo.py"
    made = run_forked(tool, folder, "--train", 600, "--held-out", 60)
    assert made.returncode == 0, made.stderr
    return folder


def settings(tiny: Path, **more: object) -> list[str]:
    values = {
        "pretrained_model_name_or_path": tiny / "base",
        "data_files": tiny / "train.jsonl",
        "cache_dir": tiny / "cache",
        "log_interval": 1,
        **more,
    }
    return ["--cfg-options", *(f"{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def trained(tiny: Path) -> Path:
    """The work dir of one epoch on the tiny data, with a checkpoint every 10 iterations."""
    work_dir = tiny / "trained"
    result = run(
        *("xtuner", "train", TINY, "--work-dir", work_dir),
        *settings(tiny, save_steps=10, save_total_limit=-1),
    )
    assert (work_dir / "last_checkpoint").exists(), result.stdout
    return work_dir


def train(config: Path, work_dir: Path, *options: object) -> str:
    """What `xtuner train` has printed."""
    result = run_forked(TRAIN, config, "--work-dir", work_dir, *options)
    return result.stdout + result.stderr


def convert(checkpoint: Path, folder: Path, *options: object) -> str:
    """What `xtuner convert pth_to_hf` has printed."""
    result = run_forked(CONVERT, TINY, checkpoint, folder, "--cfg-options", *options)
    return result.stdout + result.stderr


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    import polar_xtuner.compat  # noqa: F401  (lets torch load mmengine's types)

    return torch.load(checkpoint, map_location="cpu")["state_dict"]


def last(work_dir: Path) -> Path:
    return Path((work_dir / "last_checkpoint").read_text().strip())


def test_settings_on_the_command_line_reach_everything_computed_from_them(
    tiny: Path, tmp_path: Path
) -> None:
    options = settings(tiny, lr="3e-4", accumulative_counts=2)
    said = train(TINY, tmp_path, "--seed", 7, *options)
    assert (tmp_path / "last_checkpoint").exists(), said
    (dumped,) = tmp_path.glob("*.py")
    text = dumped.read_text()
    assert text.count("accumulative_counts=2") == 3  # optimizer, sampler, learning rate
    assert "lr=0.0003" in text
    assert re.search(r"randomness = dict\(.*seed=7", text)
    assert max(logged(tmp_path, "lr")) == pytest.approx(3e-4, rel=1e-6)


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    options = settings(tiny, save_steps=10, save_total_limit=-1)
    said = train(TINY, tmp_path, "--resume", trained / "iter_20.pth", *options)
    assert (tmp_path / "last_checkpoint").exists(), said
    unbroken, resumed = weights(last(trained)), weights(last(tmp_path))
    assert last(trained).name == last(tmp_path).name
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert logged(trained, "loss")[20:] == logged(tmp_path, "loss")


def test_types_by_class_and_by_registered_name_train_alike(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    names = {
        "PolarRewardModel": "polar_xtuner.reward_model",
        "BradleyTerryLoss": "polar_xtuner.losses",
        "PolarDataset": "polar_xtuner.dataset",
        "collate_pack": "polar_xtuner.collate",
        "PackSampler": "polar_xtuner.sampler",
        "PolarTrainLoop": "polar_xtuner.engine",
        "PolarLogProcessor": "polar_xtuner.val_log",
        "PolarOptimWrapper": "polar_xtuner.optim",
        "WarmupCosineLR": "polar_xtuner.optim",
    }
    from polar_xtuner import compat  # noqa: F401
    from mmengine.config import Config  # isort: skip

    cfg = Config.fromfile(TINY)
    options = dict(option.split("=", 1) for option in settings(tiny)[1:])
    cfg.merge_from_dict({**options, "log_interval": 1, "save_steps": 10})
    text = cfg.pretty_text
    # Nothing has registered the runner's name when xtuner asks for it.
    text = re.sub(r"custom_imports = dict\(.*?\)\n|runner_type = .*?\n", "", text, flags=re.S)
    for name, module in names.items():
        text, changed = re.subn(rf"type='{name}'", f"type={name}", text)
        assert changed
        text = f"from {module} import {name}\n{text}"
    config = tmp_path / "config.py"
    config.write_text(text)
    said = train(config, tmp_path / "work_dir")
    assert (tmp_path / "work_dir" / "last_checkpoint").exists(), said
    ours, same = weights(last(tmp_path / "work_dir")), weights(last(trained))
    assert all(torch.equal(ours[name], same[name]) for name in same)


def test_two_processes_train_to_the_weights_of_one_with_twice_the_accumulation(
    tiny: Path, tmp_path: Path
) -> None:
    for processes, counts in ((1, 2), (2, 1)):
        work_dir = tmp_path / str(processes)
        command = [TRAIN, TINY, "--work-dir", work_dir, "--launcher", "pytorch"]
        command += settings(tiny, accumulative_counts=counts, log_interval=counts)
        done = run_ranks(processes, *command, OMP_NUM_THREADS="1")
        assert (work_dir / "last_checkpoint").exists(), done[0]
    for field in ("pairs", "loss", "accuracy", "margin", "chosen_reward_std", "grad_norm", "lr",
                  "share_ratio", "pack_fill"):  # fmt: skip
        one, two = (logged(tmp_path / n, field) for n in ("1", "2"))
        assert len(one) > 10
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4), field  # of all ranks, a step a line
    one, two = (weights(last(tmp_path / n)) for n in ("1", "2"))
    start = torch.load(tiny / "base" / "pytorch_model.bin")
    for name in one:
        # Float32: Adam magnifies what rounding leaves of tiny gradients.
        moved = (one[name] - start[name.replace("llm.", "model.", 1)]).norm()
        assert (one[name] - two[name]).norm() <= 1e-4 * moved, name


def test_log_dataset_decodes_the_first_pack(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(TINY)!r}\n"
        f"tokenizer = dict(pretrained_model_name_or_path={str(tiny / 'base')!r})\n"
        f"train_dataloader = dict(dataset=dict(data_files={str(tiny / 'train.jsonl')!r}, "
        f"tokenizer=tokenizer, cache_dir={str(tiny / 'cache')!r}))\n"
    )
    result = run_forked(LOG_DATASET, config, "--show", "all")
    assert result.returncode == 0, result.stderr
    assert "<|reward|>" in result.stdout, result.stdout
    assert "[UNUSED_TOKEN_130]" in result.stdout
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    shown = [row for row in rows if row["prompt"][0]["content"] in result.stdout]
    assert 5 < len(shown) < 40
    assert all(row["reference"][0]["content"] in result.stdout for row in shown)


def test_bad_rows_stop_the_run_before_anything_is_tokenised(tiny: Path, tmp_path: Path) -> None:
    lines = (tiny / "train.jsonl").read_text().splitlines()[:50]
    lines[7] = '{"prompt": 3}'
    lines[9] = "not json"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    options = settings(tiny, data_files=bad, cache_dir=tmp_path / "cache")
    said = train(TINY, tmp_path / "w", *options)
    assert "2 of 50 rows are bad" in said
    assert f"{bad}:8: prompt:" in said
    assert f"{bad}:10:" in said
    assert "Tokenising" not in said
    assert not (tmp_path / "w" / "last_checkpoint").exists()
    said = train(TINY, tmp_path / "w", *options, "on_bad_row=skip")
    assert (tmp_path / "w" / "last_checkpoint").exists(), said
    assert "48 rows" in said


def test_every_process_stops_at_a_loss_that_is_not_finite_on_one_of_them(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "breaks.py").write_text(
        "import os\n"
        "from polar_xtuner.reward_model import PolarRewardModel\n"
        "losses, done = PolarRewardModel._losses, []\n"
        "def broken(self, *args):\n"
        "    result = losses(self, *args)\n"
        "    done.append(None)\n"
        "    if len(done) == 4 and os.environ['RANK'] == '1':\n"
        "        result['loss'] = result['loss'] * float('nan')\n"
        "    return result\n"
        "PolarRewardModel._losses = broken\n"
    )
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(TINY)!r}\n"
        "custom_imports = dict(imports=['polar_xtuner.engine', 'breaks'])\n"
    )
    command = [TRAIN, config, "--work-dir", tmp_path / "w", "--launcher", "pytorch"]
    command += settings(tiny, log_interval=5, save_steps=100)
    ranks = run_ranks(2, *command, OMP_NUM_THREADS="1", PYTHONPATH=str(tmp_path))
    for rank, place in zip(ranks, ("on another rank", "on this rank (nan)")):
        assert rank.returncode == 1
        assert f"the loss of iteration 3 is not finite {place}" in rank.stderr
    assert not list((tmp_path / "w").glob("*.pth"))


def test_conversion_keeps_every_tensor_and_refuses_a_checkpoint_that_lacks_one(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    base = f"pretrained_model_name_or_path={tiny / 'base'}"
    command = ("xtuner", "convert", "pth_to_hf", TINY, last(trained), tmp_path / "hf")
    result = run(*command, "--cfg-options", base)
    assert (tmp_path / "hf").exists(), result.stdout
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in weights(last(trained)).items():
        hf_name = name.replace("llm.", "model.", 1)
        assert torch.equal(exported.pop(hf_name), tensor)
    assert not exported
    assert (tmp_path / "hf" / "modeling_internlm2.py").exists()

    import polar_xtuner.compat  # noqa: F401

    checkpoint = torch.load(last(trained), map_location="cpu")
    del checkpoint["state_dict"]["llm.layers.2.feed_forward.w2.weight"]
    torch.save(checkpoint, tmp_path / "lacking.pth")
    said = convert(tmp_path / "lacking.pth", tmp_path / "none", base)
    assert "llm.layers.2.feed_forward.w2.weight" in said
    assert not list((tmp_path / "none").glob("*.safetensors"))

    scored = run_forked(SCORE, tmp_path / "hf", tiny / "heldout.jsonl", "--json")
    assert scored.returncode == 0, scored.stderr
    figures = json.loads(scored.stdout.splitlines()[-1])
    assert figures["n"] == 60
    assert 0 <= figures["accuracy"] <= 1


def test_score_prints_a_reward_for_every_output_in_order(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (tiny / "heldout.jsonl").read_text().splitlines()[:5]]
    outputs = [
        {"id": r["id"], "prompt": r["prompt"], "reference": r["reference"], "output": r["chosen"]}
        for r in rows
    ]
    file = tmp_path / "outputs.jsonl"
    file.write_text("".join(json.dumps(o) + "\n" for o in outputs))
    result = run_forked(SCORE, tiny / "base", file)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["id"] for line in lines] == [r["id"] for r in rows]
    assert all(len(line["scores"]) == 1 for line in lines)


def test_gsm8k_with_the_true_tokenizer_trains_with_a_falling_loss_and_converts(
    shared_data: Path, internlm2_tokenizer: Any, demo: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    demo.write_base(base, internlm2_tokenizer, seed=0, vocab_size=92552, **shape)
    rows = (shared_data / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:1000]), encoding="utf-8")
    said = train(
        *(TINY, tmp_path / "w", "--cfg-options", f"pretrained_model_name_or_path={base}"),
        f"data_files={tmp_path / 'rows.jsonl'}",
        f"cache_dir={tmp_path / 'cache'}",
        *("max_length=2048", "max_response_length=1000", "max_packed_length=4096"),
        # In one epoch a group goes by once: nothing to be remembered.
        *("log_interval=1", "train_cfg.max_epochs=2"),
    )
    losses = logged(tmp_path / "w", "loss")
    assert len(losses) >= 50, said
    quarter = len(losses) // 4
    first, final = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    print(f"{len(losses)} steps, loss {first:.4f} -> {final:.4f}")
    assert final < first - 0.01
    convert(last(tmp_path / "w"), tmp_path / "hf", f"pretrained_model_name_or_path={base}")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported["model.tok_embeddings.weight"].dtype == torch.float32
    assert len(exported) == len(weights(last(tmp_path / "w")))


def test_lora_trains_adapters_and_head_and_converts_to_a_merged_model(
    tiny: Path, tmp_path: Path
) -> None:
    lora = ["model.lora.type=peft.LoraConfig", "model.lora.r=4", "model.lora.lora_alpha=8"]
    said = train(TINY, tmp_path / "w", *settings(tiny, lr="1e-2"), *lora)
    assert (tmp_path / "w" / "last_checkpoint").exists(), said
    trained = weights(last(tmp_path / "w"))
    assert all("lora_" in name or name == "v_head.weight" for name in trained)
    base = f"pretrained_model_name_or_path={tiny / 'base'}"
    said = convert(last(tmp_path / "w"), tmp_path / "hf", base, *lora)
    assert (tmp_path / "hf" / "model.safetensors").exists(), said
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    before = torch.load(tiny / "base" / "pytorch_model.bin")
    assert exported.keys() == before.keys()
    name = "model.layers.0.feed_forward.w1.weight"
    a, b = (
        trained[f"llm.base_model.model.layers.0.feed_forward.w1.lora_{side}.default.weight"]
        for side in "AB"
    )
    assert b.abs().max() > 0
    assert torch.allclose(exported[name], before[name] + 2 * b @ a, atol=1e-6)
    assert torch.equal(exported["v_head.weight"], trained["v_head.weight"])


@pytest.mark.parametrize("what", ["no row to score", "reward is not finite"])
def test_score_ends_with_a_reason_where_it_has_no_number(
    what: str, tiny: Path, tmp_path: Path
) -> None:
    base, file = tiny / "base", tmp_path / "rows.jsonl"
    file.touch()
    if what == "reward is not finite":
        base = tmp_path / "base"
        shutil.copytree(tiny / "base", base)
        state = torch.load(base / "pytorch_model.bin")
        state["model.norm.weight"].fill_(float("nan"))
        torch.save(state, base / "pytorch_model.bin")
        file = tiny / "heldout.jsonl"
    result = run_forked(SCORE, base, file, "--json")
    assert result.returncode == 1
    assert what in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
