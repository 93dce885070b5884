"""Training on lessons computes what an engine computes for each question by itself, and can be resumed exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from capipe.models.tiny.train.architectures import (
    GRID_THW,
    build_config,
    build_processor,
    build_reader_config,
)
from capipe.models.tiny.train.schedule import Progress, Schedule
from capipe.models.tiny.train.texts.quiz_curriculum import (
    FORMS,
    QuizText,
    guessing,
    looking,
    reading,
    writing,
)
from capipe.models.tiny.train.texts.tokenizer import IMAGE, QUIZ, START, build_tokenizer, with_phrases
from capipe.models.tiny.train.texts.yes_no_curriculum import PHRASES, asking, checking
from capipe.models.tiny.train.train_quiz import (
    FORM_BASE,
    LESSON,
    QUESTION,
    Curricula,
    QuizSequence,
    QuizTrainer,
    curriculum_text,
    encode,
    text_positions,
    visible,
)
from capipe.models.yes_no import OPTIONS

SCHEDULE = Schedule(seed=3, steps=4, warmup=2)


def mixed(rng: Random, level: int) -> QuizText:
    """One lesson of any sort."""
    return rng.choice((reading, looking, guessing, writing, asking, checking))(rng)


def short_reading(rng: Random, level: int) -> QuizText:
    return reading(rng, most=2, questions=3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    lines = partial(curriculum_text, Curricula(mixed, 3, levels=1), count=50)
    return build_tokenizer(0, lines, QUIZ, PHRASES)


def new_reader(
    tokenizer: PreTrainedTokenizerFast, seed: int = 3, schedule: Schedule = SCHEDULE, guided: int | None = None
) -> QuizTrainer:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(build_reader_config(tokenizer, width=32, layers=2, inner=96))
    return QuizTrainer(model, tokenizer, schedule, Curricula(short_reading, 3, levels=1), guided)


@pytest.fixture(scope="module")
def reader(tokenizer: PreTrainedTokenizerFast) -> QuizTrainer:
    return new_reader(tokenizer)


@pytest.fixture(scope="module")
def teacher(tokenizer: PreTrainedTokenizerFast) -> QuizTrainer:
    """One that sees; its weights are random."""
    torch.manual_seed(3)
    config = build_config(tokenizer)
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    return QuizTrainer(Qwen2_5_VLForConditionalGeneration(config), tokenizer, SCHEDULE, Curricula(mixed, 3, levels=1))


def conversation(lesson: QuizText, branch: int) -> list[dict[str, Any]]:
    """What a client would send for one branch alone, and get."""
    asked = [{"type": "text", "text": lesson.text + lesson.branches[branch].asked}]
    content = [{"type": "image"}, *asked] if lesson.scene is not None else asked
    answer = [{"type": "text", "text": lesson.branches[branch].answer}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def alone(row: QuizSequence, branch: int) -> list[int]:
    """The places in a row of what one branch is made of: the beginning and its own tokens."""
    return [at for at, number in enumerate(row.branch) if number in (0, branch)]


def test_who_sees_whom() -> None:
    """A beginning of two tokens, branches of two and one, one of padding."""
    mask = visible(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert mask.shape == (1, 1, 6, 6) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    two = visible(torch.tensor([[0, 1, 2], [0, 0, -1]]))[:, 0].int().tolist()
    assert two == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 1]]]


def test_a_row_is_what_the_chat_template_makes_of_each_branch(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = build_processor(tokenizer)
    for number, make in enumerate((reading, looking, guessing, writing, asking, checking) * 3):
        lesson = make(Random(number))
        row = encode(lesson, tokenizer, Random(number))
        assert len(row.ids) == len(row.branch) == len(row.part) == row.positions.shape[1]
        assert (row.pixels is None) == (lesson.scene is None)
        for at, branch in enumerate(lesson.branches):
            text = processor.apply_chat_template(conversation(lesson, at)).removesuffix("\n")
            images = [Image.fromarray(row.pixels)] if row.pixels is not None else None
            whole = processor(text=[text], images=images).input_ids[0]
            mine = alone(row, at + 1)
            assert [row.ids[place] for place in mine] == list(whole), branch
            parts = [row.part[place] for place in mine]
            answer = len(tokenizer(branch.answer).input_ids) + 1
            learned = FORM_BASE + FORMS.index(branch.form)
            beginning, question = row.branch.count(0), len(mine) - row.branch.count(0) - answer
            said = [place for place in mine[-answer:] if row.means[place] >= 0]
            meant = [tokenizer.decode([row.means[place]]) for place in said]
            assert len(meant) == (branch.form == "letter") and all(branch.means.startswith(word) for word in meant)
            assert branch.statement or all(row.means[place] < 0 for place in mine[:-answer])
            assert parts == [LESSON] * beginning + [QUESTION] * question + [learned] * answer


def test_each_token_of_a_statement_is_followed_by_whether_it_is_true_so_far(tokenizer: PreTrainedTokenizerFast) -> None:
    yes, no = (tokenizer(option).input_ids[0] for option in OPTIONS)
    turned = 0
    for number in range(12):
        lesson = checking(Random(number))
        row = encode(lesson, tokenizer, Random(number))
        for at, branch in enumerate(lesson.branches, 1):
            places = [place for place, of in enumerate(row.branch) if of == at]
            end = places[0] + row.part[places[0] :].index(FORM_BASE + FORMS.index(branch.form))
            said = {place: row.means[place + 1] for place in range(places[0], end - 1) if row.means[place + 1] >= 0}
            if branch.statement is None:
                assert not said
                continue
            start, false_from, stop = branch.statement
            assert list(said) == list(range(min(said), max(said) + 1))
            words = tokenizer.decode([row.ids[place] for place in said])
            assert words.startswith(branch.asked[start:stop]) and words.strip() == branch.asked[start:stop]
            read = [tokenizer.decode([row.ids[place] for place in said if place <= last]) for last in said]
            expected = [no if len(text.rstrip("\n")) > false_from - start else yes for text in read]
            assert list(said.values()) == expected, branch
            turned += {yes, no} <= set(expected)
    assert turned > 5


def test_a_phrase_is_one_token_of_its_own_whenever_it_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = build_tokenizer(0, lambda seed: iter(["Question: Is there a star?\nA. Yes\n"] * 9), QUIZ)
    before = bare("Question: Is there a star?").input_ids
    with_phrases(bare, PHRASES)
    for known in (tokenizer, bare):
        assert [len(known(phrase).input_ids) for phrase in PHRASES] == [1] * len(PHRASES)
        assert known.decode(known(f"{PHRASES[0]}{PHRASES[1]}A star.").input_ids).endswith("Statement: A star.")
    assert len(before) > len(bare("Question: Is there a star?").input_ids)
    size = len(bare)
    assert len(with_phrases(bare, PHRASES)) == size, "what is there is not added again"


@torch.inference_mode()
def test_packed_branches_are_what_each_is_alone(reader: QuizTrainer) -> None:
    rows = [encode(reading(Random(seed), most=2, questions=3), reader.tokenizer, Random(0)) for seed in range(3)]
    hidden, ids, part, same = reader.hidden(rows)
    logits = reader.model.lm_head(hidden)
    for number, row in enumerate(rows):
        assert ids[number, : len(row.ids)].tolist() == row.ids and part[number, : len(row.ids)].tolist() == row.part
        assert not same[number, len(row.ids) - 1 :].any()
        for branch in (1, 2, 3):
            places = alone(row, branch)
            by_itself = reader.model(torch.tensor([[row.ids[place] for place in places]])).logits[0]
            assert torch.allclose(logits[number, places], by_itself, atol=1e-4)


@torch.inference_mode()
def test_packed_branches_with_a_picture_are_what_the_processor_and_model_make_of_each(teacher: QuizTrainer) -> None:
    """Rows with and without pictures in one batch, so that no row gets another's."""
    lessons = [looking(Random(1), questions=2), guessing(Random(2), questions=2), looking(Random(3), questions=2)]
    rows = [encode(lesson, teacher.tokenizer, Random(0)) for lesson in lessons]
    logits = teacher.model.lm_head(teacher.hidden(rows)[0])
    processor = build_processor(teacher.tokenizer)
    for number, (lesson, row) in enumerate(zip(lessons, rows, strict=True)):
        for branch in (0, 1):
            text = processor.apply_chat_template(conversation(lesson, branch)).removesuffix("\n")
            images = [Image.fromarray(row.pixels)] if row.pixels is not None else None
            inputs = processor(text=[text], images=images, return_tensors="pt")
            teacher.model.model.rope_deltas = None  # of the call before
            by_itself = teacher.model(**inputs).logits[0]
            assert torch.allclose(logits[number, alone(row, branch + 1)], by_itself, atol=1e-4)


