"""A text and a seed make a picture, in any batch; pipelines that bring code, or are none, are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from capipe.errors import BadInput

pytest.importorskip("diffusers")
from capipe.models.diffusion import Painter, load_painter

from ..small_models import diffusion, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusion(tmp_path_factory.mktemp("diffusion"))


def painter(folder: Path, **settings: Any) -> Painter:
    return load_painter(str(folder), **{"steps": 3, "guidance": 3.0, **settings})


def test_a_picture_depends_on_its_text_and_seed_alone(folder: Path) -> None:
    wanted = [("a red star", 1), ("a red star", 2), ("two blue circles on a white background", 1), ("", 5)]
    drawn = painter(folder).paint(wanted)
    assert drawn.shape == (4, 3, 16, 16) and 0 <= drawn.min() < drawn.max() <= 1
    for one, picture in zip(wanted, drawn, strict=True):
        torch.testing.assert_close(painter(folder, batch=1).paint([one])[0], picture, atol=1e-4, rtol=0)
    for first, second in ((0, 1), (0, 2)):
        assert (drawn[first] - drawn[second]).abs().max() > 1e-3


def test_guidance_goes_from_the_empty_text_to_the_text(folder: Path) -> None:
    """By hand: one step of DDIM from the noise, of what the net foretells with and without the text."""
    from capipe.models.pixel_diffusion import PixelDiffusionPipeline, encode_texts

    pipeline = PixelDiffusionPipeline.from_pretrained(folder)
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(4))[None]
    pipeline.scheduler.set_timesteps(1)
    (time,) = pipeline.scheduler.timesteps
    told = []
    with torch.inference_mode():
        for text in ("a red star", ""):
            states, _ = encode_texts(pipeline.text_encoder, pipeline.tokenizer, [text])
            told.append(pipeline.unet(noise, time, encoder_hidden_states=states).sample)
        for guidance, foretold in ((1.0, told[0]), (2.5, told[1] + 2.5 * (told[0] - told[1]))):
            picture = pipeline.scheduler.step(foretold, time, noise).prev_sample
            drawn = painter(folder, steps=1, guidance=guidance).paint([("a red star", 4)])
            torch.testing.assert_close(drawn, (picture / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_diffusers_own_pipelines_draw_as_well(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = words()
    tokenizer.model_max_length = 24
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), **small, max_position_embeddings=24, bos_token_id=2, eos_token_id=3
    )
    net = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=32, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    of_latents = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    StableDiffusionPipeline(
        of_latents, CLIPTextModel(text), tokenizer, net, DPMSolverMultistepScheduler(steps_offset=1), None, None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    wanted = [("a red star", 1), ("a blue circle", 2)]
    drawn = painter(tmp_path, size=16).paint(wanted)
    assert drawn.shape == (2, 3, 16, 16)
    torch.testing.assert_close(painter(tmp_path, size=16, batch=1).paint(wanted[1:])[0], drawn[1], atol=1e-4, rtol=0)


def test_what_is_no_such_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, said in (
        ("nowhere", "no such folder"),
        (str(tmp_path), r"the folder has no model_index\.json"),
        ("tiny/nothing", "no bundled model is called"),
    ):
        with pytest.raises(BadInput, match=said):
            painter(Path(name))
    with pytest.raises(BadInput, match="images of one size only"):
        painter(folder, size=32)
    for index, said in (
        ({"_class_name": "Nonsense"}, "has no pipeline Nonsense"),
        ({"_class_name": ["mine", "Mine"]}, "code of its own"),
        ({"_class_name": "DDPMPipeline"}, "does not load as a diffusion pipeline"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match=said) as refused:
            painter(tmp_path)
        assert "\n" not in str(refused.value)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/mine.py").write_text("raise SystemExit")
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(BadInput, match="code of its own"):
        painter(tmp_path)


def test_without_diffusers_its_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match=r"pip install 'capipe\[diffusion\]'"):
        painter(folder)
