"""A byte-level tokenizer for GPT-2 and OPT with a listed, not trained, vocabulary: the same on every machine.

Each word of the rendered world's captions is one token; other text encodes as bytes. BPE training breaks ties
differently each time, and a resumed run would read different ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ...world.captions import dense_caption, short_caption
from ...world.scenes import sample_of
from .web_captions import plain_caption

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"


def build_word_tokenizer(seed: int, begin: bool, captions: int = 4000) -> PreTrainedTokenizerFast:
    """Build the tokenizer; ``begin``: it puts ``BOS`` before every text, as OPT's does and GPT-2's does not."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {piece for text in _texts(seed, captions) for piece, _ in cut.pre_tokenize_str(text)}
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [PAD, BOS, EOS, IMAGE, *sorted(words | letters)]
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    core.pre_tokenizer, core.decoder = cut, decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in vocabulary[:4]])
    if begin:
        core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],  # not as a named token: BLIP-2's processor would misread it
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _texts(seed: int, captions: int) -> Iterator[str]:
    rng = Random(f"words:{seed}")
    for _ in range(captions):
        scene = sample_of("train", rng)
        yield dense_caption(scene, rng)
        yield short_caption(scene, rng)
        yield plain_caption(scene, rng)
