"""Sentence truth in `capipe filter` and `eval`, and absent things in `qa`, by an engine that knows the scenes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand, uid_of
from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.train.texts.hard_negatives import plant_addition
from capipe.models.tiny.train.texts.quiz import quiz, sample_asked
from capipe.models.tiny.world.corpus import CorpusSample, write_corpus
from capipe.models.yes_no import sigmoid
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.train import run_training
from capipe.pipeline.runners import local
from capipe.trainer.recipe import load_recipe

from ...oracle.scene_engine import SURE, UNLIKELY, make_engine
from ..conftest import capipe, one_line, table
from ..training import steps, weights

IMAGES, SEED = 10, 61
ROOT = Path(__file__).resolve().parents[3]  # on the path of forked commands
ENGINE = "tests.oracle.scene_engine:make_engine"
MODEL = f"{IMAGES}/heldout/{SEED}"
VLM = ("--vlm", MODEL, "--vlm-engine", ENGINE, "--gpus", "none")
TRUE = sigmoid(SURE - UNLIKELY)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CorpusSample]]:
    """Ten held-out scenes in two shards, and a file that is no image; two true questions about each scene."""
    folder = tmp_path_factory.mktemp("sentences")
    samples = write_corpus(folder / "corpus", IMAGES, "heldout", SEED)
    (folder / "corpus/zz.jpg").write_bytes(b"<html>")
    rng, lines = Random(8), []
    for sample in samples:
        question = quiz(sample.scene, sample_asked(sample.scene, rng), rng)
        record = {"image": f"{sample.key}.jpg", "question": question.text, "options": question.options}
        lines.append(json.dumps({**record, "answer": question.options[question.answer], "kind": question.kind}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", 6)
    quizzes = ("--import", folder / "set.jsonl", "--screen", "none")
    capipe("qa", "--shards", folder / "shards", "--out", folder / "qa", *quizzes)
    return folder, samples


@pytest.fixture(scope="module")
def captions(corpus: tuple[Path, list[CorpusSample]]) -> Path:
    """Dense captions; every second one has a sentence about a thing that is not there."""
    folder, samples = corpus
    return write_captions(folder / "shards", folder / "captions", texts(samples), "dense")


def texts(samples: list[CorpusSample]) -> dict[str, tuple[str, int | None]]:
    """By uid: the caption, and the index of its wrong sentence."""
    found = {}
    for number, sample in enumerate(samples):
        planted = plant_addition(sample.scene, Random(number))
        found[uid_of(sample.image)] = (planted.text, planted.sentence) if number % 2 else (planted.original, None)
    return found


def write_captions(shards: Path, out: Path, given: dict[str, tuple[str, int | None]], name: str) -> Path:
    annotate = {"prompts": [{"name": name, "text": "Describe."}], "max_tokens": 200}
    artifact = Artifact.create(str(out), "annotate", {"annotate": annotate, "model": "m" * 12}, {"model": "m"})
    for shard in expand(str(shards)):
        rows = list(RowReader(shard))
        with artifact.begin(shard.name, ANNOTATE) as writer:
            for row in rows:
                text, status = given.get(row.uid or "", (None, 0))[0], str(row.status)
                said = [] if text is None else [{"name": name, "text": text, "n_tokens": 20, "status": "ok"}]
                base = {"key": row.key, "uid": row.uid, "status": status, "error": row.error, "text": row.text}
                writer.write({**base, "captions": said})
            writer.commit(rows_in=len(rows), input_info={"digest": "test"})
    artifact.close()
    return out


def no_worker(*_: object) -> None:
    raise AssertionError("a worker was started, which loads a model")


def in_process(*arguments: object) -> int:
    from capipe.pipeline.cli import app

    with pytest.raises(SystemExit) as ended:
        app([str(each) for each in arguments])
    return int(ended.value.code or 0)


def test_rows_are_kept_by_their_least_true_sentence_and_another_threshold_loads_no_model(
    corpus: tuple[Path, list[CorpusSample]], captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, samples = corpus
    out, expected = tmp_path / "out", texts(samples)
    common = ["filter", "--shards", folder / "shards", "--captions", captions, "--out", out, *VLM]
    capipe(*common, "--keep", "vlm_min > 0.5")
    checked = table(out / "sentences")
    assert [row["key"] for row in checked] == [row["key"] for row in table(folder / "shards")]
    rows = {row["uid"]: row for row in checked}
    for key, (text, wrong) in expected.items():
        row, count = rows[key], len(split_sentences(text))
        assert row["status"] == "ok" and row["re_vlm_min"] == pytest.approx(TRUE if wrong is None else 1 - TRUE)
        assert row["re_vlm_lowest"] == (wrong or 0) and row["org_vlm_min"] == pytest.approx(TRUE)
        right = count - (wrong is not None)
        assert row["re_vlm_mean"] == pytest.approx((right * TRUE + (count - right) * (1 - TRUE)) / count)
    assert [row["status"] for key, row in rows.items() if key not in expected] == ["unsupported"]
    final = table(out / "shards")
    assert {row["uid"] for row in final if row["status"] == "ok"} == {
        key for key, (_, wrong) in expected.items() if wrong is None
    }
    (rejected,) = [row for row in final if row["uid"] == uid_of(samples[1].image)]
    assert rejected["status"] == "filtered" and "vlm_min is 0.04" in rejected["error"]
    report = (out / "shards/_capipe/report.html").read_text()
    assert "re_vlm_min" in report and "vlm_min 0.04" in report
    for name in ("sentences", "scores", "shards"):
        assert verify(str(out / name)).faults == []

    monkeypatch.setattr(local.ProcessWorkerPool, "start", no_worker)
    monkeypatch.syspath_prepend(ROOT)
    before = [path.read_bytes() for path in sorted((out / "sentences").glob("*.parquet"))]
    assert in_process(*common, "--keep", "vlm_mean > 0.9 and vlm_lowest >= 0", "--fresh") == 0
    places = ("--scores", out / "scores", "--scores", out / "sentences")
    asked = ["filter", "--shards", folder / "shards", *places, "--out", tmp_path / "again", "--keep", "vlm_min > 0.5"]
    assert in_process(*asked) == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "again/shards").glob("*.parquet"))] != []
    assert [row["status"] for row in table(tmp_path / "again/shards")] == [row["status"] for row in final]
    assert [row["re_vlm_min"] for row in table(tmp_path / "again/shards")] == [row["re_vlm_min"] for row in final]
    assert before == [path.read_bytes() for path in sorted((out / "sentences").glob("*.parquet"))]


def test_scores_that_are_there_are_joined_and_those_of_other_captions_refused(
    corpus: tuple[Path, list[CorpusSample]], captions: Path, tmp_path: Path
) -> None:
    folder, samples = corpus
    shards, out = ("--shards", folder / "shards"), tmp_path / "out"
    capipe("filter", *shards, "--captions", captions, "--out", tmp_path / "clip", "--clip", "tiny/clip")
    scored = ("--scores", tmp_path / "clip/scores")
    keep = ("--keep", "vlm_min > 0.5 and clip_score > -1")
    done = capipe("filter", *shards, *scored, "--out", out, *VLM, *keep, code=2)
    assert "name by --captions those that" in one_line(done)
    other = dict.fromkeys(texts(samples), ("A star.", None))
    others = write_captions(folder / "shards", tmp_path / "others", other, "dense2")
    done = capipe("filter", *shards, *scored, "--captions", others, "--out", out, *VLM, *keep, code=2)
    assert "--vlm is to check the same" in one_line(done) and not out.exists()
    capipe("filter", *shards, *scored, "--captions", captions, "--out", out, *VLM, *keep)
    kept = [row for row in table(out / "shards") if row["status"] == "ok"]
    assert len(kept) == IMAGES / 2 and all(row["re_clip_score"] is not None for row in kept)
    assert not (out / "scores").exists(), "what is scored is not scored again"
    capipe("filter", *shards, "--captions", others, "--out", tmp_path / "org", *VLM)
    mixed = ("--scores", tmp_path / "clip/scores", "--scores", tmp_path / "org/sentences")
    done = capipe("filter", *shards, *mixed, "--out", tmp_path / "mixed", code=2)
    assert "of other new captions than are to be written" in one_line(done)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--vlm-engine", "transformers"), "--vlm-engine: is for the model that checks sentences"),
        (("--clip", "tiny/clip", "--vlm-arg", "dtype=float32"), "name it by --vlm"),
        (("--vlm", "tiny/teacher", "--keep", "vlm_score > 1"), "vlm_"),
        (("--vlm", "tiny/teacher", "--vlm-arg", "concurrency=x"), "--vlm-arg concurrency=x"),
        (("--vlm", "tiny/reader", "--vlm-engine", "transformers"), "reads text only"),
        (("--vlm", "tiny/teacher", "--dry-run"), "no sentences are checked yet"),
        ((), "--vlm, or --scores"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    corpus: tuple[Path, list[CorpusSample]], tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    done = capipe("filter", "--shards", corpus[0] / "shards", "--out", tmp_path / "out", *options, code=2)
    assert says in one_line(done) and not (tmp_path / "out/shards").exists()


def test_an_evaluation_shows_true_sentences_by_the_model_and_by_the_scene(
    corpus: tuple[Path, list[CorpusSample]], captions: Path, tmp_path: Path
) -> None:
    folder, samples = corpus
    given = ("--shards", folder / "shards", "--questions", folder / "qa", "--captions", captions)
    reader = ("--reader", "tiny/holdout-reader", "--engine", "transformers", "--presentations", 1)
    done = capipe("eval", *given, "--out", tmp_path / "out", *reader, *VLM)
    report = json.loads((tmp_path / "out/report.json").read_text())
    systems: dict[str, Any] = {system["name"]: system for system in report["systems"]}
    sentences = systems["dense"]["sentences"]
    total = sum(len(split_sentences(text)) for text, _ in texts(samples).values())
    assert sentences["captions"] == IMAGES and sentences["wrong"]["value"] == pytest.approx(0.5)
    assert sentences["true"]["n"] == total and sentences["true"]["value"] == pytest.approx(1 - IMAGES / 2 / total)
    assert sentences["agreement"]["value"] == systems["oracle"]["sentences"]["true"]["value"] == 1
    assert sentences["scene_wrong"] == sentences["wrong"] and sentences["wrong"]["low"] is not None
    assert systems["self-oracle"]["sentences"] is None and systems["dense"]["truth"]["wrong"]["value"] > 0
    assert "Sentences" in done.stdout and "## Sentences" in (tmp_path / "out/report.md").read_text()
    assert report["settings"]["sentences"].startswith(MODEL) and verify(str(tmp_path / "out/checked")).faults == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/checked").glob("*.parquet")}
    again = ("--vlm-mode", "sampled")
    assert "check.mode" in one_line(capipe("eval", *given, "--out", tmp_path / "out", *reader, *VLM, *again, code=2))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/checked").glob("*.parquet")}


def test_absent_things_are_written_and_screened(corpus: tuple[Path, list[CorpusSample]], tmp_path: Path) -> None:
    folder, samples = corpus
    out = tmp_path / "qa"
    common = ("qa", "--shards", folder / "shards", "--out", out, "--model", MODEL, "--engine", ENGINE)
    capipe(*common, "--gpus", "none", "--absent", 3)
    rows = [row for row in table(out / "screened") if row["status"] == "ok"]
    assert len(rows) == IMAGES
    for row, sample in zip(rows, samples, strict=True):
        kinds = [(entry["kind"], entry["status"]) for entry in row["questions"]]
        assert kinds == [("background", "ok"), ("absent", "ok"), ("absent", "ok"), ("absent", "unsupported")]
        there = row["questions"][-1]["question"]
        assert there == f"Is there a {sample.scene.things[0].color} {sample.scene.things[0].shape} in the image?"
    semantic = Artifact.open(str(out / "written")).config["semantic"]
    assert semantic["questions"]["absent"] == 3 and "3 things that are not in the image" in semantic["absent_prompt"]
    assert "absent" in one_line(capipe(*common, "--gpus", "none", code=2)), "another configuration"
    nobody = ("qa", "--shards", folder / "shards", "--out", tmp_path / "x", "--import", folder / "set.jsonl")
    assert "--absent 2" in one_line(capipe(*nobody, "--screen", "none", "--absent", 2, code=2))


@pytest.mark.slow
def test_the_bundled_teacher_checks_sentences(
    corpus: tuple[Path, list[CorpusSample]], captions: Path, tmp_path: Path
) -> None:
    """In a process of its own, on pixels, twice to the same bytes; how well it answers is measured elsewhere."""
    folder, _ = corpus
    bytes_of = []
    for name in ("one", "two"):
        out = tmp_path / name
        common = ("filter", "--shards", folder / "shards", "--captions", captions, "--out", out)
        try:
            capipe(*common, "--vlm", "tiny/teacher", "--vlm-engine", "transformers", "--text", "re")
        except (
            AssertionError
        ) as ended:  # it may name no letter at all: then there is no probability, and the run says so
            assert "no answer but letters with a probability of" in str(ended)
        bytes_of.append([path.read_bytes() for path in sorted((out / "sentences").glob("*.parquet"))])
        rows = table(out / "sentences")
        assert len(rows) == IMAGES + 1 and {row["status"] for row in rows} <= {"ok", "engine_error", "unsupported"}
        known = [row for row in rows if row["re_vlm_min"] is not None]
        assert all(0 <= row["re_vlm_min"] <= row["re_vlm_mean"] <= 1 for row in known)
    assert bytes_of[0] == bytes_of[1]


@pytest.mark.slow
async def test_a_captioner_learns_by_the_quiz_and_by_who_knows_what_is_true(recipe: Path, tmp_path: Path) -> None:
    engine = f"{make_engine.__module__}:make_engine"
    rewards = [
        {"kind": "quiz", "engine": "transformers"},
        {"kind": "verified", "model": "8/train/3", "engine": engine, "words": 10, "least": 2, "weight": 0.2},
        {"kind": "length", "free": 40, "most": 60},
    ]
    sets = [f"rewards={json.dumps(rewards)}", "steps=2", "save_every=2", "validation=null"]
    said: list[str] = []
    ends = [
        await run_training(load_recipe(recipe, sets), tmp_path / name, fresh=False, say=said.append)
        for name in ("one", "two")
    ]
    assert weights(ends[0]) == weights(ends[1]), "which captions ended together decides nothing"
    for line in steps(tmp_path / "one"):
        assert line["reward/verified"] <= 0 <= line["reward/verified_wrong"] <= line["reward/verified_sentences"]
    (preflight,) = {line for line in said if line.startswith("preflight: verified")}
    means = dict(part.split() for part in preflight.removeprefix("preflight: verified: ").split(", "))
    assert float(means["true"]) > float(means["generic"]) and float(means["true"]) > float(means["empty"]) == -1
