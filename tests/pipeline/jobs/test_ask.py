"""The loaded stage on a real engine: what is written of a row depends on the row alone, to the last digit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.manifests.shards import Row, uid_of
from capipe.manifests.status import Status
from capipe.models.engines.loading import EngineConfig
from capipe.models.tiny.world.corpus import samples
from capipe.models.yes_no import YesNoConfig
from capipe.pipeline.jobs.ask import AskProcessor, AskStage
from capipe.pipeline.jobs.rows.engine import EngineSetup
from capipe.stages.ask.asker import AskConfig
from capipe.stages.ask.questions import parse_questions

from ...conftest import photo


def stage(*options: str, **engine: Any) -> AskStage:
    config = AskConfig(questions=parse_questions(options), reader=YesNoConfig(least_mass=0))
    setup = EngineSetup(EngineConfig("transformers", "tiny/teacher", device="cpu", **engine), decode_workers=1)
    return AskStage(config, setup)


def rows() -> list[Row]:
    """Five scenes of several sizes, and one that cannot be decoded."""
    images = [each.image for size in (84, 112) for each in samples(3, "heldout", seed=5, size=size)][:5]
    images.append(photo(1)[:200])
    return [Row(index, str(index), uid_of(data), Status.OK, None, data, "jpg") for index, data in enumerate(images)]


async def answered(processor: AskProcessor, order: list[int], at_once: bool) -> list[dict[str, Any]]:
    """The output rows by index, asked about in this order."""
    given = rows()
    asking = [processor.process_row(given[index]) for index in order]
    found = await asyncio.gather(*asking) if at_once else [await each for each in asking]
    return [row for _, row in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


async def test_a_row_is_the_same_whichever_rows_are_asked_about_beside_it() -> None:
    processor = await stage("all", "star=Is there a star?").load()
    try:
        assert processor.window >= 6
        alone = await answered(processor, [0, 1, 2, 3, 4, 5], at_once=False)
        assert await answered(processor, [3, 5, 0, 4, 1, 2], at_once=True) == alone
    finally:
        await processor.aclose()
    assert [row["status"] for row in alone] == ["ok"] * 5 + ["corrupt"]
    values = [value for row in alone[:5] for name, value in row.items() if name.startswith("ask_")]
    assert len(values) == 45 and all(0 <= value <= 1 for value in values) and len(set(values)) > 20
    assert not any(name.startswith("ask_") for name in alone[5])


async def test_a_question_beyond_the_context_is_refused_before_the_first_image() -> None:
    with pytest.raises(BadInput, match=r"--ask star: the prompt's .* tokens leave no room"):
        await stage(f"star={'Is there a star? ' * 50}", max_model_len=64).load()
