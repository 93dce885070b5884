"""An index, a selection without tars: its rows are those of the copied one, and its exports are that one's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.allowed import Allowed
from capipe.manifests.shards import expand
from capipe.pipeline.commands.filter import select_step
from capipe.pipeline.commands.run_job import Exit
from capipe.pipeline.inspect.images import RowImages
from capipe.pipeline.inspect.shard_join import ShardJoin, ShardName
from capipe.pipeline.inspect.status import state
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.select import preview_select
from capipe.stages.export.formats import FORMATS
from capipe.stages.filter.select import SelectConfig

from ...stages.exporting import VERSIONED, export
from ...stages.ingesting import ingest, rows
from ...stages.scored import clip, foreign_shards, plain, write_marks, write_scores

KEEP = "clip_score > 0.4"
#: Files of an export that name the artifact it was made of; all others are of pairs and rows.
OF_SOURCE = {"README.md", "croissant.json", "config.json", "manifest.jsonl", "times.jsonl", "lock"}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return foreign_shards(tmp_path / "theirs", [10, 4, 12, 6])


@pytest.fixture
def ours(tmp_path: Path, foreign: Path) -> Path:
    """An ingest of the same images; in each shard a broken one."""
    (tmp_path / "broken").mkdir()
    for number in range(4):
        (tmp_path / f"broken/{number}.jpg").write_bytes(b"\xff\xd8\xff%d" % number)
    ingest(foreign, tmp_path / "broken", out=tmp_path / "ours", shard_size=9)
    return tmp_path / "ours"


def select(shards: Path, scores: Artifact, out: Path, marks: Artifact | None = None, **config: Any) -> Path:
    options = SelectConfig(**{"keep": KEEP, "shard_size": 9, **config})
    assert select_step(scores, str(shards), str(out), options, marks, 0) is Exit.OK
    return out


def both(shards: Path, tmp_path: Path, **config: Any) -> tuple[Path, Path]:
    """The same selection copied and as an index."""
    scores = write_scores(shards, tmp_path / "scores")
    copied = select(shards, scores, tmp_path / "copied", **config)
    return copied, select(shards, scores, tmp_path / "index", index=True, **config)


def contents(folder: Path, *left_out: str) -> dict[str, bytes]:
    left_out = (*left_out, *OF_SOURCE)
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in VERSIONED]
    paths = [path for path in files if path.name not in left_out]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("whose", ["ours", "foreign"])
def test_an_index_has_the_rows_and_no_tar(whose: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shards: Path = request.getfixturevalue(whose)
    marks = write_marks(shards, tmp_path / "marks", lambda i, row: {"status": "duplicate"} if i % 5 == 0 else {})
    copied, index = both(shards, tmp_path, marks=marks)
    tars = [path.name for path in copied.glob("*.tar")]
    assert len(tars) > 1 and contents(index, "report.html") == contents(copied, *tars, "report.html")
    assert {row["status"] for row in rows(index)} >= {"ok", "filtered", "duplicate"}
    assert verify(str(index)).faults == verify(str(index)).notes == []
    for records in zip(*(Artifact.open(str(out)).committed().values() for out in (copied, index)), strict=True):
        assert records[0].input == records[1].input and records[0].rows == records[1].rows
    config = Artifact.open(str(index)).config
    assert config["run"]["shards"] == str(shards) and config["run"]["tars"]["count"] == len(expand(str(shards)))
    assert config["run"]["tars"]["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    found = state(str(index))
    assert found.complete and found.bytes < state(str(copied)).bytes / 2


def test_no_tar_is_opened_for_it(foreign: Path, tmp_path: Path) -> None:
    """Their sizes are known; their bytes could be anything until somebody exports."""
    scores = write_scores(foreign, tmp_path / "scores")
    for path in foreign.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert rows(select(foreign, scores, tmp_path / "index", index=True))


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("format", list(FORMATS))
def test_exports_are_equal(format: str, size: int | None, foreign: Path, tmp_path: Path) -> None:
    """All formats of images, each with a JSON that is theirs; with new names for images, and in other shards."""
    copied, index = both(foreign, tmp_path)
    notes = [export(source, tmp_path / f"of-{source.name}", format, shard_size=size) for source in (copied, index)]
    assert notes[0] == notes[1]
    assert contents(tmp_path / "of-index") == contents(tmp_path / "of-copied") != {}
    assert verify(str(tmp_path / "of-index")).faults == []
    cards = [(tmp_path / f"of-{name}/README.md").read_text() for name in ("copied", "index")]
    cards = [card.partition("## Provenance")[0] for card in cards]
    assert cards[0] == cards[1] and " MB as tars)" in cards[0]


@pytest.mark.parametrize("extension", ["auto", "keep"])
def test_exports_of_ingested_shards_are_equal(extension: str, ours: Path, tmp_path: Path) -> None:
    copied, index = both(ours, tmp_path)
    for source in (copied, index):
        export(source, tmp_path / f"of-{source.name}", image_extension=extension)
    assert contents(tmp_path / "of-index") == contents(tmp_path / "of-copied") != {}


@pytest.mark.parametrize("whose", ["ours", "foreign"])
def test_one_format_keeps_its_name(whose: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whether images are named alike is seen from the listing, or from the tars themselves."""
    request.getfixturevalue(whose)
    theirs = foreign_shards(tmp_path / "png", [6])
    shards = tmp_path / "shards"
    if whose == "ours":
        ingest(theirs, out=shards)
    else:
        shards = theirs
    scores = write_scores(
        shards, tmp_path / "scores", lambda i, row: {**plain(i, row), "re_clip_score": float(i % 3 == 1)}
    )
    for name, index in (("copied", False), ("index", True)):
        export(select(shards, scores, tmp_path / name, index=index), tmp_path / f"of-{name}")
    assert contents(tmp_path / "of-index") == contents(tmp_path / "of-copied")
    assert Artifact.open(str(tmp_path / "of-index")).config["semantic"]["export"]["image_extension"] is None


