"""The models that learn from lessons: which curriculum each follows, how large it is, what it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from . import resolve
from .export import build_config, build_reader_config
from .lessons import Lesson, guessing, looking, reading, writing
from .schedule import Schedule
from .school import Curricula, Curriculum, School, lessons_text
from .tokenizer import QUIZ, build_tokenizer
from .world import MOST_THINGS

TEACHER_LAYERS = 5  # one more than the captioner: an answer has to be matched with an option and its letter found


@dataclass(frozen=True)
class Graduate:
    """What there is to know to train one from a seed."""

    curriculum: Curricula
    build: Callable[[PreTrainedTokenizerFast], Any]
    lr: float
    adam_lr: float


def most_things(far: float) -> int:
    """Scenes grow from one thing to five within the first quarter of the training."""
    return min(MOST_THINGS, 1 + int(far * 20))


def reads(rng: Random, far: float) -> Lesson:
    return reading(rng, most_things(far), in_words=0.5 if far < 0.15 else 0.2)


def teaches(rng: Random, far: float) -> Lesson:
    """Half of the lessons answer about a picture, more at first; the others answer without one, or write questions."""
    most, draw = most_things(far), rng.random()
    looks, guesses = (0.75, 0.15) if far < 0.25 else (0.55, 0.2)
    if draw < looks:
        return looking(rng, most, in_words=0.4 if far < 0.15 else 0.15)
    return guessing(rng) if draw < looks + guesses else writing(rng, most)


def new_reader(width: int, layers: int) -> Callable[[PreTrainedTokenizerFast], Qwen2ForCausalLM]:
    return lambda tokenizer: Qwen2ForCausalLM(build_reader_config(tokenizer, width, layers))


def captioner_turned_teacher(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The bundled captioner's weights with this tokenizer's embeddings: those of tokens both know, the rest new."""
    from transformers import AutoTokenizer

    folder = resolve("tiny/captioner")
    captioner = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    known = AutoTokenizer.from_pretrained(folder).get_vocab()
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, TEACHER_LAYERS))
    weights, mine = captioner.state_dict(), model.state_dict()
    mine |= {name: tensor for name, tensor in weights.items() if tensor.shape == mine[name].shape}
    old, new = captioner.get_input_embeddings().weight, model.get_input_embeddings().weight.detach().clone()
    for token, index in tokenizer.get_vocab().items():
        if token in known:
            new[index] = old[known[token]].detach()
    model.load_state_dict(mine)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new)  # tied: the head's weights, too
        for layer in model.model.language_model.layers[captioner.config.text_config.num_hidden_layers :]:
            layer.self_attn.o_proj.weight.zero_()  # a new layer changes nothing at first
            layer.mlp.down_proj.weight.zero_()
    model.model.visual.requires_grad_(False)  # it sees all there is to see already
    return model


GRADUATES = {
    "reader": Graduate(Curricula(reads, 24), new_reader(128, 5), 3e-3, 1.5e-3),
    "holdout-reader": Graduate(Curricula(reads, 24), new_reader(160, 5), 3e-3, 1.5e-3),
    "teacher": Graduate(Curricula(teaches, 24), captioner_turned_teacher, 2.5e-3, 1.5e-3),
}


def enrol(name: str, schedule: Schedule) -> School:
    """The school of one of :data:`GRADUATES` at its first step; the rates are its own."""
    graduate = GRADUATES[name]
    torch.manual_seed(schedule.seed)
    make: Curriculum = graduate.curriculum.make
    tokenizer = build_tokenizer(schedule.seed, lambda seed: lessons_text(make, seed), QUIZ)
    planned = Schedule(schedule.seed, schedule.steps, schedule.minutes, graduate.lr, graduate.adam_lr)
    return School(graduate.build(tokenizer), tokenizer, planned, graduate.curriculum)
