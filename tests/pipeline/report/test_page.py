"""`capipe report`: one file that needs nothing, whatever is in the data, missing, damaged or being written."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE
from capipe.pipeline.inspect.chain_state import ChainState, StageState, save_chain
from capipe.pipeline.inspect.discover import find
from capipe.pipeline.jobs.eval import report_on
from capipe.pipeline.jobs.eval import write_report as write_evaluation
from capipe.pipeline.report.charts import Line, line_chart
from capipe.pipeline.report.demo import lines
from capipe.pipeline.report.facts import SHARDS, gather, sampled
from capipe.pipeline.report.page import write_report
from capipe.trainer.log import Best, write_best

from ...stages.scored import clip, write_answers
from ..conftest import capipe, one_line, table
from ..looking import words, write_captions, write_chain, write_images, write_run

EVIL = '</style></title><script>alert(1)</script><img src=x onerror="alert(2)"><a href="javascript:x">{{ 7*7 }}</a>'
EVIL += "\x1b[31m\u202e"
VOID = {"meta", "img", "br", "rect", "line", "circle", "path", "polyline"}
OPTIONAL = {"html", "body", "head", "li", "dt", "dd", "p", "tr", "td", "th", "tbody", "thead"}


class Page(HTMLParser):
    """Tags with their attributes, all text, and whether what must be closed is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID | OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.tags if each == tag]


def read(folder: Path, out: Path | None = None) -> Page:
    page = Page(Path(write_report(folder, out)).read_text(encoding="utf-8"))
    assert page.open == []
    return page


def evaluated(folder: Path) -> None:
    """The evaluations' own reports, as `capipe eval` writes them."""
    for name in ("eval", "eval-trained"):
        graded = Artifact.open(str(folder / name / "graded"))
        write_evaluation(report_on(graded), str(folder / name))
        report = json.loads((folder / name / "report.json").read_text())
        captioner = "run/step-000010@1" if name == "eval-trained" else "tiny/captioner@2"
        report["settings"]["captioner"] = f"/somewhere/{captioner}" if "run" in captioner else captioner
        (folder / name / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_chain(tmp_path_factory.mktemp("report") / "chain", [12, 9])
    evaluated(folder)
    write_best(folder / "run", Best(5, 0.75))
    stages = [StageState("images", "ingest", "shards", artifacts=["shards"], arguments=["capipe", "ingest", "/a/b c"])]
    save_chain(folder, ChainState("my recipe", "2026-01-01T00:00:00Z", "", stages))
    return folder


def test_a_run_without_rewards_has_a_curve_of_its_loss(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2, 0)
    lines = [json.dumps({"step": step, "reward": None, "loss": 1.0 - step / 10}) + "\n" for step in range(2)]
    (tmp_path / "run/steps.jsonl").write_text("".join(lines))
    assert "Loss" in read(tmp_path).text


def test_the_whole_chain_is_told(chain: Path) -> None:
    page = read(chain)
    text = page.text
    assert "my recipe" in text and "images checked and hashed" in text
    rows = [row["status"] for row in table(chain / "filtered/shards")]
    assert f"{rows.count('ok')} ok" in text and f"{rows.count('filtered')} filtered" in text
    assert "2 of 2 shards" in text and "from shards" in text
    assert "Step 7 of 10" in text and "Validation: plain" in text and "Loss" not in text
    assert "best checkpoint step-000005 (validation accuracy 0.750)" in text
    assert re.search(r"Quiz accuracy of “plain” captions\s+\d+\.\d → \d+\.\d %", text)
    assert "eval-trained (after training run)" in text
    assert "filtered: clip_score > 0.4" in text and "truncated" in text
    assert "capipe ingest 'b c'" in text and str(chain) not in text
    assert Artifact.open(str(chain / "captions")).fingerprint[:16] in text


def test_quiz_figures_are_those_of_the_evaluations(chain: Path) -> None:
    text = read(chain).text
    for name in ("eval", "eval-trained"):
        report = json.loads((chain / name / "report.json").read_text())
        value = next(s["quiz"]["accuracy"]["value"] for s in report["systems"] if s["name"] == "plain")
        assert f"{100 * value:.1f}" in text
    facts = gather(find(chain))
    assert [each.after for each in facts.evaluations] == [None, "run"]


def test_both_captioners_stand_beside_each_other(chain: Path, tmp_path: Path) -> None:
    text = read(chain).text
    section = text.partition("by both captioners")[2].partition("2 of 2 shards")[0]
    assert section.count("Before (tiny/captioner): ") == section.count("After (step-000010): ") == 4
    for number in (0, 2, 5, 8):  # of the eleven sound rows of the first shard
        before = f"Before (tiny/captioner): {2 * (number % 2)} of 4 answered right {words(number)}"
        after = f"After (step-000010): {4 - 2 * (number % 4 == 0)} of 4 answered right Trained: {words(number)}"
        assert f"{before} {after}" in section
    assert section.count("Trained: ") == 4
    only = Path(shutil.copytree(chain, tmp_path / "chain"))
    shutil.rmtree(only / "eval-trained")
    assert "Quiz: " in read(only).text and "Before (" not in read(only).text


def test_the_demo_ends_with_both_captions_and_the_gain(chain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chain, tmp_path / "demo"))
    (folder / "run").rename(folder / "train")
    shutil.copytree(folder / "eval/screened", folder / "questions/screened")
    for name, old, new in (
        ("eval", '"name": "blind"', '"name": "oracle"'),
        ("eval-trained", "run/step-", "train/step-"),
    ):
        report = folder / name / "report.json"
        report.write_text(report.read_text().replace(old, new))
    trained = [StageState(name, name, name) for name in ("train", "export")]
    save_chain(folder, ChainState("tiny", "2026-01-01T00:00:00Z", "", trained))
    told = lines(folder / "report.html")
    assert told[:2] == ["three captions:", f"  pictures/000000.jpg: {words(0)}"]
    assert told[4].startswith("19 of 19 questions kept, e.g. What is number 0? (a, b, c) What is number 1?")
    before, after = f"pictures/000000.jpg before: {words(0)}", f"pictures/000000.jpg after: Trained: {words(0)}"
    assert told[6:8] == [f"  {before}", f"  {after}"]
    values = {
        name: {
            system["name"]: system["quiz"]["accuracy"]["value"]
            for system in json.loads((folder / name / "report.json").read_text())["systems"]
        }
        for name in ("eval", "eval-trained")
    }
    gain = f"{values['eval']['plain']:.2f} -> {values['eval-trained']['plain']:.2f}"
    assert told[8].startswith(f"training: quiz accuracy {gain} in ")
    assert told[9].startswith("filter: ") and told[-1] == f"shards: {folder}/final"
    save_chain(folder, ChainState("tiny", "2026-01-01T00:00:00Z", "", trained[1:]))
    assert lines(folder / "report.html") == told[:6] + told[9:]  # of a folder that was trained in before


