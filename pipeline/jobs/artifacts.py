"""Artifacts of questions and captions, made by one command and read by others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import BadInput

if TYPE_CHECKING:
    from ...manifests.artifact import Artifact
    from ...manifests.shards import InputShard

WRITTEN, SCREENED = "written", "screened"  # the two artifacts in --out


def refuse_controls(names: list[str]) -> None:
    """Raise BadInput for captions with the name of a control, which would be ambiguous."""
    from ...stages.questions.grade import CONTROLS

    taken = next((name for name in names if name in CONTROLS), None)
    if taken is not None:
        raise BadInput(f"captions named {taken!r}: that is a control's name; write --prompt another-name=text")


def question_artifact(url: str) -> Artifact:
    """The questions to use: the screened ones, if the folder is one of `capipe qa`. Raises BadInput."""
    from ...manifests.artifact import Artifact

    existing = next((path for path in (url, f"{url}/{SCREENED}", f"{url}/{WRITTEN}") if Artifact.exists(path)), None)
    artifact = Artifact.open(existing) if existing is not None else None
    if artifact is None or artifact.stage not in ("questions", "screen"):
        raise BadInput(f"{url}: no questions of `capipe qa` there; name its --out folder")
    return artifact


def marks_beside(url: str | None) -> dict[str, Artifact]:
    """Marks by their name in a row's ``beside``; empty without any. Raises BadInput."""
    from ...manifests.artifact import Artifact
    from ...stages.filter.marked import MARKS

    return {} if url is None else {MARKS: Artifact.open(url)}


def marks_line(shards: Sequence[InputShard]) -> str | None:
    """How many rows the marks of ``shards`` leave to a stage, for users; by manifests alone.

    None without marks, or if they are a selection one of whose files is about further shards, too.
    """
    from ...manifests.artifact import Artifact
    from ...manifests.joining.companion import companions_of
    from ...manifests.status import Status
    from ...stages.filter.marked import MARKS

    marks = next((c for shard in shards[:1] for c in shard.companions if c.name == MARKS), None)
    if marks is None:
        return None
    artifact, asked = Artifact.open(marks.url.rpartition("/")[0]), {shard.name for shard in shards}
    about = companions_of(MARKS, artifact)
    used = {about[name].url for name in asked}
    if any(companion.url in used for name, companion in about.items() if name not in asked):
        return None
    rows: Counter[str] = Counter()
    for name, record in artifact.committed().items():
        if f"{artifact.url}/{name}.parquet" in used:
            rows.update(record.rows)
    left = rows.pop(Status.OK, 0)
    out = ", ".join(f"{count:,} {status}" for status, count in sorted(rows.items()))
    return f"marks: {left:,} of {left + rows.total():,} rows are left to do ({out or 'none is left out'})"


def captions_artifact(url: str) -> Artifact:
    """Existing captions. Raises BadInput if the artifact is of another stage."""
    from ...manifests.artifact import Artifact

    artifact = Artifact.open(url)
    if artifact.stage != "annotate":
        raise BadInput(f"{url}: an artifact of stage {artifact.stage!r}; --captions takes one of `capipe annotate`")
    refuse_controls([name for name, _ in artifact.prompts()])
    return artifact
