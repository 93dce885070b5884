from __future__ import annotations

import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.scenes import Scene, Sign, Thing, scenes
from capipe.trainer.evaluation.evaluate import evaluate
from capipe.trainer.evaluation.results import EvaluationReport, PositionAccuracy, System

from ..grading import Chosen, caption, question, row

SETTINGS = {"model": "tiny/captioner", "reader": "tiny/reader"}
SCENE = Scene("white", (Thing("top left", "circle", "red", "large"),), Sign("STOP", "center"))


def report_on(*rows: dict[str, Any], resamples: int = 50) -> EvaluationReport:
    return evaluate(rows, SETTINGS, resamples=resamples)


def system(report: EvaluationReport, name: str) -> System:
    return next(each for each in report.systems if each.name == name)


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON form."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield value


def test_accuracy_is_the_mean_over_captions_and_then_over_questions() -> None:
    asked = [question("q", 2, 0, "color"), question("r", 2, 1, "shape")]
    report = report_on(
        row(
            "a",
            asked,
            [
                caption("plain#0", "A.", {"q": [0, 0, 1], "r": [1, 1, 1]}),
                caption("plain#1", "B.", {"q": [0, 0, 0], "r": [2, 2, None]}),
            ],
        ),
        row("b", asked[:1], [caption("plain#0", "C.", {"q": [1, 2, 0]}), caption("plain#1", "D.", {"q": [1, 1, 1]})]),
    )
    quiz = system(report, "plain").quiz
    # q of a: (2/3 + 1)/2; r of a: (1 + 0)/2; q of b: (1/3 + 0)/2
    assert quiz.accuracy.value == pytest.approx((5 / 6 + 1 / 2 + 1 / 6) / 3)
    assert quiz.best.value == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert quiz.abstained.value == pytest.approx((0 + 1 / 2 + 1 / 6) / 3)
    assert quiz.by_kind["color"].value == pytest.approx((5 / 6 + 1 / 6) / 2) and quiz.by_kind["color"].n == 2
    assert (quiz.by_kind["shape"].value, quiz.by_kind["shape"].n, quiz.by_kind["shape"].low) == (0.5, 1, None)
    assert list(quiz.by_kind) == ["color", "shape"] and quiz.accuracy.n == 3
    assert quiz.accuracy.low is not None and quiz.accuracy.low <= 0.5 <= (quiz.accuracy.high or 0)
    assert (report.images, report.rows, report.questions, report.unscored) == (2, 2, 3, 0)
    assert (system(report, "plain").samples, system(report, "plain").captions) == (2, 4)


def test_unscored_questions_are_left_out_and_counted() -> None:
    asked = [question("q"), question("r"), question("s", kind="text")]
    report = report_on(
        row(
            "a",
            asked,
            [caption("plain", "A.", {"q": [0, None, 1], "r": [None] * 3}), caption("blind", None, {"q": [1] * 3})],
        )
    )
    plain, blind = system(report, "plain").quiz, system(report, "blind").quiz
    assert (plain.accuracy.value, plain.accuracy.n, plain.unscored) == (0.5, 1, 2)
    assert (blind.accuracy.value, blind.accuracy.n, blind.unscored) == (0.0, 1, 2)
    assert list(plain.by_kind) == ["color"] and report.unscored == 2 and report.questions == 3


def test_one_sample_without_a_score_does_not_pull_the_mean_down() -> None:
    asked = [question("q")]
    pair = [caption("plain#0", "A.", {"q": [0]}), caption("plain#1", "B.", {"q": [None]})]
    assert system(report_on(row("a", asked, pair)), "plain").quiz.accuracy.value == 1.0


def test_places_of_the_right_option_show_a_biased_reader() -> None:
    """Three presentations of two options and "Cannot tell" put option 0 in places 0, 2, 1 and option 1 in 1, 0, 2."""
    asked = [question("q", 2, 0), question("r", 2, 1)]
    always_first = {"q": [0, 1, 2], "r": [0, 1, 2]}
    quiz = system(report_on(row("a", asked, [caption("plain", "A.", always_first)])), "plain").quiz
    assert quiz.by_place == (PositionAccuracy(0, 2, 2), PositionAccuracy(1, 0, 2), PositionAccuracy(2, 0, 2))
    assert quiz.by_place[0].accuracy == 1.0
    partly = system(report_on(row("a", asked, [caption("plain", "A.", {"q": [0, None, 0]})])), "plain").quiz
    assert partly.by_place == (PositionAccuracy(0, 1, 1), PositionAccuracy(1, 1, 1))


