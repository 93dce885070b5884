"""Writing questions: whatever a model writes becomes questions with a status, and the raw text is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from capipe.manifests.schema import LATER, QUESTIONS
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import Completion, EngineDead, FinishReason, Refused, RequestError, Thought
from capipe.models.quiz import KINDS, writing_prompt, writing_schema
from capipe.stages.questions.validate import RawQuestion, checked
from capipe.stages.questions.write import QuestionsConfig, QuestionWriter, passed_on, written_questions

from ...scripted import IMAGE, Scripted

ROW = Row(0, "k", IMAGE.uid, Status.OK, "a note", b"image", "jpg")
Answer = str | Completion | Exception


def entry(number: int = 1, **changes: Any) -> dict[str, Any]:
    about = {"kind": "color", "question": f"What color is shape {number}?", "options": ["red", "blue"]}
    return {**about, "answer": "blue", **changes}


def whole(*entries: Any) -> str:
    return json.dumps({"questions": list(entries)})


def written(text: str, finish: FinishReason = "stop") -> list[RawQuestion]:
    return written_questions(Completion(text, (), finish, 9))


def texts(found: Iterable[RawQuestion]) -> list[object]:
    return [each.text for each in found if each.fault is None]


def faults(found: Iterable[RawQuestion]) -> list[str]:
    for each in found:
        assert each.fault is None or each.fault[0] == "malformed"
    return [each.fault[1] for each in found if each.fault is not None]


# --- reading answers -------------------------------------------------------------------------------------------------

ONE, TWO = entry(1), entry(2)


@pytest.mark.parametrize(
    "text",
    [
        whole(ONE, TWO),
        f"\n  {whole(ONE, TWO)}\n",
        json.dumps([ONE, TWO]),
        json.dumps({"note": {"a": [1, {}]}, "questions": [ONE, TWO]}, indent=2),
        f"```json\n{json.dumps({'questions': [ONE, TWO]}, indent=1)}\n```",
        f"```\n{json.dumps([ONE, TWO])}\n```",
        f'Here\'s the "JSON" {{as you asked}}: {whole(ONE, TWO)} Hope it helps {{:-}}',
        f"{json.dumps(ONE)}\n{json.dumps(TWO)}",
        f"1. {json.dumps(ONE)}, 2. {json.dumps(TWO)}",
        f"{whole(ONE)} and {whole(TWO)}",
        f'[{{"example": {{}}}}, {json.dumps(ONE)}, {json.dumps(TWO)}',
    ],
)
def test_questions_are_found_in_any_reasonable_answer(text: str) -> None:
    found = written(text)
    assert texts(found) == [ONE["question"], TWO["question"]] and not faults(found)
    statuses = [checked(each, set()) for each in found]
    assert [(each["status"], each["kind"], each["answer"]) for each in statuses] == [("ok", "color", 1)] * 2


def test_of_an_answer_cut_in_the_middle_whole_questions_are_kept_and_one_entry_says_so() -> None:
    text = whole(ONE, TWO, entry(3))
    for end in range(text.index("shape 3"), len(text) - 3):
        found = written(text[:end], "length")
        assert texts(found) == [ONE["question"], TWO["question"]]
        assert len(faults(found)) == 1 and "cut at the token limit" in faults(found)[0] and found[-1].fault is not None
    assert faults(written(whole(ONE)[:30], "length")) == faults(written("", "length")) == faults(found)
    assert texts(written(f"```json\n{text[:-20]}", "length")) == [ONE["question"], TWO["question"]]


def test_nothing_was_cut_of_an_answer_that_is_whole() -> None:
    assert not faults(written(whole(ONE, TWO), "length"))


def test_a_question_that_cannot_be_read_among_others_is_not_dropped_without_a_word() -> None:
    broken = '{"kind": "color", "question": "What?", "options": ["red", blue], "answer": "red"}'
    found = written(f'{{"questions": [{json.dumps(ONE)}, {broken}, {json.dumps(TWO)}]}}')
    assert texts(found) == [ONE["question"], TWO["question"]]
    assert faults(found) == ["JSON that cannot be read, of 1 question"]
    assert faults(written(f"[{broken}, {broken}]")) == ["JSON that cannot be read, of 2 questions"]
    cut = written(f'{{"questions": [{broken}, {json.dumps(ONE)}, {broken[:40]}', "length")
    assert [fault[:20] for fault in faults(cut)] == ["JSON that cannot be ", "the answer was cut a"]


def test_what_is_no_question_is_an_entry_of_its_own() -> None:
    found = written(whole("What?", 3, None, [ONE], True, ONE, {}))
    assert texts(found) == [ONE["question"], None]
    assert [fault.split()[1] for fault in faults(found)] == ["str", "int", "NoneType", "list", "bool"]
    seen: set[str] = set()
    assert [checked(each, seen)["status"] for each in found] == ["malformed"] * 5 + ["ok", "malformed"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "wrote nothing"),
        (" \n\t", "wrote nothing"),
        ("What color is the star? A. red B. blue", "no JSON"),
        ("null", "no JSON"),
        ("12", "no JSON"),
        ('"questions"', "no JSON"),
        ("{}", "no JSON"),
        ("[]", "no JSON"),
        ('{"questions": []}', "no JSON"),
        ('{"questions": {"a": 1}}', "no JSON"),
        ("{'questions': [{'question': 'What?'}]}", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[" * 100_000 + "]" * 100_000, "no JSON"),
        ("{" * 300_000, "no JSON"),
        ('{"a":' * 900 + "1" + "}" * 900, "no JSON"),
        ('{"questions":[' * 5_000, "no JSON"),
        ("9" * 10_000, "no JSON"),
        ('{"question": "' * 5_000, "of 5000 questions"),
    ],
)
def test_junk_is_one_malformed_entry(text: str, reason: str) -> None:
    (fault,) = faults(written(text))
    assert reason in fault
    assert len(written(text, "length")) == 1


def test_a_huge_answer_is_read_once_and_whole() -> None:
    many = [entry(number) for number in range(1_000)]
    assert len(texts(written(whole(*many)))) == len(texts(written(f"Here: {whole(*many)}"))) == 1_000


def test_wrong_types_inside_of_a_question_are_statuses() -> None:
    text = (
        '{"questions": [{"question": 1}, {"question": "Q?", "options": "red, blue", "answer": "red"},'
        ' {"question": "Q?", "options": ["a", ["b"]], "answer": "a"}, {"question": "Q?", "options": ["a", "b"]},'
        ' {"question": "Q?", "options": ["a", "b"], "answer": NaN},'
        ' {"question": "\\ud800?", "options": ["a", "\\ud800"], "answer": "a", "kind": "\\ud800"}]}'
    )
    entries = [checked(each, set()) for each in written(text)]
    assert [each["status"] for each in entries] == ["malformed", *["bad_options"] * 2, *["bad_answer"] * 2, "ok"]
    json.dumps(entries, ensure_ascii=False).encode()


def test_what_the_schema_allows_is_what_the_parser_takes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    answer = whole(*(entry(n, kind=kind) for n, kind in enumerate(KINDS[:5])))
    jsonschema.validate(json.loads(answer), json.loads(writing_schema(5)))
    seen: set[str] = set()
    entries = [checked(each, seen) for each in written(answer)]
    assert [(each["status"], each["kind"]) for each in entries] == [("ok", kind) for kind in KINDS[:5]]


# --- asking ----------------------------------------------------------------------------------------------------------


def writer(*answers: Answer, guided: bool = False, **options: Any) -> QuestionWriter:
    """One whose engine gives these answers, one after the other."""
    left = list(answers)
    return QuestionWriter(
        Scripted(generate=lambda request: left.pop(0)), "tiny/teacher", QuestionsConfig(**options), guided
    )


def engine_of(made: QuestionWriter) -> Scripted:
    assert isinstance(made.engine, Scripted)
    return made.engine


async def test_a_row_gets_its_questions_raw_text_and_origin() -> None:
    text = f"Sure! {whole(ONE, TWO)}"
    made = writer(text)
    out = await made.write(ROW, IMAGE)
    assert (out["key"], out["uid"], out["status"], out["error"]) == ("k", IMAGE.uid, "ok", "a note")
    assert [each["question"] for each in out["questions"]] == [ONE["question"], TWO["question"]]
    assert (out["raw"], out["attempts"], out["finish_reason"]) == ([text], 1, "stop")
    assert out["n_tokens"] == len(text.split()) and out["writer"] == "tiny/teacher" and "@" in out["prompt_id"]
    (request,) = engine_of(made).generations
    assert (request.prompt.text, request.prompt.image) == (writing_prompt(5), IMAGE)
    assert request.json_schema is None


async def test_a_guided_engine_is_given_the_schema_of_what_is_asked() -> None:
    made = writer(whole(ONE), guided=True, per_image=3, kinds=("color", "count"))
    await made.write(ROW, IMAGE)
    (request,) = engine_of(made).generations
    assert request.json_schema == writing_schema(3, ("color", "count"))
    assert request.prompt.text == writing_prompt(3, ("color", "count"))


async def test_it_asks_again_until_there_are_enough_and_keeps_every_answer() -> None:
    answers = ["Sorry?", whole(ONE, "junk"), whole(ONE, TWO), whole(entry(3))]
    made = writer(*answers, fewest=2, max_attempts=4, temperature=0)
    out = await made.write(ROW, IMAGE)
    assert (out["status"], out["attempts"], out["raw"]) == ("ok", 3, answers[:3])
    statuses = [each["status"] for each in out["questions"]]
    assert statuses == ["malformed", "ok", "malformed", "duplicate", "ok"]
    assert out["n_tokens"] == sum(len(each.split()) for each in answers[:3])
    sampling = [each.sampling for each in engine_of(made).generations]
    assert len({each.seed for each in sampling}) == 3
    assert [each.temperature for each in sampling] == [0, 0.7, 0.7], "a greedy model would repeat itself"


async def test_attempts_are_bounded_and_fewer_than_wanted_are_still_questions() -> None:
    out = await writer(*[whole(ONE)] * 3, fewest=2).write(ROW, IMAGE)
    assert (out["status"], out["attempts"], len(out["raw"])) == ("ok", 3, 3)
    assert [each["status"] for each in out["questions"]] == ["ok", "duplicate", "duplicate"]
    none = await writer("Sorry.", "", whole(entry(answer="green")), max_attempts=3).write(ROW, IMAGE)
    assert none["status"] == "empty" and "3 attempts" in none["error"]
    assert [each["status"] for each in none["questions"]] == ["malformed", "malformed", "bad_answer"]
    assert none["raw"][:2] == ["Sorry.", ""]


async def test_an_engine_error_keeps_what_was_written_before_it() -> None:
    out = await writer(whole(ONE), RequestError("timed out"), fewest=2).write(ROW, IMAGE)
    assert (out["status"], out["error"], out["attempts"]) == ("engine_error", "timed out", 2)
    assert not Status(out["status"]).resolved
    assert out["raw"] == [whole(ONE)] and [each["status"] for each in out["questions"]] == ["ok"]
    assert out["n_tokens"] > 0 and out["finish_reason"] == "stop"
    at_once = await writer(RequestError("timed out")).write(ROW, IMAGE)
    assert (at_once["status"], at_once["raw"], at_once["questions"]) == ("engine_error", [], [])
    with pytest.raises(EngineDead):
        await writer(EngineDead("gone")).write(ROW, IMAGE)


async def test_seeds_are_of_the_image_and_the_attempt_alone() -> None:
    made = [writer("", whole(ONE)), writer("", whole(ONE)), writer("", whole(ONE), seed=1)]
    for each in made:
        await each.write(ROW, IMAGE)
    assert engine_of(made[0]).generations == engine_of(made[1]).generations
    seeds = {each.sampling.seed for one in made for each in engine_of(one).generations}
    assert len(seeds) == 4


def test_kinds_are_those_that_rows_can_have() -> None:
    """Any other would be asked for, and then be stored as "other"."""
    with pytest.raises(ValidationError, match="weather"):
        QuestionsConfig(kinds=("color", "weather"))


def test_a_writer_that_only_thought_wrote_no_questions() -> None:
    (cut,) = written_questions(Completion("", (), "length", 9, thought=Thought("A star, so", False)))
    assert cut.fault is not None and "reasoning did not end" in cut.fault[1]
    (done,) = written_questions(Completion("", (), "stop", 9, thought=Thought("A star.", True)))
    assert done.fault is not None and "nothing after its thought" in done.fault[1]
    (kept,) = written_questions(Completion(whole(ONE), (), "stop", 9, thought=Thought("A star.", True)))
    assert kept.fault is None


async def test_a_writer_that_refuses_is_not_asked_again() -> None:
    refused = await writer(Refused("refused by the model: No.", "No.")).write(ROW, IMAGE)
    assert (refused["status"], refused["attempts"], refused["raw"]) == ("refused", 1, ["No."])


async def test_tokens_that_nobody_counted_are_unknown() -> None:
    unknown = await writer(Completion(whole(ONE), (), "stop", None)).write(ROW, IMAGE)
    assert (unknown["status"], unknown["n_tokens"]) == ("ok", None)


async def test_all_rows_fit_the_columns() -> None:
    cut = Completion(whole(ONE)[:40], (), "length", 12)
    rows = [
        await writer(whole(ONE, "junk", entry(3, options=None), {"question": 1})).write(ROW, IMAGE),
        await writer(cut, "", "no").write(ROW, IMAGE),
        await writer(RequestError("x")).write(ROW, IMAGE),
        passed_on(Row(0, "k", None, Status.CORRUPT, "zero bytes")),
    ]
    assert all(set(each) == set(QUESTIONS.names) - LATER for each in rows)
    table = pa.Table.from_pylist(rows, schema=QUESTIONS)
    table.validate(full=True)
    assert table.drop_columns(sorted(LATER)).to_pylist() == rows
    assert [each["status"] for each in rows] == ["ok", "empty", "engine_error", "corrupt"]


async def test_a_penalty_for_repetition_reaches_the_engine_and_is_configured_only_where_it_is_set() -> None:
    made = writer("{}", "{}", max_attempts=2, temperature=0.1, repetition_penalty=1.05)
    await made.write(ROW, IMAGE)
    assert [each.sampling.repetition_penalty for each in engine_of(made).generations] == [1.05, 1.05]
    assert "repetition_penalty" not in QuestionsConfig().model_dump()
    assert made.config.model_dump()["repetition_penalty"] == 1.05
