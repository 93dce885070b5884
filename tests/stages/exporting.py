"""Final shards as selection leaves them, made of rendered scenes: the input of exports."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, SELECT
from capipe.manifests.sidecars import encode_meta
from capipe.models.tiny.world.corpus import Format, samples
from capipe.pipeline.jobs.export import execute_export, finish, plan_export
from capipe.stages.export.card import CardWords

#: Folders of a Lance table whose files hold a time and a random id.
VERSIONED = ("_versions", "_transactions")

SELECTION = {"keep": "re_clip_score > 0.28", "scores": "0" * 64}


def final_shards(
    folder: Path,
    *,
    shards: int = 2,
    rows: int = 12,
    formats: Sequence[Format] = ("jpg",),
    caption: Callable[[int, str], str] = lambda index, text: text,
    key: Callable[[int, int], str] = lambda shard, index: f"{shard:05d}{index:04d}",
    meta: Callable[[int], dict[str, Any]] = lambda index: {},
    empty: Sequence[int] = (),
    total: int | None = None,
    origin: Callable[[int, int], tuple[str, str]] | None = None,
) -> Path:
    """An artifact of stage select: in every shard one row in six is filtered and one is corrupt, the others are ok.

    ``formats`` take turns image by image; all rows of the shards in ``empty`` are filtered; ``total``: shards the run
    says there are to be. ``meta``: what came with an image as JSON; ``origin``: shard and key before the selection.
    """
    run = {"shards_total": shards if total is None else total, "model": "/home/somebody/models/clip"}
    artifact = Artifact.create(str(folder), "select", SELECTION, run)
    pictures = [samples(shards * rows, "heldout", 5, fmt) for fmt in formats]
    for number in range(shards):
        with artifact.begin(f"{number:05d}", SELECT, tar=True) as shard:
            for index in range(rows):
                choice = [next(picture) for picture in pictures][index % len(formats)]
                fmt = formats[index % len(formats)]
                row, members = _row(
                    key(number, index), index, choice.image, caption(index, choice.caption), fmt, meta(index)
                )
                if origin is not None:
                    row["source_shard"], row["source_key"] = origin(number, index)
                if number in empty:
                    row["status"], members = "filtered", None
                shard.write(row, members)
            shard.commit(rows_in=rows, input_info={"digest": f"{number}"})
    artifact.close()
    return folder


def _row(
    key: str, index: int, image: bytes, text: str, fmt: str, told: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, bytes] | None]:
    uid = hashlib.sha256(image).hexdigest()[:32]
    status = {4: "filtered", 5: "corrupt"}.get(index % 6, "ok")
    row = {
        "key": key,
        "uid": uid if status != "corrupt" else None,
        "status": status,
        "error": None if status == "ok" else f"{status} for a reason",
        "re_caption": text,
        "org_caption": "alt text",
        "re_length": len(text.split()),
        "re_language": "en",
        "re_clip_score": 0.3 + index / 100 if status == "ok" else 0.2,
        "org_clip_score": None if index % 2 else 0.25,
        "caption": text if status == "ok" else None,
    }
    ours = {"uid": uid, "org_clip_score": row["org_clip_score"], "note": None if index < 6 else "text"}
    meta = encode_meta(told, ours)
    return row, {fmt: image, "txt": text.encode(), "json": meta} if status == "ok" else None


def captioned(folder: Path, count: int = 4) -> Path:
    """What ``annotate --pack`` writes on tars of another tool: captions in a list, keys with folders and long names."""
    artifact = Artifact.create(str(folder), "annotate", {"input": None}, {"shards": "crawl/*.tar", "shards_total": 1})
    with artifact.begin("crawl", ANNOTATE, tar=True) as shard:
        for index, sample in enumerate(islice(samples(count, "heldout", 6, "png"), count)):
            key = f"folder/{index}" + ("x" * 150 if index == 1 else "ü" * (index == 2))
            uid = hashlib.sha256(sample.image).hexdigest()[:32]
            written = {"name": "short", "text": sample.caption, "status": "ok"}
            row = {"key": key, "uid": uid, "status": "ok", "error": None, "text": "alt", "captions": [written]}
            shard.write(row, {"png": sample.image, "txt": sample.caption.encode(), "json": b"{}"})
        shard.commit(rows_in=count, input_info={"digest": "d"})
    artifact.close()
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of an artifact, in order."""
    artifact = Artifact.open(str(folder))
    return [row for shard in artifact.committed() for row in artifact.read_rows(shard)]


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """The ok rows by key."""
    return {row["key"]: row for row in rows_of(folder) if row["status"] == "ok"}


