"""`capipe dedup`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...terminal import print_err
from ..runners.pool_job import job_session
from ..runners.progress import Progress
from .options import shared as o
from .options.groups import flattened
from .run_job import Exit, conclude

if TYPE_CHECKING:
    from ...stages.dedup.marks import DedupConfig
    from ...stages.dedup.texts.marks import TextConfig
    from ..jobs.dedup import DedupPlan
    from ..jobs.texts.mark import TextPlan

COSINE, TEXT_THRESHOLD = 0.96, 0.8
IMAGES = "images"  # folder of the marks by images, if those by texts come on top


@dataclass(frozen=True, kw_only=True)
class DedupOptions:
    """Options of `capipe dedup`."""

    shards: o.Shards
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) for artifacts: hashes, against, marked.")]
    against: Annotated[
        list[str] | None,
        typer.Option(help="Reference set whose images must not be in the shards: anything ingest takes; repeatable."),
    ] = None
    radius: Annotated[int, typer.Option(help="Bits of 64 in which the hashes of two copies may differ.")] = 7
    placeholder: Annotated[int, typer.Option(help="The same bytes in more rows than this are a placeholder.")] = 100
    embeddings: Annotated[
        str | None,
        typer.Option(help="Artifact with a column image_embedding and these shards' rows: near ones are copies, too."),
    ] = None
    cosine: Annotated[
        float | None, typer.Option(help="Cosine from which embeddings are those of copies; 0.96 by default.")
    ] = None
    against_embeddings: Annotated[
        list[str] | None,
        typer.Option(help="Embeddings of a reference set by the same model: images near one of them leak; repeatable."),
    ] = None
    keeper: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="Image of a group to keep: the largest; the nearest to or the farthest from the centroid of its cell "
            "of embeddings; or a column of --scores, the highest.",
        ),
    ] = "largest"
    scores: Annotated[
        str | None, typer.Option(help="Artifact with these shards' rows and the column that --keeper names.")
    ] = None
    gpus: o.Gpus = None
    texts: Annotated[bool, typer.Option("--texts", help="Group near-duplicates of the shards' own texts, too.")] = False
    captions: Annotated[
        str | None, typer.Option(help="Artifact of `capipe annotate` whose captions to group, instead of --texts.")
    ] = None
    text_threshold: Annotated[
        float | None,
        typer.Option(help="Jaccard index from which texts are near-duplicates; 0.8 by default."),
    ] = None
    per_text: Annotated[
        int | None,
        typer.Option(help="Rows to keep of a group of texts; more are duplicates. Without it groups are columns only."),
    ] = None
    marks: Annotated[
        str | None, typer.Option(help="Marks of an earlier run, to which those by texts are added; no image is read.")
    ] = None
    run: o.TaskOptions


def check(options: DedupOptions) -> DedupConfig:
    """The config for marking duplicates by images. Does not access the data. Raises BadInput."""
    from ...stages.dedup.embeddings.backends import FAISS, require_faiss
    from ...stages.dedup.marks import DedupConfig

    options.run.check()
    cosine = options.cosine
    if options.embeddings is not None:
        if FAISS in devices(options):
            require_faiss()
        cosine = COSINE if cosine is None else cosine
    elif cosine is not None:
        raise BadInput(f"--cosine {cosine:g}: compares embeddings; name them with --embeddings, or leave it out")
    elif options.against_embeddings:
        text = f"--against-embeddings {options.against_embeddings[0]}: are compared with embeddings"
        raise BadInput(f"{text}; name those of the images with --embeddings, or leave it out")
    _check_keeper(options)
    check_texts(options)
    limits = {"radius": options.radius, "placeholder": options.placeholder}
    return o.validated(DedupConfig, **limits, cosine=cosine, keeper=options.keeper)


def _check_keeper(options: DedupOptions) -> None:
    """Raises BadInput unless what ``--keeper`` needs is given, and nothing else."""
    from ...stages.dedup.marks import FARTHEST, LARGEST, NEAREST

    by_column = options.keeper not in (LARGEST, NEAREST, FARTHEST)
    if by_column and options.scores is None:
        text = f"--keeper {options.keeper}: neither {LARGEST}, {NEAREST} nor {FARTHEST}"
        raise BadInput(f"{text}, hence a column; name the artifact that has it with --scores")
    if options.scores is not None and not by_column:
        raise BadInput(
            f"--scores {options.scores}: --keeper {options.keeper} reads no column; name one, or leave it out"
        )
    if options.keeper in (NEAREST, FARTHEST) and options.embeddings is None:
        raise BadInput(f"--keeper {options.keeper}: needs embeddings; name them with --embeddings")


def devices(options: DedupOptions) -> tuple[str, ...]:
    """Where embeddings are compared: on this machine's GPUs by torch, else, and on a cluster, on CPUs by faiss."""
    from ...stages.dedup.embeddings.backends import FAISS
    from .gpus import visible_gpus

    if options.run.runner == "ray":
        if options.gpus not in (None, "none"):
            text = f"--gpus {options.gpus}: on a Ray cluster embeddings are compared on its cores"
            raise BadInput(f"{text}; leave it out, or use --runner local")
        return (FAISS,)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else None
    names = [name for name in visible_gpus(options.gpus) if name]
    if numbers is not None and (unknown := [name for name in names if name not in numbers]):
        raise BadInput(
            f"--gpus {unknown[0]}: CUDA_VISIBLE_DEVICES={visible} hides it; name one of these, or leave it out"
        )
    return tuple(f"cuda:{numbers.index(name) if numbers else name}" for name in names) or (FAISS,)


