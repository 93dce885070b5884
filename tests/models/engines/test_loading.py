"""What a name comes to: a folder, a grid, an identity, or one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput, RunFailed
from capipe.models.engines.loading import EngineConfig, load_engine, model_identity
from capipe.models.engines.model_folder import folder_digest, image_grid, resolve_model
from capipe.models.images.grid import ImageGrid

from ..conftest import GRID, MODEL


def model_folder(at: Path, config: dict[str, Any], processor: dict[str, Any] | None = None) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    (at / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (at / "preprocessor_config.json").write_text(json.dumps(processor))
    return at


def test_bundled_models_and_folders_resolve(tmp_path: Path) -> None:
    assert (resolve_model(MODEL) / "config.json").is_file()
    folder = model_folder(tmp_path / "model", {})
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such/model", "no such model folder"),
        ("./nowhere", "no such model folder"),
        ("tiny/giant", "no bundled model"),
        ("nobody-at-all/no-such-model", "neither a folder here nor a model to be had from the hub"),
    ],
)
def test_a_name_that_means_nothing_is_one_clear_line(name: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


async def test_a_model_that_is_not_there_stops_loading_before_anything_heavy() -> None:
    for kind in ("auto", "vllm", "transformers"):
        with pytest.raises(BadInput, match="no such model folder"):
            await load_engine(EngineConfig(kind, "/no/such/model"))


async def test_a_folder_that_is_no_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        await load_engine(EngineConfig("transformers", str(tmp_path)))
    folder = model_folder(tmp_path / "odd", {"model_type": "no-such-architecture"})
    with pytest.raises(BadInput, match="does not load as a model"):
        await load_engine(EngineConfig("transformers", str(folder)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "tensorrt", "model": "m"},
        {"kind": "vllm"},
        {"model": "m", "dtype": "int3"},
        {"kind": "vllm", "model": "m", "device": "cpu"},
        {"model": "m", "concurrency": 0},
        {"model": "m", "gpu_memory_utilization": 1.5},
        {"model": "m", "timeout_s": -1.0},
    ],
)
def test_configurations_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        EngineConfig(**wrong)


def test_the_grid_is_read_without_the_weights(tmp_path: Path) -> None:
    assert image_grid(resolve_model(MODEL)) == GRID
    vision = {"vision_config": {}}
    limits = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
    old = model_folder(tmp_path / "qwen2.5", vision, limits)
    assert image_grid(old) == ImageGrid(28, 3136, 12845056)
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    new = model_folder(tmp_path / "qwen3", vision, {"patch_size": 16, "merge_size": 2, "size": size})
    assert image_grid(new) == ImageGrid(32, 65536, 16777216)
    assert image_grid(model_folder(tmp_path / "text", {"model_type": "qwen2"})) is None


def test_the_users_limits_win(tmp_path: Path) -> None:
    limits = {"patch_size": 14, "merge_size": 2, "min_pixels": 100_000, "max_pixels": 1_000_000}
    folder = model_folder(tmp_path / "model", {"vision_config": {}}, limits)
    assert image_grid(folder, max_pixels=400_000) == ImageGrid(28, 100_000, 400_000)
    assert image_grid(folder, min_pixels=5_000) == ImageGrid(28, 5_000, 1_000_000)
    assert image_grid(folder, max_pixels=50_000) == ImageGrid(28, 50_000, 50_000)  # the model's own minimum yields
    for wrong in ({"min_pixels": 2_000_000}, {"max_pixels": 700}):
        with pytest.raises(BadInput):
            image_grid(folder, **wrong)


def test_a_vision_model_without_a_processor_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"preprocessor_config\.json"):
        image_grid(model_folder(tmp_path / "model", {"vision_config": {}}))
    with pytest.raises(BadInput, match="not readable JSON"):
        image_grid(tmp_path)


def test_the_identity_is_the_content(tmp_path: Path) -> None:
    one, other = model_folder(tmp_path / "one", {"a": 1}), model_folder(tmp_path / "other", {"a": 1})
    (one / "model.safetensors").write_bytes(b"weights")
    (other / "model.safetensors").write_bytes(b"weights")
    (other / "README.md").write_text("a card")
    assert folder_digest(one) == folder_digest(other)
    identity = model_identity(str(one))
    assert (identity.name, identity.digest) == (str(one), folder_digest(one))
    (other / "model.safetensors").write_bytes(b"Weights")
    assert folder_digest(one) != folder_digest(other)


def test_the_identity_of_a_hub_model_is_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = model_folder(tmp_path / "models--a--b" / "snapshots" / commit, {})
    assert model_identity(str(folder)).digest == commit


async def test_a_vllm_that_cannot_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Any) -> Any:
        raise ValueError("no room on the card")

    monkeypatch.setattr("capipe.models.engines.vllm.engine.start_vllm_engine", broken)
    with pytest.raises(RunFailed, match=r"no room on the card.*--engine transformers"):
        await load_engine(EngineConfig("vllm", MODEL))


async def test_auto_falls_back_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from capipe.models.engines.hf.engine import TransformersEngine

    monkeypatch.setattr("capipe.models.engines.loading.vllm_runs", lambda: False)
    engine = await load_engine(EngineConfig("auto", MODEL))
    assert isinstance(engine, TransformersEngine)
    await engine.aclose()


def test_naming_a_model_imports_nothing_heavy() -> None:
    code = (
        "import sys; from capipe.models.engines.loading import *; image_grid(resolve_model('tiny/captioner'));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'vllm', 'httpx')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
