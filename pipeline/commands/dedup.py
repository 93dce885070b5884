"""`capipe dedup`."""

from __future__ import annotations

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
from . import options as o
from .option_groups import flattened
from .run_job import Exit, conclude

if TYPE_CHECKING:
    from ...stages.dedup.marks import DedupConfig
    from ..jobs.dedup import DedupPlan

COSINE = 0.96


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
    run: o.TaskOptions


def check(options: DedupOptions) -> DedupConfig:
    """The config for marking duplicates. Does not access the data. Raises BadInput."""
    from ...stages.dedup.cosine import require_faiss
    from ...stages.dedup.marks import DedupConfig

    options.run.check()
    cosine = options.cosine
    if options.embeddings is not None:
        require_faiss()
        cosine = COSINE if cosine is None else cosine
    elif cosine is not None:
        raise BadInput(f"--cosine {cosine:g}: compares embeddings; name them with --embeddings, or leave it out")
    return o.validated(DedupConfig, radius=options.radius, placeholder=options.placeholder, cosine=cosine)


@flattened
def dedup(options: DedupOptions) -> None:
    """Mark duplicates, placeholders and images that leak a reference set; every row stays, with its mark."""
    from ..jobs import dedup as steps

    config = check(options)
    plan = steps.plan_dedup(
        options.shards,
        options.out,
        config,
        against=options.against or (),
        embeddings=options.embeddings,
        workers=options.run.workers,
        fresh=options.run.fresh,
        share=options.run.share,
        cluster=options.run.cluster_of_tasks(),
    )
    with plan.placement.connected():
        code = _steps(options, plan)
    raise typer.Exit(code)


def _steps(options: DedupOptions, plan: DedupPlan) -> Exit:
    from ..jobs import dedup as steps

    artifacts: list[Artifact] = []
    try:
        code = _step("hash", len(plan.shards), artifacts, lambda *args: steps.hash_images(plan, *args))
        if code is Exit.OK and plan.against:
            code = _step("hash", None, artifacts, lambda *args: steps.hash_references(plan, *args))
        if code is Exit.OK:
            hashes, references = artifacts[0], artifacts[1] if plan.against else None
            total = len(plan.shards)
            code = _step("dedup", total, artifacts, lambda *args: steps.mark(plan, hashes, references, *args))
            if skipped := artifacts[-1].config["run"].get("embeddings_skipped"):
                print_err(f"{skipped} images have no usable embedding: compared by their hashes alone")
    finally:
        for artifact in artifacts:
            artifact.close()
    return code


def _step(name: str, total: int | None, artifacts: list[Artifact], run: Callable[..., tuple[Artifact, Any]]) -> Exit:
    """Run one pass with a progress display, keep its artifact's lock, and print the result."""
    progress = Progress(name, total, ready=time.monotonic())
    with job_session(progress) as (report, stop):
        artifact, outcome = run(report, stop)
    artifacts.append(artifact)
    return conclude(artifact.url, outcome.interrupted, progress.finished_line())
