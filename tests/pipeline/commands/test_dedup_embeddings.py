"""`capipe dedup --embeddings` as users run it: thresholds replayed, keepers chosen, reference sets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import BASE, embedding

from ...conftest import photo
from ...stages.embedded import embed
from ...stages.vectors import write_rows
from ..conftest import capipe, one_line, table
from ..dedup_crash import contents
from ..killing import committed, run_killed
from .test_dedup import shards_of

pytest.importorskip("faiss", reason="the extra 'dedup' is not installed")
WIDTH = 8
KEYS = ["000000000", "000000001", "000000002", "000010000", "000010001", "000010002"]


def turned(axis: int, cosine: float, towards: int = 7) -> list[float]:
    """A unit vector at a cosine to an axis."""
    out = [0.0] * WIDTH
    out[axis], out[towards] = cosine, float(np.sqrt(1 - cosine**2))
    return out


#: The first two are copies at 0.99, the second and third at 0.97; the fourth and fifth at 0.98; the sixth is alone.
VECTORS = {
    KEYS[0]: turned(0, np.cos(np.arccos(0.97) + np.arccos(0.99))),
    KEYS[1]: turned(0, 0.97),
    KEYS[2]: turned(0, 1.0),
    KEYS[3]: turned(1, 1.0),
    KEYS[4]: turned(1, 0.98, towards=6),
    KEYS[5]: turned(2, 1.0),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of six pictures, of growing size, and their hashes."""
    folder = tmp_path_factory.mktemp("made")
    pictures = [photo(seed, (240 + 20 * seed, 240)) for seed in range(6)]
    shards_of(folder / "in", [pictures[:3], pictures[3:]])
    capipe("dedup", "--shards", folder / "in", "--out", folder / "plain")
    hashes = Artifact.open(str(folder / "plain/hashes"))
    embed(folder / "e", hashes, VECTORS, WIDTH, scorers={"clip": {"model": "a"}})
    return folder


def kept(out: Path) -> set[str]:
    return {row["key"] for row in table(out / "marked") if row["status"] == "ok"}


def references(folder: Path, vectors: Sequence[Sequence[float]], model: str = "a") -> Path:
    """Embeddings of a reference set whose keys are r0, r1 and so on."""
    artifact = Artifact.create(str(folder), "embed", {"scorers": {"clip": {"model": model}}}, {})
    numbers = np.array(vectors, dtype=np.float16)
    keys, uids = ([f"{letter}{number}" for number in range(len(numbers))] for letter in ("r", "f"))
    uids = [uid.rjust(32, "0") for uid in uids]
    write_rows(artifact, "00000", embedding(numbers.shape[1]), keys, uids, numbers)
    artifact.close()
    return folder


def scores(folder: Path, made: Path, values: Mapping[str, float | None], backwards: bool = False) -> Path:
    """An artifact with a score for each row."""
    hashes = Artifact.open(str(made / "plain/hashes"))
    artifact = Artifact.create(str(folder), "score", {}, {})
    schema = pa.schema([*BASE, pa.field("clip_score", pa.float32())])
    for shard in sorted(hashes.committed()):
        rows = hashes.read_rows(shard)[:: -1 if backwards else 1]
        with artifact.begin(shard, schema) as out:
            for row in rows:
                base = {name: row[name] for name in ("key", "uid", "status", "error")}
                out.write({**base, "clip_score": values.get(row["key"])})
            out.commit(rows_in=len(rows), input_info={"digest": shard})
    artifact.close()
    return folder


def options(made: Path, out: Path, *more: object) -> list[object]:
    return ["dedup", "--shards", made / "in", "--out", out, "--embeddings", made / "e", *more]


def test_a_higher_threshold_needs_no_search_and_gives_what_a_fresh_run_gives(made: Path, tmp_path: Path) -> None:
    """A lower one searches again; so do other embeddings."""
    out, found = tmp_path / "out", tmp_path / "out/hashes/_capipe/near-embeddings/found.parquet"
    groups = []
    for cosine, searches in ((0.96, True), (0.985, False), (0.975, False), (0.95, True)):
        before = found.stat().st_mtime_ns if found.exists() else 0
        capipe(*options(made, out, "--cosine", cosine, "--fresh"))
        assert (found.stat().st_mtime_ns != before) is searches, cosine
        if not searches:
            capipe(*options(made, tmp_path / f"{cosine}", "--cosine", cosine))
            assert contents(out / "marked") == contents(tmp_path / f"{cosine}/marked")
        groups.append(len({row["group"] for row in table(out / "marked")}))
    assert groups == [3, 5, 4, 3]
    assert not (out / "hashes/_capipe/near-embeddings-work").exists()
    assert "clean" in capipe("verify", out / "hashes").stdout


