"""What does not fit together is refused in one line that names the file, the reason and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import capipe
from capipe.errors import ArtifactMismatch, BadInput, CapipeError, DamagedShard
from capipe.manifests.artifact import Artifact

from ...conftest import photo, tar_bytes
from ...stages.ingesting import ingest
from ...stages.scored import plain, write_scores
from .captioned import ROWS, Captioned, ingested, joined, loaded, write_captions


def opened(data: Captioned, **options: Any) -> Any:
    return capipe.open_dataset(data.shards, **{"captions": data.captions, "scores": data.scores, **options})


@pytest.fixture
def own(tmp_path: Path) -> Captioned:
    """Data that a test may damage."""
    return ingested(tmp_path / "own")


def one_line(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"where": "clp_score > 0.2"}, "where 'clp_score > 0.2': no column 'clp_score'; did you mean clip_score"),
        ({"where": "clip_score >"}, "where 'clip_score >': it ends too early"),
        ({"where": "__import__('os')"}, "where .* is a call"),
        ({"where": "clip_score > 2"}, "no row of 32 is selected: 0 .*, 32 are not kept by where="),
        ({"mix": {"re": 0, "org": 1}}, "mix: 're' has the weight 0; give a number above zero"),
        ({"mix": {"re": -0.5}}, "mix: 're' has the weight -0.5"),
        ({"mix": {"ocr": 1}}, "mix: there are no captions 'ocr'; known: dense, org, re, short"),
        ({"mix": {}}, "no captions in it"),
        ({"columns": ["clip_socre"]}, "columns: no column 'clip_socre'; did you mean clip_score"),
        ({"decode": "rgb"}, "decode='rgb'"),
        ({"shuffle": -1}, "shuffle=-1"),
        ({"shuffle": True}, "shuffle=True"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"tail": "pad"}, "tail='pad'"),
        ({"rank": 2, "world": 2}, "rank=2, world=2"),
        ({"rank": 1}, "rank=1, world=None: give both"),
        ({"rank": -1, "world": 2}, "rank=-1, world=2"),
        ({"rank": 0, "world": 33}, "32 samples for 33 ranks; use fewer, or tail='repeat'"),
        ({"captions": {}, "scores": (), "mix": {"dense": 1}}, "no captions 'dense'; known: org"),
        ({"captions": {"": "x"}}, "a label is empty"),
    ],
)
def test_options(options: dict[str, Any], problem: str, data: Captioned) -> None:
    with pytest.raises(BadInput, match=problem) as error:
        opened(data, **options)
    one_line(error)


def test_ranks_of_a_strange_environment(data: Captioned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(BadInput, match="WORLD_SIZE='two' in the environment"):
        opened(data)


def test_more_ranks_than_images_repeat_them(data: Captioned) -> None:
    assert [len(list(opened(data, rank=rank, world=33, tail="repeat"))) for rank in (0, 32)] == [1, 1]


def test_no_streams(data: Captioned) -> None:
    with pytest.raises(BadInput, match="streams=0"):
        opened(data).as_datasets(0)


# --- artifacts --------------------------------------------------------------------------------------------------------


def test_there_is_nothing(data: Captioned, tmp_path: Path) -> None:
    for options in ({"captions": tmp_path / "none"}, {"scores": tmp_path / "none"}):
        with pytest.raises(BadInput, match="none: not an artifact of capipe"):
            opened(data, **options)
    with pytest.raises(BadInput, match="no such file or folder"):
        capipe.open_dataset(tmp_path / "none")


def test_an_artifact_of_another_stage(data: Captioned) -> None:
    with pytest.raises(BadInput, match="an artifact of stage 'score'; give one of `annotate`"):
        opened(data, captions=data.scores)
    with pytest.raises(BadInput, match="an artifact of stage 'score'"):
        capipe.open_dataset(data.scores)


def test_an_artifact_without_a_shard(data: Captioned, tmp_path: Path) -> None:
    made = Artifact.create(str(tmp_path / "captions"), "annotate", {}, {})
    made.close()
    with pytest.raises(BadInput, match="no shard is committed there yet"):
        opened(data, captions=tmp_path / "captions")


def test_captions_of_some_of_the_shards(data: Captioned, tmp_path: Path) -> None:
    write_captions(f"{data.shards}/{{00000..00002}}.tar", tmp_path / "captions")
    with pytest.raises(BadInput, match=r"captions: has no shard 00003 for .*00003\.tar") as error:
        opened(data, captions=tmp_path / "captions")
    one_line(error)


def others(folder: Path, rows: int = ROWS) -> Path:
    """Shards of as many other images under the same names."""
    images = {f"{number:03d}.jpg": photo(1000 + number) for number in range(rows)}
    (folder / "in").mkdir(parents=True)
    (folder / "in/0.tar").write_bytes(tar_bytes({**images}))
    ingest(folder / "in", out=folder / "shards", shard_size=9)
    return folder / "shards"


def test_captions_of_other_shards(data: Captioned, tmp_path: Path) -> None:
    write_captions(others(tmp_path), tmp_path / "captions")
    with pytest.raises(ArtifactMismatch, match="was not made of these shards"):
        opened(data, captions=tmp_path / "captions")


def test_captions_of_more_rows(data: Captioned, tmp_path: Path) -> None:
    write_captions(others(tmp_path, ROWS - 1), tmp_path / "captions")
    with pytest.raises(ArtifactMismatch, match="4 rows, and 5 in"):
        opened(data, captions=tmp_path / "captions")


@pytest.mark.parametrize("counted", [True, False])
def test_captions_of_which_a_later_shard_is_another(counted: bool, data: Captioned, tmp_path: Path) -> None:
    """Found when the shard is counted, or else when it is read: no image gets a caption of another one."""
    made = others(tmp_path)
    shutil.copytree(data.shards, tmp_path / "mixed")
    for kind in ("tar", "parquet"):
        shutil.copy(made / f"00002.{kind}", tmp_path / f"mixed/00002.{kind}")
    line = next(each for each in (made / "_capipe/manifest.jsonl").read_text().splitlines() if '"00002"' in each)
    entry = json.loads(line)
    entry["fingerprint"] = Artifact.open(str(data.shards)).fingerprint
    entry.pop("checksum")
    with (tmp_path / "mixed/_capipe/manifest.jsonl").open("a") as manifest:
        manifest.write(json.dumps(entry) + "\n")
    write_captions(tmp_path / "mixed", tmp_path / "captions")
    with pytest.raises(ArtifactMismatch, match=r"00002\.parquet: its rows are not those of .*row 0, '000020'") as error:
        dataset = opened(data, captions=tmp_path / "captions", where="clip_score > 0" if counted else None)
        assert not counted
        list(dataset)
    one_line(error)


def test_a_column_of_two_scores(data: Captioned, tmp_path: Path) -> None:
    write_scores(data.shards, tmp_path / "scores", lambda i, row: {**plain(i, row), "re_clip_score": 0.5}, seed=1)
    both = [str(data.scores), str(tmp_path / "scores")]
    with pytest.raises(BadInput, match=r"re_clip_score: .* and .* both have this column"):
        opened(data, scores=both, where="clip_score > 0.2", columns=[])
    with pytest.raises(BadInput, match="both have this column"):
        opened(data, scores=both)
    assert len(opened(data, scores=both, columns=["width"], where="width > 10")) == ROWS


def test_several_captions_without_a_mix(data: Captioned) -> None:
    with pytest.raises(BadInput, match=r"several artifacts \(a, b\); say by mix="):
        opened(data, captions={"a": str(data.captions), "b": str(data.captions)})


def test_tars_of_both_kinds(own: Captioned, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    (folder / "theirs").mkdir(parents=True)
    shutil.copytree(own.shards, folder / "ours")
    shutil.copy(own.shards / "00001.tar", folder / "theirs/00001.tar")
    with pytest.raises(BadInput, match="one is capipe's and one another tool's"):
        capipe.open_dataset(f"{folder}/{{ours/00000,theirs/00001}}.tar", captions=own.captions)


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change the first image of a tar."""
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def fill(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "workers"),  # after an error torch waits five seconds for each worker
    [(cut, 0), (flip, 0), (fill, 0), (Path.unlink, 0), (cut, 1)],
)
def test_a_damaged_tar(damage: Callable[[Path], None], workers: int, own: Captioned) -> None:
    dataset = opened(own)
    damage(own.shards / "00001.tar")
    with pytest.raises(DamagedShard, match=r"00001\.tar: "):
        list(loaded(dataset, workers))


