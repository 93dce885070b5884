"""Cost of CLIP scores from stored embeddings (`capipe filter --embeddings`) and with the vision encoder.

Both sides are the work of a worker on the same shards: reading tars, scoring original captions, committing; the
encoder's side also decodes. Core-seconds are those of this process and of its decoders. Alternating rounds; ``ratio``
is the encoder's core-seconds over those of embeddings, the median over rounds; ``largest_difference`` that of the
scores.

    python bench/stages/embedded_scores.py [--images 512] [--shards 2] [--rounds 3] [--clip tiny/clip]
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import alternate, report, version
from _corpus import rendered_shards

from capipe.manifests.artifact import Artifact
from capipe.models.scorers.loading import ScorerConfig
from capipe.pipeline.jobs.rows.engine import EngineStage, plan
from capipe.pipeline.jobs.score import EmbedStage, ScoreSetup, ScoreStage, with_embeddings
from capipe.pipeline.runners.inline import DirectChannel
from capipe.pipeline.runners.worker import Worker
from capipe.stages.filter.score import EMBEDDINGS

SEED = 5


def core_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


async def through_worker(stage: EngineStage, shards: Path, out: Path, beside: dict[str, Artifact]) -> float:
    """Core-seconds of a worker, its model's loading left out."""
    job = plan(stage, str(shards), str(out), beside=beside)
    processor = await stage.load()
    started = core_seconds()
    await Worker(processor, job.artifact, DirectChannel(job.todo, job.artifact, lambda event: None)).run()
    await processor.aclose()
    job.artifact.close()
    return core_seconds() - started


def scores_of(out: Path) -> list[float]:
    artifact = Artifact.open(str(out))
    return [row["org_clip_score"] for shard in artifact.committed() for row in artifact.read_rows(shard)]


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Core-seconds by side and round, and the largest difference of two scores of an image."""
    shards = rendered_shards(folder / "shards", options.shards, options.images // options.shards, SEED)
    setup = ScoreSetup((ScorerConfig("clip", options.clip),), decode_workers=1)
    asyncio.run(through_worker(EmbedStage(setup), shards, folder / "embeddings", {}))
    embeddings = Artifact.open(str(folder / "embeddings"))
    stored = with_embeddings(setup, embeddings)
    sides = {"encoder": (setup, {}), "embeddings": (stored, {EMBEDDINGS: embeddings})}

    def run(side: str, number: int) -> float:
        own, beside = sides[side]
        return asyncio.run(through_worker(ScoreStage(own), shards, folder / f"{side}{number}", beside))

    figures = alternate({side: lambda number, side=side: run(side, number) for side in sides}, options.rounds)
    slow, fast = (scores_of(folder / f"{side}0") for side in sides)
    return figures, max(abs(a - b) for a, b in zip(slow, fast, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clip", default="tiny/clip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures, difference = measure(Path(folder), options)
    ratio = median(a / b for a, b in zip(figures["encoder"], figures["embeddings"], strict=True))
    shared = {"images": options.images, "clip": options.clip, "threads": torch.get_num_threads()}
    versions = {name: version(name) for name in ("torch", "open_clip_torch")}
    more = {**shared, "largest_difference": difference, "ratio": round(ratio, 3)}
    report("embedded_scores", figures, versions, unit="core-seconds", **more)


if __name__ == "__main__":
    main()
