"""From scores to final shards: every row accounted for, images untouched, refusals before anything is written."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capipe.errors import ArtifactMismatch, BadInput, CapipeError
from capipe.manifests.artifact import Artifact
from capipe.manifests.manifest import CHECKSUM
from capipe.manifests.shards import RowReader, expand, uid_of
from capipe.pipeline.commands.filter import select_step
from capipe.pipeline.commands.run_job import Exit
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.select import execute_select, plan_select
from capipe.stages.filter.select import SelectConfig

from ...stages.ingesting import ingest, rows
from ...stages.scored import clip, foreign_shards, plain, write_marks, write_scores

SIZES = [10, 4, 12, 6]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return foreign_shards(tmp_path / "theirs", SIZES)


@pytest.fixture
def ours(tmp_path: Path, foreign: Path) -> Path:
    """An ingest of the same images, and of a broken one in each shard."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for number in range(4):
        (broken / f"{number}.jpg").write_bytes(b"\xff\xd8\xff%d" % number)
    ingest(foreign, broken, out=tmp_path / "ours", shard_size=9)
    return tmp_path / "ours"


def select(scores: Artifact, shards: object, out: object, *, marks: Artifact | None = None, **config: Any) -> Exit:
    return select_step(scores, str(shards), str(out), SelectConfig(**config), marks, 0)


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """Members of all tars by shard and key."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                key, _, extension = name.partition(".")
                file = tar.extractfile(name)
                assert file is not None
                found.setdefault(f"{path.stem}/{key}", {})[extension] = file.read()
    return found


@pytest.mark.parametrize("whose", ["ours", "foreign"])
def test_every_row_comes_out_and_images_are_copied_untouched(
    whose: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shards: Path = request.getfixturevalue(whose)
    scores = write_scores(shards, tmp_path / "scores")
    out = tmp_path / "out"
    assert select(scores, shards, out, keep="clip_score > 0.4", shard_size=9) is Exit.OK
    source = [row for shard in expand(str(shards)) for row in RowReader(shard)]
    found = rows(out)
    assert [(row["source_key"], row["uid"]) for row in found] == [(row.key, row.uid) for row in source]
    assert [row["key"] for row in found] == [row.key for row in source]  # they are unique already
    expected = [
        (str(row.status) if row.image is None else "ok" if np.float32(clip(i)) > 0.4 else "filtered")
        for i, row in enumerate(source)
    ]
    assert [row["status"] for row in found] == expected
    assert 0 < expected.count("ok") < expected.count("ok") + expected.count("filtered")
    for row, was in zip(found, source, strict=True):
        if row["status"] == "filtered":
            assert row["error"] == f"clip_score > 0.4: clip_score is {np.float32(row['re_clip_score'])!s}"
            assert row["re_clip_score"] is not None and row["caption"] is None
        elif row["status"] == "ok":
            assert row["caption"] == row["re_caption"]
        else:
            assert row["error"] == was.error
    kept = samples(out)
    assert len(kept) == expected.count("ok")
    by_uid = {row.uid: row for row in source}
    for row in (row for row in found if row["status"] == "ok"):
        shard = next(name for name in kept if name.endswith("/" + row["key"]))
        members = kept[shard]
        image, text, meta = members.values()
        assert image == by_uid[row["uid"]].image and uid_of(image) == row["uid"]
        assert text.decode() == row["re_caption"] and list(members) == [next(iter(members)), "txt", "json"]
        told = json.loads(meta)
        assert told["uid"] == row["uid"] and np.float32(told["re_clip_score"]) == np.float32(row["re_clip_score"])
        assert told["org_caption"].startswith("alt ")
    counts = [sum(r["status"] == "ok" for r in rows_of(out, shard.stem)) for shard in sorted(out.glob("*.tar"))]
    assert len(counts) > 1 and max(counts) <= 9 and min(counts) > 0
    assert verify(str(out)).faults == [] and verify(str(out)).notes == []
    listed = np.load(out / "_capipe/uids.npy")
    assert listed.dtype == np.dtype("u8,u8") and (np.sort(listed) == listed).all()
    uids = {f"{high:016x}{low:016x}" for high, low in listed.tolist()}
    assert uids == {row["uid"] for row in found if row["status"] == "ok"}


def test_final_shards_are_shards_again(tmp_path: Path, ours: Path) -> None:
    """Their rows list a caption, not a text: it is the text of who captions, embeds or filters them next."""
    scores = write_scores(ours, tmp_path / "scores")
    assert select(scores, ours, tmp_path / "out", keep="clip_score > 0.4", shard_size=9) is Exit.OK
    read = [row for shard in expand(str(tmp_path / "out")) for row in RowReader(shard)]
    listed = rows(tmp_path / "out")
    assert [(row.key, str(row.status), row.text) for row in read] == [
        (row["key"], row["status"], row["caption"]) for row in listed
    ]
    assert any(row.text for row in read)


def rows_of(out: Path, shard: str) -> list[dict[str, Any]]:
    return Artifact.open(str(out)).read_rows(shard)


def test_all_processes_write_what_one_writes(foreign: Path, tmp_path: Path) -> None:
    scores = write_scores(foreign, tmp_path / "scores")
    config = SelectConfig(top=0.5, shard_size=3)
    assert select_step(scores, str(foreign), str(tmp_path / "one"), config, workers=0) is Exit.OK
    assert select_step(scores, str(foreign), str(tmp_path / "two"), config, workers=2) is Exit.OK
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.tar"))) == 4


def contents(out: Path) -> dict[str, str]:
    """Digests of all that a selection makes, but for the figures of time."""
    files = [*out.glob("*.tar"), *out.glob("*.parquet"), out / "_capipe/uids.npy", out / "_capipe/report.html"]
    return {
        path.name: hashlib.sha256(path.read_bytes().replace(str(out).encode(), b"OUT")).hexdigest() for path in files
    }


def test_top_records_its_threshold(ours: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scores = write_scores(ours, tmp_path / "scores")
    select(scores, ours, tmp_path / "out", top=0.25)
    known = [row["re_clip_score"] for row in rows(tmp_path / "scores") if row["re_clip_score"] is not None]
    threshold = sorted(known)[-8]  # of 32
    semantic = Artifact.open(str(tmp_path / "out")).config["semantic"]
    assert np.float32(semantic["threshold"]) == np.float32(threshold) and semantic["text"] == "re"
    kept = [row["re_clip_score"] for row in rows(tmp_path / "out") if row["status"] == "ok"]
    assert sorted(kept) == sorted(known)[-8:]
    assert f"threshold clip_score >= {semantic['threshold']}" in capfd.readouterr().err


def test_scores_that_are_missing_are_never_kept_by_top(foreign: Path, tmp_path: Path) -> None:
    def some(index: int, row: Any) -> dict[str, Any]:
        return {**plain(index, row), "re_clip_score": [None, float("nan"), clip(index)][index % 3]}

    scores = write_scores(foreign, tmp_path / "scores", some)
    select(scores, foreign, tmp_path / "out", top=0.5)
    found = Counter(row["status"] for row in rows(tmp_path / "out"))
    assert found == {"ok": 5, "filtered": 27}  # half of ten that have a score
    assert any(row["error"].endswith("clip_score is missing") for row in rows(tmp_path / "out") if row["error"])


def test_equal_scores_are_all_kept_with_a_warning(
    foreign: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = write_scores(foreign, tmp_path / "scores", lambda i, row: {**plain(i, row), "re_clip_score": 0.5})
    assert select(scores, foreign, tmp_path / "out", top=0.1) is Exit.OK
    assert "warning: --top 0.1 --by clip_score: keeps all 32 candidates" in capfd.readouterr().err
    assert Counter(row["status"] for row in rows(tmp_path / "out")) == {"ok": 32}


def test_a_condition_that_keeps_everything_goes_on_with_a_warning(
    foreign: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = write_scores(foreign, tmp_path / "scores")
    assert select(scores, foreign, tmp_path / "out", keep="clip_score >= 0") is Exit.OK
    assert "warning: --keep 'clip_score >= 0': keeps all 32 candidates" in capfd.readouterr().err
    assert select(scores, foreign, tmp_path / "all") is Exit.OK  # asked for nothing: no warning
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"keep": "clip_score > 2"},
            r"--keep 'clip_score > 2': keeps none of 32 .* clip_score is from 0\.0\d+ to 0\.9\d+ \(median 0\.\d+\)$",
        ),
        ({"keep": "itm_score > 0"}, "itm_score is always missing$"),
        (
            {"keep": 'language == "fr" and length > 1'},
            r"language is mostly 'en' \(24 times\), 'de' \(8 times\); length is from 7",
        ),
        (
            {"top": 0.1, "by": "org_itm_score"},
            "--top 0.1 --by org_itm_score: keeps none of 32 candidates; among them org_itm_score is always missing",
        ),
    ],
)
def test_what_keeps_nothing_is_refused_and_nothing_written(
    config: dict[str, Any], said: str, foreign: Path, tmp_path: Path
) -> None:
    scores = write_scores(foreign, tmp_path / "scores")
    with pytest.raises(BadInput, match=said) as refused:
        select(scores, foreign, tmp_path / "out", **config)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_no_candidates_at_all(foreign: Path, tmp_path: Path) -> None:
    scores = write_scores(foreign, tmp_path / "scores", lambda i, row: {"status": "refused" if i % 2 else "ok"})
    with pytest.raises(BadInput, match=r"no row has a org_caption to write .*16 ok, 16 refused\); nothing can be kept"):
        select(scores, foreign, tmp_path / "out", keep="clip_score > 0")


def test_original_captions_where_there_are_no_new_ones(foreign: Path, tmp_path: Path) -> None:
    def old(index: int, row: Any) -> dict[str, Any]:
        return {"org_caption": row.text, "org_length": 2, "org_clip_score": clip(index)}

    scores = write_scores(foreign, tmp_path / "scores", old)
    select(scores, foreign, tmp_path / "out", keep="clip_score > 0.5")
    assert all(members["txt"].startswith(b"alt ") for members in samples(tmp_path / "out").values())
    both = write_scores(foreign, tmp_path / "both")
    select(both, foreign, tmp_path / "chosen", keep="clip_score > 0.1", text="org")
    found = rows(tmp_path / "chosen")
    assert {row["caption"] for row in found if row["status"] == "ok"} <= {row["org_caption"] for row in found}
    assert [row["status"] == "ok" for row in found] == [clip(i) / 3 > 0.1 for i in range(32)]


def test_marks_are_kept_out_with_their_reason(foreign: Path, tmp_path: Path) -> None:
    def repeated(index: int, row: Any) -> dict[str, Any]:
        return {"status": "duplicate", "error": "repeats 00000/0001"} if index % 5 == 0 else {}

    scores = write_scores(
        foreign, tmp_path / "scores", lambda i, r: {**plain(i, r), "re_clip_score": float(i % 5 == 0)}
    )
    marks = write_marks(foreign, tmp_path / "marks", repeated)
    with pytest.raises(BadInput, match=r"keeps none of 25 candidates; among them clip_score is from 0.0 to 0.0"):
        select(scores, foreign, tmp_path / "out", marks=marks, keep="clip_score > 0.5")
    select(scores, foreign, tmp_path / "out", marks=marks, keep="clip_score < 0.5")
    found = rows(tmp_path / "out")
    assert Counter(row["status"] for row in found) == {"duplicate": 7, "ok": 25}
    assert {row["error"] for row in found if row["status"] == "duplicate"} == {"repeats 00000/0001"}
    with pytest.raises(ArtifactMismatch, match=r"marks: .* -> null"):
        select(scores, foreign, tmp_path / "out", keep="clip_score < 0.5")
    others = write_marks(foreign_shards(tmp_path / "x", SIZES, "o{shard}{row:03d}"), tmp_path / "others", repeated)
    with pytest.raises(ArtifactMismatch, match="row '0000' expected, 'o0000' found; it was not made of these shards"):
        select(scores, foreign, tmp_path / "new", marks=others, keep="clip_score < 0.5")
    others = write_marks(foreign_shards(tmp_path / "y", [SIZES[0], *SIZES[:0:-1]]), tmp_path / "other", repeated)
    with pytest.raises(BadInput, match="give --marks what was made of these shards"):
        select(scores, foreign, tmp_path / "new", marks=others, keep="clip_score < 0.5")


def test_keys_that_clash_get_their_shard_before_them(tmp_path: Path) -> None:
    shards = foreign_shards(tmp_path / "theirs", [4, 4, 4], "{row:03d}")
    scores = write_scores(shards, tmp_path / "scores")
    select(scores, shards, tmp_path / "out", keep="clip_score >= 0", shard_size=8)
    found = rows(tmp_path / "out")
    clashing = [f"0000{s}_00{r}" for s in (0, 1) for r in range(4)]
    assert [row["key"] for row in found] == [*clashing, *(f"00{r}" for r in range(4))]
    assert [row["source_key"] for row in found] == [f"00{r}" for r in range(4)] * 3
    assert [row["source_shard"] for row in found] == [f"0000{s}" for s in range(3) for _ in range(4)]
    assert list(samples(tmp_path / "out"))[:2] == ["00000/00000_000", "00000/00000_001"]
    assert verify(str(tmp_path / "out")).faults == []


def test_scores_of_other_images_are_refused(foreign: Path, ours: Path, tmp_path: Path) -> None:
    scores = write_scores(foreign, tmp_path / "scores")
    fewer = foreign_shards(tmp_path / "fewer", SIZES[:2])
    (fewer / "00009.tar").write_bytes((foreign / "00000.tar").read_bytes())
    with pytest.raises(BadInput, match=r"has no shard 00009 for .*00009.tar"):
        select(scores, fewer, tmp_path / "out", keep="clip_score > 0")
    before = (foreign / "00001.tar").read_bytes()
    (foreign / "00001.tar").write_bytes((foreign / "00002.tar").read_bytes())
    with pytest.raises(BadInput, match=r"00001.parquet: made of another tar than .*00001.tar .*; give --shards those"):
        select(scores, foreign, tmp_path / "out", keep="clip_score > 0")
    (foreign / "00001.tar").write_bytes(before)
    mine = write_scores(ours, tmp_path / "mine")
    again, tars = tmp_path / "again", sorted((tmp_path / "theirs").glob("*.tar"))
    ingest(tars[0], *tars[:0:-1], tmp_path / "broken", out=again, shard_size=9)
    said = r"00001.parquet: its rows are not those of .*00001.tar, by key and uid \(row 1, '\d+', is another image"
    with pytest.raises(BadInput, match=said):
        select(mine, again, tmp_path / "out", keep="clip_score > 0")
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_another_one_ends_the_run(foreign: Path, tmp_path: Path) -> None:
    """A foreign tar of the same size: seen when the image is read, and nothing of its shard is committed."""
    scores = write_scores(foreign, tmp_path / "scores")
    data = (foreign / "00002.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmember("2005.txt").offset_data
        image = tar.getmembers()[0].offset_data + 40
    assert data[at : at + 3] == b"alt"
    (foreign / "00002.tar").write_bytes(data[:image] + b"\0\1\2\3" + data[image + 4 :])
    with pytest.raises(CapipeError, match=r"00002.parquet: row '2000' expected, '2000' of another image found"):
        select(scores, foreign, tmp_path / "out", keep="clip_score > 0", shard_size=1)
    assert set(Artifact.open(str(tmp_path / "out")).committed()) == {"00000", "00001"}
    assert verify(str(tmp_path / "out")).faults == [] and not (tmp_path / "out/_capipe/uids.npy").exists()


def test_what_is_no_score_is_refused(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="an artifact of stage 'ingest'; give --scores"):
        select(Artifact.open(str(ours)), ours, tmp_path / "out")


def test_never_written_over_what_is_read(ours: Path, foreign: Path, tmp_path: Path) -> None:
    """Least of all with --fresh, which would remove it first."""
    scores = write_scores(ours, tmp_path / "scores")
    for out in (ours, tmp_path / "scores", f"{ours}/../ours/"):
        with pytest.raises(BadInput, match="is what to read; choose another --out"):
            select_step(scores, str(ours), str(out), SelectConfig(), workers=0, fresh=True)
    theirs = write_scores(foreign, tmp_path / "others")
    with pytest.raises(BadInput, match="holds an artifact of stage 'ingest'; choose another --out"):
        select_step(theirs, str(foreign), str(ours), SelectConfig(), workers=0, fresh=True)
    assert verify(str(ours)).faults == [] and verify(str(tmp_path / "scores")).faults == []


def test_resume_does_what_is_left(foreign: Path, tmp_path: Path) -> None:
    scores = write_scores(foreign, tmp_path / "scores")
    config, out = SelectConfig(keep="clip_score > 0.2", shard_size=3), tmp_path / "out"
    made = plan_select(scores, str(foreign), str(out), config, workers=0)
    stop = threading.Event()
    outcome = execute_select(made, lambda event: stop.set(), stop)
    made.artifact.close()
    assert outcome.interrupted and len(list(out.glob("*.tar"))) == 1 and not (out / "_capipe/uids.npy").exists()
    first = (out / "00000.tar").stat().st_mtime_ns
    assert select_step(scores, str(foreign), str(out), config, workers=0) is Exit.OK
    assert (out / "00000.tar").stat().st_mtime_ns == first
    select_step(scores, str(foreign), str(tmp_path / "alone"), config, workers=0)
    assert contents(out) == contents(tmp_path / "alone")


def test_resume_refuses_what_would_give_other_rows(foreign: Path, tmp_path: Path) -> None:
    scores = write_scores(foreign, tmp_path / "scores")
    out = tmp_path / "out"
    select(scores, foreign, out, top=0.5)
    with pytest.raises(ArtifactMismatch, match=r"select.top: 0.5 -> 0.4; threshold: .*--fresh"):
        select(scores, foreign, out, top=0.4)
    with pytest.raises(ArtifactMismatch, match="scores: "):
        select(write_scores(foreign, tmp_path / "again", seed=1), foreign, out, top=0.5)
    changed = write_scores(foreign, tmp_path / "changed", lambda i, r: {**plain(i, r), "re_caption": "Another."})
    with pytest.raises(ArtifactMismatch, match="changed since this output was made"):
        select(changed, foreign, out, top=0.5)
    assert select_step(scores, str(foreign), str(out), SelectConfig(top=0.4), workers=0, fresh=True) is Exit.OK
    assert sum(row["status"] == "ok" for row in rows(out)) == 13


def test_damaged_scores_are_refused(foreign: Path, tmp_path: Path) -> None:
    scores = write_scores(foreign, tmp_path / "scores")
    path = tmp_path / "scores/00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])  # the first column, keys
    with pytest.raises(CapipeError, match=r"00001.parquet"):
        select(scores, foreign, tmp_path / "out", keep="clip_score > 0")
    path.write_bytes(data[:100])
    with pytest.raises(ArtifactMismatch, match=r"00001.parquet: cannot be read"):
        select(scores, foreign, tmp_path / "new", keep="clip_score > 0")


def test_verify_sees_rows_that_are_not_the_inputs(ours: Path, tmp_path: Path) -> None:
    scores = write_scores(ours, tmp_path / "scores")
    select(scores, ours, tmp_path / "out", keep="clip_score > 0.3")
    config = tmp_path / "out/_capipe/manifest.jsonl"
    entry = json.loads(config.read_text())
    entry["input"]["shards"] = entry["input"]["shards"][::-1]
    del entry[CHECKSUM]  # as an earlier version would have written it
    config.write_text(json.dumps(entry) + "\n")
    assert [fault.partition(": ")[2] for fault in verify(str(tmp_path / "out")).faults] == [
        f"keys and uids are not those of its input {ours}, row by row"
    ]
    assert "score" in Artifact.open(str(tmp_path / "scores")).stage and verify(str(tmp_path / "scores")).faults == []


def test_a_remote_selection(foreign: Path, s3: str, tmp_path: Path) -> None:
    scores = write_scores(foreign, f"{s3}/select/scores")
    config = SelectConfig(keep="clip_score > 0.4", shard_size=8)
    assert select_step(scores, str(foreign), f"{s3}/select/out", config, workers=0) is Exit.OK
    assert verify(f"{s3}/select/out").faults == []
    local = write_scores(foreign, tmp_path / "scores")
    select_step(local, str(foreign), str(tmp_path / "out"), config, workers=0)
    remote = Artifact.open(f"{s3}/select/out")
    for name in ("00000.tar", "_capipe/uids.npy"):
        assert remote.folder.read_bytes(name) == (tmp_path / "out" / name).read_bytes()
