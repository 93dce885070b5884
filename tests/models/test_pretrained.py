"""No model begins with weights that are not there: what is missing or of another shape is refused by name."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import capipe
from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.diffusion import load_painter
from capipe.models.engines.hf.engine import load_model
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.pretrained import check_weights, load_weights
from capipe.models.scorers.blip_contrastive import load_blip
from capipe.models.scorers.itm import load_itm
from capipe.models.scorers.lm_scores import load_text_scorer
from capipe.models.scorers.vgg import load_perceptual
from capipe.models.tiny.train.bundle import load_tensors

from ..small_models import blip_retrieval, diffusion, opt
from .captioners import KINDS, write_captioner

LAYER = "model.language_model.layers.2.self_attn.v_proj.weight"
LOADS = "from_pretrained"
CODE_RUN = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoConfig")
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def copied(name: str, folder: Path, change: Change = dict) -> Path:
    """A bundled model with other weights, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in folder_of(name).iterdir():
        if not each.name.endswith((".safetensors", ".index.json")):
            (folder / each.name).write_bytes(each.read_bytes())
    save_file(change(load_tensors(folder_of(name))), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rewrite(file: Path, change: Change) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(*names: str) -> Change:
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(names)}


def layer_of(folder: Path) -> str:
    """A name in a captioner's file, which may not be the one that the loaded model has."""
    (found,) = [
        name for name in load_file(folder / "model.safetensors") if name.endswith("layers.2.self_attn.v_proj.weight")
    ]
    return found


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
async def test_an_engine_refuses_a_model_with_a_layer_missing(kind: str, tmp_path: Path) -> None:
    if kind == "vllm":
        pytest.importorskip("vllm")
    folder = copied("captioner", tmp_path)
    rewrite(folder / "model.safetensors", without(layer_of(folder)))
    with pytest.raises(BadInput, match=r"1 weight of Qwen2_5_VLFor\w+ is not in its files \(.*layers\.2") as told:
        await load_engine(EngineConfig(kind, str(folder)))
    assert "\n" not in str(told.value) and str(folder) in str(told.value)