def test_places_where_the_option_to_abstain_is_always_last() -> None:
    """Two presentations of two options then put each in both places, and abstaining in neither."""
    asked, always_first = [question("q", 2, 0), question("r", 2, 1)], {"q": [0, 1], "r": [0, 1]}
    rows = [row("a", asked, [caption("plain", "A.", always_first)])]
    quiz = system(evaluate(rows, {**SETTINGS, "reader prompt": "caprl"}, resamples=50), "plain").quiz
    assert quiz.by_place == (PositionAccuracy(0, 2, 2), PositionAccuracy(1, 0, 2))


def test_engine_errors_are_excluded_and_other_faults_are_graded() -> None:
    asked = [question("q")]
    wrong = {"q": [1, 1, 1]}
    rows = [
        row("a", asked, [caption("plain", None, {"q": [0, 0, 0]}, "engine_error"), caption("blind", None, wrong)]),
        row("b", asked, [caption("plain", "A", {"q": [0, 0, 0]}, "truncated"), caption("blind", None, wrong)]),
        row("c", asked, [caption("plain", "", wrong, "empty"), caption("blind", None, wrong)]),
    ]
    plain = system(report_on(*rows), "plain")
    assert plain.excluded == {"engine_error": 1} and plain.captions == 2
    assert (plain.quiz.accuracy.value, plain.quiz.accuracy.n, plain.quiz.unscored) == (0.5, 2, 1)
    assert report_on(*rows).unscored == 1


def test_rows_with_nothing_to_measure_are_counted_by_reason() -> None:
    good = row("a", [question("q")], [caption("plain", "A.", {"q": [0]})])
    rows = [
        row("b", None, None, status="corrupt"),
        row("c", [], [caption("plain", "A.", {})]),
        row("d", [question("q")], []),
        row("e", [], [], status="engine_error"),
    ]
    report = report_on(good, *rows)
    assert report.excluded == {"corrupt": 1, "engine_error": 1, "no_caption": 1, "no_question": 1}
    assert report.images == report.rows == 1


def test_systems_come_prompts_first_and_controls_from_best_to_worst() -> None:
    names = ["blind", "generic", "short", "oracle", "plain#0", "empty", "plain#1"]
    report = report_on(row("a", [question("q")], [caption(name, "A.", {"q": [0]}) for name in names]))
    assert [each.name for each in report.systems] == ["short", "plain", "oracle", "generic", "empty", "blind"]


def read_by(told: Chosen, blind: Chosen, control: str = "self-oracle", images: int = 10) -> EvaluationReport:
    """A reader that answers so from a caption that tells all, and so without any; two options, the first is right."""
    captions = [caption("plain", "A.", {"q": blind}), caption(control, "Q? Yes.", {"q": told})]
    captions.append(caption("blind", None, {"q": blind}))
    return report_on(*(row(str(number), [question("q")], captions, SCENE) for number in range(images)))


def test_a_reader_that_cannot_read_is_warned_of_for_people_and_machines() -> None:
    report = read_by(told=[0, 2, 2], blind=[0, 2, 1])
    (caution,) = report.warnings
    assert caution.kind == "cannot_read" and "self-oracle 0.333, blind 0.333" in caution.text
    assert caution.figures == pytest.approx({"self-oracle": 1 / 3, "blind": 1 / 3, "threshold": 0.2})
    assert report.to_dict()["warnings"][0]["kind"] == "cannot_read"
    assert EvaluationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert read_by(told=[0, 0, 0], blind=[2, 2, 2]).warnings == ()
    assert read_by(told=[0, 0, 0], blind=[2, 2, 2], control="oracle").warnings == ()
    assert read_by(told=[1, 2, 1], blind=[1, 2, 1], control="oracle").warnings[0].kind == "cannot_read"
    assert read_by(told=[0, 2, 2], blind=[0, 2, 1], control="generic").warnings == (), "nothing tells the answers"


