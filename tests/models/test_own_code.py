"""Model folders with code of their own: nothing of it runs, and nobody is asked, whatever stands on standard input."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import capipe
from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.engines.loading import EngineConfig

from ..small_models import diffusion

ROOT = Path(capipe.__file__).parent
SOURCES = ("manifests", "models", "pipeline", "stages", "trainer")
PARTS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer")
PROCESSORS = ("AutoProcessor", "AutoImageProcessor")
CODE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import PretrainedConfig
class Evil(PretrainedConfig):
    model_type = "evil"
"""


def hostile(folder: Path, canary: Path, *, kind: str = "evil") -> Path:
    """``folder`` as one of a model of an unknown ``kind``, every part of which is in its own Python file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    parts = dict.fromkeys((*PARTS, *PROCESSORS), "evil.Evil")
    parts["AutoTokenizer"] = ["evil.Evil", None]  # type: ignore[assignment]
    own = {"auto_map": parts}
    sized = {"patch_size": 14, "size": {"shortest_edge": 784, "longest_edge": 78400, "height": 64, "width": 64}}
    for name, more in (
        ("config.json", {"model_type": kind, "architectures": ["Evil"], "vision_config": {}, "image_token_id": 3}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}),
        ("preprocessor_config.json", {"image_processor_type": "Evil", **sized}),
        ("processor_config.json", {"processor_class": "Evil", "image_processor": sized}),
    ):
        (folder / name).write_text(json.dumps({**more, **own}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def hostile_clip(folder: Path, canary: Path) -> Path:
    """open_clip's, whose text tower and tokenizer are transformers' by name."""
    shutil.copytree(folder_of("clip"), folder)
    tower = hostile(folder / "tower", canary)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(tower / name, folder / name)
    shutil.copy(tower / "evil.py", folder / "evil.py")
    return folder


def hostile_pipeline(folder: Path, canary: Path) -> Path:
    """A diffusion pipeline, one part of which is whatever transformers makes of its folder."""
    diffusion(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"], index["tokenizer"] = ["transformers", "AutoModel"], ["transformers", "AutoTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part, ignore_errors=True)
        hostile(folder / part, canary)
    return folder


SCRIPT = """
import asyncio, sys
from pathlib import Path
from capipe.errors import CapipeError
from capipe.models.engines.lora import merge
from capipe.models.scorers.clip import load_clip
from capipe.models.context_check import counter_of
from capipe.models.diffusion import load_painter
from capipe.models.scorers.itm import load_retrieval
from capipe.models.scorers.lm_scores import load_text_scorer
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.hf.engine import load_model
model, clip, pipeline = sys.argv[1:]
asked = EngineConfig("transformers", model)
loads = {
    "captioner": lambda: asyncio.run(load_engine(asked)),
    "reader": lambda: load_model(model, sees=False),
    "counter": lambda: counter_of(asked),
    "clip": lambda: load_clip(clip, device="cpu"),
    "itm": lambda: load_retrieval(model, device="cpu"),
    "lm": lambda: load_text_scorer(model, device="cpu"),
    "diffusion": lambda: load_painter(pipeline, steps=1, guidance=1.0, device="cpu"),
}
for name, load in loads.items():
    try:
        load()
        print(name, "LOADED")
    except CapipeError as error:
        print(name, str(error).replace(chr(10), " "))
