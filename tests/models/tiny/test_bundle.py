"""Bundling an exported model: nothing of it changes, and equal vision encoders lie on the disk once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from capipe.errors import BadInput
from capipe.models.bundled import NAMES, folder_of
from capipe.models.engines.model_folder import folder_digest
from capipe.models.pretrained import check_weights
from capipe.models.tiny.train import build
from capipe.models.tiny.train.bundle import (
    CARD,
    INDEX,
    REST_FILE,
    ROOT,
    VISION_FILE,
    WHOLE,
    bundle,
    load_tensors,
    main,
    report,
    vision_files,
)

CAPTIONER, TEACHER, READER = NAMES[:3]


def exported(folder: Path, vision: float = 1.0, rest: float = 2.0, kind: str = "qwen2_5_vl") -> Path:
    """A folder as an export has it, with weights of these values."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    weights = {"visual.a": torch.full((3,), vision), "model.b": torch.full((2, 2), rest, dtype=torch.bfloat16)}
    save_file(weights, folder / WHOLE, metadata={"format": "pt"})
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Bundled models of one vision encoder: the captioner's, to which the two others link."""
    (tmp_path / "tiny").mkdir()
    for number, name in enumerate((CAPTIONER, TEACHER, READER)):
        bundle(exported(tmp_path / name, rest=number), name, tmp_path / "tiny")
    return tmp_path / "tiny"


def vision_of(root: Path, name: str) -> float:
    return float(load_tensors(root / name)["visual.a"][0])


def test_equal_vision_encoders_lie_in_the_repository_once() -> None:
    """Of the models that are bundled here: captioner and teacher, itm and blip2."""
    files = list(vision_files(ROOT))
    assert len(files) >= 4 and len({file.read_bytes() for file in files}) == len({file.resolve() for file in files})
    links = [file for file in files if file.is_symlink()]
    assert links and all(not file.readlink().is_absolute() and file.resolve().is_relative_to(ROOT) for file in links)


def test_nothing_of_a_model_changes(tmp_path: Path) -> None:
    whole = tmp_path / "export"
    weights = load_tensors(folder_of("captioner"))
    shutil.copytree(folder_of("captioner"), whole, ignore=shutil.ignore_patterns("model*", CARD))
    save_file(weights, whole / WHOLE, metadata={"format": "pt"})
    (tmp_path / "tiny").mkdir()
    bundle(whole, "captioner", tmp_path / "tiny")
    made = tmp_path / "tiny/captioner"
    assert {file.name for file in made.iterdir()} == {file.name for file in folder_of("captioner").iterdir()} - {CARD}
    again = load_tensors(made)
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        assert again[name].dtype == weight.dtype and torch.equal(again[name], weight), name
    check_weights(made, "mine")
    one, other = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (whole, made))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_equal_vision_encoders_are_linked_to_the_first(root: Path) -> None:
    held = root / CAPTIONER / VISION_FILE
    assert not held.is_symlink()
    for name in (TEACHER, READER):
        assert str((root / name / VISION_FILE).readlink()) == f"../{CAPTIONER}/{VISION_FILE}"
        assert not (root / name / REST_FILE).is_symlink()
        assert report(name, root).endswith(f"its vision encoder is the file of tiny/{CAPTIONER}")
    assert report(CAPTIONER, root).endswith(f"to which tiny/{TEACHER}, tiny/{READER} links")


def test_a_models_identity_is_its_content_linked_or_not(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root / TEACHER, tmp_path / "copy"))
    assert not (copy / VISION_FILE).is_symlink() and folder_digest(copy) == folder_digest(root / TEACHER)
    (copy / VISION_FILE).unlink()
    (copy / VISION_FILE).symlink_to(exported(tmp_path / "other", vision=9.0) / WHOLE)
    assert folder_digest(copy) != folder_digest(root / TEACHER)


