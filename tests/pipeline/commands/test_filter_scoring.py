"""`capipe filter` with its models: scores beside the rows, thresholds that change nothing of them, kills, bad input."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from random import Random

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.files.tar import TarWriter
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand
from capipe.models.tiny.train.texts.hard_negatives import plant_addition
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.corpus import CorpusSample, samples
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.runners import local

from ..conftest import COMMAND, capipe, one_line, table
from ..killing import committed, run_killed

MODELS = ("--clip", "tiny/clip", "--itm", "tiny/itm")


def write_shards(folder: Path, shown: list[CorpusSample], per_shard: int) -> Path:
    """Tars of rendered pictures with their alt texts; every seventh has none, every eleventh is no picture."""
    folder.mkdir()
    for number in range(0, len(shown), per_shard):
        with (folder / f"{number // per_shard:05}.tar").open("wb") as file:
            writer = TarWriter(file)
            for index, sample in enumerate(shown[number : number + per_shard]):
                writer.add(f"{sample.key}.jpg", sample.image if index % 11 != 10 else b"<html>")
                if index % 7 != 6:
                    writer.add(f"{sample.key}.txt", sample.caption.encode())
            writer.finish()
    return folder


def write_captions(shards: Path, out: Path, texts: list[str | None]) -> Path:
    """An annotate artifact; None is a caption that degenerated."""
    left = iter(texts)
    artifact = Artifact.create(str(out), "annotate", {"annotate": {"prompts": []}, "texts": texts}, {})
    for shard in expand(str(shards)):
        rows = list(RowReader(shard))
        with artifact.begin(shard.name, ANNOTATE) as writer:
            for row in rows:
                text = next(left)
                status = str(row.status) if row.image is None else "ok" if text is not None else "degenerate"
                caption = {"name": "dense", "text": text, "status": status}
                base = {"key": row.key, "uid": row.uid, "status": status, "error": None, "text": row.text}
                writer.write({**base, "captions": [caption] if row.image is not None else []})
            writer.commit(rows_in=len(rows), input_info={"digest": "test"})
    artifact.close()
    return out


@pytest.fixture
def shown() -> list[CorpusSample]:
    return list(samples(24, "heldout", seed=31))


@pytest.fixture
def shards(tmp_path: Path, shown: list[CorpusSample]) -> Path:
    return write_shards(tmp_path / "shards", shown, 12)


@pytest.fixture
def captions(tmp_path: Path, shards: Path, shown: list[CorpusSample]) -> Path:
    texts: list[str | None] = [dense_caption(each.scene, Random(number)) for number, each in enumerate(shown)]
    texts[1], texts[2] = "", None
    texts[3] = " ".join(f"There is a red star at place number {number}." for number in range(600))
    return write_captions(shards, tmp_path / "captions", texts)


@pytest.mark.slow
def test_both_captions_are_scored_and_another_threshold_loads_no_model(
    shards: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    common = ["filter", "--shards", shards, "--captions", captions, "--out", out, *MODELS]
    capipe(*common, "--keep", "clip_score > -1")
    scores = table(out / "scores")
    assert [row["status"] for row in scores[:4]] == ["ok", "empty", "degenerate", "ok"]
    assert scores[10]["status"] == "unsupported" and scores[22]["status"] == "unsupported"
    whole = [row for row in scores if row["status"] == "ok" and row["org_caption"] is not None]
    assert len(whole) == 24 - 2 - 2 - 2  # no picture; empty or degenerate; no text
    for row in whole:
        for start in ("re_clip", "org_clip", "re_itm", "org_itm"):
            least, mean = row[f"{start}_score_min"], row[f"{start}_score_mean"]
            assert -1 <= least <= mean <= 1 and row[f"{start}_score"] is not None
            assert 0 <= row[f"{start}_lowest"] < row[f"{start[: start.index('_')]}_sentences"]
    without = [row for row in scores if row["status"] == "ok" and row["org_caption"] is None]
    assert without and all(row["org_clip_score"] is None and row["re_clip_score"] is not None for row in without)
    assert scores[3]["re_sentences"] == 600 and scores[3]["re_itm_score"] is not None
    final = table(out / "shards")
    assert [row["status"] for row in final] == [row["status"] for row in scores]
    assert verify(str(out / "scores")).faults == [] and verify(str(out / "shards")).faults == []

    def no_worker(*_: object) -> None:
        raise AssertionError("a worker was started, which loads the models")

    monkeypatch.setattr(local.ProcessWorkerPool, "start", no_worker)
    from capipe.pipeline.cli import app

    with pytest.raises(SystemExit) as ended:
        app([str(each) for each in [*common, "--top", "0.5", "--fresh"]])
    assert ended.value.code == 0
    kept = [row for row in table(out / "shards") if row["status"] == "ok"]
    assert len(kept) == -(-len([row for row in scores if row["status"] == "ok"]) // 2)


@pytest.mark.slow
def test_without_captions_the_tars_own_texts_are_scored(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    capipe("filter", "--shards", shards, "--out", out, "--clip", "tiny/clip", "--keep", "clip_score > -1")
    rows = table(out / "scores")
    assert [row["status"] for row in rows[:7]] == ["ok"] * 6 + ["empty"]
    assert rows[0]["re_caption"] is None and rows[0]["org_clip_score"] is not None and rows[0]["org_itm_score"] is None
    assert table(out / "shards")[0]["caption"] == rows[0]["org_caption"]


@pytest.mark.slow
def test_chunks_computed_side_by_side_give_the_bytes_of_one_after_another(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", list(samples(200, "heldout", seed=34)), 150)
    made = []
    for threads in (1, 3):
        out = tmp_path / f"out{threads}"
        capipe("filter", "--shards", shards, "--out", out, *MODELS, OMP_NUM_THREADS=str(threads))
        made.append([path.read_bytes() for path in sorted((out / "scores").glob("*.parquet"))])
    assert made[0] == made[1] and len(made[0]) == 2


def test_captions_of_other_images_are_refused(shards: Path, captions: Path, tmp_path: Path) -> None:
    others = write_shards(tmp_path / "others", list(samples(24, "heldout", seed=32)), 12)
    done = capipe("filter", "--shards", others, "--captions", captions, "--out", tmp_path / "out", *MODELS, code=2)
    assert "found; it was not made of these shards" in one_line(done) and not (tmp_path / "out").exists()


def test_captions_that_lack_a_shard_are_refused_in_a_line(shards: Path, captions: Path, tmp_path: Path) -> None:
    (shards / "00002.tar").write_bytes((shards / "00001.tar").read_bytes())
    done = capipe("filter", "--shards", shards, "--captions", captions, "--out", tmp_path / "out", *MODELS, code=2)
    assert "has no shard 00002" in one_line(done) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_scores_of_other_models_are_refused_and_stay(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    capipe("filter", "--shards", shards, "--out", out, "--clip", "tiny/clip")
    before = (out / "scores/00000.parquet").read_bytes()
    done = capipe("filter", "--shards", shards, "--out", out, *MODELS, code=2)
    assert "scorers" in one_line(done)
    assert (out / "scores/00000.parquet").read_bytes() == before


def contents(out: Path) -> dict[str, str]:
    made = [*out.glob("*/*.tar"), *out.glob("*/*.parquet")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


@pytest.mark.slow
def test_killed_while_scoring_and_resumed_the_final_shards_are_the_same_bytes(tmp_path: Path) -> None:
    assert len(trial(tmp_path, images=400, kills=3)) >= 2


def trial(folder: Path, images: int, kills: int) -> list[int]:
    """Score and select in one go, and again with ``kills``; returns their moments. Both must be the same."""
    shown = list(samples(images, "heldout", seed=33))
    shards = write_shards(folder / "shards", shown, images // 4)
    texts: list[str | None] = [
        plant_addition(each.scene, Random(number)).text if number % 3 else dense_caption(each.scene, Random(number))
        for number, each in enumerate(shown)
    ]
    captions = write_captions(shards, folder / "captions", texts)
    options = ["filter", "--shards", shards, "--captions", captions, *MODELS, "--top", 0.5, "--shard-size", images // 5]
    command = [*COMMAND, *map(str, options)]
    subprocess.run([*command, "--out", str(folder / "alone")], check=True, capture_output=True)
    killed, total = folder / "killed", committed(folder / "alone")
    moments = run_killed([*command, "--out", killed], killed, total, kills, seed=1, within=2)
    assert contents(folder / "killed") == contents(folder / "alone")
    for part in ("scores", "shards"):
        assert verify(str(folder / "killed" / part)).faults == []
    return moments


def test_captions_that_spell_tokens_have_scores_and_so_have_their_neighbours(
    tmp_path: Path, shown: list[CorpusSample]
) -> None:
    """<image> is a token of BLIP-2's vocabulary for which its matching model has no row."""
    spelled = ["<image>", "A <image> of [SEP] a star. [CLS]", "<image><image>", "[PAD][MASK]", "&lt;image&gt;"]
    folder = tmp_path / "shards"
    folder.mkdir()
    with (folder / "00000.tar").open("wb") as file:
        writer = TarWriter(file)
        for number, sample in enumerate(shown):
            writer.add(f"{sample.key}.jpg", sample.image)
            writer.add(f"{sample.key}.txt", (spelled[number] if number < 5 else sample.caption).encode())
        writer.finish()
    texts: list[str | None] = [dense_caption(each.scene, Random(number)) for number, each in enumerate(shown)]
    texts[7] = "A star.\n<image>"
    captions = write_captions(folder, tmp_path / "captions", texts)
    capipe("filter", "--shards", folder, "--captions", captions, "--out", tmp_path / "out", *MODELS)
    rows = table(tmp_path / "out/scores")
    assert [row["status"] for row in rows] == ["ok"] * 24
    assert all(
        row[f"{start}_score"] is not None for row in rows for start in ("re_clip", "org_clip", "re_itm", "org_itm")
    )
    assert [row["org_caption"] for row in rows[:5]] == spelled and rows[7]["re_caption"] == texts[7]


@pytest.mark.slow
def test_only_what_is_not_scored_yet_is_scored(shards: Path, captions: Path, tmp_path: Path) -> None:
    """Scores by a second model beside those by a first are what one run with both gives, row by row."""
    options = ["filter", "--shards", shards, "--captions", captions]
    keep = ["--keep", "clip_score > -1 and itm_score_min >= 0"]
    capipe(*options, *MODELS, *keep, "--out", tmp_path / "both")
    capipe(*options, "--clip", "tiny/clip", "--out", tmp_path / "clip")
    capipe(*options, "--itm", "tiny/itm", *keep, "--scores", tmp_path / "clip/scores", "--out", tmp_path / "itm")
    assert {row["re_clip_score"] for row in table(tmp_path / "itm/scores")} == {None}
    assert table(tmp_path / "itm/shards") == table(tmp_path / "both/shards")
    alone = ["--itm", "tiny/itm", "--scores", tmp_path / "clip/scores", "--out", tmp_path / "none"]
    line = one_line(capipe(*options[:3], *alone, code=2))
    assert "of other new captions than are to be written; give --captions the same" in line