@pytest.mark.parametrize(
    ("keeper", "first"),
    [("largest", KEYS[2]), ("nearest", None), ("farthest", None), ("clip_score", KEYS[0])],
)
def test_which_member_of_a_group_is_kept(keeper: str, first: str | None, made: Path, tmp_path: Path) -> None:
    if first is None:  # of so few images the cell is all of them, and its centroid the mean of their unit vectors
        similar = np.array([VECTORS[key] for key in KEYS[:3]]) @ np.mean([VECTORS[key] for key in KEYS], axis=0)
        first = KEYS[int(similar.argmax() if keeper == "nearest" else similar.argmin())]
    given = scores(tmp_path / "s", made, {KEYS[0]: 0.3, KEYS[1]: 0.2, KEYS[3]: float("nan"), KEYS[4]: -1.0})
    more = ["--scores", given] if keeper == "clip_score" else []
    capipe(*options(made, tmp_path / "out", "--keeper", keeper, *more))
    assert first in kept(tmp_path / "out") and len(kept(tmp_path / "out")) == 3
    if keeper == "clip_score":
        assert KEYS[4] in kept(tmp_path / "out")  # a score beats none, however low
        refused = one_line(capipe(*options(made, tmp_path / "out"), code=2))
        assert 'dedup.keeper: "clip_score" -> null' in refused and "--fresh" in refused


def test_a_column_chooses_among_copies_by_hashes_as_well(made: Path, tmp_path: Path) -> None:
    pictures = [photo(0, (400, 300)), photo(0, (200, 150)), photo(1, (300, 300))]
    shards_of(tmp_path / "in", [pictures])
    capipe("dedup", "--shards", tmp_path / "in", "--out", tmp_path / "plain")
    assert kept(tmp_path / "plain") == {"000000000", "000000002"}
    (tmp_path / "made").mkdir()
    (tmp_path / "made/plain").symlink_to(tmp_path / "plain")
    given = scores(tmp_path / "s", tmp_path / "made", {"000000001": 1.0, "000000000": 0.5})
    capipe("dedup", "--shards", tmp_path / "in", "--out", tmp_path / "out", "--keeper", "clip_score", "--scores", given)
    assert kept(tmp_path / "out") == {"000000001", "000000002"}


def test_images_near_a_reference_are_contaminated_with_their_group(made: Path, tmp_path: Path) -> None:
    given = references(tmp_path / "refs", [turned(4, 1.0), turned(0, 0.995), turned(2, 0.9), turned(1, 0.97)])
    out = tmp_path / "out"
    capipe(*options(made, out, "--against-embeddings", given))
    rows = {row["key"]: row for row in table(out / "marked")}
    leaked = {key for key, row in rows.items() if row["status"] == "contaminated"}
    assert leaked == set(KEYS[:5])
    assert {rows[key]["matched"] for key in KEYS[:3]} == {f"{given}/00000: r1"}
    assert {rows[key]["matched"] for key in KEYS[3:5]} == {f"{given}/00000: r3"}
    assert rows[KEYS[5]]["status"] == "ok" and rows[KEYS[5]]["matched"] is None
    capipe(*options(made, out, "--against-embeddings", given, "--cosine", 0.975, "--fresh"))
    rows = {row["key"]: row for row in table(out / "marked")}
    assert {key for key, row in rows.items() if row["status"] == "contaminated"} == set(KEYS[1:3]) | {KEYS[0]}
    refused = one_line(capipe(*options(made, out, "--cosine", 0.975), code=2))
    assert "against_embeddings" in refused and "--fresh" in refused


def test_what_cannot_be_compared_is_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wide = references(tmp_path / "wide", [[1.0] * (WIDTH + 1)])
    said = one_line(capipe(*options(made, out, "--against-embeddings", wide), code=2))
    assert f"{wide}: embeddings of 9 numbers, but {made}/e has 8" in said
    other = references(tmp_path / "other", [[1.0] * WIDTH], model="b")
    said = one_line(capipe(*options(made, out, "--against-embeddings", other), code=2))
    assert f"{other}: embeddings by another tower" in said
    given = scores(tmp_path / "s", made, {})
    for more, says in (
        (["--keeper", "itm_score"], "--scores"),
        (
            ["--keeper", "itm_score", "--scores", given],
            "no column 'itm_score' of numbers for --keeper; it has clip_score",
        ),
        (["--scores", given], "--keeper largest reads no column"),
    ):
        assert says in one_line(capipe(*options(made, out, *more), code=2))
    plain = ["dedup", "--shards", made / "in", "--out", out]
    assert "--embeddings" in one_line(capipe(*plain, "--keeper", "nearest", code=2))
    assert "--embeddings" in one_line(capipe(*plain, "--against-embeddings", wide, code=2))
    assert not out.exists()
    turned_round = scores(tmp_path / "turned", made, {}, backwards=True)
    by_column = [*plain, "--keeper", "clip_score", "--scores", turned_round]
    assert "it was not made of these shards" in one_line(capipe(*by_column, code=2))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(made: Path, tmp_path: Path, kills: Any) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    given = references(tmp_path / "refs", [turned(1, 0.97)])
    command = options(made, alone, "--workers", 1, "--against-embeddings", given, "--keeper", "nearest")
    capipe(*command)
    command[4] = killed
    ways = [sys.executable, "-m", "capipe.pipeline", *command]
    moments = run_killed(ways, killed, committed(alone), kills(4), seed=1, within=1.0)
    assert moments, "the runs were over too soon to be killed"
    assert contents(alone / "marked") == contents(killed / "marked")
    assert contents(alone / "hashes") == contents(killed / "hashes")
    assert not (killed / "hashes/_capipe/near-embeddings-work").exists()
    assert subprocess.run([*map(str, ways)], capture_output=True, check=True).stdout
