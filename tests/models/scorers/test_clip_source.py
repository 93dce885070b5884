"""open_clip's weights are computed with the activation they were trained with, whatever the architecture is called."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import save_file

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.images.preprocess import Preprocess
from capipe.models.scorers.clip import built_activation, load_clip
from capipe.models.scorers.clip_source import CONFIG, ClipSource, clip_source

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AMBIGUOUS = {("roberta-ViT-B-32", "laion2b_s12b_b32k")}
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def test_every_tag_is_decided_as_its_weights_were_trained() -> None:
    wrong, refused, mended = [], set(), 0
    for architecture, tag in open_clip.list_pretrained():
        wanted = "quick_gelu" if get_pretrained_cfg(architecture, tag).get("quick_gelu") else "gelu"
        try:
            decided = clip_source(f"{architecture}:{tag}").activation
        except BadInput as error:
            assert "with QuickGELU" in str(error) and "laion/CLIP-ViT-B-32-roberta" in str(error)
            refused.add((architecture, tag))
            continue
        wrong += [(architecture, tag)] if decided != wanted else []
        mended += decided == "quick_gelu" and not get_model_config(architecture).get("quick_gelu")
    assert not wrong and refused == AMBIGUOUS and mended >= 27


@pytest.mark.parametrize(
    ("name", "preprocess", "levels"),
    [
        ("ViT-L-14:openai", Preprocess(224, 224), OPENAI),
        ("ViT-L-14-336:openai", Preprocess(336, 336), OPENAI),
        ("ViT-B-32:laion2b_s34b_b79k", Preprocess(224, 224), OPENAI),
        ("ViT-L-14:laion2b_s32b_b82k", Preprocess(224, 224), HALF),
        ("ViT-L-14:metaclip_fullcc", Preprocess(224, 224), OPENAI),
        ("ViT-L-14:dfn2b", Preprocess(224, 224), OPENAI),
        ("ViT-H-14-378-quickgelu:dfn5b", Preprocess(378, 378, "squash"), OPENAI),
        ("ViT-SO400M-14-SigLIP-384:webli", Preprocess(384, 384, "squash"), HALF),
        ("ViT-B-16-SigLIP2:webli", Preprocess(224, 224, "squash"), HALF),
        ("ViT-H-14-CLIPA:datacomp1b", Preprocess(224, 224, "squash", "bilinear"), IMAGENET),
        ("MobileCLIP-B:datacompdr", Preprocess(224, 224, "shortest", "bilinear"), ((0, 0, 0), (1, 1, 1))),
    ],
)
def test_pictures_are_made_as_the_tag_says(name: str, preprocess: Preprocess, levels: Any) -> None:
    source = clip_source(name)
    assert source.preprocess == preprocess and (source.mean, source.std) == levels


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-B-16:dfn2b", "ViT-B-16-quickgelu:metaclip_400m", "ViT-B-16-SigLIP:webli", "RN50:openai",
             "convnext_base_w_320:laion_aesthetic_s13b_b82k", "coca_ViT-B-32:laion2b_s13b_b90k"],
)  # fmt: skip
def test_what_open_clip_builds_is_what_was_decided(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that holds no numbers, so that no weights are needed."""
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "nowhere")
    source, (architecture, tag) = clip_source(name), name.split(":")
    fast = source.activation == "quick_gelu"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = open_clip.create_model(
            architecture, tag, load_weights=False, force_quick_gelu=fast, pretrained_text=False, device="meta"
        )
    agree(model, source)


def agree(model: Any, source: ClipSource) -> None:
    shown = model.visual.preprocess_cfg
    size = (shown["size"],) * 2 if isinstance(shown["size"], int) else tuple(shown["size"])
    assert size == (source.preprocess.height, source.preprocess.width)
    assert (tuple(shown["mean"]), tuple(shown["std"])) == (source.mean, source.std)
    assert (shown["resize_mode"], shown["interpolation"]) == (source.preprocess.resize, source.preprocess.interpolation)
    assert built_activation(model) in (None, source.activation)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, torch.Tensor]]:
    """Makes open_clip know a small architecture with the tag ``theirs``, whose random weights it "downloads"."""

    def make(architecture: dict[str, Any], **weights: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = open_clip.CLIP(**{key: value for key, value in architecture.items() if key != "quick_gelu"})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        save_file(state, tmp_path / "downloaded.safetensors")
        entry = {"hf_hub": "some/body/", "interpolation": "bilinear", "resize_mode": "squash", **weights}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", architecture)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"theirs": entry})
        path = str(tmp_path / "downloaded.safetensors")
        monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: path)
        return state

    return make


