"""Readers that cannot read, that captions do not fit, or that have rewarded the captioner: refused or warned of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.manifests.fingerprint import fingerprint
from capipe.models.engines.base import Completion, GenerationRequest, RequestError
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig, ModelIdentity, model_identity, same_model
from capipe.models.quiz import Question
from capipe.pipeline.jobs.grade import GradeStage
from capipe.pipeline.jobs.rows.engine import EngineSetup
from capipe.pipeline.jobs.rows.reader_checks import check_captions, check_limit
from capipe.pipeline.jobs.train import run_training
from capipe.stages.questions.grade import GradeConfig
from capipe.stages.questions.open_ended import OpenQuestion, OpenReaderConfig
from capipe.trainer.recipe import load_recipe

from ....readers import copied, deaf, prefers_a
from ...conftest import capipe, one_line, table

QUICK = ("steps=1", "rollout.images=2", "save_every=1", "validation=null", "rewards.1.weight=0")
ASKED = (Question("What color is the star?", ("red", "blue", "green"), 0),)


def stage(reader: str | Path, asked: tuple[Question, ...] = ASKED) -> GradeStage:
    return GradeStage(GradeConfig(), EngineSetup(EngineConfig("transformers", str(reader))), asked=asked)


def evaluated(data: Path, reader: str | Path, out: Path, *options: object) -> tuple[dict[str, Any], str]:
    """The report of a `capipe eval` of the captions of a set's images, and what it said on stderr."""
    common = ("--shards", data / "shards", "--questions", data / "qa", "--out", out, "--reader", reader)
    captioner = () if "--captions" in options else ("--model", "tiny/captioner", "--max-tokens", 40)
    done = capipe("eval", *common, *captioner, "--samples", 1, "--engine", "transformers", *options)
    return json.loads((out / "report.json").read_text()), done.stderr


async def train(recipe: Path, out: Path, *changes: str) -> list[str]:
    said: list[str] = []
    await run_training(load_recipe(recipe, [*QUICK, *changes]), out, fresh=False, say=said.append)
    return said


# --- readers that cannot read ----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_training_is_refused_by_a_reader_that_hears_nothing(recipe: Path, tmp_path: Path) -> None:
    reader = deaf(tmp_path / "deaf")
    with pytest.raises(
        BadInput, match=r"preflight: .*deaf: .* self-oracle 0\.\d+, oracle 0\.\d+, blind 0\.\d+.*less than 0\.20"
    ):
        await train(recipe, tmp_path / "run", f"rewards.0.reader={reader}")
    assert not list((tmp_path / "run").glob("step-*"))
    said = await train(recipe, tmp_path / "off", f"rewards.0.reader={reader}", "preflight=false")
    assert not any(line.startswith("preflight") for line in said)
    said = await train(recipe, tmp_path / "sound")
    (line,) = (each for each in said if each.startswith("preflight: self-oracle"))
    assert re.search(r", oracle [01]\.\d+, blind 0\.\d+; oracle by place of the right option: A [01]\.\d+, B ", line)
    assert not any(each.startswith("warning") for each in said)


@pytest.mark.slow
def test_evaluation_warns_of_readers_that_hear_nothing_or_prefer_a_place(training_data: Path, tmp_path: Path) -> None:
    report, told = evaluated(training_data / "held", deaf(tmp_path / "deaf"), tmp_path / "one")
    kinds = {each["kind"]: each for each in report["warnings"]}
    assert "cannot_read" in kinds and kinds["cannot_read"]["figures"]["threshold"] == 0.2
    assert "warning: the reader does not find in captions what they tell: self-oracle 0." in told
    assert "**Warning:** the reader does not find" in (tmp_path / "one/report.md").read_text()
    captions = ("--captions", tmp_path / "one/captions")
    report, told = evaluated(training_data / "train", prefers_a(tmp_path / "biased", 24.0), tmp_path / "two")
    assert "prefers_places" in [each["kind"] for each in report["warnings"]]
    assert "warning: the reader prefers some places: accuracy from" in told and "(A 1.000, B 0." in told
    report, told = evaluated(training_data / "held", "tiny/reader", tmp_path / "three", *captions)
    assert report["warnings"] == [] and "warning" not in told
    assert [each["name"] for each in report["systems"]][1:3] == ["oracle", "self-oracle"]


@pytest.mark.slow
def test_grades_without_the_control_that_tells_all_are_not_gone_on_with(training_data: Path, tmp_path: Path) -> None:
    evaluated(training_data / "held", "tiny/reader", tmp_path / "out")
    file = next((tmp_path / "out/graded/_capipe").glob("config*.json"))
    config = json.loads(file.read_text())
    del config["semantic"]["grade"]["self_oracle"]
    config["fingerprint"] = fingerprint(config["semantic"])  # as an earlier version would have written it
    file.write_text(json.dumps(config))
    common = ("--shards", training_data / "held/shards", "--questions", training_data / "held/qa")
    again = ("--captions", tmp_path / "out/captions", "--reader", "tiny/reader", "--engine", "transformers")
    refused = capipe("eval", *common, "--out", tmp_path / "out", *again, code=2)
    assert "grade.self_oracle" in one_line(refused)


