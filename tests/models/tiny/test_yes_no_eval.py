"""Areas under the ROC curve of yes-or-no answers: 1 for who knows, a half for who guesses, and ITM's on the same."""

from __future__ import annotations

import math

import pytest

from capipe.models.engines.base import ChoiceRequest, RequestError
from capipe.models.scorers.loading import ScorerConfig, load_scorer
from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.train.eval.yes_no import Probe, evaluate_yes_no, probes, scorer_truth, sentence_truth
from capipe.models.tiny.train.texts.presence import PRESENCE_KINDS
from capipe.models.tiny.train.texts.yes_no_curriculum import CHECKED

from ...scripted import Scripted, options_of


@pytest.fixture(scope="module")
def some() -> list[Probe]:
    return probes(24, seed=3)


def wrong_sentence(probe: Probe) -> str:
    return split_sentences(probe.captions[1])[probe.subject.changed.sentence]


def knowing(of: list[Probe], sure: float) -> Scripted:
    """Answers every question by what is so; ``sure``: the log-odds of an answer."""
    truths = {}
    for probe in of:
        sample = probe.subject.sample
        uid = f"{sample.scene.signature}-{sample.key}"
        truths |= {(uid, each.text): each.holds for each in probe.questions}
        truths |= {(uid, CHECKED + text): False for text in (probe.false, wrong_sentence(probe))}

    def choose(request: ChoiceRequest) -> list[float]:
        prompt = request.prompt
        assert prompt.image is not None and prompt.image.encoded
        question = prompt.text[prompt.text.rindex("Question: ") + len("Question: ") :].partition("\n")[0]
        odds = sure if truths.get((prompt.image.uid, question), True) else -sure
        yes = 1 / (1 + math.exp(-odds))
        first = options_of(prompt)["Yes"] == request.choices[0]
        return [math.log(yes if (place == 0) == first else 1 - yes) for place in range(2)]

    return Scripted(choose)


async def test_who_knows_is_always_right(some: list[Probe]) -> None:
    found = await evaluate_yes_no(knowing(some, 2.0), some)
    assert (found.questions, found.sentences, found.least, found.lowest, found.unanswered) == (1, 1, 1, 1, 0)
    assert set(found.by_kind) == set(PRESENCE_KINDS)
    assert all(area == 1 or math.isnan(area) for area in found.by_kind.values())
    assert found.mean == 1


async def test_who_does_not_know_is_right_half_of_the_time(some: list[Probe]) -> None:
    found = await evaluate_yes_no(knowing(some, 0.0), some)
    assert (found.questions, found.sentences, found.least, found.mean, found.unanswered) == (0.5, 0.5, 0.5, 0.5, 0)
    inverted = await evaluate_yes_no(knowing(some, -2.0), some)
    assert (inverted.questions, inverted.sentences) == (0, 0)
    silent = await evaluate_yes_no(Scripted(lambda request: RequestError("gone")), some)
    assert (silent.questions, silent.unanswered) == (0.5, 1)


def test_probes_are_the_same_for_the_same_seed_and_of_every_kind(some: list[Probe]) -> None:
    assert probes(24, seed=3) == some != probes(24, seed=4)
    for probe in some:
        assert [each.kind for each in probe.questions] == list(PRESENCE_KINDS)
        assert probe.true != probe.false and probe.captions[0] != probe.captions[1]


def test_the_lowest_sentence_counts_where_there_are_several(some: list[Probe]) -> None:
    one = next(probe for probe in some if len(split_sentences(probe.captions[1])) > 1)
    true, false = (split_sentences(caption) for caption in one.captions)
    truth = {one.true: 0.9, one.false: 0.2} | dict.fromkeys((*true, *false), 0.8)
    found = sentence_truth([one], [truth | {wrong_sentence(one): 0.1}])
    assert (found.least, found.mean, found.lowest) == (1, 1, 1)
    other = next(text for text in false if text != wrong_sentence(one))
    assert sentence_truth([one], [truth | {wrong_sentence(one): 0.3, other: 0.1}]).lowest == 0


def test_a_matching_model_is_measured_on_the_same_sentences(some: list[Probe]) -> None:
    found = scorer_truth(load_scorer(ScorerConfig("itm", "tiny/itm")), some)
    assert found.sentences > 0.75 and found.least > 0.7 and 0 <= found.lowest <= 1
