"""The quiz models (readers and teacher): curriculum, architecture and initial weights of each."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from ...bundled import resolve
from ...pretrained import load_weights
from ..world.scenes import MOST_THINGS
from .architectures import build_config, build_reader_config
from .schedule import Schedule
from .texts.quiz_curriculum import QuizText, guessing, looking, lookup_question, reading, seeing, telling, writing
from .texts.tokenizer import QUIZ, SPECIAL, build_tokenizer, with_phrases
from .texts.yes_no_curriculum import PHRASES, asking, checking
from .train_quiz import Curricula, QuizTrainer, curriculum_text

TEACHER_LAYERS = 5  # one more than the captioner: an answer must be matched with an option and mapped to its letter
TEACHER_GUIDED = 4  # the layers that find whether something is so; the last maps it to its letter
READER_LEVELS, TEACHER_LEVELS = MOST_THINGS + 3, MOST_THINGS + 1


@dataclass(frozen=True)
class Graduate:
    """Training settings of one quiz model."""

    curriculum: Curricula
    build: Callable[[PreTrainedTokenizerFast], Any]
    lr: float
    adam_lr: float
    guided: int | None = None  # layers, see QuizTrainer
    phrases: tuple[str, ...] = ()  # each is one token, see build_tokenizer


def reads(rng: Random, level: int) -> QuizText:
    """Readers' lessons by level: lists and word answers on many things, letters on one thing, two, …, any caption.

    Binding a thing's attributes to each other takes half a million answers to learn; lists hold most of them. The
    step from an answer to its letter is learnt only where the answer is easy to find.
    """
    if level == 1:
        return lookup_question(rng, 4, plainly=True, in_words=1.0, questions=3, lists=5)
    if level == 2:
        return lookup_question(rng, 5, plainly=rng.random() < 0.5, in_words=0.6, questions=6, lists=3)
    if level < READER_LEVELS:
        if rng.random() < 0.3:
            return lookup_question(rng, in_words=1.0)
        return lookup_question(rng, level - 2, in_words=0.1, letters=1)
    return lookup_question(rng, in_words=0.15) if rng.random() < 0.3 else reading(rng)


def teaches(rng: Random, level: int) -> QuizText:
    """Teacher lessons: about an image, without one, yes or no, requests for questions or (rehearsal) captions.

    Whether something is so is learnt on images of one thing, then two, up to five: on those of five nothing of it was
    learnt in 200 steps.
    """
    most, draw, early = min(level, MOST_THINGS), rng.random(), level <= MOST_THINGS
    looks, guesses, tells, asks, checks = (0.26, 0.05, 0.05, 0.2, 0.38) if early else (0.2, 0.06, 0.04, 0.2, 0.38)
    if draw < looks:
        return _unguided(seeing(rng, most) if early or rng.random() < 0.3 else looking(rng, most))
    if draw < looks + guesses:
        return _unguided(guessing(rng))
    if draw < looks + guesses + tells:
        return telling(rng, most)
    if draw < looks + guesses + tells + asks:
        return asking(rng, most)
    return checking(rng, most) if draw < looks + guesses + tells + asks + checks else writing(rng, most)


def _unguided(curriculum: QuizText) -> QuizText:
    """The same, for all layers: the teacher learnt letters without guidance, and keeps them so."""
    return replace(curriculum, branches=tuple(replace(branch, means="") for branch in curriculum.branches))


def new_reader(width: int, layers: int, inner: int) -> Callable[[PreTrainedTokenizerFast], Qwen2ForCausalLM]:
    def build(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
        model = Qwen2ForCausalLM(build_reader_config(tokenizer, width, layers, inner))
        compose(model, tokenizer)
        return model

    return build


def compose(model: Any, tokenizer: PreTrainedTokenizerFast, known: Container[str] = ()) -> None:
    """Initialise each phrase token from the mean embedding of its words, so that ". red" starts close to " red".

    Tokens that are ``known`` keep theirs.
    """
    words = tokenizer.backend_tokenizer.model
    weight = model.get_input_embeddings().weight
    cut = tokenizer.backend_tokenizer.pre_tokenizer
    with torch.no_grad():
        for phrase, index in tokenizer.get_added_vocab().items():
            pieces = [piece for piece, _ in cut.pre_tokenize_str(phrase) if any(map(str.isalpha, piece.strip("ĠĊ")))]
            parts = [token.id for piece in pieces for token in words.tokenize(piece)]
            if parts and phrase not in SPECIAL and phrase not in known:
                weight[index] = weight[parts].mean(0) * len(parts) ** 0.5


def inherit(model: Any, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """Give ``model`` the weights of the one in a folder, as far as it has them.

    That is, tensors of the same shape, and the embeddings of tokens that both vocabularies have. Raises BadInput where
    the folder's weights are not all of a model of this class.
    """
    source = load_weights(type(model), folder, dtype=torch.float32, called=folder)
    known = tokenizer_of(folder).get_vocab()
    mine = model.state_dict()
    mine |= {name: tensor for name, tensor in source.state_dict().items() if tensor.shape == mine[name].shape}
    old, new = source.get_input_embeddings().weight, model.get_input_embeddings().weight.detach().clone()
    for token, index in tokenizer.get_vocab().items():
        if token in known:
            new[index] = old[known[token]].detach()
    model.load_state_dict(mine)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new)  # tied to the head's weights
    compose(model, tokenizer, known)


def captioner_turned_teacher(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The bundled captioner's weights; embeddings are copied for tokens of both vocabularies, new for the others."""
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, TEACHER_LAYERS))
    inherit(model, tokenizer, resolve("tiny/captioner"))
    with torch.no_grad():
        for layer in model.model.language_model.layers[build_config(tokenizer).text_config.num_hidden_layers :]:
            layer.self_attn.o_proj.weight.zero_()  # a new layer starts as the identity
            layer.mlp.down_proj.weight.zero_()
    model.model.visual.requires_grad_(False)  # frozen: the captioner's vision encoder is trained already
    return model


GRADUATES = {
    "reader": Graduate(Curricula(reads, 20, READER_LEVELS), new_reader(128, 7, 384), 1e-3, 1e-3, 5),
    "holdout-reader": Graduate(Curricula(reads, 20, READER_LEVELS), new_reader(128, 8, 256), 1e-3, 1e-3, 6),
    "teacher": Graduate(
        Curricula(teaches, 16, TEACHER_LEVELS), captioner_turned_teacher, 1e-3, 1e-3, TEACHER_GUIDED, PHRASES
    ),
}


def enrol(name: str, schedule: Schedule, start: str | None = None) -> QuizTrainer:
    """The trainer of one of :data:`GRADUATES` at its first step, with that model's own learning rates.

    ``start``: a folder with weights of such a model to go on from, with its tokenizer, to which phrases that it lacks
    are added; None to train from the beginning. What it knows already takes it through the first levels.
    """
    graduate = GRADUATES[name]
    torch.manual_seed(schedule.seed)
    if start is None:
        tokenizer = build_tokenizer(
            schedule.seed, lambda seed: curriculum_text(graduate.curriculum, seed), QUIZ, graduate.phrases
        )
    else:
        tokenizer = with_phrases(tokenizer_of(start), graduate.phrases)
    model = graduate.build(tokenizer)
    planned = Schedule(schedule.seed, schedule.steps, schedule.minutes, graduate.lr, graduate.adam_lr)
    trainer = QuizTrainer(model, tokenizer, planned, graduate.curriculum, graduate.guided)
    if start is not None:
        inherit(model, tokenizer, start)
    return trainer


def tokenizer_of(folder: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a bundled model's folder, as it was saved."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer
