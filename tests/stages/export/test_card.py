"""The card: a header the Hub's library reads, figures that are true, and captions that cannot become markup."""

from __future__ import annotations

import json
import random
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import SELECT
from capipe.stages.export.card import CardWords, Contents, fenced, plain, render, size_category
from capipe.stages.export.card_statistics import Column, Statistics, Tally, bars, histogram
from capipe.stages.export.provenance import Step, chain, public

from ..exporting import captioned, export, final_shards

HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=y> & <b>bold</b>",
    "| a | b |\n| --- | --- |\n\n# Heading\n\n- item\n```\ncode",
    "[link](javascript:alert(1)) ![i](http://x/y.png) **bold** _it_ `code` ~~gone~~ $x$ <image> \\",
    "---\nlicense: mit\n---",
    "``` ` ```` 1. one\n2. two &lt; &amp;",
]


def parsed(card: Path) -> list[Token]:
    """The page as GitHub-flavoured Markdown, without its header."""
    body = card.read_text(encoding="utf-8").split("\n---\n", 1)[1]
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)


def inline(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in token.children or []]


def test_the_hubs_own_library_reads_the_header(tmp_path: Path) -> None:
    export(final_shards(tmp_path / "final"), tmp_path / "out", license="cc-by-4.0")
    data = huggingface_hub.DatasetCard.load(tmp_path / "out/README.md").data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["language"] == ["en"]
    assert data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["image-to-text", "image-text-to-text"]
    assert data["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]


@pytest.mark.parametrize("format", ["webdataset", "llava"])
def test_captions_stay_text_whatever_is_in_them(tmp_path: Path, format: str) -> None:
    source = final_shards(
        tmp_path / "final", shards=1, rows=4, caption=lambda index, text: HOSTILE[index % len(HOSTILE)]
    )
    export(source, tmp_path / "out", format)
    card = tmp_path / "out/README.md"
    assert huggingface_hub.DatasetCard.load(card).data.license == "cc-by-4.0"
    tokens = parsed(card)
    kinds = {token.type for token in [*tokens, *inline(tokens)]}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "s_open", "strong_open", "em_open", "hr"}
    shown = {"".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"}
    cells = [" ".join(caption.split()) for caption in HOSTILE[:4]]
    assert sum(cell in shown for cell in cells) == 3  # three examples, each word for word
    headings = [token.content for token in tokens if token.type == "inline" and token.level == 1]
    assert "Heading" not in headings


def test_a_hostile_title_and_prompt(tmp_path: Path) -> None:
    prompt = "Describe.\n```\n# Not a heading\n<b>````</b>"
    asked = {"prompts": [{"name": "a|b", "text": prompt}], "fallbacks": [{"name": "a|b", "text": f"Else: {prompt}"}]}
    semantic = {"annotate": asked, "input": None}
    artifact = Artifact.create(str(tmp_path / "a<b>c"), "select", semantic, {"shards_total": 1})
    with artifact.begin("00000", SELECT, tar=True) as shard:
        row = {"key": "k", "uid": "0" * 32, "status": "ok", "error": None, "caption": "c"}
        shard.write(row, {"jpg": b"x", "txt": b"c", "json": b"{}"})
        shard.commit(rows_in=1, input_info={"digest": "d"})
    artifact.close()
    export(tmp_path / "a<b>c", tmp_path / "out")
    tokens = parsed(tmp_path / "out/README.md")
    fences = [token.content for token in tokens if token.type == "fence"]
    assert {prompt + "\n", f"Else: {prompt}\n"} <= {*fences}
    assert any(json.loads(text).get("annotate") for text in fences if text.startswith("{"))
    assert not {token.type for token in inline(tokens)} & {"html_inline"}


def test_counts_lengths_and_scores_are_those_of_the_rows(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", caption=lambda index, text: "word " * (index + 1))
    export(source, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "| `ok` | 16 | 66.7% |" in text and "| `filtered` | 4 | 16.7% |" in text
    assert "| caption | 5.5 | 1 | 4 | 10 | 10 |" in text  # words: 1, 2, 3, 4, 7, 8, 9, 10, twice
    assert "| `re_clip_score` | 16 | 0.345 | 0.30 | 0.33 | 0.39 | 8 |" in text


@pytest.mark.parametrize("convert", [False, True])
def test_converted_pictures_are_named(convert: bool) -> None:
    run = {"created": "2026", "run": {}}
    steps = [Step("shards", "ingest", "f0", {**run, "semantic": {"convert": convert}}), Step("gone", "score", "f1")]
    contents = Contents("webdataset", 1, 1000, {"png": 3})
    card = render(CardWords("Scenes", "cc-by-4.0"), contents, Statistics(), steps)
    assert ("collected, never re-encoded." in card) != convert
    assert ("re-encoded, but for those whose JSON names an `original_format`." in card) == convert


def test_provenance_follows_what_is_there_and_says_what_is_gone(tmp_path: Path) -> None:
    def make(name: str, stage: str, semantic: dict[str, object], run: dict[str, object]) -> Artifact:
        made = Artifact.create(str(tmp_path / "data" / name), stage, semantic, run)
        made.close()
        return made

    shards = make("shards", "ingest", {"shard_size": 10}, {})
    captions = make("captions", "annotate", {"input": shards.fingerprint, "n": 1}, {"shards": shards.url})
    run = {"shards": shards.url, "captions": captions.url, "model": "/home/somebody/clip"}
    scores = make("scores", "score", {"input": shards.fingerprint, "captions": captions.fingerprint}, run)
    final = make("final", "select", {"input": scores.fingerprint}, {"shards": scores.url})
    assert [step.stage for step in chain(final)] == ["ingest", "annotate", "score", "select"]
    (tmp_path / "data").rename(tmp_path / "moved")  # together: each is found beside the next
    moved = Artifact.open(str(tmp_path / "moved/final"))
    assert [step.stage for step in chain(moved)] == ["ingest", "annotate", "score", "select"]
    (tmp_path / "moved/captions/_capipe/config.json").unlink()
    Artifact.create(str(tmp_path / "moved/captions"), "annotate", {"n": 2}, {}).close()
    notes = {step.name: step.note for step in chain(moved)}
    assert notes["captions"] == "another artifact is in its place by now" and notes["shards"] is None
    (tmp_path / "moved/scores/_capipe/config.json").unlink()
    gone, last = chain(moved)
    assert (gone.name, gone.fingerprint, last.stage) == ("scores", scores.fingerprint, "select")
    assert gone.note == "gone: its folder is not where it was"


def test_a_card_tells_nobodys_paths(tmp_path: Path) -> None:
    export(final_shards(tmp_path / "final"), tmp_path / "out")
    export(captioned(tmp_path / "captions"), tmp_path / "other")
    text = (tmp_path / "out/README.md").read_text() + (tmp_path / "other/README.md").read_text()
    assert str(tmp_path) not in text and "/home/" not in text
    assert "- model: clip" in text and "tars that are no artifact of capipe" in text
    assert public({"a": ["s3://b/c", "x/y", "/z", 1, "/a\nb"]}) == {"a": ["c", "x/y", "z", 1, "/a\nb"]}


def test_quantiles_are_numpys_of_the_lower_value() -> None:
    rng = random.Random(0)
    for count in (1, 2, 7, 100):
        values, tally = [rng.randrange(50) for _ in range(count)], Tally(1.0)
        for value in values:
            tally.add(value)
        for share in (0.0, 0.05, 0.5, 0.95, 1.0):
            assert tally.quantile(share) == np.quantile(values, share, method="lower")
        assert tally.mean == pytest.approx(np.mean(values))
    scores = Tally(0.01)
    for value in (0.29, -0.011, 0.39):
        scores.add(float(np.float32(value)))
    assert sorted(scores.bins) == [-2, 29, 39]


def test_histograms_lose_nothing() -> None:
    column = Column.of(0.01)
    for value in range(-7, 90):
        (column.kept if value % 3 else column.others).add(value / 100)
    rows = histogram(column)
    assert len(rows) <= 12
    assert sum(kept for *_, kept, _ in rows) == column.kept.count
    assert sum(other for *_, other in rows) == column.others.count
    assert all(low <= high for low, high, *_ in rows)
    assert bars([0, 1, 1000]) == ["", "█", "█" * 24]


def test_sizes_are_the_hubs_words() -> None:
    found = [size_category(n) for n in (1, 999, 1000, 99_999, 10**6, 5 * 10**6, 10**12)]
    assert found == ["n<1K", "n<1K", "1K<n<10K", "10K<n<100K", "1M<n<10M", "1M<n<10M", "n>1T"]


def test_escaping_is_undone_by_reading() -> None:
    for text in [*HOSTILE, "a * b_c [d] | e ~ f $ g < h & i"]:
        (paragraph,) = [t for t in MarkdownIt("commonmark").parse("x " + plain(text)) if t.type == "inline"]
        assert "".join(c.content for c in paragraph.children or []) == "x " + " ".join(text.split())
        (fence,) = MarkdownIt("commonmark").parse(fenced(text))
        assert fence.content == text + "\n"
