"""`capipe qa` as users run it, with the bundled teacher on the transformers engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.models.tiny.train.texts.quiz import quiz, sample_asked
from capipe.models.tiny.world.corpus import CorpusSample, write_corpus
from capipe.pipeline.inspect.screening import screening_lines
from capipe.pipeline.inspect.verify import verify

from ...conftest import photo
from ..conftest import CaptionServer, capipe, one_line, table

TEACHER = ("--model", "tiny/teacher", "--engine", "transformers")
SCREEN = ("--screen-model", "tiny/teacher", "--engine", "transformers")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CorpusSample]]:
    """Twelve held-out scenes and a broken file in two shards."""
    folder = tmp_path_factory.mktemp("qa")
    samples = write_corpus(folder / "corpus", 12, "heldout", 41)
    (folder / "corpus" / "zz-broken.jpg").write_bytes(photo(1)[:200])
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", 10)
    return folder / "shards", samples


def records(samples: list[CorpusSample], name: str = "{key}.jpg") -> list[dict[str, Any]]:
    """A good question about each sample, as a plain question set has it."""
    rng = Random("records")
    found = []
    for sample in samples:
        question = quiz(sample.scene, sample_asked(sample.scene, rng), rng)
        record = {"image": name.format(key=sample.key), "question": question.text, "options": list(question.options)}
        found.append({**record, "answer": question.options[question.answer]})
    return found


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_questions_are_written_and_screened(corpus: tuple[Path, list[CorpusSample]], tmp_path: Path) -> None:
    shards, _ = corpus
    out = tmp_path / "qa"
    said = capipe("qa", "--shards", shards, "--out", out, *TEACHER, "--per-image", 3).stderr
    written, screened = table(out / "written"), table(out / "screened")
    assert [row["key"] for row in written] == [row["key"] for row in screened] == [r["key"] for r in table(shards)]
    assert written[-1]["status"] == screened[-1]["status"] == "corrupt" and screened[-1]["questions"] == []
    usable = [row for row in written if row["status"] == "ok"]
    assert len(usable) >= 10 and all(row["raw"] and row["writer"] == "tiny/teacher" for row in usable)
    entries = [entry for row in screened for entry in row["questions"]]
    assert sum(entry["status"] == "ok" for entry in entries) >= len(entries) / 2
    for entry in entries:
        if entry["status"] == "ok":
            orders = len(entry["options"]) + 1
            assert entry["with_image"] == [entry["answer"]] * orders and entry["image_accuracy"] == 1
            assert len(entry["without_image"]) == orders and entry["answer"] not in entry["without_image"]
            assert len(entry["guessed"]) == orders - 1 and entry["guess_accuracy"] <= 1 / (orders - 1) + 0.25 + 1e-4
    (line,) = screening_lines(Artifact.open(str(out / "screened")))
    assert line in said and f"screening kept {sum(entry['status'] == 'ok' for entry in entries)} of" in line
    capipe("report", out)
    assert line in (out / "report.html").read_text(encoding="utf-8")
    for name in ("written", "screened"):
        assert verify(str(out / name)).faults == []


def test_a_second_run_does_nothing_and_another_configuration_is_refused(
    corpus: tuple[Path, list[CorpusSample]], tmp_path: Path
) -> None:
    shards, samples = corpus
    out, file = tmp_path / "qa", write_lines(tmp_path / "set.jsonl", records(samples))
    command = ("qa", "--shards", shards, "--out", out, "--import", file, *SCREEN)
    capipe(*command)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    capipe(*command)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    refused = capipe(*command, "--without-image", "<=0.5", code=2)
    assert "screen.text_max: 0.0 -> 0.5" in one_line(refused)
    assert "screen.guess_margin: 0.25 -> 0.3" in one_line(capipe(*command, "--guess-margin", 0.3, code=2))
    assert 'screen.blind: "both" -> ' in one_line(capipe(*command, "--blind", "abstain", code=2))
    write_lines(file, records(samples[:5]))
    assert "imported" in one_line(capipe(*command, code=2))
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}


def test_a_set_is_imported_row_by_row(corpus: tuple[Path, list[CorpusSample]], tmp_path: Path) -> None:
    shards, samples = corpus
    good = records(samples)
    bad = [
        {**good[0], "question": "Is it so?", "answer": "neither"},
        {**good[1], "question": "Or so?", "options": ["only one"], "answer": "only one"},
        {**good[2], "question": "Or else?", "options": ["red", "Red", "blue"], "answer": "blue"},
        {**good[3], "question": "Then?", "options": ["red", "both A and C", "blue"], "answer": "red"},
        {**good[4], "image": "elsewhere.jpg"},
    ]
    file = write_lines(tmp_path / "set.jsonl", good + bad)
    out = tmp_path / "qa"
    done = capipe("qa", "--shards", shards, "--out", out, "--import", file, "--screen", "none")
    line = done.stderr
    assert "set.jsonl:17" in line and "elsewhere.jpg" in line and "unmatched.jsonl" in line
    listed = [json.loads(each) for each in (out / "written/_capipe/unmatched.jsonl").read_text().splitlines()]
    assert [each["image"] for each in listed] == ["elsewhere.jpg"]
    assert "4 of 16 questions cannot be used: " in line and "bad_answer: the answer 'neither' is none of" in line
    statuses = [entry["status"] for row in table(out / "written") for entry in row["questions"]]
    assert sorted(statuses) == sorted(["ok"] * 12 + ["bad_answer"] + ["bad_options"] * 3)
    assert not (out / "screened").exists()
    artifact = Artifact.open(str(out / "written"))
    assert artifact.config["semantic"]["imported"] and verify(str(out / "written")).faults == []


def test_caprl_layout_is_imported(corpus: tuple[Path, list[CorpusSample]], tmp_path: Path) -> None:
    shards, samples = corpus
    items = []
    for record in records(samples):
        lines = "\n".join(f"   - {letter}) {text}" for letter, text in zip("ABCDEF", record["options"], strict=False))
        answer = "ABCDEF"[record["options"].index(record["answer"])]
        qa = [{"question": f"{record['question']}\n{lines}", "answer": answer}]
        items.append({"image_path": f"corpus/{record['image']}", "qa_list": qa})
    file = tmp_path / "caprl.json"
    file.write_text(json.dumps(items))
    out = tmp_path / "qa"
    capipe("qa", "--shards", shards, "--out", out, "--import", file, "--screen", "none")
    entries = [entry for row in table(out / "written") for entry in row["questions"]]
    expected = [(r["question"], r["options"], r["options"].index(r["answer"])) for r in records(samples)]
    assert [(entry["question"], entry["options"], entry["answer"]) for entry in entries] == expected


def test_open_ended_questions_become_multiple_choice_on_request(
    corpus: tuple[Path, list[CorpusSample]], tmp_path: Path
) -> None:
    shards, samples = corpus
    lines = [
        {
            "image": f"{sample.key}.jpg",
            "question": "What color is the first shape?",
            "answer": sample.scene.things[0].color,
        }
        for sample in samples
    ]
    file = write_lines(tmp_path / "open.jsonl", lines)
    refused = tmp_path / "refused"
    command = ("qa", "--shards", shards, "--out", refused, "--import", file, "--screen", "none")
    assert "none of its 12 questions" in one_line(capipe(*command, code=2)) and not refused.exists()
    out = tmp_path / "qa"
    capipe("qa", "--shards", shards, "--out", out, "--import", file, "--distractors", 2, "--screen", "none")
    entries = [entry for row in table(out / "written") for entry in row["questions"]]
    assert len(entries) == 12 and all(len(entry["options"]) == 3 for entry in entries)
    assert [entry["options"][entry["answer"]] for entry in entries] == [line["answer"] for line in lines]


def test_wrong_gold_is_found_by_the_screen(corpus: tuple[Path, list[CorpusSample]], tmp_path: Path) -> None:
    shards, samples = corpus
    rng, lines = Random(3), []
    for sample in samples:
        question = quiz(sample.scene, sample_asked(sample.scene, rng), rng)
        wrong = replace(question, answer=(question.answer + 1) % len(question.options))
        lines.append(
            {
                "image": f"{sample.key}.jpg",
                "question": wrong.text,
                "options": list(wrong.options),
                "answer": wrong.options[wrong.answer],
            }
        )
    out = tmp_path / "qa"
    file = write_lines(tmp_path / "wrong.jsonl", lines)
    capipe("qa", "--shards", shards, "--out", out, "--import", file, *SCREEN)
    rows = table(out / "screened")
    assert sum(entry["status"] == "unsupported" for row in rows for entry in row["questions"]) >= 11
    assert sum(row["status"] == "filtered" for row in rows) >= 11


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--model"),
        (("--model", "tiny/teacher", "--import", "x.jsonl"), "either --model"),
        (("--import", "missing.jsonl", "--screen", "none"), "missing.jsonl"),
        (("--import", "missing.jsonl"), "--screen-model"),
        (("--model", "tiny/teacher", "--screen", "loose"), "strict, caprl"),
        (("--model", "tiny/teacher", "--with-image", "1"), "--with-image"),
        (("--model", "tiny/teacher", "--without-image", ">0.5"), "--without-image"),
        (("--model", "tiny/teacher", "--blind", "abstain", "--guess-margin", "0.1"), "--guess-margin 0.1: nothing is"),
        (("--model", "tiny/teacher", "--guess-margin", "2"), "--guess-margin 2.0: a share"),
        (
            ("--model", "tiny/teacher", "--blind", "guess", "--without-image", "<=0.5"),
            "--without-image '<=0.5': forced",
        ),
        (("--model", "tiny/teacher", "--screen", "none", "--blind", "both"), "--blind: --screen none"),
        (("--model", "tiny/teacher", "--screen", "none", "--guess-margin", "0.1"), "--guess-margin: --screen none"),
        (("--model", "tiny/teacher", "--without-image", "<2"), "--without-image"),
        (("--model", "tiny/teacher", "--per-image", "0"), "--per-image"),
        (("--model", "tiny/teacher", "--repetition-penalty", "0"), "--repetition-penalty"),
        (("--model", "tiny/teacher", "--screen", "none", "--reader-prompt", "caprl"), "--reader-prompt: --screen none"),
        (("--model", "tiny/teacher", "--presentations", "0"), "--presentations"),
        (("--model", "tiny/reader", "--engine", "transformers"), "reads text only"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    corpus: tuple[Path, list[CorpusSample]], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    shards, _ = corpus
    assert says in one_line(capipe("qa", "--shards", shards, "--out", tmp_path / "qa", *arguments, code=2))
    assert not (tmp_path / "qa").exists()


def test_a_set_without_questions_or_about_other_images_is_refused(
    corpus: tuple[Path, list[CorpusSample]], tmp_path: Path
) -> None:
    shards, samples = corpus
    command = ("qa", "--shards", shards, "--out", tmp_path / "qa", "--screen", "none", "--import")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in one_line(capipe(*command, empty, code=2))
    strangers = write_lines(tmp_path / "strangers.jsonl", records(samples, "other-{key}.jpg"))
    assert "other-000000.jpg" in one_line(capipe(*command, strangers, code=2))
    assert not (tmp_path / "qa").exists()


def test_a_set_of_which_nothing_can_be_used_is_refused_with_the_reasons(
    corpus: tuple[Path, list[CorpusSample]], tmp_path: Path
) -> None:
    shards, samples = corpus
    bad = [{**each, "answer": f"nothing like {number}"} for number, each in enumerate(records(samples))]
    bad[:3] = [{**each, "options": None} for each in bad[:3]]
    bad[3] |= {"options": ["red", "both A and C", "blue"]}
    bad[4] |= {"question": ""}
    file = write_lines(tmp_path / "set.jsonl", bad)
    command = ("qa", "--shards", shards, "--out", tmp_path / "qa", "--import", file, "--screen", "none")
    line = one_line(capipe(*command, code=2))
    assert "set.jsonl: none of its 12 questions about the images can be used: 7 bad_answer: the answer 'nothing" in line
    assert "; 3 bad_options: there are no options; 1 " in line and "; 1 for other reasons" in line
    assert not (tmp_path / "qa").exists()


def test_llavas_multiple_choice_is_imported(corpus: tuple[Path, list[CorpusSample]], tmp_path: Path) -> None:
    shards, samples = corpus
    plain, rows = records(samples), []
    for record in plain:
        lines = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDEF", record["options"], strict=False))
        asks = (
            f"<image>\n{record['question']}\n{lines}\nAnswer with the option's letter from the given choices directly."
        )
        answer = "ABCDEF"[record["options"].index(record["answer"])]
        turns = [{"from": "human", "value": asks}, {"from": "gpt", "value": answer}]
        rows.append({"id": record["image"], "image": f"corpus/{record['image']}", "conversations": turns})
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(rows, indent=1))
    capipe("qa", "--shards", shards, "--out", tmp_path / "qa", "--import", file, "--screen", "none")
    entries = [entry for row in table(tmp_path / "qa/written") for entry in row["questions"]]
    expected = [(r["question"], r["options"], r["options"].index(r["answer"])) for r in plain]
    assert [(entry["question"], entry["options"], entry["answer"]) for entry in entries] == expected


def test_rows_an_engine_failed_on_are_done_again_on_request(
    corpus: tuple[Path, list[CorpusSample]], tmp_path: Path, server: CaptionServer
) -> None:
    shards, _ = corpus
    server.fails = lambda number, image: 400 if number % 3 == 0 else 200
    command = ("qa", "--shards", shards, "--out", tmp_path / "qa", "--model", "m", "--engine", server.url)
    capipe(*command, "--screen", "none", "--max-attempts", 1, code=1)
    failed = [row for row in table(tmp_path / "qa/written") if row["status"] == "engine_error"]
    assert failed and all(row["error"] and row["raw"] == [] for row in failed)
    server.fails = lambda number, image: 200
    before = server.requests
    capipe(*command, "--screen", "none", "--max-attempts", 1, "--retry")
    rows = table(tmp_path / "qa/written")
    assert server.requests - before == len(failed) and "engine_error" not in {row["status"] for row in rows}
    faults = {entry["error"] for row in rows for entry in row["questions"]}
    assert faults == {"no JSON with questions"} and all(row["raw"] for row in rows if row["status"] == "empty")
