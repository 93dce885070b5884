"""An adapter is merged once, as training merges its own; what is no adapter of the model is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from capipe.errors import BadInput, RunFailed
from capipe.models.engines.base import GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.lora import CACHE_VARIABLE, CONFIG, WEIGHTS, check_adapter, merged_folder
from capipe.models.engines.model_folder import image_grid, resolve_model
from capipe.trainer.build import build_policy, write_policy
from capipe.trainer.policy.lora import adapter_weights
from capipe.trainer.recipe import Recipe

from ..conftest import DETAILED, MODEL

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `capipe train` writes it with trained.lora: merged weights, the adapter beside them."""
    recipe = {"model": MODEL, "data": {"shards": "", "questions": ""}, "rewards": [{"kind": "length"}]}
    parts = build_policy(Recipe.model_validate({**recipe, "trained": {"lora": {"rank": 2}}}))
    torch.manual_seed(7)
    for weight in adapter_weights(parts.policy).values():
        weight.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("trained") / "step-000001"
    write_policy(parts, folder, {})
    parts.pictures.close()
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    return dict(model.state_dict())


def test_merged_it_is_the_checkpoint_that_training_wrote(trained: Path, cache: Path) -> None:
    base = resolve_model(MODEL)
    made = merged_folder(base, trained / "adapter", "auto" if not torch.cuda.is_available() else "float32")
    assert made.parent == cache / "merged"
    mine, theirs, plain = weights_of(made), weights_of(trained), weights_of(base)
    assert mine.keys() == theirs.keys()
    assert max((mine[name] - theirs[name]).abs().max() for name in mine) == 0
    assert sum(not torch.equal(mine[name], plain[name]) for name in mine) > 10
    assert image_grid(made) == image_grid(base)
    before = (made / "merged.json").stat().st_mtime_ns
    assert merged_folder(base, trained / "adapter", "float32") == made
    assert (made / "merged.json").stat().st_mtime_ns == before  # it is made once
    half = merged_folder(base, trained / "adapter", "bfloat16")
    assert half != made and all(w.dtype == torch.bfloat16 for w in load_file(half / "model.safetensors").values())


def test_what_was_killed_half_way_is_made_again(trained: Path) -> None:
    base = resolve_model(MODEL)
    made = merged_folder(base, trained / "adapter", "float32")
    (made / "merged.json").unlink()
    (made / "model.safetensors").write_bytes(b"half")
    assert merged_folder(base, trained / "adapter", "float32") == made
    assert weights_of(made).keys() == weights_of(base).keys()


def test_what_is_no_adapter_is_refused(trained: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(trained / "adapter", tmp_path / name))

    with pytest.raises(BadInput, match="no such folder; download"):
        check_adapter("someone/some-lora")
    with pytest.raises(BadInput, match=rf"no {CONFIG}; name .*step-000001/adapter"):
        check_adapter(str(trained))
    bare = copied("bare")
    (bare / CONFIG).unlink()
    with pytest.raises(BadInput, match=f"no {CONFIG}; name the folder of a peft adapter"):
        check_adapter(str(bare))
    pickled = copied("pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    with pytest.raises(BadInput, match="pickle may run code"):
        check_adapter(str(pickled))
    with pytest.raises(BadInput, match=r"a server loads its own; .*--model"):
        EngineConfig("http://127.0.0.1:9", "m", adapter=str(trained / "adapter"))


def test_without_peft_the_way_to_get_it_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capipe.models.engines.lora.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'capipe\[lora\]'"):
        check_adapter(str(trained / "adapter"))


def test_an_adapter_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    base, adapter = resolve_model(MODEL), trained / "adapter"

    def changed(name: str, change: Any) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        save_file(change(load_file(adapter / WEIGHTS)), folder / WEIGHTS)
        return folder

    wide = changed("wide", lambda ws: {n: torch.cat([w, w], dim=1) if "lora_A" in n else w for n, w in ws.items()})
    deep = changed("deep", lambda ws: {n.replace("layers.0.", "layers.77."): w for n, w in ws.items()})
    less = changed("less", lambda ws: dict(list(ws.items())[2:]))
    for folder, reason in ((wide, "size mismatch"), (deep, r"layers\.77\."), (less, "would need a")):
        with pytest.raises(BadInput, match=rf"is no adapter of this .*{reason}.*; name its base") as caught:
            merged_folder(base, folder, "float32")
        assert "\n" not in str(caught.value)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((other / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps({**config, "target_modules": ["no_such_layer"]}))
    with pytest.raises(BadInput, match="is no adapter of this"):
        merged_folder(base, other, "float32")


def test_nothing_is_merged_into_quantised_weights(trained: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(resolve_model(MODEL), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BadInput, match="is quantised"):
        merged_folder(base, trained / "adapter", "float32")


def test_a_cache_that_cannot_be_written_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(trained / "config.json"))
    with pytest.raises(RunFailed, match=f"set {CACHE_VARIABLE} to another folder"):
        merged_folder(resolve_model(MODEL), trained / "adapter", "float32")


@pytest.mark.parametrize("kind", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
async def test_engines_write_with_it_as_with_the_merged_checkpoint(
    trained: Path, pictures: list[ImageInput], kind: str
) -> None:
    prompts = [Prompt(DETAILED, image) for image in pictures[:3]]
    sampling = Sampling(max_tokens=24)
    found = []
    for config in (
        EngineConfig(kind, MODEL, adapter=str(trained / "adapter"), room=600),
        EngineConfig(kind, str(trained), room=600),
        EngineConfig(kind, MODEL, room=600),
    ):
        engine = await load_engine(config)
        found.append([(await engine.generate(GenerationRequest(each, sampling))).token_ids for each in prompts])
        await engine.aclose()
    assert found[0] == found[1] != found[2]
