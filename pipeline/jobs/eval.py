"""Reports and comparisons on disk, computed from graded artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.files.allowed import Allowed
from ...manifests.files.outside import Refused
from ...manifests.files.storage import Folder, write_new
from ...manifests.fingerprint import fingerprint
from ...manifests.shards import RowReader, expand
from ...models.hub import HubName, snapshot
from ...models.scorers.blip_contrastive import BlipScorer
from ...models.scorers.clip import ClipScorer, load_clip
from ...models.scorers.clip_source import clip_place
from ...models.scorers.lm_scores import load_text_scorer
from ...models.scorers.loading import ScorerConfig, scorer_identity
from ...stages.annotate.captioner import AnnotateConfig
from ...trainer.evaluation.compare import EvaluationRun
from ...trainer.evaluation.evaluate import evaluate
from ...trainer.evaluation.results import Caution, Comparison, EvaluationReport
from ...trainer.evaluation.retrieval import Gallery, cosines_of, gallery_of, ranks_of
from ...trainer.evaluation.tables import to_json, to_markdown
from ..inspect.fallbacks import fallbacks_of


@dataclass(frozen=True)
class EvaluationModels:
    """Models that score captions in an evaluation, by name. ``cosine``: a CLIP or a BLIP, possibly the reward's."""

    clip: str | None = None
    cosine: str | None = None
    language_model: str | None = None


def load_cosine(name: str) -> ClipScorer | BlipScorer:
    """A BLIP with contrastive heads, or any open_clip model. Raises BadInput if it is neither."""
    from ...models.scorers.blip_contrastive import load_blip

    try:
        if isinstance(source := clip_place(name), HubName):
            snapshot(source, "open_clip")
    except BadInput:
        return load_blip(name)
    return load_clip(name)


def report_on(
    graded: Artifact,
    judges: EvaluationModels = EvaluationModels(),
    warnings: Sequence[Caution] = (),
    checked: Artifact | None = None,
) -> EvaluationReport:
    """Metrics of a graded artifact, including those of the given models. Raises BadInput if it has no rows.

    ``warnings``: known problems, in addition to those that the metrics show; ``checked``: the captions, checked
    sentence by sentence.
    """
    facts, more = settings(graded), dict[str, Any]()
    if judges.clip is not None:
        clip = load_clip(judges.clip)
        gallery, captions = _gallery(graded, clip)
        more |= {"ranks": ranks_of(gallery, captions, clip), "gallery": len(gallery.names)}
        facts["retrieval"] = _identified("clip", judges.clip)
    if judges.cosine is not None:
        scorer = load_cosine(judges.cosine)
        more["cosines"] = cosines_of(*_gallery(graded, scorer), scorer)
        facts["cosine"] = _identified("clip" if isinstance(scorer, ClipScorer) else "blip", judges.cosine)
    if judges.language_model is not None:
        texts = sorted({text for _, text in _captions(graded)})
        more["logps"] = dict(zip(texts, load_text_scorer(judges.language_model).logps(texts), strict=True))
        facts["language model"] = judges.language_model
    if checked is not None:
        more["truths"] = _truths(checked)
        facts["sentences"] = _checked_by(checked)
    return evaluate(rows_of(graded), facts, where=graded.url, warnings=warnings, **more)


def _truths(checked: Artifact) -> dict[tuple[str, str], list[float | None]]:
    """Probabilities of each caption's sentences, by the image's uid and the caption's text."""
    return {
        (row["uid"], caption["text"]): caption["sentences"]
        for row in rows_of(checked)
        for caption in row["captions"]
        if row["uid"] is not None
    }


def _checked_by(checked: Artifact) -> str:
    """The model that checked sentences, with its identity and how it was asked."""
    model = f"{checked.setting('run', 'model', kind=str)}@{checked.setting('semantic', 'model', kind=str)[:12]}"
    asked = checked.setting("semantic", "check", kind=dict)
    return f"{model}, {asked.get('mode')}"


def _identified(kind: str, model: str) -> str:
    """A scorer's name with its identity, so that reports by different scorers can be distinguished."""
    identity = scorer_identity(ScorerConfig(kind, model))
    return f"{model}@{str(identity['model'])[:12]}, {identity['activation']}"


