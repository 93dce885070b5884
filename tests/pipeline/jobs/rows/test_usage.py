"""Tokens of a row: all of its answered requests, and nobody else's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.models.engines.base import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    GenerationRequest,
    ImageInput,
    Prompt,
    RequestError,
)
from capipe.pipeline.inspect.costs import stage_cost
from capipe.pipeline.jobs.rows.counting_engine import CountingEngine, TracedEngine
from capipe.pipeline.jobs.rows.usage import counted

from ....conftest import photo
from ....scripted import Scripted
from ...conftest import CaptionServer, capipe, table


class Counts(Scripted):
    """Each prompt has as many tokens as words, its image four more."""

    async def generate(self, request: GenerationRequest) -> Completion:
        answer = await super().generate(request)
        words, image = len(request.prompt.text.split()), 4 if request.prompt.image else 0
        return Completion(answer.text, (), "stop", answer.n_tokens, prompt_tokens=words + image, image_tokens=image)

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        return ChoiceScores((-0.1, -3.0), prompt_tokens=10, image_tokens=None)


async def test_rows_that_are_worked_on_at_once_are_counted_apart() -> None:
    engine = CountingEngine(Counts(generate=lambda request: "one two three"))
    image = ImageInput("u" * 32)

    async def asks(times: int) -> dict[str, Any]:
        prompts = [Prompt("a b", image), Prompt("a b c")][:times]
        await asyncio.gather(*(engine.generate(GenerationRequest(prompt)) for prompt in prompts))
        return {"status": "ok"}

    none, one, two = await asyncio.gather(*(counted(lambda _, n=n: asks(n), None) for n in range(3)))  # type: ignore[misc, arg-type]
    assert none == {"status": "ok", "prompt_tokens": None, "image_tokens": None, "output_tokens": None}
    assert (one["prompt_tokens"], one["image_tokens"], one["output_tokens"]) == (6, 4, 3)
    assert (two["prompt_tokens"], two["image_tokens"], two["output_tokens"]) == (9, 4, 6)


async def test_what_an_engine_does_not_count_is_unknown_and_what_failed_costs_nothing() -> None:
    engine = CountingEngine(Counts(generate=lambda request: RequestError("lost")))
    image = ImageInput("u" * 32)

    async def asks(row: object) -> dict[str, Any]:
        await engine.choose(ChoiceRequest(Prompt("x", image), ("A", "B")))
        await engine.choose(ChoiceRequest(Prompt("x"), ("A", "B")))
        with pytest.raises(RequestError):
            await engine.generate(GenerationRequest(Prompt("x")))
        return {}

    assert await counted(asks, None) == {"prompt_tokens": 20, "image_tokens": None, "output_tokens": 0}  # type: ignore[arg-type]


async def test_the_log_of_requests_changes_no_count(tmp_path: Path) -> None:
    """The engine that writes it is inside the one that counts."""
    traced = TracedEngine(Counts(generate=lambda request: "one two three"), tmp_path / "trace")
    engine = CountingEngine(traced)

    async def asks(row: object) -> dict[str, Any]:
        await engine.generate(GenerationRequest(Prompt("a b")))
        await engine.choose(ChoiceRequest(Prompt("x"), ("A", "B")))
        return {}

    assert await counted(asks, None) == {"prompt_tokens": 12, "image_tokens": 0, "output_tokens": 3}  # type: ignore[arg-type]
    assert (engine.requests, traced.requests) == (2, 0)
    await engine.aclose()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    capipe("ingest", folder, "--out", tmp_path / "shards", "--shard-size", 2)
    return tmp_path / "shards"


def test_captions_in_process_have_their_tokens_and_the_manifest_their_sums(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions"
    words = ("--model", "tiny/captioner", "--engine", "transformers", "--max-tokens", 12, "--max-attempts", 2)
    capipe("annotate", "--shards", shards, "--out", out, *words)
    rows = table(out)
    asked = [each for each in rows if each["captions"]]
    assert len(asked) == 3 and len(rows) == 4
    for each in asked:
        attempts = each["captions"][0]["attempts"]
        assert each["image_tokens"] > 0 and each["image_tokens"] % attempts == 0
        assert each["prompt_tokens"] > each["image_tokens"] and each["prompt_tokens"] % attempts == 0
        assert each["captions"][0]["n_tokens"] <= each["output_tokens"] <= 12 * attempts
    (broken,) = [each for each in rows if not each["captions"]]
    assert (broken["prompt_tokens"], broken["image_tokens"], broken["output_tokens"]) == (None, None, None)
    cost = stage_cost("captions", Artifact.open(str(out)))
    assert cost is not None and cost.rows == 3 and cost.core_seconds > 0 and cost.gpu_seconds == 0
    for column in ("prompt_tokens", "image_tokens", "output_tokens"):
        assert cost.total(column) == sum(each[column] for each in asked)
    again = tmp_path / "again"
    capipe("annotate", "--shards", shards, "--out", again, *words, "--concurrency", 1)
    first, second = (Artifact.open(str(place)) for place in (out, again))
    assert first.committed() == second.committed() and first.manifest_digest() == second.manifest_digest()
    capipe("report", tmp_path, "--price", "core=0.04")
    page = (tmp_path / "report.html").read_text()
    assert "What the stages that ask a model cost" in page and "price per million" in page


def test_a_server_that_counts_prompts(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    """It says how many tokens a prompt has, and not how many of them are the image's."""
    out = tmp_path / "captions"
    capipe("annotate", "--shards", shards, "--out", out, "--model", "m", "--engine", server.url)
    asked = [each for each in table(out) if each["captions"]]
    assert [each["output_tokens"] for each in asked] == [5, 5, 5]
    assert [each["image_tokens"] for each in asked] == [None] * 3
