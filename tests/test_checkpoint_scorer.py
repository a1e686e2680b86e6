"""What MODEL may be. That a checkpoint is scored as its conversion: `test_evaluate_tool.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from polar_xtuner import checkpoint_scorer
from polar_xtuner.checkpoint_scorer import as_hf_folder, config_beside, is_checkpoint


def test_models_and_checkpoints_are_told_apart(tmp_path: Path) -> None:
    file, zero, hf = tmp_path / "iter_1.pth", tmp_path / "iter_2.pth", tmp_path / "hf"
    file.touch()
    zero.mkdir()
    (zero / "mp_rank_00_model_states.pt").touch()
    hf.mkdir()
    (hf / "config.json").touch()
    assert is_checkpoint(str(file)) and is_checkpoint(str(zero))
    assert not is_checkpoint(str(hf)) and not is_checkpoint("internlm/POLAR-7B")
    with as_hf_folder(str(hf)) as folder:
        assert folder == str(hf)


def test_a_folder_that_is_neither_is_named_with_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither .* no \*_model_states.pt$"):
        is_checkpoint(str(tmp_path))
    for name in ("iter_2.pth", "iter_1.pth"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"give one of those in it: iter_1.pth, iter_2.pth"):
        is_checkpoint(str(tmp_path))


def test_the_config_is_the_one_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_1.pth"
    with pytest.raises(ValueError, match=r"there is none in .*: name it \(--config\)"):
        config_beside(checkpoint)
    (tmp_path / "b.py").touch()
    (tmp_path / "zero_to_fp32.py").touch()  # DeepSpeed leaves it there
    assert config_beside(checkpoint) == tmp_path / "b.py"
    (tmp_path / "a.py").touch()
    with pytest.raises(ValueError, match=r"has several: a.py, b.py"):
        config_beside(checkpoint)


def test_without_xtuner_the_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "iter_1.pth"
    checkpoint.touch()
    monkeypatch.setattr(checkpoint_scorer, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"polar_xtuner\[train\]"), as_hf_folder(str(checkpoint)):
        pass


@pytest.mark.parametrize(
    "said, reason",
    [
        ("print('not converted: it is damaged'); print('more')", "it is damaged"),
        ("print('log'); raise KeyError('base')", "KeyError: 'base'"),
        ("print('done, and nothing is there')", "done, and nothing is there"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_a_conversion_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    (tmp_path / "converter.py").write_text(said)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(checkpoint_scorer, "CONVERTER", "converter")
    checkpoint = tmp_path / "iter_1.pth"
    checkpoint.touch()
    with pytest.raises(ValueError) as raised, as_hf_folder(str(checkpoint), "config.py"):
        raise AssertionError("converted")
    assert str(raised.value) == f"{checkpoint}: {reason}"
    assert not [*(tmp_path / "tmp").iterdir()]