@pytest.mark.parametrize("which", ["shards", "captions", "scores"])
@pytest.mark.parametrize("damage", [cut, flip, fill, Path.unlink])
def test_a_damaged_sidecar(damage: Callable[[Path], None], which: str, own: Captioned) -> None:
    path = getattr(own, which) / "00001.parquet"
    damage(path)
    with pytest.raises(DamagedShard, match=f"{which}/00001\\.parquet: ") as error:
        list(opened(own))
    one_line(error)


def test_a_missing_sidecar_is_found_while_counting(own: Captioned) -> None:
    (own.captions / "00002.parquet").unlink()
    with pytest.raises(DamagedShard, match=r"captions/00002\.parquet: cannot be read"):
        opened(own, where="clip_score > 0.1")


def test_sidecars_that_change_while_they_are_read(own: Captioned, tmp_path: Path) -> None:
    dataset = opened(own)
    path = own.captions / "00001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 8), path)
    with pytest.raises(CapipeError, match=r"captions/00001\.parquet: "):
        list(dataset)


def test_unsafe_names_and_links_are_never_samples(tmp_path: Path) -> None:
    members = {"../a.jpg": photo(0), "/b.jpg": photo(1), "c.jpg": photo(2), "d.jpg": photo(3)}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/00000.tar").write_bytes(tar_bytes(members))
    data = joined(tmp_path, tmp_path / "in")
    samples = list(opened(data))
    assert sorted(each["key"] for each in samples) == ["c", "d"] and opened(data).counts.left_out == 2


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    images = {"a.jpg": photo(0), "b.jpg": photo(1)[:300]}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/00000.tar").write_bytes(tar_bytes(images))
    data = joined(tmp_path / "of-broken", tmp_path / "broken")
    assert len(list(opened(data))) == 2
    with pytest.raises(DamagedShard, match=r"00000\.tar: the image of 'b' cannot be decoded .*; leave it out by"):
        list(opened(data, decode="array"))
    with pytest.raises(ZeroDivisionError):
        list(opened(data, decode=lambda image: 1 // 0))


# --- counts -----------------------------------------------------------------------------------------------------------


def test_counts_of_other_options(data: Captioned, tmp_path: Path) -> None:
    kept = tmp_path / "counts.json"
    opened(data, counts=kept)
    with pytest.raises(BadInput, match=r"counts=.*counts\.json: of other data or options"):
        opened(data, counts=kept, where="clip_score > 0.5")
    assert len(opened(data, counts=kept, rank=0, world=2, seed=7)) == ROWS // 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}', '{"settings": {}, "shards": [[-1]]}', "[" * 200])
def test_a_file_that_has_no_counts(text: str, data: Captioned, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text(text)
    with pytest.raises(BadInput, match="not a file of counts"):
        opened(data, counts=tmp_path / "counts.json")


def test_counts_that_are_wrong_are_found_when_read(data: Captioned, tmp_path: Path) -> None:
    kept = tmp_path / "counts.json"
    opened(data, counts=kept)
    found = json.loads(kept.read_text())
    found["shards"][0] = [9, 0, 0, 1, 8]
    kept.write_text(json.dumps(found))
    with pytest.raises(DamagedShard, match=r"00000\.tar: 9 rows selected, 8 counted before"):
        list(opened(data, counts=kept))
