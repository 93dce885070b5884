"""CLIP and ITM scores are the libraries' own, whatever shares the batch."""

from __future__ import annotations

import io
import string
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from capipe.errors import BadInput
from capipe.manifests.fingerprint import differences
from capipe.models.bundled import folder_of
from capipe.models.images.decode import ImageLimits, Pixels
from capipe.models.images.formats import ImageProblem
from capipe.models.images.preprocess import decode_preprocessed
from capipe.models.scorers.base import Pair, Scorer, by_length, cleaned, computing_threads, score_captions
from capipe.models.scorers.blip_contrastive import load_blip
from capipe.models.scorers.clip import ClipScorer, load_clip, token_ids
from capipe.models.scorers.itm import ItmScorer, load_itm
from capipe.models.scorers.loading import ScorerConfig, load_scorer, scorer_identity
from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.corpus import samples

from ...small_models import blip_retrieval

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "camera")
TEXTS = (
    "a red star",
    "A photo of a person in an orange suit. Behind her is a flag.",
    'Two shapes on a white background. A large red star is in the center. A sign says "EXIT".',
    "word " * 400,
    "ünïcode 猫 and (punctuation)!?",
)


def photographs() -> list[bytes]:
    """As JPEG files, so that decoding is part of what is compared."""
    data = pytest.importorskip("skimage.data")
    found = []
    for name in PHOTOGRAPHS:
        buffer = io.BytesIO()
        Image.fromarray(getattr(data, name)()).convert("RGB").save(buffer, "JPEG", quality=92)
        found.append(buffer.getvalue())
    return found


def files() -> list[bytes]:
    return [*photographs(), *(sample.image for sample in samples(4, "heldout", seed=5))]


def views(images: Sequence[bytes], scorer: Scorer) -> list[Pixels]:
    decoded = [decode_preprocessed(image, preprocesses=(scorer.preprocess,), limits=ImageLimits()) for image in images]
    return [each[0] for each in decoded if not isinstance(each, ImageProblem)]


@pytest.fixture(scope="module")
def clip() -> ClipScorer:
    return load_clip("tiny/clip")


@pytest.fixture(scope="module")
def itm() -> ItmScorer:
    return load_itm("tiny/itm")


@torch.inference_mode()
def test_clip_scores_are_open_clips_own_for_single_pairs(clip: ClipScorer) -> None:
    import open_clip

    source = f"local-dir:{folder_of('clip')}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    tokenizer, model = open_clip.get_tokenizer(source), model.eval()
    images = files()
    pairs = [Pair(image, text) for image in range(len(images)) for text in TEXTS]
    ours = clip.score(clip.encode_images(views(images, clip)), pairs)
    for pair, score in zip(pairs, ours, strict=True):
        shown = model.encode_image(preprocess(Image.open(io.BytesIO(images[pair.image])))[None], normalize=True)
        said = model.encode_text(tokenizer([pair.text]), normalize=True)
        assert score == pytest.approx((shown @ said.T).item(), abs=1e-4)


@torch.inference_mode()
def test_itm_scores_are_transformers_own_for_single_pairs(itm: ItmScorer) -> None:
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval

    model = Blip2ForImageTextRetrieval.from_pretrained(folder_of("itm"), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder_of("itm"))
    images = files()
    pairs = [Pair(image, text) for image in range(len(images)) for text in TEXTS]
    ours = itm.score(itm.encode_images(views(images, itm)), pairs)
    for pair, score in zip(pairs, ours, strict=True):
        shown = processor.image_processor(Image.open(io.BytesIO(images[pair.image])), return_tensors="pt")
        said = processor.tokenizer(pair.text, truncation=True, max_length=512, return_tensors="pt")
        asked = {"input_ids": said.input_ids, "attention_mask": said.attention_mask, **shown}
        logits = model(**asked, use_image_text_matching_head=True).logits_per_image
        assert score == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("heads", ["matching", "contrastive"])