# --- one reader under two names --------------------------------------------------------------------------------------


def test_one_model_under_two_names(tmp_path: Path) -> None:
    same, other = copied(tmp_path / "same"), copied(tmp_path / "other", max_position_embeddings=100)
    (same / "README.md").write_text("A copy.")
    bundled = model_identity("tiny/reader")
    assert same_model(bundled, model_identity(str(same))) and not same_model(bundled, model_identity(str(other)))
    served, named = ModelIdentity("Qwen/x", None), ModelIdentity("Qwen/x", "0" * 64)
    assert same_model(served, named) and not same_model(served, ModelIdentity("Qwen/y", "0" * 64))
    assert same_model(ModelIdentity(str(same), None), bundled), "a server calls it by the folder's name"


async def test_the_hold_out_reader_is_not_the_rewards_under_another_name(recipe: Path, tmp_path: Path) -> None:
    again = copied(tmp_path / "again")
    loaded = load_recipe(recipe, [f"validation.reader={again}"])
    with pytest.raises(
        BadInput, match=r"validation.reader: .*again is the reward's reader, tiny/reader, under another name"
    ):
        await run_training(loaded, tmp_path / "run", fresh=False, say=lambda line: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
async def test_evaluation_by_the_rewards_own_reader_is_warned_of(
    recipe: Path, training_data: Path, tmp_path: Path
) -> None:
    await train(recipe, tmp_path / "run", "preflight=false")
    own = ("--model", tmp_path / "run/step-000001", "--max-tokens", 40)
    again = copied(tmp_path / "again")
    common = ("--shards", training_data / "held/shards", "--questions", training_data / "held/qa", "--samples", 1)
    told = capipe("eval", *common, *own, "--out", tmp_path / "a", "--reader", again, "--engine", "transformers").stderr
    assert "warning: the captioner was trained with this very reader as its reward" in told
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert [each["kind"] for each in report["warnings"]] == ["reward_reader"]
    captions = ("--captions", tmp_path / "a/captions")
    report, told = evaluated(training_data / "held", "tiny/holdout-reader", tmp_path / "b", *captions)
    assert report["warnings"] == [] and "warning" not in told
    evaluated(training_data / "held", "tiny/reader", tmp_path / "c", *captions)
    capipe("compare", tmp_path / "a", tmp_path / "c")  # one reader, whatever it is called
    assert "grade both with one reader" in one_line(capipe("compare", tmp_path / "a", tmp_path / "b", code=2))


# --- captions that do not fit ----------------------------------------------------------------------------------------


async def test_captions_longer_than_the_readers_context_are_refused_at_the_start(recipe: Path, tmp_path: Path) -> None:
    short = copied(tmp_path / "short", max_position_embeddings=70)
    with pytest.raises(
        BadInput,
        match=r"rollout.max_tokens: a caption of 60 tokens may be \d+ tokens to .*short, which has room for \d+",
    ):
        await train(recipe, tmp_path / "run", f"rewards.0.reader={short}")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_may_write_longer_captions_than_its_reader_takes_is_refused(
    training_data: Path, tmp_path: Path
) -> None:
    common = ("--shards", training_data / "held/shards", "--questions", training_data / "held/qa")
    model = ("--model", "tiny/captioner", "--reader", "tiny/holdout-reader", "--engine", "transformers")
    done = capipe("eval", *common, *model, "--out", tmp_path / "out", "--max-tokens", 2000, code=2)
    assert "--max-tokens: captions of up to 2000 tokens, and tiny/holdout-reader has room for" in one_line(done)
    assert not (tmp_path / "out").exists()


def texts(*lengths: int) -> Sequence[tuple[str, str, int | None]]:
    return [(f"{number:03}", " star" * length, None) for number, length in enumerate(lengths)]


def test_real_captions_are_held_against_the_readers_context(tmp_path: Path) -> None:
    short = stage(copied(tmp_path / "short", max_position_embeddings=300))
    fits = check_captions(short, texts(50, 120, 7))
    assert (fits.all, fits.too_long, fits.cautions) == (3, 0, []) and 110 < fits.longest < 130
    one = check_captions(short, texts(50, 900, 120))
    (caution,) = one.cautions
    assert caution.kind == "too_long" and caution.figures["too_long"] == 1
    assert caution.text.startswith("1 of 3 captions have more than the") and "row '001', 9" in caution.text
    assert check_captions(short, texts(*[5] * 40, 900, 900)).too_long == 2
    with pytest.raises(BadInput, match=r"2 of 4 captions of up to 9\d\d tokens, and .*short has room for \d+ beside"):
        check_captions(short, texts(50, 900, 800, 120))
    assert check_captions(stage(short.engine.model, ()), texts(900, 900)).all == 0, "nothing is asked"
    check_limit(short, 100)
    with pytest.raises(BadInput, match="--max-tokens: captions of up to 290 tokens"):
        check_limit(short, 290)


def test_answers_in_words_need_room_too(tmp_path: Path) -> None:
    """64 tokens for the answer, where a letter needs one; also in a set that has no other questions."""
    short = stage(copied(tmp_path / "short", max_position_embeddings=300))
    opened = (OpenQuestion("What color is the star?", ("red",)), OpenQuestion("What? " * 40, ("red",)))
    alone = replace(short, asked=(), open_ended=True, opened=opened[:1])
    both, longer = replace(short, open_ended=True, opened=opened[:1]), replace(alone, opened=opened)
    by_letter, in_words, of_both, of_longer = (
        check_captions(each, texts(5)).room for each in (short, alone, both, longer)
    )
    assert by_letter > in_words + 30 and in_words > of_longer + 30 and of_both == in_words
    with pytest.raises(BadInput, match=rf"captions of up to 290 tokens, and .*short has room for {in_words} beside"):
        check_limit(alone, 290)
    check_limit(alone, in_words)


def test_the_engine_s_room_is_for_the_longest_answer() -> None:
    engine = EngineConfig("transformers", "tiny/reader", room=1)
    rooms = []
    for open_ended in (False, True):
        made = GradeStage(GradeConfig(), EngineSetup(engine), asked=ASKED, open_ended=open_ended).with_room(100)
        rooms.append(made.setup.engine.room or 0)
    assert rooms[1] - rooms[0] == OpenReaderConfig().answer_tokens - made.reader.answer_tokens == 60


async def test_a_worker_refuses_a_context_without_room_for_words() -> None:
    limited = EngineSetup(EngineConfig("transformers", "tiny/reader", max_model_len=150))
    opened = (OpenQuestion("What color is the star?", ("red",)),)
    with pytest.raises(BadInput, match="captions of up to 100 tokens, and tiny/reader has room for"):
        await GradeStage(GradeConfig(), limited, open_ended=True, opened=opened, longest=100).load()
    loaded = await GradeStage(GradeConfig(), limited, open_ended=True, opened=opened, longest=5).load()
    await loaded.aclose()


async def test_a_worker_checks_what_its_engine_has_settled_on() -> None:
    limited = GradeStage(
        GradeConfig(),
        EngineSetup(EngineConfig("transformers", "tiny/reader", max_model_len=150)),
        asked=ASKED,
        longest=140,
    )
    with pytest.raises(BadInput, match="captions of up to 140 tokens, and tiny/reader has room for"):
        await limited.load()
    loaded = await stage("tiny/reader").load()
    await loaded.aclose()


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_request_that_fails_in_validation_costs_one_caption(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = 0
    generate = TransformersEngine.generate

    async def failing(self: TransformersEngine, request: GenerationRequest) -> Completion:
        nonlocal greedy
        greedy += request.sampling.temperature == 0
        if greedy == 6 and request.sampling.temperature == 0:  # four images: in the second validation
            raise RequestError("the engine timed out")
        return await generate(self, request)

    monkeypatch.setattr(TransformersEngine, "generate", failing)
    said: list[str] = []
    await run_training(
        load_recipe(recipe, ["preflight=false", "steps=2"]), tmp_path / "run", fresh=False, say=said.append
    )
    assert "warning: validation: 1 captions could not be sampled and are left out: the engine timed out" in said
    (line,) = (each for each in said if each.startswith("validation after 2 steps"))
    assert "images 3.000 failed 1.000" in line and (tmp_path / "run/step-000002/model.safetensors").exists()


# --- ten options -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_options_are_imported_and_put_in_eleven_letters_and_eleven_are_refused(
    training_data: Path, tmp_path: Path
) -> None:
    ten = [
        f"a {color} star"
        for color in ["red", "blue", "green", "gray", "white", "black", "pink", "brown", "purple", "orange"]
    ]
    lines = [
        {"image": "000000.jpg", "question": "Which is shown?", "options": ten, "answer": "J"},
        {"image": "000000.jpg", "question": "Which one is it?", "options": [*ten, "a star"], "answer": "K"},
        {"image": "000000.jpg", "question": "Or which?", "options": [*ten, "Cannot tell"], "answer": ten[9]},
    ]
    (tmp_path / "ten.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shards = ("--shards", training_data / "held/shards")
    capipe("qa", *shards, "--out", tmp_path / "qa", "--import", tmp_path / "ten.jsonl", "--screen", "none")
    (row,) = (each for each in table(tmp_path / "qa/written") if each["questions"])
    assert [each["status"] for each in row["questions"]] == ["ok", "bad_options", "ok"]
    assert row["questions"][1]["error"] == "11 options, not 2 to 10"
    reader = ("--model", "tiny/captioner", "--max-tokens", 40, "--reader", "tiny/reader", "--engine", "transformers")
    capipe("eval", *shards, "--questions", tmp_path / "qa", "--out", tmp_path / "eval", "--samples", 1, *reader)
    (graded,) = (each for each in table(tmp_path / "eval/graded") if each["captions"])
    assert {len(answer["chosen"]) for caption in graded["captions"] for answer in caption["answers"]} == {11}