def test_a_reader_that_prefers_a_place_is_warned_of() -> None:
    """Three presentations put option 0 in places A, C and B."""
    report = read_by(told=[0, 2, 2], blind=[2, 2, 2], images=20)
    (caution,) = report.warnings
    assert caution.kind == "prefers_places" and "A 1.000, B 0.000, C 0.000" in caution.text
    assert caution.figures == pytest.approx({"A": 1.0, "B": 0.0, "C": 0.0, "threshold": 0.2})
    assert read_by(told=[0, 2, 2], blind=[2, 2, 2], images=19).warnings == (), "too few to tell"


def test_the_self_oracle_states_nothing_of_the_image() -> None:
    report = read_by(told=[0, 0, 0], blind=[2, 2, 2])
    assert system(report, "self-oracle").truth is None and system(report, "plain").truth is not None


def test_a_repeated_image_is_one_unit() -> None:
    def of(key: str, uid: str, chosen: int) -> dict[str, Any]:
        return row(key, [question("q")], [caption("plain", "Same.", {"q": [chosen]})], uid=uid)

    report = report_on(of("a", "u", 0), of("b", "u", 1))
    plain = system(report, "plain")
    assert (report.images, report.rows) == (1, 2) and plain.quiz.accuracy.value == 0.5
    assert plain.quiz.accuracy.low is None and plain.text is not None and plain.text.identical == 0
    keyless = report_on(row("a", [question("q")], [caption("plain", "A.", {"q": [0]})], uid=None))
    assert keyless.images == 1


# --- the truth -------------------------------------------------------------------------------------------------------


def test_truth_by_hand() -> None:
    asked, answers = [question("q")], {"q": [0]}
    told = (
        "A large red circle in the top left. A blue star in the center. A green cross in the bottom left."
        ' A sign in the center reads "STOP".'
    )
    report = report_on(
        row(
            "a",
            asked,
            [
                caption("plain#0", told, answers),
                caption("plain#1", "A red circle.", answers),
                caption("generic", "A photo.", answers),
                caption("empty", "", answers),
                caption("blind", None, answers),
            ],
            SCENE,
        ),
        row("b", asked, [caption("plain#0", "A blue star.", answers)]),
    )
    truth = system(report, "plain").truth
    assert truth is not None and truth.captions == 2  # image b has no known truth
    # first: 4 of the circle are right, 3 each of the star and the cross are not, 2 of the sign are; second: 2 right
    assert truth.precision.value == pytest.approx(8 / 14) and truth.precision.n == 14
    # expected: shape, color, size, place, background, count, sign, sign_place, for each caption
    assert truth.recall.value == pytest.approx(8 / 16)
    assert truth.hallucinated.value == 1 and truth.chair_s.value == 0.5
    assert truth.chair_i.value == 2 / 5  # circle, star, cross, sign; circle
    generic = system(report, "generic").truth
    assert generic is not None and generic.precision.value is None and generic.recall.value == 0
    assert generic.chair_i.value is None and generic.chair_s.value == 0
    assert system(report, "blind").truth is None and system(report, "empty").truth is None


def test_the_truth_told_densely_is_perfect() -> None:
    rng = Random(0)
    rows = [
        row(str(i), [question("q")], [caption("oracle", dense_caption(scene, rng), {"q": [0]})], scene)
        for i, scene in enumerate(scenes("heldout", 20, seed=0))
    ]
    truth = system(report_on(*rows), "oracle").truth
    assert truth is not None
    assert (truth.precision.value, truth.recall.value, truth.chair_i.value, truth.chair_s.value) == (1, 1, 0, 0)
    assert (truth.recall.low, truth.recall.high) == (1, 1)


def test_text_figures_are_of_each_system() -> None:
    answers = {"q": [0]}
    loop = "the red car and " * 6
    rows = [
        row(
            key,
            [question("q")],
            [
                caption("plain", text, answers, n_tokens=len(key)),
                caption("generic", "A photo.", answers),
                caption("blind", None, answers),
            ],
        )
        for key, text in (("a", loop), ("bbb", "A red circle."))
    ]
    report = report_on(*rows)
    plain, generic = system(report, "plain").text, system(report, "generic").text
    assert plain is not None and (plain.loops, plain.tokens, plain.identical) == (0.5, 2.0, 0)
    assert generic is not None and (generic.identical, generic.words, generic.tokens) == (1.0, 2.0, None)
    assert system(report, "blind").text is None


