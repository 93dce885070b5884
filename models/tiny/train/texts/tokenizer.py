"""A small byte-level BPE like Qwen's, trained on the tiny world's captions and prompts; it encodes any text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...world.captions import dense_caption, short_caption
from ...world.prompts import DENSE, PLAIN, SHORT
from ...world.scenes import sample_of

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE = "<|image_pad|>"
VIDEO = "<|video_pad|>"
SPECIAL = (PAD, START, END, VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO)
VOCABULARY = 2048  # at most; the merges of so small a world end earlier
WORD = (  # Qwen's pre-tokenization
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Repeated parts of quizzes are one piece: instructions, the frame of a question, an option with its line's end, the
# JSON between a question's parts. This halves a question's tokens and puts an option's text next to its letter.
QUIZ = (
    r" ?(?:Answer the question|multiple-choice questions)[^<\n]+\n*"
    r"|(?:Question: )?(?:What|Which|Where|How|In which)[a-z ]*?(?= (?:the|there|is|does|can|has)\b)"
    r"|(?<=\n)[A-J](?=\. )|(?<=\n[A-J])\. [^\n<]+\n?"
    r'|["\]}, \[{]*"(?:questions": \[\{"kind|kind|question|options|answer)": \[?"|", "|"\}\]\}'
    r"|<\/?caption>\n*|assistant\n|user\n"
    r"|" + WORD
)
# No default system message: a request has one only if it contains it.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] in ('image', 'image_url') %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def training_text(seed: int, captions: int = 6000) -> Iterator[str]:
    """Captions of training scenes, then every prompt, about as frequent as a common word."""
    rng = Random(f"tokenizer:{seed}")
    for _ in range(captions):
        scene = sample_of("train", rng)
        yield dense_caption(scene, rng)
        yield short_caption(scene, rng)
    for _ in range(50):
        yield from (*PLAIN, *SHORT, *DENSE, "system\n", "user\n", "assistant\n")


def build_tokenizer(
    seed: int,
    text: Callable[[int], Iterator[str]] = training_text,
    pieces: str = WORD,
    phrases: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template, merged on ``text`` within ``pieces``; deterministic per seed.

    A piece that Qwen would split becomes an added token, matched before pre-tokenization: transformers applies Qwen's
    pre-tokenization to models of Qwen's types, whatever their files say. So does each of ``phrases``, which then needs
    no merges of its own.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = _cutting(pieces)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_without(text(seed), phrases), trainer)
    if pieces != WORD:
        found = _phrases(core, _without(text(seed), phrases))
        core.pre_tokenizer = _cutting(WORD)
        core.add_tokens(_added(found))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    return with_phrases(tokenizer, phrases)


def with_phrases(tokenizer: PreTrainedTokenizerFast, phrases: Sequence[str]) -> PreTrainedTokenizerFast:
    """The same tokenizer, in which each phrase is one token; those that it lacks get the next ids."""
    tokenizer.add_tokens(_added(phrases))
    return tokenizer


def _added(phrases: Iterable[str]) -> list[AddedToken]:
    return [AddedToken(phrase, normalized=False) for phrase in phrases]


def _without(texts: Iterable[str], phrases: Sequence[str]) -> Iterator[str]:
    """The texts between the phrases."""
    for text in texts:
        for phrase in phrases:
            text = text.replace(phrase, "\n")
        yield text


def _cutting(pieces: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _phrases(core: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The tokens of ``texts`` that Qwen's pre-tokenization would split, longest first."""
    words = _cutting(WORD)
    seen = {text[start:end] for text in texts for start, end in core.encode(text).offsets}
    return sorted((token for token in seen if len(words.pre_tokenize_str(token)) > 1), key=lambda t: (-len(t), t))