def test_another_vision_encoder_leaves_those_that_linked_to_it(root: Path, tmp_path: Path) -> None:
    bundle(exported(tmp_path / "next", vision=5.0), CAPTIONER, root)
    assert [vision_of(root, name) for name in (CAPTIONER, TEACHER, READER)] == [5.0, 1.0, 1.0]
    assert not (root / TEACHER / VISION_FILE).is_symlink()
    assert str((root / READER / VISION_FILE).readlink()) == f"../{TEACHER}/{VISION_FILE}"
    bundle(exported(tmp_path / "back", vision=1.0), CAPTIONER, root)  # the first that has it holds it
    assert [(root / name / VISION_FILE).is_symlink() for name in (CAPTIONER, TEACHER, READER)] == [False, True, True]
    bundle(exported(tmp_path / "own", vision=7.0), TEACHER, root)
    assert [vision_of(root, name) for name in (CAPTIONER, TEACHER, READER)] == [1.0, 7.0, 1.0]
    assert report(TEACHER, root).endswith("which no other bundled model has")


def test_a_bundled_folder_is_bundled_again_as_it_is(root: Path) -> None:
    before = {name: folder_digest(root / name) for name in (CAPTIONER, TEACHER)}
    for name in before:
        bundle(root / name, name, root)
    assert {name: folder_digest(root / name) for name in before} == before
    assert (root / TEACHER / VISION_FILE).is_symlink() and not (root / CAPTIONER / VISION_FILE).is_symlink()


def test_the_card_stays_and_all_else_is_the_exports(root: Path, tmp_path: Path) -> None:
    (root / TEACHER / CARD).write_text("a card")
    (root / TEACHER / "added_tokens.json").write_text("{}")
    export = exported(tmp_path / "next", kind="qwen2")  # a type that is not split
    (export / "scheduler").mkdir()
    (export / "scheduler/scheduler_config.json").write_text("{}")
    bundle(export, TEACHER, root)
    names = sorted(file.relative_to(root / TEACHER).as_posix() for file in (root / TEACHER).rglob("*"))
    assert names == [CARD, "config.json", WHOLE, "scheduler", "scheduler/scheduler_config.json"]
    assert (root / TEACHER / CARD).read_text() == "a card"
    assert report(TEACHER, root) == f"tiny/{TEACHER}: bundled whole"
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"no exported model: it has none of config\.json"),
        (lambda folder: (folder / WHOLE).unlink(), r"model\.safetensors: no weights that can be read"),
        (lambda folder: (folder / WHOLE).write_bytes(b"torn"), r"model\.safetensors: no weights that can be read"),
        (lambda folder: (folder / INDEX).write_text("[]"), "is no index of weights"),
        (lambda folder: (folder / "lost").symlink_to("nowhere"), "cannot be copied"),
        (
            lambda folder: save_file({"model.b": torch.zeros(2)}, folder / WHOLE),
            r"has no weights called visual\.\*, which its model_type has",
        ),
    ],
)
def test_what_is_no_export_is_refused_in_a_line(
    root: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    before = folder_digest(root / CAPTIONER)
    damage(exported(tmp_path / "broken"))
    with pytest.raises(BadInput, match=reason) as caught:
        bundle(tmp_path / "broken", CAPTIONER, root)
    assert "\n" not in str(caught.value) and folder_digest(root / CAPTIONER) == before
    assert (root / TEACHER / VISION_FILE).is_symlink()


def test_the_command_refuses_as_others_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        ([str(tmp_path), "captioner"], "no exported model"),
        ([str(tmp_path), "captain"], "invalid choice: 'captain'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_the_command_says_where_the_weights_lie(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("capipe.models.tiny.train.bundle.ROOT", root)
    assert main([str(exported(tmp_path / "next", rest=8.0)), TEACHER]) == 0
    assert capsys.readouterr().out.splitlines() == [report(TEACHER, root)]
    assert float(load_tensors(root / TEACHER)["model.b"][0, 0]) == 8.0


def test_training_does_not_export_into_a_bundled_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole weights beside the parts of older ones would be a mixture."""
    with pytest.raises(SystemExit):
        build.parse_arguments(["captioner", "--steps", "1", "--out", str(folder_of("captioner"))])
    assert "without --out" in capsys.readouterr().err