def check_texts(options: DedupOptions) -> TextConfig | None:
    """The config for marks by texts, if any are asked for. Does not access the data. Raises BadInput."""
    from ...stages.dedup.texts.bands import require_rensa
    from ...stages.dedup.texts.marks import TextConfig

    if not options.texts and options.captions is None:
        for name, value in (("text-threshold", options.text_threshold), ("per-text", options.per_text)):
            if value is not None:
                raise BadInput(f"--{name} {value:g}: compares texts; add --texts or --captions, or leave it out")
        if options.marks is not None:
            raise BadInput("--marks: marks by texts are added to them; add --texts or --captions, or leave it out")
        return None
    if options.texts and options.captions is not None:
        raise BadInput("--texts and --captions: only one kind of text is compared in a run; leave one of them out")
    if options.marks is not None and (given := _decides_images(options)):
        raise BadInput(f"--marks: {given} decides about images, as was done when these were made; leave it out")
    require_rensa()
    threshold = TEXT_THRESHOLD if options.text_threshold is None else options.text_threshold
    return o.validated(TextConfig, text_threshold=threshold, per_text=options.per_text)


def _decides_images(options: DedupOptions) -> str | None:
    """An option that is not as it is by default, of those that decide which images are duplicates."""
    names = ("against", "radius", "placeholder", "embeddings", "cosine", "against_embeddings", "keeper", "scores")
    for name in names:
        value = getattr(options, name)
        if value not in (getattr(DedupOptions, name, None), [], ()):  # a repeatable option that is not given is a list
            return "--" + name.replace("_", "-")
    return None


@flattened
def dedup(options: DedupOptions) -> None:
    """Mark duplicates, placeholders and images that leak a reference set, and near-duplicate texts; every row stays."""
    check(options)
    by_texts, artifacts = check_texts(options), list[Artifact]()
    try:
        code = _by_images(options, artifacts) if by_texts is None else _by_texts(options, by_texts, artifacts)
    finally:
        for artifact in artifacts:
            artifact.close()
    raise typer.Exit(code)


def _by_images(options: DedupOptions, artifacts: list[Artifact], marked: str = "marked") -> Exit:
    """Hash and mark images; the marks are the last of ``artifacts``, in the folder ``marked``."""
    from ..jobs import dedup as steps

    plan = steps.plan_dedup(
        options.shards,
        options.out,
        check(options),
        against=options.against or (),
        embeddings=options.embeddings,
        against_embeddings=options.against_embeddings or (),
        scores=options.scores,
        devices=devices(options) if options.embeddings is not None else (),
        workers=options.run.workers,
        fresh=options.run.fresh,
        share=options.run.share,
        cluster=options.run.cluster_of_tasks(),
        marked=marked,
    )
    with plan.placement.connected():
        return _image_steps(plan, artifacts)


def _image_steps(plan: DedupPlan, artifacts: list[Artifact]) -> Exit:
    from ..jobs import dedup as steps

    code = _step("hash", len(plan.shards), artifacts, lambda *args: steps.hash_images(plan, *args))
    if code is Exit.OK and plan.against:
        code = _step("hash", None, artifacts, lambda *args: steps.hash_references(plan, *args))
    if code is Exit.OK:
        hashes, references = artifacts[0], artifacts[1] if plan.against else None
        total = len(plan.shards)
        code = _step("dedup", total, artifacts, lambda *args: steps.mark(plan, hashes, references, *args))
        if skipped := artifacts[-1].config["run"].get("embeddings_skipped"):
            print_err(f"{skipped} images have no usable embedding: compared by their hashes alone")
    return code


def _by_texts(options: DedupOptions, config: TextConfig, artifacts: list[Artifact]) -> Exit:
    """Mark images, unless --marks says how, then texts on top."""
    from ..jobs.texts import mark as steps

    plan = steps.plan_texts(
        options.shards,
        options.out,
        config,
        captions=options.captions,
        marks=options.marks,
        workers=options.run.workers,
        fresh=options.run.fresh,
        share=options.run.share,
        cluster=options.run.cluster_of_tasks(),
    )
    with plan.placement.connected():
        return _text_steps(options, plan, artifacts)


def _text_steps(options: DedupOptions, plan: TextPlan, artifacts: list[Artifact]) -> Exit:
    """Marks of images, unless --marks says which, then texts on top."""
    from ..jobs.texts import mark as steps

    marks, code = plan.marks, Exit.OK
    if marks is None:
        code = _by_images(options, artifacts, IMAGES)
        marks = artifacts[-1]
    if code is Exit.OK:
        code = _step("texts", len(plan.shards), artifacts, lambda *args: steps.read(plan, *args))
    if code is Exit.OK:
        texts, total = artifacts[-1], len(plan.shards)
        code = _step("dedup", total, artifacts, lambda *args: steps.mark(plan, texts, marks, *args))
        if line := steps.warning(artifacts[-1]):
            print_err(f"warning: {line}")
    return code


def _step(name: str, total: int | None, artifacts: list[Artifact], run: Callable[..., tuple[Artifact, Any]]) -> Exit:
    """Run one pass with a progress display, keep its artifact's lock, and print the result."""
    progress = Progress(name, total, ready=time.monotonic())
    with job_session(progress) as (report, stop):
        artifact, outcome = run(report, stop)
    artifacts.append(artifact)
    return conclude(artifact.url, outcome.interrupted, progress.finished_line())