def model_positions(school: QuizTrainer, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids])
    kinds = (tokens == school.model.config.image_token_id).int()
    where: Tensor = school.model.model.get_rope_index(tokens, kinds, image_grid_thw=torch.tensor([GRID_THW]))[0]
    return where[:, 0]


def test_positions_are_the_models_own(teacher: QuizTrainer) -> None:
    for make in (looking, writing):
        row = encode(make(Random(5)), teacher.tokenizer, Random(0))
        for branch in range(1, max(row.branch) + 1):
            places = alone(row, branch)
            expected = model_positions(teacher, [row.ids[place] for place in places])
            assert torch.equal(row.positions[:, places], expected)
    image = teacher.tokenizer.convert_tokens_to_ids(IMAGE)
    beginning = row.ids[: row.branch.count(0)]
    assert torch.equal(text_positions(len(beginning), beginning, image), model_positions(teacher, beginning))
    start = teacher.tokenizer.convert_tokens_to_ids(START)
    assert text_positions(3, [start] * 3, image).tolist() == [[0, 1, 2]] * 3


@torch.inference_mode()
def test_the_loss_is_each_kinds_mean_over_the_batch(reader: QuizTrainer) -> None:
    """However a batch is cut in parts: the letters' loss is the mean over all of them."""
    rows = [encode(reading(Random(seed), most=2, questions=3), reader.tokenizer, Random(0)) for seed in range(4)]
    counts = reader.count(rows)
    assert counts.all[FORM_BASE] == 2 * counts.told[FORM_BASE]  # a letter, and the end of the answer
    together, figures = reader._loss(rows, counts)
    parts = [reader._loss(rows[at : at + 1], counts) for at in range(4)]
    assert torch.allclose(sum(loss for loss, _ in parts), together, rtol=1e-4)
    losses = []
    for row in rows:
        for branch in (1, 2, 3):
            places = alone(row, branch)
            ids = torch.tensor([row.ids[place] for place in places])
            logprobs = reader.model(ids[None]).logits[0].log_softmax(-1)
            letters = [at for at, place in enumerate(places) if row.part[place] == FORM_BASE]
            losses += [-logprobs[at - 1, ids[at]].item() for at in letters]
    assert figures["letter"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_steps_lower_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    school = new_reader(tokenizer, schedule=Schedule(lr=1e-2, adam_lr=1e-2))
    rows = [encode(short_reading(Random(seed), 1.0), tokenizer, Random(0)) for seed in range(4)]
    reports = [school.step(list(rows), 1.0) for _ in range(12)]
    assert reports[-1]["letter"] < 0.6 * reports[0]["letter"]
    assert reports[-1]["letter_right"] > reports[0]["letter_right"]
    assert all(0 <= report["letter_right"] <= 1 and report["norm"] > 0 for report in reports)


def test_a_middle_layer_is_held_to_the_answer_in_words(tokenizer: PreTrainedTokenizerFast) -> None:
    school = new_reader(tokenizer, guided=1)
    rows = [encode(short_reading(Random(seed), 1), tokenizer, Random(0)) for seed in range(4)]
    _, figures = school._loss(rows, school.count(rows))
    losses = []
    for row in rows:
        for branch in (1, 2, 3):
            places = alone(row, branch)
            ids = torch.tensor([[row.ids[place] for place in places]])
            middle = school.model(ids, output_hidden_states=True).hidden_states[1]  # behind the first layer
            logprobs = school.model.lm_head(school.model.model.norm(middle))[0].log_softmax(-1)
            losses += [
                -logprobs[at - 1, row.means[place]].item() for at, place in enumerate(places) if row.means[place] >= 0
            ]
    letters = [row for row in rows for part in row.part if part == FORM_BASE]
    assert losses and len(losses) == len(letters) / 2  # the letter and the end of the turn
    assert figures["guide"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    reports = [school.step(list(rows), 1.0) for _ in range(12)]
    assert reports[-1]["guide"] < 0.9 * reports[0]["guide"]


def test_a_rate_of_zero_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    school = new_reader(tokenizer)
    before = {name: weight.clone() for name, weight in school.model.state_dict().items()}
    school.step([encode(short_reading(Random(0), 1.0), tokenizer, Random(0))], 0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in school.model.state_dict().items())


def test_levels_follow_what_is_answered_right() -> None:
    schedule, state = Schedule(steps=1000), Progress()
    for _ in range(300):
        state = schedule.advance(state, 0.0, 0.9, 3)
    assert (state.step, state.level) == (300, 1)  # not good enough
    reached = []
    for _ in range(300):
        before, state = state, schedule.advance(state, 0.0, 1.0, 3)
        if state.level > before.level:
            reached.append(state.step)
            assert state.right == 0.0  # what was right on one level says nothing about the next
    assert state.level == 3 and reached == [301, 346]
    assert schedule.advance(Progress(599, level=1), 0.0, 0.0, 3).level == 1
    assert schedule.advance(Progress(600, level=1), 0.0, 0.0, 3).level == 3  # the last part is of all sorts


def test_a_resumed_run_ends_in_the_same_weights(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole, first, second = new_reader(tokenizer), new_reader(tokenizer), new_reader(tokenizer, seed=8)
    lines: list[str] = []
    list(whole.run(lines.append))
    for progress in first.run(lambda line: None):
        if progress.step == 2:
            break
    first.save(tmp_path / "deep/run.pt")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["run.pt"]
    second.load(tmp_path / "deep/run.pt")
    assert second.progress.step == 2
    list(second.run(lambda line: None))
    assert second.progress.step == whole.progress.step == 4
    assert [line.split()[:2] for line in lines] == [["step", "1"], ["step", "2"], ["step", "3"]]
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name
    assert any(not torch.equal(w, first.model.state_dict()[name]) for name, w in whole.model.state_dict().items())
    other = new_reader(tokenizer, schedule=replace(SCHEDULE, seed=4))
    with pytest.raises(ValueError, match="seed 3, not 4"):
        other.load(tmp_path / "deep/run.pt")