@pytest.mark.parametrize(
    "load", [lambda folder: load_model(str(folder), sees=True), lambda folder: check_weights(folder, str(folder))]
)
def test_weights_of_another_shape_are_refused_by_name(load: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = copied("captioner", tmp_path)
    name = layer_of(folder)
    rewrite(folder / "model.safetensors", lambda weights: {**weights, name: weights[name][:-8].clone()})
    with pytest.raises(
        BadInput, match=r"1 weight of another shape .*v_proj\.weight: \d+ x \d+ there, \d+ x \d+ wanted"
    ):
        load(folder)


def test_many_are_counted_and_a_few_named(tmp_path: Path) -> None:
    folder = copied("captioner", tmp_path, without("visual.", "model.visual."))
    with pytest.raises(BadInput, match=r"(\d\d+) weights of .* are not in its files \(([^,]*, ){3}and \d+ more\)"):
        load_model(str(folder), sees=True)


def test_weights_of_no_part_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied("reader", tmp_path, lambda weights: {**weights, "reward_head.weight": torch.zeros(2, 2)})
    load_model(str(folder), sees=False, called="mine")
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "mine: 1 weight of no part of Qwen2ForCausalLM, left out (reward_head.weight)"


def test_whole_models_load_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Tied heads among them, which their files do not hold."""
    for name in ("captioner", "reader", "vit-gpt2", "blip2", "opt", "itm"):
        check_weights(folder_of(name), name)
    load_model(str(folder_of("reader")), sees=False)
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_a_captioner_with_a_layer_missing_is_refused(kind: str, tmp_path: Path) -> None:
    folder = write_captioner(tmp_path, kind)
    some = next(
        name for name in sorted(load_file(folder / "model.safetensors")) if "layer" in name and "weight" in name
    )
    rewrite(folder / "model.safetensors", without(some))
    with pytest.raises(BadInput, match=r"1 weight of .* is not in its files"):
        load_model(str(folder), sees=True)


def test_a_pooler_that_nothing_reads_may_be_missing(tmp_path: Path) -> None:
    """As in ViT-GPT2s that were put together from a tower without one."""
    folder = copied("vit-gpt2", tmp_path, without("encoder.pooler."))
    load_model(str(folder), sees=True)


def test_an_index_that_names_what_its_files_lack_is_refused(tmp_path: Path) -> None:
    folder = copied("captioner", tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    half = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, inside in half.items():
        save_file({name: weights[name] for name in inside}, folder / file, metadata={"format": "pt"})
    of_weight = {name: file for file, inside in half.items() for name in inside}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": of_weight}))
    check_weights(folder, "mine")
    rewrite(folder / "b.safetensors", without(names[-1]))
    with pytest.raises(BadInput, match=f"mine: 1 weight of its index not in its files .{names[-1]}"):
        check_weights(folder, "mine")
    (folder / "b.safetensors").unlink()
    with pytest.raises(BadInput, match="weights of its index not in its files"):
        check_weights(folder, "mine")


def test_what_transformers_cannot_load_is_left_to_the_engine(tmp_path: Path) -> None:
    folder = copied("reader", tmp_path)
    (folder / "model.safetensors").rename(folder / "own.safetensors")  # vLLM reads it under any name
    check_weights(folder, "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OwnForCausalLM"]}))
    check_weights(folder, "mine")


def test_a_file_that_was_cut_short_is_one_line(tmp_path: Path) -> None:
    folder = copied("reader", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for load in (lambda: load_model(str(folder), sees=False), lambda: check_weights(folder, "mine")):
        with pytest.raises(BadInput, match="weights cannot be read") as told:
            load()
        assert "\n" not in str(told.value)


def test_scorers_and_language_models_refuse_what_is_not_whole(tmp_path: Path) -> None:
    itm = copied("itm", tmp_path / "itm", without("qformer.encoder.layer.0.attention"))
    with pytest.raises(BadInput, match=r"weights of Blip2\w+ are not in its files \(qformer"):
        load_itm(str(itm))
    blip = blip_retrieval(tmp_path / "blip")
    rewrite(blip / "model.safetensors", without("vision_model.encoder.layers.1.mlp"))
    for load in (load_itm, load_blip):
        with pytest.raises(BadInput, match=r"4 weights of Blip\w+ are not in its files"):
            load(str(blip))
    text = opt(tmp_path / "opt")
    rewrite(text / "model.safetensors", without("model.decoder.layers.1.fc1"))
    with pytest.raises(BadInput, match=r"2 weights of OPTForCausalLM are not in its files"):
        load_text_scorer(str(text))
    net = copied("vgg", tmp_path / "vgg", without("features.0."))
    with pytest.raises(BadInput, match=r"model\.safetensors is not of the layers"):
        load_perceptual(str(net))


def test_heads_that_are_not_asked_may_be_missing(tmp_path: Path) -> None:
    folder = blip_retrieval(tmp_path)
    rewrite(folder / "model.safetensors", without("itm_head"))
    load_blip(str(folder))
    with pytest.raises(BadInput, match="no trained matching head"):
        load_itm(str(folder))


@pytest.mark.slow
def test_a_diffusion_pipelines_models_have_all_of_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from capipe.models.diffusion import load_painter

    folder = diffusion(tmp_path)
    load_painter(str(folder), steps=1, guidance=1.0)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    kept = unet.read_bytes()
    rewrite(unet, without("mid_block.resnets.0.conv1"))
    with pytest.raises(BadInput, match=r"unet: 2 weights of UNet2DConditionModel are not in its files \(mid_block"):
        load_painter(str(folder), steps=1, guidance=1.0)
    unet.write_bytes(kept)
    rewrite(
        folder / "text_encoder" / "model.safetensors",
        lambda weights: {name: value for name, value in weights.items() if ".layers.1." not in name},
    )
    with pytest.raises(BadInput, match=r"text_encoder: \d+ weights of CLIPTextModel are not in its files"):
        load_painter(str(folder), steps=1, guidance=1.0)


def test_pickled_weights_run_no_code(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = copied("reader", tmp_path)
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="weights cannot be read"):
        load_weights(AutoModelForCausalLM, folder, dtype=torch.float32, called="mine")
    assert not marker.exists()


def test_nothing_loads_weights_past_the_helper() -> None:
    """And whatever else is loaded runs no code of the folder's."""
    found = dict[str, int]()
    for call, where in calls(Path(capipe.__file__).parent):
        assert isinstance(call.func, ast.Attribute)
        owner = ast.unparse(call.func.value)
        trusted = [ast.unparse(each.value) for each in call.keywords if each.arg == "trust_remote_code"]
        if owner in CODE_RUN:
            assert trusted == ["False"], f"{where}: {owner}.from_pretrained without trust_remote_code=False"
        else:
            found[f"{where.name}: {owner}"] = found.get(f"{where.name}: {owner}", 0) + 1
    assert found == {
        "pretrained.py: loader": 1,
        "lora.py: PeftConfig": 1,  # settings alone
        "diffusion.py: kind": 1,  # diffusers', with its own report
        "diffusion.py: loader": 1,
        "train_diffusion.py: BertTokenizer": 1,  # while tiny/diffusion is made, from bundled files
        "train_diffusion.py: PixelDiffusionPipeline": 1,
    }


def calls(root: Path) -> Iterator[tuple[ast.Call, Path]]:
    for folder in ("models", "stages", "trainer", "pipeline"):  # a checkout has a virtual environment, too
        for file in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == LOADS:
                    yield node, file


def test_loading_draws_no_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of weights that lie on the disk nobody has to wait, and a log shows each of its states."""
    pytest.importorskip("diffusers")
    folder = str(diffusion(tmp_path))
    capfd.readouterr()  # of making it
    load_model(str(folder_of("captioner")), sees=True, dtype="float32", device="cpu")
    load_painter(folder, steps=1, guidance=1.0)
    assert capfd.readouterr().err == ""
