"""Texts are data: whatever token they spell, no scorer, reader, captioner or teacher reads it as that token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from capipe.models.bundled import folder_of
from capipe.models.context_check import counter_of
from capipe.models.engines.base import GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.captioner_registry import KINDS, kind_of
from capipe.models.engines.chat_templates import open_encoder
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.plain_text import broken, is_control, plain_for_servers, plain_text, spelled
from capipe.models.engines.prompting import CaptionerEncoder, PromptEncoder
from capipe.models.quiz import Question, caption_prompt, put, writing_prompt
from capipe.models.reader import QuizReader, ReaderConfig
from capipe.models.scorers.clip import load_clip
from capipe.models.scorers.itm import load_itm
from capipe.models.scorers.lm_scores import load_text_scorer
from capipe.models.tiny.world.corpus import samples

from ...conftest import photo
from ..chat_server import Double, ask, completion

TOKENIZERS = (
    *("blip2", "captioner", "clip", "diffusion/tokenizer", "eval-clip", "holdout-reader", "itm", "opt", "reader"),
    *("teacher", "vit-gpt2"),
)
IMAGE = ImageInput("probe")
OTHERS = ("<think>", "</think>", "<tool_call>")  # added to many vocabularies, and not marked special


def tokenizer_of(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def control_of(tokenizer: Any) -> dict[int, str]:
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if is_control(token)}


def spelling(token: str) -> list[str]:
    """Texts that spell a token: alone, twice, within itself, broken where the breaking itself might mend it."""
    within = token[: len(token) // 2] + token + token[len(token) // 2 :]
    return [token, f"A red star{token}{token} on blue.", f"{token}\n", within, token[0] + token, f"{token[0]} {token}"]


def test_the_list_of_bundled_tokenizers_is_whole() -> None:
    root = folder_of("itm").parent
    assert set(TOKENIZERS) == {str(file.parent.relative_to(root)) for file in root.rglob("tokenizer.json")}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_bundled_tokenizer_reads_a_spelled_token(name: str) -> None:
    tokenizer = tokenizer_of(folder_of(name))
    plain, control = plain_text(tokenizer), control_of(tokenizer)
    assert set(tokenizer.all_special_ids) <= set(control)
    for number, token in control.items():
        assert number in tokenizer.encode(token, add_special_tokens=False)  # or nothing is shown
        for text in spelling(token):
            assert not set(tokenizer.encode(plain(text), add_special_tokens=False)) & set(control), text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_other_texts_stay_byte_for_byte(name: str) -> None:
    plain = plain_text(tokenizer_of(folder_of(name)))
    questions = [
        Question("What is <3 of 1 < 2 > 0?", ("a [b]", "|c|"), 0),
        Question("Which color?", ("red", "blue"), 1),
    ]
    texts = [each.caption for each in samples(20, "heldout", seed=4)]
    texts += [caption_prompt(text) + put(each, (2, 0, 1)) for text in texts for each in questions]
    texts += [
        writing_prompt(3),
        "",
        "\r\n\t \0",
        "ﬁ ½ é e\u0301 \u2581 猫 👩\u200d🚀",
        "a < image > [ SEP ] <|im end|>",
    ]
    assert [plain(text) for text in texts] == texts


@pytest.mark.parametrize("name", ["reader", "holdout-reader", "teacher"])
def test_the_phrases_of_the_bundled_readers_stay_tokens(name: str) -> None:
    tokenizer = tokenizer_of(folder_of(name))
    plain, control = plain_text(tokenizer), control_of(tokenizer)
    phrases = {n: token.content for n, token in tokenizer.added_tokens_decoder.items() if n not in control}
    assert len(phrases) > 60 and not any(token in control.values() for token in phrases.values())
    for number, phrase in phrases.items():
        assert plain(phrase) == phrase and tokenizer.encode(phrase, add_special_tokens=False) == [number]


# --- what is asked of models ------------------------------------------------------------------------------------------


def encoder_of(name: str) -> tuple[PromptEncoder, int | None]:
    import json

    folder = folder_of(name)
    config = json.loads((folder / "config.json").read_text())
    image = config.get("image_token_id", config.get("image_token_index"))
    if (kind := kind_of(folder)) is not None:
        return CaptionerEncoder(tokenizer_of(folder), image, 1, KINDS[config["model_type"]].prompted), image
    assert kind is None
    return open_encoder(folder, tokenizer_of(folder), image), image


@pytest.mark.parametrize("name", ["captioner", "teacher", "reader", "holdout-reader", "blip2"])
def test_a_prompt_has_the_tokens_of_its_template_alone(name: str) -> None:
    encoder, image = encoder_of(name)
    tokenizer = tokenizer_of(folder_of(name))
    control, shown = control_of(tokenizer), None if image is None else IMAGE
    chat = name != "blip2"

    def put_in(text: str) -> list[Prompt]:
        question = Question(f"What {text} is it?", (f"red {text}", f"{text} blue"), 0)
        read = caption_prompt(text) + put(question, (0, 1, 2))
        asked = [Prompt(text, shown), Prompt(read, shown), Prompt("Say.", shown, answer_prefix=text)]
        return [*asked, Prompt("Say.", shown, system=f"Be {text}.")] if chat else asked

    def control_ids(prompt: Prompt) -> list[int]:
        return [number for number in encoder.encode(prompt) if number in control]

    expected = [control_ids(prompt) for prompt in put_in("red")]
    assert all(expected)
    for token in control.values():
        for text in spelling(token):
            assert [control_ids(prompt) for prompt in put_in(text)] == expected, text
            assert not set(encoder.text_ids(text)) & set(control)


def test_tokens_that_are_not_marked_special_count_and_a_thoughts_own_tags_stay(tmp_path: Path) -> None:
    from ..folders import BEGUN, thinking_reader

    folder = thinking_reader(tmp_path / "reader", BEGUN)
    tokenizer = tokenizer_of(folder)
    tokenizer.add_tokens(["<tool_call>", "zebraword", "  \n"])
    encoder = open_encoder(folder, tokenizer, None)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*OTHERS, "zebraword")}
    usual = encoder.encode(Prompt("Say.", thought="red"))
    for token in OTHERS:
        assert not tokenizer.added_tokens_decoder[ids[token]].special
        put = encoder.encode(Prompt(f"Say {token}.", thought=f"It is {token} red.", answer_prefix=token))
        for other in OTHERS:
            assert put.count(ids[other]) == usual.count(ids[other])
    assert [usual.count(ids[token]) for token in OTHERS] == [1, 1, 0]
    assert ids["zebraword"] in encoder.encode(Prompt("A zebraword."))


async def test_a_reader_answers_from_captions_and_questions_that_spell_tokens() -> None:
    engine = await load_engine(EngineConfig("transformers", "tiny/reader", device="cpu"))
    reader = QuizReader(engine, ReaderConfig())
    try:
        for token in control_of(tokenizer_of(folder_of("reader"))).values():
            question = Question(f"What color is the{token} star?", ("red", f"blue{token}", "green"), 0)
            (reading,) = await reader.read(f"{token}There is a large red star in the center.{token}", [question])
            assert reading.errors == () and reading.scored == 4
    finally:
        await engine.aclose()


def test_tokens_are_counted_as_they_are_read() -> None:
    count = counter_of(EngineConfig("transformers", str(folder_of("reader"))))
    tokenizer = tokenizer_of(folder_of("reader"))
    text = "A red star<|im_end|>."
    assert count(text) == len(tokenizer.encode(plain_text(tokenizer)(text))) > len(tokenizer.encode(text))


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "[/INST] B", "[gMASK]", "</s>", "<image>", "<｜User｜>", "◁think▷", "<start_of_turn>"]
)
async def test_servers_get_no_common_control_token(text: str) -> None:
    double = Double(lambda n, body: completion("x"))
    image = ImageInput("u", encoded=photo(1))
    await ask(double, GenerationRequest(Prompt(f"Say {text}.", image, f"Be {text}.", text), Sampling(max_tokens=4)))
    sent = str(double.bodies[0]["messages"])
    assert text not in sent and sent.count(f"{text[0]} {text[1:]}") == 3


def test_what_is_no_control_token_reaches_servers_as_it_is() -> None:
    for text in (
        "1 < 2",
        "<caption>\nA [LOGO].\n</caption>",
        "Think in <think> tags.",
        "|x|",
        "<| a |>",
        writing_prompt(2),
    ):
        assert plain_for_servers(text) == text


# --- scorers ----------------------------------------------------------------------------------------------------------


def ids_of(scorer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    def ids(texts: Sequence[str]) -> list[list[int]]:
        found = scorer.tokenize(texts)
        return found.tolist() if isinstance(found, torch.Tensor) else found

    return ids


@pytest.mark.parametrize(
    ("load", "name"),
    [(load_clip, "clip"), (load_clip, "eval-clip"), (load_itm, "itm"), (load_text_scorer, "opt")],
)
def test_scorers_read_no_token_that_a_caption_spells(load: Callable[[str], Any], name: str) -> None:
    scorer, control = load(f"tiny/{name}"), control_of(tokenizer_of(folder_of(name)))
    ids = ids_of(scorer)

    def control_ids(texts: Sequence[str]) -> list[set[int]]:
        return [{number for number in each if number in control} for each in ids(texts)]

    (expected,) = control_ids(["a red star"])
    for token in control.values():
        assert control_ids(spelling(token)) == [expected] * len(spelling(token))


def test_blip_rewards_and_pictures_from_text_read_none_either(tmp_path: Path) -> None:
    from capipe.models.scorers.blip_contrastive import load_blip

    from ...small_models import blip_retrieval

    folder = str(blip_retrieval(tmp_path))
    scorer, itm = load_blip(folder), load_itm(folder)
    control = control_of(tokenizer_of(folder))
    for token in control.values():
        for each in (scorer, itm):
            ids = [number for number in each.tokenize([f"a{token}red star"])[0] if number in control]
            assert [control[number] for number in ids] == ["[CLS]", "[SEP]"]


def test_a_painter_is_given_plain_text() -> None:
    pytest.importorskip("diffusers")
    from capipe.models.diffusion import load_painter

    painter = load_painter("tiny/diffusion", steps=1, guidance=1.0)
    tokenizer, asked = painter._pipeline.tokenizer, list[str]()
    encode = painter._pipeline.encode_prompt

    def noted(prompts: Sequence[str]) -> Any:
        asked.extend(prompts)
        return encode(prompts)

    painter._pipeline.encode_prompt = noted
    tokens = list(control_of(tokenizer).values())
    painter.paint([(f"a red {token} star", 0) for token in tokens])
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in asked]
    assert len(asked) == len(tokens) and not any(set(ids) & set(control_of(tokenizer)) for ids in plain)


def test_open_clips_own_tokenizer_reads_none_either_not_even_after_cleaning() -> None:
    """It lowers letters and mends entities before it looks for tokens."""
    import open_clip

    from capipe.models.scorers.clip import read_plainly, token_ids

    own = open_clip.SimpleTokenizer()
    plain = read_plainly(open_clip.SimpleTokenizer())
    start, end = own.all_special_ids
    for text in ("<end_of_text>", "a <START_OF_TEXT> b", "&lt;end_of_text&gt;", "&amp;lt;end_of_text&amp;gt; dog"):
        assert (own([text]) == start).sum() + (own([text]) == end).sum() > 2
        ids = token_ids(plain, [text])
        assert (ids == start).sum() == 1 and (ids == end).sum() == 1
    texts = ["A dog, a cat &amp; 3 < 4!", "ünï", "", "word " * 90]
    assert torch.equal(token_ids(plain, texts), own(texts))


# --- tokenizers of other kinds ---------------------------------------------------------------------------------------


def other(model: Any, normaliser: Any = None, **added: bool) -> Any:
    """A tokenizer with added tokens, each said to be looked for in normalised text or not."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(model)
    if normaliser is not None:
        core.normalizer = normaliser
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.add_tokens([AddedToken(token, normalized=normalised) for token, normalised in added.items()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def unigram(*more: str) -> Any:
    from tokenizers.models import Unigram

    letters = [(chr(code), -5.0) for code in (*range(33, 127), 0x2581)]
    return Unigram([("<unk>", 0.0), *((token, 0.0) for token in more), *letters], unk_id=0)


def test_a_token_looked_for_in_normalised_text_is_found_there() -> None:
    from tokenizers import normalizers

    normaliser = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = other(unigram(), normaliser, **{"<Image>": True, "<end>": False})
    control, plain = set(control_of(tokenizer)), plain_text(tokenizer)
    for text in ("<IMAGE>", "\uff1cimage\uff1e", "a <iMage>b", "\uff1cimage\uff1e and \uff1cend\uff1e <end>"):
        assert set(tokenizer.encode(text)) & control
        assert not set(tokenizer.encode(plain(text))) & control, text
    assert plain("\uff1cpicture\uff1e") == "\uff1cpicture\uff1e"


def test_a_normaliser_that_marks_words_does_not_hide_a_token() -> None:
    from tokenizers import normalizers

    normaliser = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = other(unigram(), normaliser, **{"<pad>": True})
    control, plain = set(control_of(tokenizer)), plain_text(tokenizer)
    for text in ("<pad>", "a <pad> b", "a<pad>"):
        assert not set(tokenizer.encode(plain(text))) & control, text


def test_a_vocabulary_that_has_the_token_as_a_piece_does_not_find_it() -> None:
    tokenizer = other(unigram("</s>", "<image>"), None, **{"</s>": False, "<image>": False})
    control, plain = set(control_of(tokenizer)), plain_text(tokenizer)
    for text in ("</s>", "a<image>b</s>", "<<image>image>"):
        assert not set(tokenizer.encode(plain(text))) & control, text


def test_nothing_is_left_of_any_spelling() -> None:
    """Overlapping ones, ones within others, ones that a blank would make."""
    tokens = ("<a>", "a>", "<a", "< a>", "<  a>", "[x", "x]", "<a><a>", "!", " b ", "b\u2581", "c d")
    pattern, rng = spelled(tokens), Random(8)
    assert pattern is not None
    for _ in range(3000):
        text = "".join(rng.choices(["<", "a", ">", " ", "[", "x", "]", "!", "b", "c", "d", "\n"], k=rng.randrange(12)))
        made = broken(pattern, text)
        assert not pattern.search(made) and made.replace(" ", "") == text.replace(" ", "")
        assert made == text or pattern.search(text)
    assert spelled(["!", " ", ""]) is None


#: How other families than the bundled ones write theirs: Mistral, GLM, Llama 2, DeepSeek, Gemma, Kimi, InternLM, BERT.
FAMILIES = (
    *("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]"),
    *("[gMASK]", "[sMASK]", "sop", "[sop]", "<sop>", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<\uff5cUser\uff5c>"),
    *("<start_of_turn>", "<end_of_turn>", "\u25c1think\u25b7", "<IMG_CONTEXT>", "[MASK]", "[CLS]", "<fim_prefix>"),
)


@pytest.mark.parametrize("marked", ["special", "not special", "stripping", "normalized"])
def test_no_family_s_tokens_arise_from_a_text(marked: str) -> None:
    """Whatever the loaded tokenizer has been given, and however it is to look for it."""
    from tokenizers import AddedToken, normalizers

    tokenizer = other(unigram("[", "/INST", "]"), normalizers.NFKC())
    flags = {"lstrip": marked == "stripping", "rstrip": marked == "stripping", "normalized": marked == "normalized"}
    added = [AddedToken(token, special=marked != "not special", **flags) for token in FAMILIES]
    tokenizer.add_tokens(added, special_tokens=marked != "not special")
    # A bare word that is not marked special is vocabulary, as the bundled readers' phrases are.
    ids = {tokenizer.convert_tokens_to_ids(each) for each in FAMILIES if marked != "not special" or each != "sop"}
    plain = plain_text(tokenizer)
    wide = str.maketrans({"[": "\uff3b", "]": "\uff3d", "<": "\uff1c", ">": "\uff1e"})
    for token in FAMILIES:
        if token == "sop" and marked == "not special":
            continue
        nested = token[: len(token) // 2] + token + token[len(token) // 2 :]
        texts = [token, f"{token} B", f"A dog.{token}{token}x", f" {token}\n", nested, token.translate(wide)]
        texts += [f"[/INST] B {token} [{token}]", f"[{token}/INST]"]
        assert set(tokenizer.encode(token)) & ids, token
        for text in texts:
            assert not set(tokenizer.encode(plain(text), add_special_tokens=False)) & ids, (marked, text, plain(text))
    assert plain("An [INSTANT] photo [IMAGE] of a sofa") == "An [INSTANT] photo [IMAGE] of a sofa"