def test_blip_retrieval_models_are_scored_as_transformers_does(tmp_path: Path, heads: str) -> None:
    from transformers import AutoProcessor, BlipForImageTextRetrieval

    folder = str(blip_retrieval(tmp_path))
    model, processor = BlipForImageTextRetrieval.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    scorer: Scorer = load_itm(folder) if heads == "matching" else load_blip(folder)
    images = [sample.image for sample in samples(3, "heldout", seed=6)]
    pairs = [Pair(image, text) for image in range(3) for text in TEXTS]
    ours = scorer.score(scorer.encode_images(views(images, scorer)), pairs)
    assert max(ours) - min(ours) > 0.01
    for pair, score in zip(pairs, ours, strict=True):
        asked = processor(
            images=Image.open(io.BytesIO(images[pair.image])),
            text=pair.text,
            return_tensors="pt",
            truncation=True,
            max_length=64,
        )
        theirs = model(**asked, use_itm_head=heads == "matching").itm_score
        value = theirs.softmax(-1)[0, 1] if heads == "matching" else theirs[0, 0]
        assert score == pytest.approx(value.item(), abs=1e-4)


def test_a_blip_without_contrastive_heads_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = blip_retrieval(tmp_path)
    weights = load_file(folder / "model.safetensors")
    bare = {name: value for name, value in weights.items() if not name.startswith("text_proj")}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="has no trained text_proj; name an image-text retrieval checkpoint"):
        load_blip(str(folder))
    with pytest.raises(BadInput, match=r"a model of type 'blip-2'; .* one of blip$"):
        load_blip("tiny/itm")


def test_clip_models_with_any_text_tower_are_scored(tmp_path: Path) -> None:
    """A tower that attends both ways cannot be cut short; nobody has to say so."""
    import json

    import open_clip
    from safetensors.torch import save_file

    config = json.loads((folder_of("clip") / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"no_causal_mask": True, "pool_type": "first", "layers": 1}
    config["model_cfg"]["custom_text"] = True
    for file in folder_of("clip").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = open_clip.CustomTextCLIP(
        **{key: value for key, value in config["model_cfg"].items() if key != "custom_text"}
    ).eval()
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors"
    )
    scorer = load_clip(str(tmp_path))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(list(TEXTS))
    with torch.inference_mode():
        expected = model.encode_text(tokens, normalize=True)
    assert torch.allclose(scorer.encode_texts(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("texts", [("a dog",), ("", "a &amp; b", "two  red\nsquares \u2019"), ("word " * 200, "short")])
def test_token_ids_are_the_tokenizers_own(texts: tuple[str, ...]) -> None:
    import open_clip

    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder_of('clip')}")
    assert torch.equal(token_ids(tokenizer, texts), tokenizer(list(texts)))
    simple = open_clip.SimpleTokenizer()
    assert torch.equal(token_ids(simple, texts), simple(list(texts)))


@pytest.mark.parametrize("kind", ["lower", "whitespace", "canonicalize"])
def test_texts_are_cleaned_as_open_clip_does(kind: str) -> None:
    from open_clip.tokenizer import get_clean_fn

    clean, rng = get_clean_fn(kind), Random(3)
    plain = ["".join(rng.choices(string.printable, k=rng.randrange(40))) for _ in range(500)]
    words = [
        " ".join(rng.choices(["Dog,", "_a_", "&lt;b&gt;", "&amp;amp;", "\u201chi\u201d", "caf\u00c3\u00a9"], k=4))
        for _ in range(50)
    ]
    for text in [*plain, *words, "", " ", "  two  Reds ", "A. B-c's (d)"]:
        assert cleaned(clean, text) == clean(text), text


@pytest.mark.parametrize("kind", ["clip", "itm"])
def test_a_caption_is_scored_whole_and_by_sentence(kind: str) -> None:
    scorer = load_scorer(ScorerConfig(kind, f"tiny/{kind}"))
    shown = list(samples(3, "heldout", seed=7))
    pixels = views([each.image for each in shown], scorer)
    captions = [(index, dense_caption(each.scene, Random(index))) for index, each in enumerate(shown)]
    captions.append((0, captions[1][1]))
    got = score_captions(scorer, pixels, captions)
    for (image, caption), score in zip(captions, got, strict=True):
        features = scorer.encode_images([pixels[image]])
        parts = [scorer.score(features, [Pair(0, part)])[0] for part in split_sentences(caption)]
        assert score.score == pytest.approx(scorer.score(features, [Pair(0, caption)])[0], abs=1e-5)
        assert score.mean == pytest.approx(np.mean(parts), abs=1e-5)
        assert score.least == pytest.approx(min(parts), abs=1e-5)
        assert score.least == pytest.approx(parts[score.lowest], abs=1e-5)


def test_the_same_batch_gives_the_same_bits(clip: ClipScorer, itm: ItmScorer) -> None:
    for scorer in (clip, itm):
        pixels = views([each.image for each in samples(5, "heldout", seed=8)], scorer)
        captions = [(index, "A large red star. A small blue circle.") for index in range(5)]
        assert score_captions(scorer, pixels, captions) == score_captions(scorer, pixels, captions)


def test_a_cpu_computes_batches_side_by_side_and_a_gpu_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert computing_threads([cpu, cpu], 4) == (4, 1) and computing_threads([cpu], 2) == (2, 3)
    assert computing_threads([cpu, gpu], 4) == (1, 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert computing_threads([cpu], 4) == (1, 1)


def test_batches_hold_alike_lengths_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 80, 500).tolist()
    batches = by_length(lengths, budget=400)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 400 for batch in batches)
    assert by_length([1000], budget=400) == [[0]]