def test_tars_without_a_kept_row_are_not_needed(foreign: Path, tmp_path: Path) -> None:
    scores = write_scores(
        foreign, tmp_path / "scores", lambda i, row: {**plain(i, row), "re_clip_score": float(i < 10)}
    )
    index = select(foreign, scores, tmp_path / "index", index=True)
    for name in ("00001", "00002", "00003"):
        (foreign / f"{name}.tar").unlink()
    export(index, tmp_path / "out")
    assert sum(row["status"] == "ok" for row in rows(tmp_path / "out")) == 10


def other_bytes(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1  # behind the last member: no image is another one
    tar.write_bytes(data)


def other_image(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[512 + 100] ^= 1
    tar.write_bytes(data)


def other_tar(tar: Path) -> None:
    shutil.copyfile(tar.with_name("00002.tar"), tar)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_bytes, r"00000\.tar: changed since .*index, an index over it, was made \(its bytes are others\)"),
        (other_image, r"00000\.tar: changed since .* \(the image of '0000' is another one\)"),
        (other_tar, r"00000\.tar: changed since .* \(it has no '0000'\); restore it, or score and select anew"),
        (Path.unlink, r"00000\.tar: cannot be read .* an index over it; restore it, or name its folder by --images"),
    ],
)
def test_a_tar_that_changed_is_refused_in_words(change: Any, said: str, foreign: Path, tmp_path: Path) -> None:
    scores = write_scores(foreign, tmp_path / "scores", lambda i, row: {**plain(i, row), "re_clip_score": 1.0})
    index = select(foreign, scores, tmp_path / "index", index=True)
    change(foreign / "00000.tar")
    (fault,) = verify(str(index)).faults
    assert re.search(said, fault) and "\n" not in fault
    if change is Path.unlink:  # perhaps of all tars, so that the run ends
        with pytest.raises(ArtifactMismatch, match=said):
            export(index, tmp_path / "out", image_extension="jpg")
        assert "00000" not in Artifact.open(str(tmp_path / "out")).committed()
        return
    assert export(index, tmp_path / "out", image_extension="jpg") is None
    out = Artifact.open(str(tmp_path / "out"))
    assert re.search(said, out.quarantined()["00000"]) and list(out.committed()) == ["00001", "00002", "00003"]


