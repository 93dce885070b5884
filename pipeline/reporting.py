"""From graded artifacts to reports and comparisons on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..manifests.artifact import Artifact
from ..manifests.shards import RowReader, expand
from ..models.clip import ClipScorer, load_clip
from ..models.scorers import ScorerConfig, scorer_identity
from ..trainer.comparison import Run
from ..trainer.evaluation import evaluate
from ..trainer.figures import Comparison, Report
from ..trainer.report import to_json, to_markdown
from ..trainer.retrieval import gallery_of, ranks_of


def report_on(graded: Artifact, clip: str | None = None) -> Report:
    """The figures of a graded artifact, with recall at k by the CLIP that is named. Raises BadInput without any."""
    if clip is None:
        return evaluate(rows_of(graded), settings(graded), where=graded.url)
    ranks, gallery = _ranks(graded, load_clip(clip))
    identity = scorer_identity(ScorerConfig("clip", clip))
    facts = {**settings(graded), "retrieval": f"{clip}@{str(identity['model'])[:12]}"}
    return evaluate(rows_of(graded), facts, ranks=ranks, gallery=gallery, where=graded.url)


def _ranks(graded: Artifact, clip: ClipScorer) -> tuple[dict[tuple[str, str], int], int]:
    """Ranks by image and caption, and the gallery's size: the images whose captions were graded."""
    captions = {
        (row["uid"], caption["text"] or ""): None
        for row in rows_of(graded)
        for caption in row["captions"]
        if row["uid"] is not None and caption["text"] is not None
    }
    shards = expand(graded.config["run"]["shards"])
    images = (row for shard in shards for row in RowReader(shard))
    gallery = gallery_of(images, {image for image, _ in captions}, clip)
    return ranks_of(gallery, captions, clip), len(gallery.names)


def run_of(folder: Path, system: str | None) -> Run:
    """A graded artifact as one side of a comparison."""
    graded = Artifact.open(str(folder))
    return Run(str(folder.parent), rows_of(graded), settings(graded), system)


def rows_of(graded: Artifact) -> Iterator[dict[str, Any]]:
    """All rows, shard after shard."""
    for shard in graded.committed():
        yield from graded.read_rows(shard)


def settings(graded: Artifact) -> dict[str, Any]:
    """What the figures depend on. ``reader``: everything that decides how it answers, so that runs can be compared."""
    semantic, run = graded.config["semantic"], graded.config["run"]
    reader = f"{run['model']}@{str(semantic['model'])[:12]}, {_presented(semantic['grade']['presentations'])}"
    facts = {"reader": reader, "questions": f"{run['questions']}@{str(semantic['questions'])[:12]}"}
    facts |= {"captions": f"{run['captions']}@{str(semantic['captions'])[:12]}", "shards": run["shards"]}
    if Artifact.exists(run["captions"]):
        asked = Artifact.open(run["captions"]).config
        named = asked["semantic"]["annotate"]
        facts |= {"captioner": f"{asked['run']['model']}@{str(asked['semantic']['model'])[:12]}"}
        facts |= {"temperature": named["temperature"], "captions per prompt": named["samples"]}
        facts |= {f"prompt {each['name']}": each["text"] for each in named["prompts"]}
    return {**facts, "generic caption": semantic["grade"]["generic"]}


def _presented(presentations: int | None) -> str:
    return "all cyclic orders" if presentations is None else f"{presentations} cyclic orders"


def write_report(value: Report | Comparison, folder: Path, name: str = "report") -> None:
    """``name``.json and ``name``.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(to_json(value), encoding="utf-8")
    (folder / f"{name}.md").write_text(to_markdown(value), encoding="utf-8")