# --- the whole -------------------------------------------------------------------------------------------------------


def test_examples_show_the_first_images_with_their_results() -> None:
    asked = [question("q"), question("r", kind="text")]
    rows = [
        row(
            str(i),
            asked,
            [caption("blind", None, {"q": [0]}), caption("plain", f"No. {i}", {"q": [0, 2, 1], "r": [None]})],
        )
        for i in range(5)
    ]
    report = report_on(*rows)
    assert [(each.key, each.system) for each in report.examples[:3]] == [("0", "plain"), ("0", "blind"), ("1", "plain")]
    assert {each.key for each in report.examples} == {"0", "1", "2"}
    first, blind = report.examples[:2]
    assert first.text == "No. 0" and blind.text is None
    assert [(each.kind, each.right, each.abstained, each.scored) for each in first.answers] == [("color", 1, 1, 3)]


def test_the_same_rows_give_the_same_report_and_another_seed_other_intervals() -> None:
    rng = Random(3)
    rows = [
        row(str(i), [question("q")], [caption("plain", "A.", {"q": [rng.randrange(3) for _ in range(3)]})])
        for i in range(40)
    ]
    report, again = evaluate(iter(rows), SETTINGS, seed=1), evaluate(iter(rows), SETTINGS, seed=1)
    other = evaluate(iter(rows), SETTINGS, seed=2)
    assert report == again and report != other
    assert system(report, "plain").quiz.accuracy.value == system(other, "plain").quiz.accuracy.value


def test_a_report_survives_json_and_has_no_nan() -> None:
    asked = [question("q"), question("r", 4, 3, "text")]
    answers = {"q": [0, None, 2], "r": [3, 4, 0, 1, 2]}
    captions = [caption("plain", "A | b\nc <i>", answers), caption("oracle", "", {"q": [None]}, "engine_error")]
    report = evaluate(
        [row("a", asked, [*captions, caption("blind", None, answers)], SCENE), row("b", None, None, status="unsafe")],
        {**SETTINGS, "seeds": (1, 2), "captions": {"fingerprint": "ab"}},
    )
    assert EvaluationReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    assert all(math.isfinite(number) for number in numbers(report.to_dict()))
    oracle = system(report, "oracle")
    assert oracle.captions == 0 and oracle.quiz.accuracy.value is None and oracle.truth is None


def test_json_of_another_form_names_the_field() -> None:
    with pytest.raises(BadInput, match=r"^images: .*capipe eval"):
        EvaluationReport.from_dict({"rows": 1})


# --- what cannot be measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "grades: no row at all"),
        ([row("a", None, None, status="corrupt")], r"grades: no row with questions and captions \(1 corrupt\)"),
        (
            [row("a", [question("q")], [caption("plain", "A.", {"q": [None]})])],
            "none of the 1 questions has a score; take another",
        ),
        (
            [row("a", [question("q")], [caption("plain", "A.", {"q": [None]})], error="the first is 'The'")],
            "none of the 1 questions has a score: the first is 'The'; take another --reader or --reader-mode",
        ),
        (
            [row("a", None, None, status="engine_error", error="HTTP 400: no")],
            r"\(1 engine_error; the first says: HTTP 400: no\)",
        ),
    ],
)
def test_nothing_to_measure_is_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        evaluate(rows, SETTINGS, where="grades")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scene", ["[]", "{", '{"background": "mauve", "things": []}'])
def test_a_scene_that_cannot_be_read_is_named(scene: str) -> None:
    bad = {**row("a", [question("q")], [caption("plain", "A.", {"q": [0]})]), "scene": scene}
    with pytest.raises(BadInput, match="the scene of row 'a' cannot be read"):
        report_on(bad)


def test_answers_that_contradict_their_counts_or_question_are_refused() -> None:
    graded = row("a", [question("q")], [caption("plain", "A.", {"q": [0, 1, 2]})])
    graded["captions"][0]["answers"][0]["right"] = 2
    with pytest.raises(BadInput, match="row 'a', caption 'plain': the counts of question q contradict"):
        report_on(graded)
    with pytest.raises(BadInput, match="question q has 4 presentations of option 0 of 2"):
        report_on(row("a", [question("q")], [caption("plain", "A.", {"q": [0, 1, 2, 0]})]))
