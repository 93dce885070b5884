"""Questions about absent things: from whatever a writer names to questions that screening keeps or does not."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.schema import QUESTIONS, SCREEN
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import ChoiceRequest, Completion, GenerationRequest, Refused, RequestError
from capipe.models.quiz import ABSENT, ABSTAIN, KINDS, Question, absent_prompt, absent_schema, writing_prompt
from capipe.models.reader import QuizReader, ReaderConfig
from capipe.models.tiny.world.grade import is_true
from capipe.models.tiny.world.scenes import scenes
from capipe.stages.questions.absent import absent_questions
from capipe.stages.questions.screen import PRESETS, Screener
from capipe.stages.questions.screen_counts import GUESSING, count_screened
from capipe.stages.questions.validate import RawQuestion, checked
from capipe.stages.questions.write import QuestionsConfig, QuestionWriter

from ...oracle.scene_engine import SceneEngine, absent_things
from ...scripted import IMAGE, Scripted, knows

ROW = Row(0, "k", IMAGE.uid, Status.OK, None, b"image", "jpg")
WRITTEN = json.dumps(
    {"questions": [{"kind": "color", "question": "What color?", "options": ["red", "blue"], "answer": "red"}]}
)


def named(text: str, most: int = 5) -> list[RawQuestion]:
    return absent_questions(Completion(text, (), "stop", 9), most)


@pytest.mark.parametrize(
    "text",
    [
        '{"things": ["a dog", "An umbrella.", "water"]}',
        '["a dog", "An umbrella", "water"]',
        'Here {you} are:\n```json\n{"things": ["a dog", "an  umbrella", " water "]}\n```',
        '{"things": ["a dog", "an umbrella", "water", "a fourth", "a fifth"]}',
    ],
)
def test_things_become_questions_answered_no(text: str) -> None:
    found = [checked(entry, set()) for entry in named(text, 3)]
    asked = ["Is there a dog in the image?", "Is there an umbrella in the image?", "Is there any water in the image?"]
    assert [entry["question"] for entry in found] == asked
    assert {(entry["kind"], *entry["options"], entry["answer"], entry["status"]) for entry in found} == {
        (ABSENT, "Yes", "No", 1, "ok")
    }


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("", ["named no absent thing"]),
        ("I see no reason to.", ["no JSON with absent things"]),
        ('{"things": "a dog"}', ["no JSON with absent things"]),
        ('{"things": []}', ["is empty"]),
        ("[" * 5000, ["no JSON with absent things"]),
        ('{"things": [3, "", "Is it a dog?", "a b c d e f g h i"]}', ["a int where", "''", "'Is it", "'a b c"]),
    ],
)
def test_what_names_no_thing_is_kept_as_malformed(text: str, reasons: list[str]) -> None:
    found = [checked(entry, set()) for entry in named(text)]
    assert [entry["status"] for entry in found] == ["malformed"] * len(reasons)
    for entry, reason in zip(found, reasons, strict=True):
        assert reason in entry["error"]


async def written(says: Any, **settings: Any) -> dict[str, Any]:
    def generate(request: GenerationRequest) -> str | Exception:
        absent = request.prompt.text == absent_prompt(2)
        answer: str | Exception = says if absent else WRITTEN
        return answer

    config = QuestionsConfig(absent=2, **settings)
    out = await QuestionWriter(Scripted(generate=generate), "m", config, True).write(ROW, IMAGE)
    back: dict[str, Any] = pa.Table.from_pylist([out], schema=QUESTIONS).to_pylist()[0]
    return back


async def test_they_come_after_the_written_ones_by_a_request_of_their_own() -> None:
    answer = '{"things": ["a dog", "a dog", "a cat"]}'
    out = await written(answer)
    assert [(entry["kind"], entry["status"]) for entry in out["questions"]] == [
        ("color", "ok"),
        (ABSENT, "ok"),
        (ABSENT, "duplicate"),
    ]
    assert out["raw"] == [WRITTEN, answer] and (out["status"], out["attempts"]) == ("ok", 1)
    failed = await written(RequestError("reset"))
    assert (failed["status"], failed["error"]) == ("engine_error", "reset"), "to be done again, whole"
    refused = await written(Refused("no", "I will not"))
    assert refused["status"] == "ok" and refused["raw"][-1] == "I will not" and len(refused["questions"]) == 1


async def test_the_request_is_guided_and_its_seed_its_own() -> None:
    engine = Scripted(generate=lambda request: WRITTEN)
    await QuestionWriter(engine, "m", QuestionsConfig(absent=2), True).write(ROW, IMAGE)
    first, absent = engine.generations
    assert absent.json_schema == absent_schema(2) and first.json_schema != absent.json_schema
    assert absent.sampling.seed != first.sampling.seed and absent.prompt.image is IMAGE
    plain = QuestionsConfig()
    assert plain.prompt.text == writing_prompt(5, KINDS) and "absent" not in plain.model_dump()
    assert plain.room <= QuestionsConfig(absent=2).room


async def test_screening_keeps_what_is_absent_and_nothing_else() -> None:
    """The scene grades exactly: a thing that is there is unsupported; one that a blind model denies has leaked."""
    for scene in scenes("heldout", 10, seed=3):
        there = f"a {scene.things[0].color} {scene.things[0].shape}"
        things = [*absent_things(scene, 2), there]
        assert [is_true(scene, thing) for thing in things] == [False, False, True]
        seen: set[str] = set()
        entries = [checked(entry, seen) for entry in named(json.dumps(things))]
        questions = {"key": "k", "uid": IMAGE.uid, "status": "ok", "error": None, "questions": entries}
        given = Row(0, "k", IMAGE.uid, Status.OK, None, b"image", "jpg", beside={"questions": questions})
        sees = SceneEngine({IMAGE.uid: scene})
        out = await Screener(QuizReader(sees, ReaderConfig()), "m", PRESETS["strict"]).screen(given, IMAGE)
        pa.Table.from_pylist([out], schema=SCREEN)
        assert [entry["status"] for entry in out["questions"]] == ["ok", "ok", "unsupported"]
        denies = _Denying({IMAGE.uid: scene})
        out = await Screener(QuizReader(denies, ReaderConfig()), "m", PRESETS["strict"]).screen(given, IMAGE)
        assert [entry["status"] for entry in out["questions"]] == ["leaked", "leaked", "unsupported"]


async def test_a_forced_guess_may_be_no() -> None:
    """Who has to guess denies what nobody mentioned; of other questions that is a leak."""
    (scene,) = scenes("heldout", 1, seed=3)
    seen: set[str] = set()
    entries = [checked(entry, seen) for entry in named(json.dumps(absent_things(scene, 1)))]
    entries.append(checked(RawQuestion("Is it dark in the image?", ["Yes", "No"], "No", "other"), seen))
    questions = {"key": "k", "uid": IMAGE.uid, "status": "ok", "error": None, "questions": entries}
    given = Row(0, "k", IMAGE.uid, Status.OK, None, b"image", "jpg", beside={"questions": questions})

    def chooses(request: ChoiceRequest) -> list[float]:
        return (
            knows(request, "No")
            if request.prompt.image is not None or ABSTAIN not in request.prompt.text
            else (knows(request, ABSTAIN))
        )

    reader = QuizReader(Scripted(chooses), ReaderConfig())
    out = await Screener(reader, "m", PRESETS["strict"]).screen(given, IMAGE)
    assert [entry["status"] for entry in out["questions"]] == ["ok", "leaked"]
    counts = count_screened(out["questions"], PRESETS["strict"])
    assert (counts.kept, counts.refused[GUESSING]) == (1, 1)


class _Denying(SceneEngine):
    """Without an image it says no to everything."""

    @staticmethod
    def _answer(scene: Any, question: str, options: Any) -> str:
        return SceneEngine._answer(scene, question, options) if scene is not None else "No"


def test_only_a_question_answered_no_asks_for_something_absent() -> None:
    assert Question("Is there a dog?", ("Yes", "No"), 1, ABSENT).asks_absent
    assert not Question("Is there a dog?", ("Yes", "No"), 0, ABSENT).asks_absent
    assert not Question("Is there a dog?", ("Yes", "No"), 1, "object").asks_absent