print("left on standard input:", len(sys.stdin.read()))
"""


def test_no_loader_runs_a_models_code_or_asks(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    model = hostile(tmp_path / "model", canary)
    clip, pipeline = hostile_clip(tmp_path / "clip", canary), hostile_pipeline(tmp_path / "pipeline", canary)
    given = [sys.executable, "-c", SCRIPT, str(model), str(clip), str(pipeline)]
    done = subprocess.run(given, input=20 * "y\n", capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    *lines, left = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["captioner", "reader", "counter", "clip", "itm", "lm", "diffusion"]
    assert not canary.exists()
    assert left == "left on standard input: 40", "somebody was asked"
    for line in lines:
        assert "LOADED" not in line and "code of its own" in line and "trust_remote_code=True" not in line, line


def test_pickled_weights_run_nothing(tmp_path: Path) -> None:
    """Neither a model's nor an adapter's; the rest of the folder is sound."""
    from capipe.models.engines.hf.engine import load_model
    from capipe.models.engines.lora import check_adapter

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "canary",))  # type: ignore[return-value]

    folder = tmp_path / "model"
    shutil.copytree(folder_of("captioner"), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput):
        load_model(str(folder), sees=True, device="cpu")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    torch.save({"weight": Evil()}, adapter / "adapter_model.bin")
    with pytest.raises(BadInput, match="safetensors"):
        check_adapter(str(adapter))
    assert not (tmp_path / "canary").exists()


def test_vllm_is_told_too() -> None:
    with pytest.raises(BadInput, match=r"trust_remote_code: .* own code is not run"):
        EngineConfig("vllm", "tiny/captioner", engine_args={"trust_remote_code": True})


# --- every load in the sources says so -------------------------------------------------------------------------------

#: Calls of libraries whose loaders have no such argument, by file: what keeps them from it stands beside.
WITHOUT: dict[tuple[str, str], str] = {
    ("models/engines/lora.py", "PeftConfig.from_pretrained"): "ask_nothing()",
    ("models/diffusion.py", "loader.from_pretrained"): "ask_nothing()",  # diffusers' own classes: JSON and safetensors
    ("models/diffusion.py", "DiffusionPipeline.download"): "use_safetensors=True",
    ("models/scorers/clip.py", "open_clip.create_model"): "ask_nothing()",
    ("models/scorers/clip.py", "open_clip.get_tokenizer"): "ask_nothing()",
    ("models/scorers/clip.py", "HFTokenizer"): "ask_nothing()",
    ("stages/ingest/huggingface.py", "datasets.load_dataset"): "",  # from 4.0 on it runs no scripts
}
LOADS = ("from_pretrained", "create_model", "create_model_and_transforms", "create_model_from_pretrained", "download")
LOADS = (*LOADS, "get_tokenizer", "HFTokenizer", "load_dataset")


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """File, name and call of every call in the sources."""
    return list(_calls())


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    for path in (path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(ROOT)), ast.unparse(node.func), node


def says(call: ast.Call, name: str, value: object) -> bool:
    return any(
        each.arg == name and isinstance(each.value, ast.Constant) and each.value.value is value
        for each in call.keywords
    )


def test_every_load_says_that_no_code_is_trusted() -> None:
    seen, silent = set(), []
    for file, name, call in calls():
        if name.rpartition(".")[2] not in LOADS:
            continue
        if (file, name) in WITHOUT:
            seen.add((file, name))
            assert WITHOUT[file, name] in (ROOT / file).read_text(encoding="utf-8")
        elif not says(call, "trust_remote_code", False):
            silent.append(f"{file}:{call.lineno}: {name}")
    assert not silent
    assert seen == set(WITHOUT)


def test_every_read_of_a_pickle_reads_weights_alone() -> None:
    loose = []
    for file, name, call in calls():
        last = name.rpartition(".")[2]
        if name == "torch.load" and not says(call, "weights_only", True):
            loose.append(f"{file}:{call.lineno}: torch.load")
        if name in ("open_clip.create_model",) and not says(call, "weights_only", True):
            loose.append(f"{file}:{call.lineno}: {name}")
        if name in ("np.load", "numpy.load") and not says(call, "allow_pickle", False):
            loose.append(f"{file}:{call.lineno}: {name}")
        if (name.startswith(("pickle.load", "dill.", "joblib.")) or last == "Unpickler") and file != (
            "models/worker_process.py"  # between a process and its own workers, over a socket pair
        ):
            loose.append(f"{file}:{call.lineno}: {name}")
    assert not loose
