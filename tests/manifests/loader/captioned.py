"""Shards with captions and scores that no model gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from capipe.manifests.artifact import Artifact
from capipe.manifests.loader.dataset import ImageCaptions
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand
from capipe.manifests.status import Status

from ...stages.ingesting import ingest
from ...stages.scored import foreign_shards, write_scores

PROMPTS = ("dense", "short")
ROWS, SHARD = 32, 9  # images, and those of a shard: four shards, the last one smaller
Batch = list[dict[str, Any]]


class Captioned(NamedTuple):
    """Shards with captions of two prompts and scores; all rows are ok."""

    shards: Path
    captions: Path
    scores: Path


def ingested(folder: Path, rows: int = ROWS, size: int = SHARD) -> Captioned:
    ingest(foreign_shards(folder / "theirs", [rows]), out=folder / "shards", shard_size=size)
    return joined(folder, folder / "shards")


def joined(folder: Path, shards: Path | str) -> Captioned:
    """Captions and scores for shards of any kind."""
    write_captions(shards, folder / "captions")
    write_scores(shards, folder / "scores")
    return Captioned(Path(shards), folder / "captions", folder / "scores")


def write_captions(
    shards: Path | str,
    out: Path | str,
    fails: Callable[[int, str], bool] = lambda index, name: False,
    model: str = "m",
    prompts: Sequence[str] = PROMPTS,
    left_out: Iterable[int] = (),
) -> Artifact:
    """An artifact of `annotate`: each prompt's caption names its image. ``fails``: of the index among all rows and the
    prompt; ``left_out``: rows that marks left out."""
    named = [{"name": name, "text": f"{name}?"} for name in prompts]
    artifact = Artifact.create(str(out), "annotate", {"annotate": {"prompts": named}, "model": model}, {})
    number, away = 0, set(left_out)
    for shard in expand(str(shards)):
        reader = RowReader(shard)
        with artifact.begin(shard.name, ANNOTATE) as writer:
            start = number
            for row in reader:
                base = {"key": row.key, "uid": row.uid, "text": row.text}
                found = [] if row.image is None else [_caption(row.uid, number, name, model, fails) for name in prompts]
                status = next((each["status"] for each in found if each["status"] != "ok"), str(row.status))
                if number in away:
                    status, found = str(Status.DUPLICATE), []
                error = None if status == "ok" else "for a reason"
                writer.write({**base, "status": status, "error": error, "captions": found})
                number += 1
            writer.commit(rows_in=number - start, input_info=reader.info)
    artifact.close()
    return artifact


def _caption(uid: str | None, number: int, name: str, model: str, fails: Callable[[int, str], bool]) -> dict[str, Any]:
    text, status = (None, "empty") if fails(number, name) else (f"{name} caption by {model} of {uid}", "ok")
    facts = {"model": model, "prompt_id": name, "finish_reason": "stop", "n_tokens": 5, "attempts": 1}
    return {"name": name, "text": text, "status": status, **facts}


def loaded(dataset: ImageCaptions, workers: int = 0, batch_size: int = 3, **options: Any) -> DataLoader[Any]:

    return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list, **options)


def keys(batches: Iterable[Batch]) -> list[str]:
    return [sample["key"] for batch in batches for sample in batch]
