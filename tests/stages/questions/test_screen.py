"""Screening: the same question in both arms, thresholds read as they are meant, and no question ever lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.schema import LATER, SCREEN
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import ChoiceRequest, EngineDead, Refused, RequestError
from capipe.models.quiz import ABSTAIN, Question
from capipe.models.reader import QuizReader, Reading
from capipe.stages.questions import screen_counts
from capipe.stages.questions.screen import PRESETS, Arms, ScreenConfig, Screener, judge, passed_on
from capipe.stages.questions.screen_counts import count_screened
from capipe.stages.questions.validate import RawQuestion, checked

from ...scripted import IMAGE, Scores, Scripted, knows, pick

COLOR = Question("What color is the star?", ("red", "blue", "green"), 1, "color")


def entries() -> list[dict[str, Any]]:
    """Usable: about the star, the count, the sign. Not usable: a duplicate, one without an answer, junk."""
    seen: set[str] = set()
    raw = [
        RawQuestion("What color is the star?", ["red", "blue", "green"], "blue", "color"),
        RawQuestion("How many are there?", ["one", "two", "three"], "one", "count"),
        RawQuestion("what color is the star?", ["red", "blue"], "red", "color"),
        RawQuestion("What does the sign say?", ["STOP", "EXIT", "OPEN"], "EXIT", "text"),
        RawQuestion("Where?", ["here", "there"], "nowhere", "position"),
        RawQuestion(None, None, None),
    ]
    return [checked(each, seen) for each in raw]


def row(**beside: Any) -> Row:
    questions = {"key": "k", "uid": IMAGE.uid, "status": "ok", "error": None, "questions": entries(), **beside}
    return Row(0, "k", IMAGE.uid, Status.OK, None, b"image", "jpg", beside={"questions": questions})


def screener(choose: Callable[[ChoiceRequest], Scores | Exception], preset: str = "strict") -> Screener:
    config = PRESETS[preset]
    generate = None
    if config.reader.mode == "sampled":

        def generate(request: Any) -> str | Exception:
            answer = choose(ChoiceRequest(request.prompt, ("A", "B", "C", "D")))
            return answer if isinstance(answer, Exception) else "ABCD"[answer.index(max(answer, key=float))]  # type: ignore[arg-type]

    return Screener(QuizReader(Scripted(choose, generate), config.reader), "tiny/teacher", config)


def sees_all_but_the_sign(request: ChoiceRequest) -> list[float]:
    """Knows the count even without the image; where it has to guess, it says red."""
    guess = () if ABSTAIN in request.prompt.text else ("red",)
    return knows(request, "one", *(("blue",) if request.prompt.image is not None else guess))


@pytest.mark.parametrize("preset", ["strict", "caprl"])
async def test_questions_stay_that_need_the_image_and_can_be_answered_from_it(preset: str) -> None:
    given = row()
    before = copy.deepcopy(given.beside)
    out = await screener(sees_all_but_the_sign, preset).screen(given, IMAGE)
    assert (out["status"], out["error"], out["screener"]) == ("ok", None, "tiny/teacher")
    statuses = [each["status"] for each in out["questions"]]
    assert statuses == ["ok", "leaked", "duplicate", "unsupported", "bad_answer", "malformed"]
    star, count, duplicate, sign = out["questions"][:4]
    assert (star["with_image"], star["image_accuracy"], star["error"]) == ([1] * 4, 1.0, None)
    if preset == "strict":
        assert (star["without_image"], star["text_accuracy"]) == ([3] * 4, 0.0)
        assert count["text_accuracy"] == 1.0 and "4 of 4 presentations without the image" in count["error"]
    else:
        assert (star["without_image"], star["text_accuracy"]) == (None, None)
        assert count["guess_accuracy"] == 1.0 and "4 of 4 forced guesses without the image" in count["error"]
    assert (star["guessed"], star["guess_accuracy"]) == ([0] * len(star["guessed"]), 0.0)
    assert sign["image_accuracy"] == 0.0 and "0 of 4" in sign["error"]
    assert duplicate["with_image"] is None and duplicate["error"] == before["questions"]["questions"][2]["error"]
    assert given.beside == before, "the row beside it is not written to"


async def test_the_abstaining_arms_have_the_same_prompts_and_the_guess_lacks_that_option_alone() -> None:
    for preset in PRESETS:
        made = screener(sees_all_but_the_sign, preset)
        await made.screen(row(), IMAGE)
        engine = made.reader.engine
        assert isinstance(engine, Scripted)
        prompts = [each.prompt for each in engine.choices or engine.generations]
        seen = [each.text for each in prompts if each.image is not None]
        blind = [each.text for each in prompts if each.image is None and "Cannot tell" in each.text]
        guessed = [each.text for each in prompts if each.image is None and "Cannot tell" not in each.text]
        assert len(seen) == 12 and all("Cannot tell" in each for each in seen)
        assert blind == (seen if preset == "strict" else [])
        assert len(guessed) == (9 if preset == "strict" else 12)
        assert {each.partition(".")[0] for each in guessed} == {each.partition(".")[0] for each in seen}
        assert not any("\nD. " in each for each in guessed), "three options, three letters"


def reading(right: int, of: int = 4) -> Reading:
    return Reading(COLOR, (1,) * right + (0,) * (of - right))


@pytest.mark.parametrize("preset", ["strict", "caprl"])
def test_presets_keep_four_of_four_with_and_none_of_four_without_the_image(preset: str) -> None:
    """The released bounds, 0.75 and 0.25, are strict: at them a question does not stay."""
    config = PRESETS[preset]

    def arms(image: int, text: int) -> Arms:
        if preset == "strict":
            return Arms(reading(image), reading(text), reading(0))
        return Arms(reading(image), None, reading(text))

    fates = {(i, t): str(judge(arms(i, t), config)[0]) for i in range(5) for t in range(5)}
    assert [key for key, fate in fates.items() if fate == "ok"] == [(4, 0)]
    assert {fates[4, text] for text in range(1, 5)} == {"leaked"}
    assert {fates[image, text] for image in range(4) for text in range(5)} == {"unsupported"}
    assert config.reader.presentations in (None, 4)


@pytest.mark.parametrize(("inclusive", "kept"), [(True, "ok"), (False, "unsupported")])
def test_a_bound_counts_or_does_not_as_configured(inclusive: bool, kept: str) -> None:
    for bound, right, of in ((0.75, 3, 4), (0.6667, 2, 3), (0.6666, 2, 3), (1.0, 7, 7), (0.0, 0, 4)):
        config = ScreenConfig(image_min=bound, image_inclusive=inclusive, text_max=1)
        assert judge(Arms(reading(right, of), reading(0)), config)[0] == kept
    for bound, right, of in ((0.25, 1, 4), (0.3333, 1, 3), (0.3334, 1, 3), (0.0, 0, 4), (1.0, 4, 4)):
        config = ScreenConfig(text_max=bound, text_inclusive=inclusive)
        assert judge(Arms(reading(4), reading(right, of)), config)[0] == (kept if inclusive else "leaked")


def test_a_question_with_anything_unscored_is_neither_kept_nor_refused() -> None:
    whole, broken, nothing = reading(4), Reading(COLOR, (1, 1, 1, None), ("long",)), Reading(COLOR, (None,), ("long",))
    for image, text in ((broken, reading(0)), (whole, broken), (nothing, reading(0)), (whole, nothing)):
        status, reason = judge(Arms(image, text), ScreenConfig())
        assert status == "unscored" and reason


async def test_a_failure_leaves_an_unresolved_row_with_every_question_and_its_status() -> None:
    def choose(request: ChoiceRequest) -> Scores | Exception:
        if "sign" in request.prompt.text and request.prompt.image is None:
            return RequestError("the server timed out")
        return knows(request, "EXIT", "one", *(("blue",) if request.prompt.image is not None else ()))

    out = await screener(choose).screen(row(), IMAGE)
    assert out["status"] == "engine_error" and not Status(out["status"]).resolved
    assert "the server timed out" in out["error"]
    statuses = [each["status"] for each in out["questions"]]
    assert statuses == ["ok", "leaked", "duplicate", "unscored", "bad_answer", "malformed"]
    sign = out["questions"][3]
    assert (sign["with_image"], sign["image_accuracy"]) == ([1] * 4, 1.0)
    assert (sign["without_image"], sign["text_accuracy"]) == ([None] * 4, None)


async def test_what_cannot_be_scored_is_never_wrong() -> None:
    out = await screener(lambda request: [float("nan")] * 4).screen(row(), IMAGE)
    assert out["status"] == "engine_error" and "scores that are no numbers" in out["error"]
    unscored = [each for each in out["questions"] if each["status"] == "unscored"]
    assert len(unscored) == 3 and all(each["with_image"] == [None] * 4 for each in unscored)
    assert all((each["image_accuracy"], each["text_accuracy"]) == (None, 0) for each in unscored)


def test_an_answer_without_a_letter_counts_neither_way_with_the_image() -> None:
    hazy = Reading(COLOR, (1, 1, 1, None), instead="'It is'")
    status, reason = judge(Arms(hazy, reading(0)), ScreenConfig())
    assert status == "unscored" and reason is not None and "1 of 4" in reason and "'It is'" in reason
    assert judge(Arms(hazy, reading(0)), ScreenConfig(image_min=0.75))[0] == "ok"
    wrong = Reading(COLOR, (1, 1, 0, None))
    assert judge(Arms(wrong, reading(0)), ScreenConfig())[0] == "unsupported"  # whatever the fourth meant
    nothing = Reading(COLOR, (None,) * 4)
    assert judge(Arms(nothing, reading(0)), ScreenConfig(image_min=0.0))[0] == "unscored"
    assert judge(Arms(reading(4), nothing, nothing), PRESETS["strict"])[0] == "ok"  # the desired result


# --- forced guesses --------------------------------------------------------------------------------------------------


def guess(right: int, options: int) -> Reading:
    """A question with so many options, guessed right in so many of its orders."""
    asked = Question("Which?", tuple(f"option {number}" for number in range(options)), 0)
    return Reading(asked, (0,) * right + (1,) * (options - right))


@pytest.mark.parametrize(
    ("options", "margin", "most"),
    [(2, 0.25, 1), (3, 0.25, 1), (4, 0.25, 2), (5, 0.25, 2), (6, 0.25, 2), (10, 0.25, 3), (4, 0.0, 1), (4, 1.0, 4)],
)
def test_a_question_is_refused_that_is_guessed_above_chance_and_the_margin(
    options: int, margin: float, most: int
) -> None:
    config = ScreenConfig(blind="both", guess_margin=margin)
    for right in range(options + 1):
        status, reason = judge(Arms(reading(4), reading(0), guess(right, options)), config)
        assert status == ("ok" if right <= most else "leaked")
        if status == "leaked":
            assert reason == f"right in {right} of {options} forced guesses without the image, chance is 1 in {options}"


def test_a_reader_that_always_says_a_letter_guesses_at_chance_and_is_no_leak() -> None:
    for options in range(2, 11):
        config = ScreenConfig(blind="guess", guess_margin=0.0)
        assert judge(Arms(reading(4), None, guess(1, options)), config)[0] == "ok"


async def test_a_reader_that_abstains_hides_a_leak_that_a_guess_shows() -> None:
    """What the third arm is for: it would know, and says that it cannot."""

    def modest(request: ChoiceRequest) -> list[float]:
        if request.prompt.image is None and ABSTAIN in request.prompt.text:
            return knows(request)
        return knows(request, "blue", "one", "EXIT")

    for blind, status in (("abstain", "ok"), ("both", "leaked"), ("guess", "leaked")):
        margin = None if blind == "abstain" else 0.25
        config = ScreenConfig(blind=blind, guess_margin=margin)
        made = Screener(QuizReader(Scripted(modest), config.reader), "m", config)
        out = await made.screen(row(), IMAGE)
        assert {each["status"] for each in out["questions"][:2]} == {status}
        star = out["questions"][0]
        assert (star["without_image"] is None, star["guessed"] is None) == (blind == "guess", blind == "abstain")


def test_without_a_margin_the_bound_of_the_blind_arm_holds() -> None:
    config = PRESETS["caprl"]
    assert (config.blind, config.guess_margin, config.text_max, config.text_inclusive) == ("guess", None, 0.25, False)
    assert judge(Arms(reading(4), None, guess(1, 4)), config)[0] == "leaked"
    assert judge(Arms(reading(4), None, guess(0, 4)), config)[0] == "ok"
    with pytest.raises(ValueError, match="nothing is guessed"):
        ScreenConfig(guess_margin=0.25)


def test_failures_and_silence_of_a_forced_guess() -> None:
    config = PRESETS["strict"]
    broken = Reading(COLOR, (1, None), ("timed out",))
    assert judge(Arms(reading(4), reading(0), broken), config) == ("unscored", "timed out")
    silent = Reading(COLOR, (None, None, None), instead="'I cannot see'")
    assert judge(Arms(reading(4), reading(0), silent), config)[0] == "ok"


def test_criteria_of_before_the_third_arm_keep_their_fingerprint() -> None:
    assert not {"blind", "guess_margin"} & ScreenConfig().model_dump().keys()
    assert PRESETS["strict"].model_copy(update={"blind": "abstain", "guess_margin": None}) == ScreenConfig()
    assert {"blind", "guess_margin"} <= PRESETS["strict"].model_dump().keys()


def test_what_each_arm_refuses_is_counted_by_itself_and_alone() -> None:
    config = PRESETS["strict"]

    def entry(image: int, blind: int, guessed: int, status: str) -> dict[str, Any]:
        shares = {"image_accuracy": image / 4, "text_accuracy": blind / 4, "guess_accuracy": guessed / 3}
        return {"status": status, "options": ["a", "b", "c"], "with_image": [0], **shares}

    entries = [
        entry(4, 0, 1, "ok"),
        entry(4, 0, 3, "leaked"),
        entry(4, 1, 3, "leaked"),
        entry(4, 1, 0, "leaked"),
        entry(3, 0, 3, "unsupported"),
        entry(0, 0, 0, "unsupported"),
        {**entry(4, 0, 0, "unscored"), "text_accuracy": None, "guess_accuracy": None},
        {**entry(4, 0, 0, "duplicate"), "with_image": None},
    ]
    counts = count_screened(entries, config)
    assert (counts.asked, counts.kept, counts.unscored) == (7, 1, 1)
    arms = (screen_counts.IMAGE, screen_counts.ABSTAINING, screen_counts.GUESSING)
    assert [counts.refused[arm] for arm in arms] == [2, 2, 3] and [counts.alone[arm] for arm in arms] == [1, 1, 1]
    assert counts.line(config) == (
        "screening kept 1 of 7 questions; refused: 2 not right with the image (1 for that alone), "
        "2 right without it (1 for that alone), 3 right by a forced guess (1 for that alone); 1 unscored"
    )
    before = [{key: value for key, value in each.items() if key != "guess_accuracy"} for each in entries]
    line = count_screened(before, ScreenConfig()).line(ScreenConfig())
    assert "forced" not in line and "2 right without it" in line


async def test_some_answers_without_a_letter_do_not_hold_a_row_up() -> None:
    def choose(request: ChoiceRequest) -> Scores:
        if "sign" in request.prompt.text:
            return [None] * 4
        return sees_all_but_the_sign(request)

    out = await screener(choose).screen(row(), IMAGE)
    assert (out["status"], out["error"]) == ("ok", None)
    statuses = [each["status"] for each in out["questions"]]
    assert statuses == ["ok", "leaked", "duplicate", "unscored", "bad_answer", "malformed"]
    assert "no letter among the likeliest tokens" in out["questions"][3]["error"]


async def test_a_reader_that_refuses_is_not_asked_again() -> None:
    out = await screener(lambda request: Refused("refused: content_filter")).screen(row(), IMAGE)
    assert out["status"] == "refused" and Status(out["status"]).resolved
    assert "refused: content_filter" in out["error"]
    assert judge(Arms(reading(4), Reading(COLOR, (None,) * 4)), ScreenConfig())[0] == "ok"


async def test_a_dead_engine_is_no_outcome() -> None:
    with pytest.raises(EngineDead):
        await screener(lambda request: EngineDead("gone")).screen(row(), IMAGE)


async def test_a_row_of_which_no_question_stays_says_so() -> None:
    out = await screener(lambda request: pick(request, "A")).screen(row(), IMAGE)
    assert (out["status"], out["error"]) == ("filtered", "no question stayed")
    assert {each["status"] for each in out["questions"][:2]} == {"unsupported"}


async def test_rows_without_anything_to_ask_are_passed_on_with_their_status() -> None:
    made = screener(lambda request: AssertionError("nothing to ask"))
    empty = await made.screen(row(status="empty", error="no usable question", questions=entries()[4:]), IMAGE)
    assert (empty["status"], empty["error"], len(empty["questions"])) == ("empty", "no usable question", 2)
    failed = passed_on(row(status="engine_error", error="timed out"))
    assert (failed["status"], failed["error"]) == ("engine_error", "timed out")
    assert [each["status"] for each in failed["questions"]] == [each["status"] for each in entries()]
    assert all(each["with_image"] is None for each in failed["questions"])
    corrupt = Row(0, "k", None, Status.CORRUPT, "zero bytes", beside={"questions": {"questions": [], "status": "ok"}})
    assert (passed_on(corrupt)["status"], passed_on(corrupt)["error"]) == ("corrupt", "zero bytes")
    assert passed_on(Row(0, "k", None, Status.CORRUPT, "zero bytes"))["questions"] == []


async def test_all_rows_fit_the_columns() -> None:
    rows = [
        await screener(sees_all_but_the_sign).screen(row(), IMAGE),
        await screener(lambda request: RequestError("x")).screen(row(), IMAGE),
        passed_on(row(status="empty", error="none", questions=None)),
        passed_on(Row(0, "k", None, Status.CORRUPT, "zero bytes")),
    ]
    table = pa.Table.from_pylist(rows, schema=SCREEN)
    table.validate(full=True)
    assert all(set(each) == set(SCREEN.names) - LATER for each in rows)
    assert table["questions"].to_pylist()[0][0]["with_image"] == [1] * 4
    again = Row(0, "k", IMAGE.uid, Status.OK, beside={"questions": table.to_pylist()[0]})
    assert (await screener(sees_all_but_the_sign).screen(again, IMAGE))["questions"][0] == rows[0]["questions"][0]