@pytest.mark.parametrize("fast", [True, False])
def test_the_features_are_those_of_the_trained_activation(
    fast: bool, small: Callable[..., dict[str, torch.Tensor]], recwarn: pytest.WarningsRecorder
) -> None:
    state = small(SMALL, quick_gelu=fast)
    scorer = load_clip("small:theirs")
    assert built_activation(scorer._model) == ("quick_gelu" if fast else "gelu")
    assert not [each for each in recwarn if "QuickGELU" in str(each.message)]
    agree(scorer._model, clip_source("small:theirs"))
    assert scorer.preprocess == Preprocess(32, 32, "squash", "bilinear")
    text = open_clip.tokenize(["a red star"], context_length=12)
    found = {}
    for activation in (True, False):
        model = open_clip.CLIP(**SMALL, quick_gelu=activation).eval()
        model.load_state_dict(state)
        with torch.inference_mode():
            found[activation] = model.encode_text(text, normalize=True)
    assert torch.allclose(scorer.encode_texts(["a red star"]), found[fast], atol=1e-5)
    assert (found[True] - found[False]).abs().max() > 1e-3  # which one it is matters


def test_weights_of_the_other_activation_than_the_architectures_are_refused(
    small: Callable[..., dict[str, torch.Tensor]],
) -> None:
    small({**SMALL, "quick_gelu": True})
    with pytest.raises(BadInput, match="builds small with QuickGELU and calls these weights trained with GELU") as told:
        load_clip("small:theirs")
    assert "some/body" in str(told.value) and "\n" not in str(told.value)


def bundled(folder: Path, **model: Any) -> Path:
    """A copy of ``tiny/clip`` whose configuration is changed."""
    for file in folder_of("clip").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"] |= model
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_a_folder_computes_as_its_configuration_says(tmp_path: Path) -> None:
    assert built_activation(load_clip("tiny/clip")._model) == clip_source("tiny/clip").activation == "gelu"
    folder = str(bundled(tmp_path, quick_gelu=True))
    assert built_activation(load_clip(folder)._model) == clip_source(folder).activation == "quick_gelu"


def test_a_folder_whose_two_configurations_differ_is_refused(tmp_path: Path) -> None:
    folder = bundled(tmp_path)
    towers = {tower: {"hidden_act": "gelu"} for tower in ("vision_config", "text_config")}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **towers}))
    assert clip_source(str(folder)).activation == "gelu"
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))  # quick_gelu is what that means
    with pytest.raises(BadInput, match=r"compute with gelu, config\.json \(vision_config\) with quick_gelu"):
        load_clip(str(folder))


def test_a_folder_without_weights_or_with_others_is_refused(tmp_path: Path) -> None:
    folder = bundled(tmp_path)
    weights = folder / "open_clip_model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    with pytest.raises(BadInput, match="open_clip cannot load it"):
        load_clip(str(folder))
    weights.write_bytes(kept)
    deeper = {**json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]}
    bundled(folder, text_cfg={**deeper, "layers": deeper["layers"] + 1})
    with pytest.raises(BadInput, match=r"open_clip cannot load it .*Missing key.*resblocks") as told:
        load_clip(str(folder))
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_the_readmes_clip_has_the_activation_of_openai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        made = open_clip.create_model("ViT-B-32", load_weights=False, device="meta")
    state = {name: torch.zeros(value.shape) + 0.01 for name, value in made.state_dict().items()}
    save_file(state, tmp_path / "openai.safetensors")
    path = str(tmp_path / "openai.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: path)
    assert built_activation(load_clip("ViT-B-32:openai")._model) == "quick_gelu"