def _captions(graded: Artifact) -> dict[tuple[str, str], None]:
    """Distinct captions with the uid of their image."""
    return {
        (row["uid"], caption["text"] or ""): None
        for row in rows_of(graded)
        for caption in row["captions"]
        if row["uid"] is not None and caption["text"] is not None
    }


def _gallery(graded: Artifact, scorer: ClipScorer | BlipScorer) -> tuple[Gallery, dict[tuple[str, str], None]]:
    """The images of the graded captions, and these captions."""
    captions = _captions(graded)
    shards = expand(graded.setting("run", "shards", kind=str))
    images = (row for shard in shards for row in RowReader(shard))
    return gallery_of(images, {image for image, _ in captions}, scorer), captions


def run_of(folder: str, name: str, system: str | None) -> EvaluationRun:
    """The graded artifact of this ``name`` in an evaluation's folder, as one side of a comparison."""
    folder = folder.rstrip("/")
    graded = Artifact.open(f"{folder}/{name}")
    return EvaluationRun(folder, rows_of(graded), settings(graded, Allowed(graded.url)), system)


def rows_of(graded: Artifact) -> Iterator[dict[str, Any]]:
    """All rows, shard by shard."""
    for shard in graded.committed():
        yield from graded.read_rows(shard)


def settings(graded: Artifact, allowed: Allowed | None = None) -> dict[str, Any]:
    """Settings that the metrics depend on. ``reader identity``: all that determines its answers, whatever its name.

    ``allowed``: permitted locations of the captions; None for an artifact whose inputs this command line named.
    """
    reader = f"{graded.setting('run', 'model', kind=str)}@{graded.setting('semantic', 'model', kind=str)[:12]}"
    asked = graded.setting("semantic", "reader", kind=dict)
    facts: dict[str, Any] = {
        "reader": f"{reader}, {_presented(graded.setting('semantic', 'grade', kind=dict).get('presentations'))}",
        "reader identity": fingerprint({"model": graded.setting("semantic", "model", kind=str), "asked": asked})[:16],
    }
    if words := graded.setting("semantic", "grade", kind=dict).get("words"):
        facts["word budgets"] = words
    if "prompt" in asked:
        facts["reader prompt"] = asked["prompt"]
    for role in ("questions", "captions"):
        facts[role] = f"{graded.setting('run', role, kind=str)}@{graded.setting('semantic', role, kind=str)[:12]}"
    facts["shards"] = graded.setting("run", "shards", kind=str)
    if (captions := _captions_of(graded.setting("run", "captions", kind=str), allowed)) is not None:
        named = captions.setting("semantic", "annotate", kind=dict)
        model = captions.setting("semantic", "model", kind=str)[:12]
        facts |= {"captioner": f"{captions.setting('run', 'model', kind=str)}@{model}"}
        facts |= {"temperature": named.get("temperature"), "captions per prompt": named.get("samples")}
        facts |= {name: named[name] for name in AnnotateConfig.later if name in named and name != "fallbacks"}
        facts |= {f"prompt {name}": text for name, text in captions.prompts()}
        facts |= {f"fallback prompt {prompt.name}": prompt.text for prompt in fallbacks_of(captions)}
    return {**facts, "generic caption": graded.setting("semantic", "grade", "generic", kind=str)}


def _captions_of(url: str, allowed: Allowed | None) -> Artifact | None:
    """The captions that were graded, if they still exist and may be opened."""
    try:
        location = url if allowed is None else allowed.place(url)
    except Refused:
        return None
    return Artifact.open(location) if Artifact.exists(location) else None


def _presented(presentations: int | None) -> str:
    return "all cyclic orders" if presentations is None else f"{presentations} cyclic orders"


def write_report(value: EvaluationReport | Comparison, url: str, name: str = "report") -> None:
    """Write ``name``.json and ``name``.md into a folder."""
    folder = Folder(url)
    folder.make()
    for file, text in ((f"{name}.json", to_json(value)), (f"{name}.md", to_markdown(value))):
        if folder.is_local:
            write_new(folder.local(file), text.encode())
        else:
            folder.write(file, text.encode())
