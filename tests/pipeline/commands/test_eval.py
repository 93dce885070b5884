"""`capipe eval` and `capipe compare` as users run them, on the bundled models and the transformers engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from capipe.manifests.artifact import Artifact
from capipe.models.tiny.train.texts.quiz import quiz, sample_asked
from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.inspect.verify import verify

from ..conftest import capipe, one_line, table

ENGINE = ("--engine", "transformers")
READER = ("--reader", "tiny/holdout-reader", *ENGINE)


@pytest.fixture(scope="module")
def quizzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ten held-out scenes, two true questions about each imported beside them, and plain captions."""
    folder = tmp_path_factory.mktemp("eval")
    rng, lines = Random(8), []
    for sample in write_corpus(folder / "corpus", 10, "heldout", 51):
        for _ in range(2):
            question = quiz(sample.scene, sample_asked(sample.scene, rng), rng)
            answer = question.options[question.answer]
            record = {"image": f"{sample.key}.jpg", "question": question.text, "options": question.options}
            lines.append(json.dumps({**record, "answer": answer, "kind": question.kind}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    shards = ("--shards", folder / "shards")
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", 6)
    capipe("qa", *shards, "--out", folder / "qa", "--import", folder / "set.jsonl", "--screen", "none")
    plain = ("--prompt", "plain", "--samples", 2, "--temperature", 1, "--max-tokens", 200)
    evaluate(folder, "plain", "--model", "tiny/captioner", *plain)
    return folder


def evaluate(folder: Path, name: str, *options: object, code: int = 0) -> str:
    common = ("--shards", folder / "shards", "--questions", folder / "qa", "--out", folder / name, *READER)
    return capipe("eval", *common, *options, code=code).stdout


def test_a_captioner_is_placed_between_floor_and_ceiling(quizzed: Path) -> None:
    report = json.loads((quizzed / "plain/report.json").read_text())
    systems = {system["name"]: system["quiz"]["accuracy"]["value"] for system in report["systems"]}
    assert list(systems) == ["plain", "oracle", "self-oracle", "generic", "empty", "blind"]
    assert systems["oracle"] > 0.85 and systems["plain"] < systems["oracle"] - 0.3
    assert max(systems["empty"], systems["generic"], systems["blind"]) < 0.1
    assert report["images"] == 10 and report["questions"] == len(questions(quizzed))
    assert "tiny/captioner" in report["settings"]["captioner"] and "all cyclic" in report["settings"]["reader"]
    rows = table(quizzed / "plain/graded")
    assert all(len(row["captions"]) == 2 + 5 for row in rows)
    assert (quizzed / "plain/report.md").read_text().startswith("# Evaluation")
    assert verify(str(quizzed / "plain/graded")).faults == []


def questions(folder: Path) -> list[str]:
    rows = table(folder / "qa/written")
    return [entry["id"] for row in rows for entry in row["questions"] if entry["status"] == "ok"]


def test_captions_made_before_are_graded_and_two_runs_compared(quizzed: Path, tmp_path: Path) -> None:
    dense = ("--model", "tiny/captioner", "--prompt", "dense", "--temperature", 0, "--max-tokens", 200)
    capipe("annotate", "--shards", quizzed / "shards", "--out", quizzed / "dense-captions", *dense, *ENGINE)
    out = evaluate(quizzed, "dense", "--captions", quizzed / "dense-captions", "--no-controls")
    assert "dense" in out and "oracle" not in out
    capipe("compare", quizzed / "plain", quizzed / "dense", "--out", tmp_path / "both")
    difference = json.loads((tmp_path / "both/comparison.json").read_text())["overall"]["difference"]
    assert difference["value"] > 0.3 and difference["low"] > 0
    assert "Both read by tiny/holdout-reader" in (tmp_path / "both/comparison.md").read_text()
    assert "# Comparison" in (tmp_path / "both/comparison.md").read_text()


def test_runs_with_different_readers_are_not_compared(quizzed: Path) -> None:
    evaluate(quizzed, "few", "--captions", quizzed / "plain/captions", "--presentations", 2)
    assert "reader" in one_line(capipe("compare", quizzed / "plain", quizzed / "few", code=2))
    unknown = capipe("compare", quizzed / "plain", quizzed / "plain", "--first-system", "none such", code=2)
    assert "no captions named 'none such'" in one_line(unknown)


def test_the_readers_prompt_may_be_caprls(quizzed: Path) -> None:
    """In the configuration, and the option to abstain in no place but the last.

    The bundled readers were trained on our own prompt alone, and have letters with a space before them up to F: asked
    so, they name no option, which is said.
    """
    records = map(json.loads, (quizzed / "set.jsonl").read_text().splitlines())
    (quizzed / "few.jsonl").write_text("\n".join(json.dumps(each) for each in records if len(each["options"]) < 6))
    shards, qa = ("--shards", quizzed / "shards"), quizzed / "few-qa"
    capipe("qa", *shards, "--out", qa, "--import", quizzed / "few.jsonl", "--screen", "none")
    asked = ("eval", *shards, "--questions", qa, *READER, "--captions", quizzed / "plain/captions")
    out = quizzed / "caprl"
    unread = capipe(*asked, "--out", out, "--reader-prompt", "caprl", code=2).stderr
    assert "no answer names an option" in unread
    assert Artifact.open(str(out / "graded")).setting("semantic", "reader", kind=dict)["prompt"] == "caprl"
    graded = [row for row in table(out / "graded") if row["questions"]]
    for row in graded:
        options = {question["id"]: question["options"] for question in row["questions"]}
        answers = [answer for caption in row["captions"] for answer in caption["answers"]]
        assert answers and all(len(answer["chosen"]) == options[answer["id"]] for answer in answers)
    assert len(graded) > 3 and "reader.prompt" in one_line(capipe(*asked, "--out", out, code=2))


def test_a_second_run_only_reports(quizzed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (quizzed / "plain").rglob("*.parquet")}
    plain = ("--prompt", "plain", "--samples", 2, "--temperature", 1, "--max-tokens", 200)
    evaluate(quizzed, "plain", "--model", "tiny/captioner", *plain)
    assert before == {path: path.stat().st_mtime_ns for path in (quizzed / "plain").rglob("*.parquet")}


def test_what_does_not_fit_is_refused(quizzed: Path, tmp_path: Path) -> None:
    shards, qa = quizzed / "shards", quizzed / "qa"
    common = ("eval", "--out", tmp_path / "out", *READER)

    def refusal(*arguments: object) -> str:
        return one_line(capipe(*common, *arguments, code=2))

    captions = ("--captions", quizzed / "plain/captions")
    assert "either --model" in refusal("--shards", shards, "--questions", qa)
    assert "capipe qa" in refusal("--shards", shards, "--questions", shards, *captions)
    assert "capipe annotate" in refusal("--shards", shards, "--questions", qa, "--captions", qa / "written")
    other = tmp_path / "other"
    shutil.copytree(quizzed / "corpus", other)
    (other / "000000.jpg").unlink()
    capipe("ingest", other, "--out", tmp_path / "other-shards", "--shard-size", 100)
    assert not (tmp_path / "out").exists()
    refused = refusal("--shards", tmp_path / "other-shards", "--questions", qa, *captions)
    assert "give --shards those it was made of" in refused and not (tmp_path / "out").exists()


def test_captions_by_prompts_with_the_row_in_them_are_graded(quizzed: Path) -> None:
    template = "A page says: {text}. Describe the image in detail."
    prompt = ("--prompt", f"named={template}", "--fallback-prompt", "named=Describe the image in detail.")
    evaluate(
        quizzed, "named", "--model", "tiny/captioner", *prompt, "--samples", 1, "--max-tokens", 60, "--no-controls"
    )
    report = json.loads((quizzed / "named/report.json").read_text())
    assert report["settings"]["prompt named"] == template
    assert report["settings"]["fallback prompt named"] == "Describe the image in detail."
    ids = {caption["prompt_id"] for row in table(quizzed / "named/captions") for caption in row["captions"]}
    assert len(ids) == 1 and [system["name"] for system in report["systems"]] == ["named"]