def test_the_file_needs_nothing_and_runs_nothing(chain: Path) -> None:
    page = read(chain)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    assert all((each["src"] or "").startswith("data:image/jpeg;base64,") for each in page.named("img"))
    assert all((each["href"] or "").startswith("#") for each in page.named("a"))
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)
    text = (chain / "report.html").read_text()
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_pictures_are_small_and_each_thing_has_a_name(chain: Path) -> None:
    page = read(chain)
    sources = [base64.b64decode((each["src"] or "").partition(",")[2]) for each in page.named("img")]
    assert len(sources) >= 12 and all(max(Image.open(io.BytesIO(data)).size) <= 256 for data in sources)
    assert all(each["alt"] for each in page.named("img"))
    assert all(each.get("aria-label") or each.get("aria-hidden") for each in page.named("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(each["href"] or "")[1:] for each in page.named("a")} <= set(ids)
    assert (chain / "report.html").stat().st_size < 400_000


def test_captions_questions_and_answers_stand_beside_their_picture(chain: Path) -> None:
    text = read(chain).text
    shown = re.findall(r"What is number (\d+)\?", text)
    assert len(shown) == 11  # the sound rows of the first shard
    for number in map(int, shown[:4]):
        assert words(number) in text
        assert f"eval: plain {2 * (number % 2)}/4" in text


def test_nothing_from_the_data_is_markup(tmp_path: Path) -> None:
    folder = write_chain(tmp_path / EVIL[:20].replace("/", ""), [4], lambda index: EVIL)
    artifact = Artifact.open(str(folder / "captions"))
    artifact.quarantine("x", EVIL)
    (folder / "run/run.json").write_text(json.dumps({"prompt": EVIL, "steps": 10}))
    page = read(folder)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe"})
    assert all((each["src"] or "").startswith("data:") for each in page.named("img"))
    assert not any("javascript" in (value or "") for _, attributes in page.tags for value in attributes.values())
    raw = (folder / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in raw and "{{ 7*7 }}" in raw and "\x1b" not in raw and "\u202e" not in raw
    assert page.text.count("<script>alert(1)</script>") > 10  # shown, word for word


def test_captions_that_many_pictures_share_are_named(tmp_path: Path) -> None:
    shards = write_images(tmp_path / "shards", [30])
    write_captions(tmp_path / "shards", tmp_path / "captions", lambda number: "A picture." if number else "A dog.")
    assert "2 captions stand under more than 20 images each" in read(tmp_path).text, shards
    write_captions(tmp_path / "shards", tmp_path / "others" / "captions")
    assert "stand" not in read(tmp_path / "others").text


def test_parts_that_are_missing_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [3])
    text = read(tmp_path).text
    assert "2 ok" in text and "Training" not in text and "Quiz" not in text and "Scores" not in text
    write_run(tmp_path / "run", 5, 0)
    assert "Nothing was logged yet" in read(tmp_path).text
    only = tmp_path / "only"
    write_run(only / "run", 5, 3)
    assert "No artifact yet" in read(only).text


def test_a_report_while_all_is_being_written(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [4, 4, 4])
    write_captions(tmp_path / "shards", tmp_path / "captions", only=1)
    journal = Artifact.open(str(tmp_path / "captions")).journal("00001")
    journal.append(0, {"key": "a"})
    begun = Artifact.create(str(tmp_path / "begun"), "annotate", {"x": 1}, {"shards": str(tmp_path / "shards")})
    with begun.begin("00000", ANNOTATE):
        text = read(tmp_path).text
    assert "1 of 3 shards" in text and "1 more rows are finished in shards that are not committed yet" in text
    assert "0 of an unknown number of shards" in text
    journal.close()
    begun.close()


def test_what_is_damaged_is_told_and_costs_nothing_else(tmp_path: Path) -> None:
    folder = write_chain(tmp_path / "chain", [6, 6])
    (folder / "captions/00000.parquet").write_bytes(b"nonsense")
    (folder / "filtered/scores/_capipe/manifest.jsonl").write_text("nonsense\n")
    (folder / "other/_capipe/config.json").write_text("[]")
    (folder / "shards/00000.tar").write_bytes(b"")
    (folder / "eval/report.json").write_text('{"images": 1}')
    (folder / "chain.json").write_text("{")
    (folder / "run/run.json").write_text("{")
    text = read(folder).text
    assert "What could not be read" in text
    for name in ("captions (captions): ", "filtered/scores: ", "other: ", "eval: ", "chain.json: "):
        assert name in text, name
    assert "images checked and hashed" in text and "no image" in text


def test_large_artifacts_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capipe.pipeline.report import examples, facts

    assert sampled([str(i) for i in range(1000)], SHARDS)[:2] == ["0", "31"] and len(sampled(["a"] * 999, 8)) == 8
    monkeypatch.setattr(facts, "SHARDS", 2)
    monkeypatch.setattr(examples, "_SHARDS", 2)
    opened: dict[str, set[str]] = {}
    plain = Artifact.parquet

    def noted(artifact: Artifact, shard: str) -> Any:
        opened.setdefault(artifact.url, set()).add(shard)
        return plain(artifact, shard)

    folder = write_chain(tmp_path / "chain", [3] * 7)
    monkeypatch.setattr(Artifact, "parquet", noted)
    text = read(folder).text
    assert "2 of 7 shards, evenly spread" in text or "filtered/shards, all rows" in text
    assert "Counted in 2 of the 7 shards that lost rows" in text
    assert len(opened) > 4 and all(len(names) <= 3 for names in opened.values())


def test_lines_of_many_steps_are_thinned_and_flat_ones_drawn() -> None:
    many = str(line_chart("t", [Line("a", [(float(i), float(i % 7)) for i in range(100_000)])], "step"))
    assert len(many) < 12_000 and many.count("<circle") == 0
    for values in ([0.0, 0.0], [5.0], [-2.0, -2.0], [1e-12, 1e12]):
        chart = str(line_chart("t", [Line("a", [(float(i), v) for i, v in enumerate(values)])], "step"))
        assert "nan" not in chart and "inf" not in chart and "<polyline" in chart


def test_the_command(chain: Path, tmp_path: Path) -> None:
    done = capipe("report", chain, "--out", tmp_path / "deep/page.html")
    assert done.stdout.strip() == str(tmp_path / "deep/page.html")
    assert (tmp_path / "deep/page.html").read_text().startswith("<!doctype html>")
    (tmp_path / "empty").mkdir()
    assert "no artifact" in one_line(capipe("report", tmp_path / "empty", code=2))


@pytest.mark.parametrize("name", [".report.html.partial", "report.html"])
def test_a_link_in_its_place_is_replaced_and_never_followed(tmp_path: Path, name: str) -> None:
    """Somebody else's folder may hold links under any name that can be foreseen."""
    write_images(tmp_path / "given/shards", [2])
    outside = tmp_path / "outside.html"
    outside.write_text("mine")
    (tmp_path / "given" / name).symlink_to(outside)
    made = Path(write_report(tmp_path / "given"))
    assert outside.read_text() == "mine" and not made.is_symlink() and made.read_text().startswith("<!doctype html>")
    assert {each.name for each in (tmp_path / "given").iterdir()} <= {"shards", "report.html", name}


def test_what_a_killed_report_left_is_cleared(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [2])
    left = tmp_path / f".report.html.{'0' * 16}.partial"
    left.write_text("half")
    assert Path(write_report(tmp_path)).stat().st_size > 1000 and not left.exists()


def test_answers_to_questions_are_shown_beside_a_selection_by_other_scores(chain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chain, tmp_path / "chain"))
    before = read(folder).text
    assert "filtered/shards, all rows" in before and "filtered/scores, all rows" not in before
    write_answers(folder / "shards", folder / "answers", ["star"], lambda index, row: {"ask_star": clip(index)})
    text = read(folder).text
    assert "answers, all rows that have them" in text and text.count("ask_star") > 1
    assert "filtered/shards, all rows" in text and "filtered/scores, all rows" not in text