def export(
    source: Path | str,
    out: Path | str,
    format: str = "webdataset",
    *,
    license: str = "cc-by-4.0",
    words: CardWords | None = None,
    **options: Any,
) -> list[str] | None:
    """Run an export to its end in this process; returns its notes. ``words``: of the card, instead of ``license``."""
    words = words or CardWords("Rendered scenes", license)
    made = plan_export(str(source), str(out), format, words, **{"workers": 0, **options})
    try:
        execute_export(made, lambda event: None, threading.Event())
        return finish(made, words)
    finally:
        made.artifact.close()


def captions_of(
    source: Path,
    folder: Path,
    *,
    prompts: Sequence[str] = ("dense",),
    samples: int = 1,
    shards: Mapping[str, Sequence[tuple[str, str | None]]] | None = None,
    of: str | None = None,
    failed: Container[str] = (),
    total: int | None = None,
    seed: int = 0,
) -> Path:
    """What ``annotate`` writes about the rows of ``source``: every text names its prompt, its row and the seed.

    ``shards``: key and uid of the rows by shard, if they are others; ``of``: the fingerprint of what was captioned;
    ``failed``: keys of rows for which the model wrote nothing; ``total``: shards that there are to be.
    """
    origin = Artifact.open(str(source))
    if shards is None:
        rows = {shard: origin.read_rows(shard) for shard in origin.committed()}
        shards = {shard: [(row["key"], row["uid"]) for row in found] for shard, found in rows.items()}
    asked = {"prompts": [{"name": name, "text": f"Write a {name} caption."} for name in prompts], "samples": samples}
    semantic = {"input": of or origin.fingerprint, "annotate": {**asked, "seed": seed}}
    run = {"shards": str(source), "shards_total": total or len(shards), "model": "/somewhere/models/captioner"}
    artifact = Artifact.create(str(folder), "annotate", semantic, run)
    for name, rows_of_shard in shards.items():
        write_captions(artifact, name, rows_of_shard, prompts, samples, failed, seed)
    artifact.close()
    return folder


def write_captions(
    artifact: Artifact,
    shard: str,
    rows: Sequence[tuple[str, str | None]],
    prompts: Sequence[str],
    samples: int = 1,
    failed: Container[str] = (),
    seed: int = 0,
) -> None:
    """Commit a shard of captions."""
    names = [name if samples == 1 else f"{name}#{k}" for name in prompts for k in range(samples)]
    with artifact.begin(shard, ANNOTATE) as out:
        for key, uid in rows:
            status = "corrupt" if uid is None else "empty" if key in failed else "ok"
            texts = [] if uid is None else [{"name": n, "text": text_of(n, key, seed), "status": status} for n in names]
            out.write({"key": key, "uid": uid, "status": status, "error": None, "text": None, "captions": texts}, None)
        out.commit(rows_in=len(rows), input_info={"digest": shard})


def text_of(name: str, key: str, seed: int = 0) -> str:
    """The caption that :func:`captions_of` writes."""
    return f"{name} of {key}" + (f" by seed {seed}" if seed else "")


def croissant_of(cache: Path, patch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Opens the metadata in a folder by MLCommons' library, which unpacks tars below ``cache`` for the test.

    It finds what it unpacked by the tar's name alone, which all exports share: each of them has a cache of its own.
    """
    import mlcroissant
    from mlcroissant._src.core import constants
    from mlcroissant._src.operation_graph.operations import extract

    def opened(folder: Path) -> Any:
        for name in ("CROISSANT_CACHE", "DOWNLOAD_PATH", "EXTRACT_PATH"):
            place = type(constants.DOWNLOAD_PATH)(cache / folder.name / name)
            patch.setattr(constants, name, place)
            patch.setattr(extract, name, place, raising=False)
        return mlcroissant.Dataset(str(folder / "croissant.json"))

    return opened


def table_of(folder: Path, version: int | None = None) -> pa.Table:
    """All rows of an export's Lance table, as pylance reads them."""
    import lance

    found: pa.Table = lance.dataset(str(folder / "train.lance"), version=version).to_table()
    return found