@pytest.mark.parametrize(
    ("kind", "model", "reason"),
    [
        ("clip", "tiny/reader", "no open_clip_config.json"),
        ("clip", "ViT-B-32", "name its weights"),
        ("clip", "ViT-B-32:nobody", "name its weights"),
        ("clip", "no/such/folder", "no folder"),
        ("clip", "tiny/nothing", "no bundled model"),
        ("itm", "tiny/reader", "'qwen2'"),
        ("itm", "tiny/clip", "no config.json"),
        ("blip", "tiny/itm", "neither clip nor itm"),
    ],
)
def test_what_is_no_scorer_is_refused_in_a_line(kind: str, model: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as error:
        load_scorer(ScorerConfig(kind, model))
    assert "\n" not in str(error.value)


def test_a_retrieval_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from capipe.models.tiny.train.bundle import load_tensors

    for file in folder_of("itm").iterdir():
        if not file.name.startswith("model"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = {key: value for key, value in load_tensors(folder_of("itm")).items() if "itm_head" not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="no trained matching head"):
        load_itm(str(tmp_path))


def test_fingerprints_follow_the_weights(tmp_path: Path) -> None:
    for file in folder_of("clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    same = scorer_identity(ScorerConfig("clip", str(tmp_path)))
    assert same == scorer_identity(ScorerConfig("clip", "tiny/clip"))
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    other = scorer_identity(ScorerConfig("clip", str(tmp_path)))
    assert other["model"] != same["model"] and other["view"] == same["view"]
    assert scorer_identity(ScorerConfig("clip", "ViT-B-32:openai"))["model"] == "ViT-B-32|openai"


def test_fingerprints_follow_what_is_computed_and_how_pictures_come() -> None:
    """A folder that was scored with another activation is told apart by that key, with the same weights."""
    clip = scorer_identity(ScorerConfig("clip", "ViT-L-14:openai"))
    assert differences({**clip, "activation": "gelu"}, clip) == ['activation: "gelu" -> "quick_gelu"']
    for kind, model, size in (("clip", "ViT-L-14:openai", 224), ("itm", "tiny/itm", 112)):
        found = scorer_identity(ScorerConfig(kind, model))
        assert found["view"]["height"] == found["view"]["width"] == size
        assert set(found) == {"model", "dtype", "activation", "view", "mean", "std"}
        without = {key: found[key] for key in ("model", "dtype")}  # as it was written before
        named = [each.split(":")[0] for each in differences({"scorers": {kind: without}}, {"scorers": {kind: found}})]
        assert named == [f"scorers.{kind}.{key}" for key in ("activation", "mean", "std", "view")]
    assert scorer_identity(ScorerConfig("itm", "tiny/itm"))["activation"] == "vision gelu, text gelu"
