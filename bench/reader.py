"""Speed-up of the quiz reader by sharing a caption's prefix: captions with 8 questions in 4 orders each.

Both sides are one transformers engine with the same requests; the slow one computes every prompt in full. The captions
are dense ones of single scenes, and concatenated ones of many scenes, up to the 300 tokens of photographs' captions.
The ratio is that of the long ones; answers must be identical.

    python bench/reader.py [--captions 12] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, quotient, report, version

from capipe.models.engines.base import Prompt
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.quiz import Question
from capipe.models.reader import QuizReader, ReaderConfig, Reading
from capipe.models.tiny.train.texts.quiz import possible, quiz
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.scenes import scenes

MODEL = "tiny/reader"
QUESTIONS, ORDERS = 8, 4
LONG = 300  # tokens
Task = tuple[str, list[Question]]


def tasks(engine: TransformersEngine, count: int, tokens: int) -> list[Task]:
    """Captions of at least ``tokens`` tokens (one scene's if 0) with questions about their first scene."""
    result: list[Task] = []
    pool = list(scenes("heldout", 40 * count, seed=61))
    for number in range(count):
        rng = Random(f"reader:{number}")
        scene = next(candidate for candidate in pool[number::count] if len(possible(candidate)) >= QUESTIONS)
        caption = dense_caption(scene, rng)
        others = iter(pool[number::count])
        while length(engine, caption) < tokens:
            caption += " " + dense_caption(next(others), rng)
        result.append((caption, [quiz(scene, asked, rng) for asked in rng.sample(possible(scene), QUESTIONS)]))
    return result


def length(engine: TransformersEngine, text: str) -> int:
    """Tokens of a text, without the chat template."""
    return len(engine.lm.encoder.encode(Prompt(text))) - len(engine.lm.encoder.encode(Prompt("")))


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    engine = await load_engine(EngineConfig("transformers", MODEL))
    assert isinstance(engine, TransformersEngine)
    reader = QuizReader(engine, ReaderConfig(presentations=ORDERS))

    async def read(work: list[Task]) -> list[list[Reading]]:
        return await asyncio.gather(*(reader.read(caption, questions) for caption, questions in work))

    figures: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    lengths: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    for name, tokens in (("dense", 0), ("long", LONG)):
        work = tasks(engine, options.captions, tokens)
        lengths[name] = round(sum(length(engine, caption) for caption, _ in work) / len(work), 1)
        answers: dict[str, list[list[Reading]]] = {}
        for side, shares in (("alone", False), ("shared", True)):  # a first, unmeasured round, for the answers
            engine.lm.share_prefixes = shares
            answers[side] = await read(work)
        assert answers["alone"] == answers["shared"], f"{name}: the answers differ"

        def measured(shares: bool, work: list[Task] = work) -> float:
            engine.lm.share_prefixes = shares
            started = time.perf_counter()
            asyncio.run_coroutine_threadsafe(read(work), loop).result()
            return len(work) * QUESTIONS / (time.perf_counter() - started)

        sides = {f"{name}_shared": lambda _: measured(True), f"{name}_alone": lambda _: measured(False)}
        rounds = await asyncio.to_thread(alternate, sides, options.rounds)
        ratios[name] = quotient(rounds[f"{name}_shared"], rounds[f"{name}_alone"])
        figures |= rounds
    versions = {package: version(package) for package in ("transformers", "torch")}
    facts = {"unit": "questions/s", "questions": QUESTIONS, "orders": ORDERS, "caption_tokens": lengths}
    report("reader", figures, versions, ratio=ratios["long"], ratios=ratios, **facts)
    await engine.aclose()


if __name__ == "__main__":
    asyncio.run(main())
