"""Prompts, re-rolls and statuses, with an engine whose answers are scripted (the real ones are tested elsewhere)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    GenerationRequest,
    ImageInput,
    Refused,
    RequestError,
)
from capipe.models.images.grid import ImageGrid
from capipe.stages.annotate.captioner import AnnotateConfig, Annotator, chosen_caption, derive_seed
from capipe.stages.annotate.prompts import NAMED, parse_prompt

Answer = str | RequestError


class Scripted:
    """Answers each request by a function of it and remembers all of them."""

    concurrency = 4
    grid: ImageGrid | None = ImageGrid(28, 784, 12544)
    guides = False

    def __init__(self, answer: Callable[[GenerationRequest], Answer]) -> None:
        self.answer, self.requests = answer, list[GenerationRequest]()

    async def generate(self, request: GenerationRequest) -> Completion:
        self.requests.append(request)
        answer = self.answer(request)
        if isinstance(answer, RequestError):
            raise answer
        return Completion(answer, (), "stop", len(answer.split()))

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        raise AssertionError("annotate never chooses")

    async def aclose(self) -> None: ...


ROW = Row(3, "k", "u" * 32, Status.OK, None, b"image", "jpg", "alt text")
IMAGE = ImageInput(ROW.uid or "")


def config(*prompts: str, **options: object) -> AnnotateConfig:
    return AnnotateConfig(prompts=tuple(map(parse_prompt, prompts)), **options)  # type: ignore[arg-type]


async def test_every_prompt_gets_its_caption_and_the_original_text_is_kept() -> None:
    engine = Scripted(lambda request: f"said to: {request.prompt.text}")
    row = await Annotator(engine, "m", config("short", "ocr=Read it.")).annotate(ROW, IMAGE)
    assert (row["key"], row["uid"], row["status"], row["text"]) == ("k", "u" * 32, "ok", "alt text")
    assert [(c["name"], c["text"]) for c in row["captions"]] == [
        ("short", f"said to: {NAMED['short']}"),
        ("ocr", "said to: Read it."),
    ]
    assert all(c["attempts"] == 1 and c["model"] == "m" and "@" in c["prompt_id"] for c in row["captions"])


async def test_an_unhealthy_caption_is_rolled_again_under_another_seed_and_warm() -> None:
    engine = Scripted(lambda request: "!" * 40 if request.sampling.temperature == 0 else "A dog.")
    row = await Annotator(engine, "m", config("plain")).annotate(ROW, IMAGE)
    (caption,) = row["captions"]
    assert (row["status"], caption["text"], caption["attempts"]) == ("ok", "A dog.", 2)
    first, second = (request.sampling for request in engine.requests)
    assert first.seed != second.seed and second.temperature > 0


async def test_re_rolls_are_bounded_and_the_last_text_is_kept_with_its_fault() -> None:
    engine = Scripted(lambda request: "I'm sorry, I cannot." if request.prompt.text == NAMED["plain"] else "A dog.")
    row = await Annotator(engine, "m", config("plain", "short", max_attempts=3)).annotate(ROW, IMAGE)
    assert row["status"] == "refused" and "plain: begins" in row["error"]
    assert [(c["status"], c["attempts"]) for c in row["captions"]] == [("refused", 3), ("ok", 1)]
    assert row["captions"][0]["text"] == "I'm sorry, I cannot." and chosen_caption(row) == "A dog."
    assert len({request.sampling.seed for request in engine.requests}) == 4


async def test_an_engine_error_is_a_status_and_costs_no_other_caption() -> None:
    def answer(request: GenerationRequest) -> Answer:
        return RequestError("out of tokens") if request.prompt.text == NAMED["plain"] else "A dog."

    row = await Annotator(Scripted(answer), "m", config("plain", "short")).annotate(ROW, IMAGE)
    assert row["status"] == "engine_error" and row["error"] == "plain: out of tokens"
    assert [c["text"] for c in row["captions"]] == [None, "A dog."]


async def test_a_refusal_by_the_server_is_final_and_its_words_are_kept() -> None:
    def answer(request: GenerationRequest) -> Answer:
        return Refused("refused by the model: No.", "No.") if request.prompt.text == NAMED["plain"] else "A dog."

    engine = Scripted(answer)
    row = await Annotator(engine, "m", config("plain", "short", max_attempts=3)).annotate(ROW, IMAGE)
    assert row["status"] == "refused" and row["error"] == "plain: refused by the model: No."
    assert [(c["text"], c["attempts"]) for c in row["captions"]] == [("No.", 1), ("A dog.", 1)]


async def test_json_is_a_fault_where_the_prompt_does_not_ask_for_it() -> None:
    engine = Scripted(lambda request: '{"caption": "A dog."}')
    row = await Annotator(engine, "m", config("plain", "fields=Reply in JSON.")).annotate(ROW, IMAGE)
    assert [(c["status"], c["attempts"]) for c in row["captions"]] == [("degenerate", 3), ("ok", 1)]


async def test_a_re_roll_of_a_search_is_sampled() -> None:
    """Another search would find the same caption; the other rules hold for it, too."""
    engine = Scripted(lambda request: "")
    rules = {"beams": 5, "no_repeat_ngram": 2, "min_tokens": 4}
    await Annotator(engine, "m", config("plain", max_attempts=2, **rules)).annotate(ROW, IMAGE)
    first, second = (request.sampling for request in engine.requests)
    assert (first.beams, first.temperature) == (5, 0.0) and (second.beams, second.temperature) == (1, 0.7)
    assert [(each.no_repeat_ngram, each.min_tokens) for each in (first, second)] == [(2, 4)] * 2


def test_rules_of_decoding_are_in_the_configuration_only_where_they_are_set() -> None:
    """Artifacts of before these options keep their fingerprints."""
    assert not {"beams", "no_repeat_ngram", "min_tokens"} & config("plain").model_dump().keys()
    assert config("plain", beams=5).model_dump()["beams"] == 5
    with pytest.raises(ValueError, match="set temperature to 0"):
        config("plain", beams=5, temperature=1.0)


async def test_samples_differ_in_seed_only_and_seeds_depend_on_the_image_alone() -> None:
    engine = Scripted(lambda request: "A dog.")
    row = await Annotator(engine, "m", config("plain", samples=3, temperature=1.0)).annotate(ROW, IMAGE)
    assert [c["name"] for c in row["captions"]] == ["plain#0", "plain#1", "plain#2"]
    seeds = [request.sampling.seed for request in engine.requests]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == derive_seed(0, "u" * 32, parse_prompt("plain").prompt_id, 0, 1)


def test_prompt_options(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("  Read the sign.\n")
    assert parse_prompt(f"ocr=@{tmp_path}/p.txt").text == "Read the sign."
    assert parse_prompt("a=b=c").text == "b=c"
    for option, word in (("nosuch", "there are"), ("x=", "empty"), ("=y", "name"), ("x=@/no/file", "cannot be read")):
        with pytest.raises(BadInput, match=word):
            parse_prompt(option)