def test_tars_that_moved_are_found_where_the_user_says(ours: Path, tmp_path: Path) -> None:
    copied, index = both(ours, tmp_path)
    ours.rename(tmp_path / "moved")
    with pytest.raises(ArtifactMismatch, match="cannot be read"):
        export(index, tmp_path / "out")
    export(index, tmp_path / "out", images=[str(tmp_path / "moved")])
    export(copied, tmp_path / "of-copied")
    assert contents(tmp_path / "out") == contents(tmp_path / "of-copied")
    assert verify(str(index), [str(tmp_path / "moved")]).faults == []


def test_a_store_that_nobody_named_is_not_asked(foreign: Path, tmp_path: Path) -> None:
    """A manifest may come from anybody, and signs its own lines."""
    scores = write_scores(foreign, tmp_path / "scores")
    index = select(foreign, scores, tmp_path / "index", index=True)
    manifest = index / "_capipe/manifest.jsonl"
    forged = manifest.read_text().replace(str(foreign), "http://127.0.0.1:9/theirs").splitlines()
    entries = [json.loads(line) for line in forged]
    for entry in entries:
        del entry["checksum"]
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(ArtifactMismatch, match=r"in a store that was not named; --images http://127.0.0.1:9/theirs"):
        export(index, tmp_path / "out")
    assert "in a store that was not named" in verify(str(index)).faults[0]


def test_pictures_are_shown(foreign: Path, tmp_path: Path) -> None:
    """Of an index's rows, also of those that are left out, and of exports without tars of their own."""
    _, index = both(foreign, tmp_path)
    export(index, tmp_path / "loose", "parquet")
    export(index, tmp_path / "cut", "llava", shard_size=3)
    names = ("index", "loose", "cut")
    join = ShardJoin({name: Artifact.open(str(tmp_path / name)) for name in names})
    images = RowImages(Allowed(str(tmp_path)))
    for artifact in names:
        for shard in join.records[artifact]:
            for row in join.artifacts[artifact].read_rows(shard):
                shown = images.of(join, ShardName(artifact, shard), row)
                assert (shown is not None) or (artifact, row["status"]) == ("cut", "filtered"), (artifact, row["key"])
    assert images.refused == []


def test_what_an_index_cannot_do_is_said(foreign: Path, tmp_path: Path) -> None:
    copied, index = both(foreign, tmp_path)
    with pytest.raises(BadInput, match=r"index, which has no tars to link; leave it out to copy"):
        export(index, tmp_path / "out", image_extension="keep", link=True)
    with pytest.raises(
        BadInput, match=r"an index without tars: `capipe export` reads it; other commands take .*theirs"
    ):
        expand(str(index))
    with pytest.raises(ArtifactMismatch, match=r"select.index: null -> true"):
        select(foreign, Artifact.open(str(tmp_path / "scores")), copied, index=True)
    semantic = Artifact.open(str(copied)).config["semantic"]
    assert "index" not in semantic["select"]  # fingerprints of older selections stay what they were


def test_costs_are_told_before(tmp_path: Path) -> None:
    """What copying and an index will take, by manifests alone."""
    shards = foreign_shards(tmp_path / "many", [120, 130])
    scores = write_scores(shards, tmp_path / "scores")
    plan, costs = preview_select(scores, str(shards), SelectConfig(keep=KEEP, shard_size=80))
    copied, index = both(shards, tmp_path, shard_size=80)
    tars = sum(path.stat().st_size for path in copied.glob("*.tar"))
    listed = sum(path.stat().st_size for path in index.glob("*.parquet"))
    assert sum(plan.kept) == sum(row["status"] == "ok" for row in rows(index)) == sum(clip(i) > 0.4 for i in range(250))
    assert 0.7 < costs.images / tars < 1.4 and 0.7 < costs.rows / listed < 1.4, (costs, tars, listed)
