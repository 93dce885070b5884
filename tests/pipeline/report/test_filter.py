"""The report of a selection: what it shows, and that nothing in it is markup but its own."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capipe.manifests.artifact import Artifact
from capipe.pipeline.commands.filter import select_step
from capipe.pipeline.inspect.histograms import histograms
from capipe.pipeline.report.charts import histogram_chart
from capipe.stages.filter.select import SelectConfig

from ...stages.scored import clip, foreign_shards, plain, write_scores

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[31m & "quoted"'


class Page(HTMLParser):
    """Tags with their attributes, and the text of articles by side."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.articles: list[list[str]] = []
        self.sides: list[int] = []
        self.in_sides = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section" and self.in_sides:
            self.sides.append(len(self.articles))
        self.in_sides = self.in_sides or dict(attrs).get("class") == "sides"
        if tag == "article":
            self.articles.append([])

    def handle_data(self, data: str) -> None:
        if self.articles:
            self.articles[-1].append(data)

    @property
    def charts(self) -> list[str]:
        """The score of each chart."""
        labels = [attributes["aria-label"] or "" for tag, attributes in self.tags if attributes.get("role") == "img"]
        return [label.partition(". ")[0] for label in labels]

    def images(self, kind: str) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        start = f"data:image/{kind};base64,"
        return [base64.b64decode(source.removeprefix(start)) for source in sources if source.startswith(start)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_shards(tmp_path_factory.mktemp("report") / "theirs", [20, 20])


def report(shards: Path, folder: Path, values: Any, **config: Any) -> str:
    scores = write_scores(shards, folder / "scores", values)
    select_step(scores, str(shards), str(folder / "out"), SelectConfig(**config), workers=0)
    return (folder / "out/_capipe/report.html").read_text()


def test_kept_and_filtered_side_by_side(shards: Path, tmp_path: Path) -> None:
    text = report(shards, tmp_path, plain, keep="clip_score > 0.4", top=0.9)
    page = Page(text)
    kept, filtered = page.articles[: page.sides[1]], page.articles[page.sides[1] :]
    assert len(kept) == len(filtered) == 12
    artifact = Artifact.open(str(tmp_path / "out"))
    rows = {row["uid"]: row for shard in artifact.committed() for row in artifact.read_rows(shard)}
    for articles, status in ((kept, "ok"), (filtered, "filtered")):
        shown = [re.search("uid ([0-9a-f]{32})", "".join(article)) for article in articles]
        uids = [match[1] for match in shown if match]
        assert uids == sorted(uid for uid, row in rows.items() if row["status"] == status)[:12]
        for uid, article in zip(uids, articles, strict=True):
            told, row = "".join(article), rows[uid]
            assert row["re_caption"] in told and row["org_caption"] in told
            assert f"clip_score {np.float32(row['re_clip_score'])!s}" in told
            lowest = ["New caption", "It has two sentences."][row["re_clip_lowest"]]
            assert re.search(f"lowest by clip: “{lowest}", told)
            assert (row["error"] in told) if row["error"] else "clip_score >" not in told
    pictures = [Image.open(io.BytesIO(data)) for data in page.images("jpeg")]
    assert len(pictures) == 24 and all(max(picture.size) <= 300 for picture in pictures)
    assert page.charts == ["clip_score", "clip_score_min"]  # the others have no values
    assert "threshold 0.4; threshold 0.42" in text and text.count('class="bound s0"') == 2  # and that of --top
    assert "Filtered by" in text and "clip_score &gt; 0.4" in text


def test_nothing_from_the_data_is_markup(shards: Path, tmp_path: Path) -> None:
    def evil(index: int, row: Any) -> dict[str, Any]:
        return {**plain(index, row), "re_caption": EVIL, "org_caption": EVIL, "re_language": EVIL, "re_sentences": 1}

    page = Page(report(shards, tmp_path, evil, keep=f"clip_score > 0.5 and language != {'<b>'!r}"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "form"})
    assert all((attributes["href"] or "").startswith("#") for tag, attributes in page.tags if tag == "a")
    assert "\x1b" not in str(page.articles)
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all("".join(article).count("<script>") >= 2 for article in page.articles)  # shown, word for word


def test_what_a_report_cannot_show_it_does_without(shards: Path, tmp_path: Path) -> None:
    """Other sentence counts than ours, captions of thousands of words, no score at all, nothing filtered."""

    def odd(index: int, row: Any) -> dict[str, Any]:
        caption = "word " * 5000
        return {"re_caption": caption, "re_length": 5000, "re_sentences": 7, "re_clip_lowest": 3, "re_clip_score": None}

    text = report(shards, tmp_path, odd)
    page = Page(text)
    assert len(page.articles) == 12 and "sentence 4 of 7" in text
    assert page.charts == [] and len(text) < 400_000


def test_repeated_images_are_shown_once(tmp_path: Path) -> None:
    folder = tmp_path / "same"
    folder.mkdir()
    first = foreign_shards(tmp_path / "theirs", [3]) / "00000.tar"
    for number in range(5):
        (folder / f"{number}.tar").write_bytes(first.read_bytes())

    def thirds(index: int, row: Any) -> dict[str, Any]:
        return {**plain(index, row), "re_clip_score": float(index % 3)}

    page = Page(report(folder, tmp_path, thirds, keep="clip_score > 0"))
    assert [len(page.articles) - page.sides[1], page.sides[1]] == [1, 2]


def test_histograms_count_every_row(shards: Path, tmp_path: Path) -> None:
    report(shards, tmp_path, plain, top=0.5)
    artifact = Artifact.open(str(tmp_path / "out"))
    bounds = [("re_clip_score", 0.5), ("org_clip_score", 0.1), ("re_length", 7.0)]
    found = histograms(artifact, ["clip_score", "itm_score", "length", "unsafe"], bounds)
    assert [each.name for each in found] == ["clip_score", "length"]
    values = np.array([clip(i) for i in range(40)])
    for key, scores in (("re", values), ("org", values / 3)):
        expected = np.histogram(scores.astype(np.float32), found[0].edges)[0]
        assert found[0].counts[key].tolist() == expected.tolist() and expected.sum() == 40
    assert found[0].bounds == (("re", 0.5), ("org", 0.1)) and found[1].bounds == (("re", 7.0),)
    chart = str(histogram_chart(found[0]))
    assert chart == str(histogram_chart(found[0])) and "original captions" in chart
    assert 'class="bound s0"' in chart and 'class="bound s1"' in chart and "threshold 0.5; threshold 0.1" in chart
