"""Artifacts that one command makes and others are given: questions and captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import BadInput

if TYPE_CHECKING:
    from ...manifests.artifact import Artifact

WRITTEN, SCREENED = "written", "screened"  # the two artifacts in --out


def refuse_controls(names: list[str]) -> None:
    """Raise BadInput for captions that could not be told from the controls beside them."""
    from ...stages.questions.grade import CONTROLS

    taken = next((name for name in names if name in CONTROLS), None)
    if taken is not None:
        raise BadInput(f"captions named {taken!r}: that is a control's name; write --prompt another-name=text")


def question_artifact(url: str) -> Artifact:
    """The questions to ask: those that were screened, where the folder is one of `capipe qa`. Raises BadInput."""
    from ...manifests.artifact import Artifact

    found = next((each for each in (url, f"{url}/{SCREENED}", f"{url}/{WRITTEN}") if Artifact.exists(each)), None)
    artifact = Artifact.open(found) if found is not None else None
    if artifact is None or artifact.stage not in ("questions", "screen"):
        raise BadInput(f"{url}: no questions of `capipe qa` there; name its --out folder")
    return artifact


def captions_artifact(url: str) -> Artifact:
    """Captions made before. Raises BadInput where the artifact is of another stage."""
    from ...manifests.artifact import Artifact

    artifact = Artifact.open(url)
    if artifact.stage != "annotate":
        raise BadInput(f"{url}: an artifact of stage {artifact.stage!r}; --captions takes one of `capipe annotate`")
    refuse_controls([name for name, _ in artifact.prompts()])
    return artifact
