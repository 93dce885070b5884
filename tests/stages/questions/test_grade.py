"""Grading: every caption and control is read by the same reader, and what could not be read is not counted as wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.schema import GRADE, GRADE_WITH_OPEN, LATER
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import ChoiceRequest, EngineDead, GenerationRequest, RequestError
from capipe.models.quiz import READ_NOTHING, caption_prompt
from capipe.models.reader import QuizReader, ReaderConfig
from capipe.models.tiny.world.scenes import Scene, Sign, Thing, sample_scene
from capipe.stages.questions.grade import GradeConfig, Grader, passed_on, scene_of
from capipe.stages.questions.open_ended import OpenQuestion, OpenReader, stored
from capipe.stages.questions.validate import RawQuestion, checked

from ...scripted import IMAGE, Scores, Scripted, knows, pick

SCENE = Scene("gray", (Thing("center", "star", "blue", "large"),), Sign("EXIT", "top left"))
CONTROLS = ["generic", "empty", "blind"]
TOLD = "What color is the star? blue. What does the sign say? EXIT."


def questions(**changes: Any) -> dict[str, Any]:
    seen: set[str] = set()
    raw = [
        RawQuestion("What color is the star?", ["red", "blue", "green"], "blue", "color"),
        RawQuestion("Which?", ["a"], "a"),
        RawQuestion("What does the sign say?", ["STOP", "EXIT"], "EXIT", "text"),
    ]
    entries = [checked(each, seen) for each in raw]
    return {"status": "ok", "error": None, "questions": entries, **changes}


def caption(name: str, text: str | None, status: str = "ok") -> dict[str, Any]:
    return {"name": name, "text": text, "n_tokens": None if text is None else len(text.split()), "status": status}


def captions(*given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"status": "ok", "error": None, "captions": list(given), **changes}


SAID = captions(caption("plain#0", "A blue star."), caption("plain#1", "A sign says EXIT."))


def row(meta: dict[str, Any] | None = None, **beside: dict[str, Any]) -> Row:
    given = {"questions": questions(), "captions": SAID, **beside}
    return Row(0, "k", IMAGE.uid, Status.OK, None, b"image", "jpg", meta=meta, beside=given)


def reads(request: ChoiceRequest) -> list[float]:
    """Knows what the caption says, and nothing else."""
    text = request.prompt.text
    said = text[text.index("<caption>") : text.index("</caption>")] if "<caption>" in text else ""
    return knows(request, *(word for word in ("blue", "EXIT") if word in said))


def grader(choose: Callable[[ChoiceRequest], Scores | Exception] = reads, **options: Any) -> Grader:
    return Grader(QuizReader(Scripted(choose), ReaderConfig()), GradeConfig(**options))


def summary(out: dict[str, Any]) -> dict[str, list[tuple[int, int, int]]]:
    return {
        each["name"]: [(answer["right"], answer["abstained"], answer["scored"]) for answer in each["answers"]]
        for each in out["captions"]
    }


async def test_every_caption_and_control_is_graded_on_the_usable_questions() -> None:
    out = await grader().grade(row({"scene": SCENE.to_dict()}))
    assert (out["status"], out["error"], out["key"], out["uid"]) == ("ok", None, "k", IMAGE.uid)
    known, unknown = (lambda n: (n, 0, n)), (lambda n: (0, n, n))
    assert summary(out) == {
        "plain#0": [known(4), unknown(3)],
        "plain#1": [unknown(4), known(3)],
        "oracle": [known(4), known(3)],
        "self-oracle": [known(4), known(3)],
        **{name: [unknown(4), unknown(3)] for name in CONTROLS},
    }
    assert [(each["kind"], each["options"], each["answer"]) for each in out["questions"]] == [
        ("color", 3, 1),
        ("text", 2, 1),
    ]
    ids = [each["id"] for each in out["questions"]]
    assert all([answer["id"] for answer in each["answers"]] == ids for each in out["captions"])
    first = out["captions"][0]
    assert (first["text"], first["n_tokens"], first["status"]) == ("A blue star.", 3, "ok")
    assert first["answers"][0]["chosen"] == [1] * 4 and json.loads(out["scene"]) == SCENE.to_dict()


async def test_controls_are_what_their_names_say() -> None:
    made = grader(generic="Something is shown.")
    out = await made.grade(row({"scene": SCENE.to_dict()}, captions=captions(caption("short", "A star."))))
    texts = {each["name"]: each["text"] for each in out["captions"]}
    assert list(texts) == ["short", "oracle", "self-oracle", *CONTROLS] and texts["self-oracle"] == TOLD
    assert (texts["generic"], texts["empty"], texts["blind"]) == ("Something is shown.", "", None)
    assert "blue star" in texts["oracle"] and '"EXIT"' in texts["oracle"]
    assert out == await made.grade(row({"scene": SCENE.to_dict()}, captions=captions(caption("short", "A star."))))
    engine = made.reader.engine
    assert isinstance(engine, Scripted)
    prompts = [each.prompt for each in engine.choices]
    beginnings = [caption_prompt(each) for each in texts.values()]
    assert all(sum(each.text.startswith(beginning) for each in prompts) == 14 for beginning in beginnings)
    assert caption_prompt(None).startswith(READ_NOTHING[:30]) and all(each.image is None for each in prompts)


@pytest.mark.parametrize(
    "template", ["{question}", "{answer} {question}", "{question} {answer} {0}", "{question.x} {answer}"]
)
def test_a_self_oracle_of_another_form_is_refused(template: str) -> None:
    assert GradeConfig(self_oracle="{question}: {answer}").self_oracle != GradeConfig().self_oracle
    with pytest.raises(ValueError, match="self_oracle"):
        GradeConfig(self_oracle=template)


async def test_without_controls_only_captions_are_graded() -> None:
    out = await grader(controls=False).grade(row({"scene": SCENE.to_dict()}))
    assert list(summary(out)) == ["plain#0", "plain#1"] and out["scene"] is not None


TRUE = SCENE.to_dict()


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {"scene": None},
        {"scene": "a star"},
        {"scene": 3},
        {"scene": []},
        {"scene": [TRUE]},
        {"scene": {}},
        {"scene": {**TRUE, "things": None}},
        {"scene": {**TRUE, "things": "star"}},
        {"scene": {**TRUE, "things": [None]}},
        {"scene": {**TRUE, "things": [["star"]]}},
        {"scene": {**TRUE, "things": [{**TRUE["things"][0], "shape": "blob"}]}},
        {"scene": {**TRUE, "things": [{**TRUE["things"][0], "color": ["red"]}]}},
        {"scene": {**TRUE, "things": [{**TRUE["things"][0], "place": {}}]}},
        {"scene": {**TRUE, "things": TRUE["things"] * 2}},
        {"scene": {**TRUE, "things": [{**TRUE["things"][0], "more": 1}]}},
        {"scene": {**TRUE, "background": {}}},
        {"scene": {**TRUE, "sign": "EXIT"}},
        {"scene": {**TRUE, "sign": ["EXIT"]}},
        {"scene": {**TRUE, "sign": {"text": "EXIT"}}},
        {"scene": {**TRUE, "sign": {"text": 3, "place": "top left"}}},
        {"scene": {"background": "gray"}},
    ],
)
async def test_a_scene_that_cannot_be_read_is_none_and_gives_no_oracle(meta: dict[str, Any] | None) -> None:
    assert scene_of(row(meta)) is None
    out = await grader().grade(row(meta))
    assert (out["status"], out["scene"]) == ("ok", None)
    assert list(summary(out)) == ["plain#0", "plain#1", "self-oracle", *CONTROLS]


async def test_any_scene_that_can_be_read_has_an_oracle() -> None:
    rng = Random(3)
    scenes = [sample_scene(rng, 8) for _ in range(30)] + [Scene("white", ())]
    for scene in scenes:
        out = await grader().grade(row({"scene": scene.to_dict()}))
        assert out["captions"][2]["name"] == "oracle" and out["captions"][2]["text"]


async def test_a_caption_that_was_never_written_is_not_graded_as_an_empty_one() -> None:
    given = captions(caption("short", None, "engine_error"), caption("plain", "", "empty"), status="engine_error")
    made = grader(controls=False)
    out = await made.grade(row(captions=given))
    short, plain = out["captions"]
    assert (short["answers"], short["text"], short["status"]) == ([], "", "engine_error")
    assert [answer["scored"] for answer in plain["answers"]] == [4, 3] and plain["status"] == "empty"
    engine = made.reader.engine
    assert isinstance(engine, Scripted) and len(engine.choices) == 7
    nothing = captions(caption("short", None, "engine_error"), status="engine_error", error="short: timed out")
    out = await made.grade(row(captions=nothing))
    assert (out["status"], out["error"]) == ("engine_error", "short: timed out")
    assert summary(out) == {"short": []}
    assert (await grader().grade(row(captions=nothing)))["status"] == "ok", "the controls were graded"


async def test_unhealthy_captions_are_graded_as_they_are() -> None:
    given = captions(caption("plain", "A blue", "truncated"), status="truncated", error="plain: cut")
    out = await grader().grade(row(captions=given))
    assert (out["status"], out["captions"][0]["status"]) == ("ok", "truncated")
    assert summary(out)["plain"][0] == (4, 0, 4)


async def test_answers_that_were_not_scored_leave_the_row_unresolved_and_lose_nothing() -> None:
    def choose(request: ChoiceRequest) -> Scores | Exception:
        if "EXIT" in request.prompt.text and "A. STOP" in request.prompt.text and "blue star" in request.prompt.text:
            return RequestError("timed out")
        return reads(request)

    out = await grader(choose).grade(row())
    assert out["status"] == "engine_error" and not Status(out["status"]).resolved
    assert out["error"] == "1 answers were not scored: timed out"
    assert list(summary(out)) == ["plain#0", "plain#1", "self-oracle", *CONTROLS]
    assert summary(out)["plain#0"] == [(4, 0, 4), (0, 2, 2)] and summary(out)["plain#1"][1] == (3, 0, 3)
    assert out["captions"][0]["answers"][1]["chosen"] == [None, 2, 2]
    with pytest.raises(EngineDead):
        await grader(lambda request: EngineDead("gone")).grade(row())


async def test_nonsense_is_left_unscored_and_not_asked_again() -> None:
    out = await grader(lambda request: [float("nan")] * len(request.choices)).grade(row())
    assert out["status"] == "ok"
    answers = [answer for caption in out["captions"] for answer in caption["answers"]]
    assert answers and all(answer["scored"] == answer["right"] == 0 for answer in answers)


@pytest.mark.parametrize(
    ("beside", "status", "error"),
    [
        ({"questions": questions(status="empty", error="none usable", questions=[])}, "empty", "none usable"),
        ({"questions": questions(status="filtered", error="none stayed", questions=None)}, "filtered", "none stayed"),
        ({"questions": questions(questions=[], status="ok")}, "ok", None),
    ],
)
async def test_rows_without_questions_are_passed_on(beside: Any, status: str, error: str | None) -> None:
    made = grader(lambda request: AssertionError("there is nothing to ask"))
    out = await made.grade(row(**beside))
    assert (out["status"], out["error"], out["captions"], out["questions"]) == (status, error, [], [])


async def test_rows_without_captions_are_passed_on_unless_there_are_controls() -> None:
    none = captions(status="engine_error", error="timed out", captions=None)
    out = await grader(controls=False).grade(row(captions=none))
    assert (out["status"], out["error"], out["captions"]) == ("engine_error", "timed out", [])
    assert len(out["questions"]) == 2


def test_an_image_that_could_not_be_read_keeps_its_own_reason() -> None:
    beside = {"questions": questions(status="corrupt", error="other"), "captions": SAID}
    out = passed_on(Row(0, "k", None, Status.CORRUPT, "zero bytes", beside=beside))
    assert (out["status"], out["error"], out["captions"], out["scene"]) == ("corrupt", "zero bytes", [], None)
    both = passed_on(
        row(questions=questions(status="empty", error="q"), captions=captions(status="refused", error="c"))
    )
    assert (both["status"], both["error"]) == ("empty", "q")
    assert passed_on(Row(0, "k", None, Status.CORRUPT, "zero bytes"))["questions"] == []


async def test_all_rows_fit_the_columns() -> None:
    given = captions(caption("short", None, "engine_error"), caption("plain", "A blue star."), status="engine_error")
    rows = [
        await grader().grade(row({"scene": SCENE.to_dict()}, captions=given)),
        await grader(lambda request: RequestError("x")).grade(row()),
        await grader(lambda request: pick(request, "A")).grade(row(questions=questions(questions=None))),
        passed_on(Row(0, "k", None, Status.CORRUPT, "zero bytes")),
    ]
    assert all(set(each) == set(GRADE.names) - LATER for each in rows)
    table = pa.Table.from_pylist(rows, schema=GRADE)
    table.validate(full=True)
    assert table.drop_columns(sorted(LATER)).to_pylist() == rows


async def test_where_nothing_scores_the_first_answer_that_came_instead_is_told() -> None:
    reader = QuizReader(Scripted(generate=lambda request: "It is hard to say"), ReaderConfig(mode="sampled"))
    out = await Grader(reader, GradeConfig()).grade(row())
    assert (out["status"], out["error"]) == ("ok", "no answer names an option; the first is 'It is hard to say'")
    some = QuizReader(
        Scripted(lambda request: pick(request, "A") if "star" in request.prompt.text else [None] * 3), ReaderConfig()
    )
    assert (await Grader(some, GradeConfig()).grade(row()))["error"] is None


# --- word budgets ----------------------------------------------------------------------------------------------------

LONG = "A blue star. A sign says EXIT."


async def test_captions_are_graded_within_word_budgets_beside_the_whole_ones() -> None:
    given = captions(caption("plain#0", LONG), caption("plain#1", "A sign says EXIT."))
    out = await grader(words=(3, 4, 400)).grade(row(captions=given))
    found = {each["name"]: (each["text"], each["n_tokens"]) for each in out["captions"]}
    assert list(found)[:4] == ["plain#0", "plain#1", "plain@3#0", "plain@3#1"]
    assert found["plain@3#0"] == ("A blue star.", None) and found["plain@4#0"] == ("A blue star. A", None)
    assert found["plain@4#1"] == found["plain#1"] == ("A sign says EXIT.", 4)
    known, unknown = (lambda n: (n, 0, n)), (lambda n: (0, n, n))
    assert summary(out)["plain@3#0"] == [known(4), unknown(3)]
    assert summary(out)["plain@3#1"] == [unknown(4), unknown(3)]
    assert summary(out)["plain@400#0"] == summary(out)["plain#0"] == [known(4), known(3)]
    assert list(summary(out))[-4:] == ["self-oracle", *CONTROLS], "controls are not cut"


async def test_a_caption_within_its_budget_is_read_once_and_as_if_it_were_read_again() -> None:
    given = captions(caption("plain", LONG), caption("short", None, "engine_error"))
    made = grader(words=(400,), controls=False)
    out = await made.grade(row(captions=given))
    engine = made.reader.engine
    assert isinstance(engine, Scripted) and len(engine.choices) == 7
    again = await grader(controls=False).grade(row(captions=captions(caption("plain@400", LONG))))
    by_name = {each["name"]: each for each in out["captions"]}
    assert by_name["plain@400"] == again["captions"][0]
    assert (by_name["short@400"]["answers"], by_name["short@400"]["status"]) == ([], "engine_error")


def test_budgets_are_in_the_fingerprint_and_grades_without_any_keep_theirs() -> None:
    assert "words" not in GradeConfig().model_dump(mode="json")
    assert GradeConfig(words=(100, 50, 50)).model_dump(mode="json")["words"] == [50, 100]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        GradeConfig(words=(50, 0))


# --- open-ended questions --------------------------------------------------------------------------------------------


def says_what_is_told(request: GenerationRequest) -> str:
    text = request.prompt.text
    said = text[text.index("<caption>") : text.index("</caption>")] if "<caption>" in text else ""
    return "The answer is blue." if "blue" in said else "Cannot tell"


def open_grader(answer: Callable[[GenerationRequest], str | Exception] = says_what_is_told) -> Grader:
    engine = Scripted(reads, answer)
    return Grader(QuizReader(engine, ReaderConfig()), GradeConfig(), OpenReader(engine))


OPEN = [stored(OpenQuestion("What color is the star?", ("blue", "dark blue"), "color"))]


async def test_open_ended_questions_are_answered_in_words_from_every_caption() -> None:
    out = await open_grader().grade(row(questions=questions(open_questions=OPEN)))
    assert out["open_questions"] == OPEN and out["status"] == "ok"
    assert {each["name"]: each["answer"] for each in out["open_answers"]} == {
        "plain#0": "blue",
        "plain#1": "Cannot tell",
        **dict.fromkeys(CONTROLS, "Cannot tell"),
    }
    assert summary(out) == summary(await grader().grade(row())), "multiple choice is as without them"
    table = pa.Table.from_pylist([out], schema=GRADE_WITH_OPEN)
    assert table.column("open_questions").to_pylist() == [OPEN]


async def test_a_row_may_have_open_ended_questions_alone() -> None:
    alone = questions(questions=[], open_questions=OPEN)
    out = await open_grader().grade(row(questions=alone))
    assert (out["status"], out["error"], len(out["open_answers"])) == ("ok", None, 5)
    assert (await grader().grade(row(questions=alone)))["captions"] == [], "a reader that is not to answer them"


async def test_words_from_a_caption_within_its_budget_are_not_asked_for_again() -> None:
    engine = Scripted(reads, says_what_is_told)
    config = GradeConfig(controls=False, words=(2, 400))
    out = await Grader(QuizReader(engine, ReaderConfig()), config, OpenReader(engine)).grade(
        row(questions=questions(questions=[], open_questions=OPEN), captions=captions(caption("plain", "A blue star.")))
    )
    answers = {each["name"]: each["answer"] for each in out["open_answers"]}
    assert answers == {"plain": "blue", "plain@2": "blue", "plain@400": "blue"}
    assert len(engine.generations) == 2


async def test_a_failed_request_for_words_leaves_the_row_unresolved() -> None:
    out = await open_grader(lambda request: RequestError("timed out")).grade(
        row(questions=questions(open_questions=OPEN))
    )
    assert (out["status"], out["error"]) == ("engine_error", "5 answers were not scored: timed out")
    assert {each["answer"] for each in out["open_answers"]} == {None}
