"""What is fetched of a hub's repository is what is loaded, at the revision that was named, and once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.hub import HubName, Library, hub_name, wanted

from .hubs import Files, Hub, serving

INDEX = "model.safetensors.index.json"
SHARDED = json.dumps({"weight_map": {each: f"model-{each % 2 + 1}.safetensors" for each in range(3)}})
KEPT = {
    *("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "merges.txt"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("model-1.safetensors", "model-2.safetensors", INDEX),
}
LEFT = {
    *("consolidated.safetensors", "pytorch_model.bin", "tf_model.h5", "model.gguf", "flax_model.msgpack"),
    *("onnx/model.onnx", "original/params.json", "README.md", "picture.png", "modeling_own.py"),
}
QWEN: Files = {name: name.encode() for name in KEPT | LEFT} | {"config.json": b"{}", INDEX: SHARDED.encode()}
CLIP_SAFE, CLIP_BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", HubName("Qwen/Qwen2.5-VL-3B-Instruct")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        ("org/name@", None),
        ("name@v1", None),
        ("./org/name", None),
        ("https://host/v1", None),
    ],
)
def test_a_name_may_pin_a_revision(text: str, named: HubName | None) -> None:
    assert hub_name(text) == named and (named is None or str(named) == text)


@pytest.mark.parametrize(
    ("library", "files", "kept"),
    [
        ("transformers", ["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        ("transformers", ["config.json", "pytorch_model.bin", "v.txt"], ["config.json", "pytorch_model.bin", "v.txt"]),
        ("transformers", ["config.json", "own.safetensors", "own.bin"], ["config.json", "own.safetensors"]),
        ("transformers", ["config.json", "model.gguf"], None),
        ("open_clip", [CLIP_SAFE, CLIP_BIN, "model.safetensors"], [CLIP_SAFE]),
        ("open_clip", ["open_clip_config.json", CLIP_BIN], ["open_clip_config.json", CLIP_BIN]),
        ("open_clip", ["config.json", "model.safetensors"], None),
        ("tokenizer", ["tokenizer.json", "model.safetensors"], ["tokenizer.json"]),
        ("tokenizer", ["config.json"], None),
    ],
)
def test_the_files_of_each_library(library: Library, files: list[str], kept: list[str] | None) -> None:
    assert wanted(files, library, lambda index: ()) == kept


def test_the_weights_are_those_of_the_index() -> None:
    shards = ("model-1.safetensors", "model-2.safetensors")
    assert set(wanted(list(QWEN), "transformers", lambda index: shards) or ()) == KEPT


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as made:
        yield made


SCRIPT = """
import json, sys
from capipe.errors import BadInput
from capipe.models.hub import cached, hub_name, snapshot
from capipe.models.engines.loading import model_identity
found = []
for name in sys.argv[1:]:
    name, _, library = name.partition("|")
    try:
        folder = snapshot(hub_name(name), library or "transformers")
        files = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())
        digest = None if library else model_identity(name).digest
        found.append({"commit": folder.name, "files": files, "digest": digest})
    except BadInput as error:
        found.append({"error": str(error)})
print(json.dumps(found))
"""


def asked(hub: Hub, home: Path, *names: str, offline: bool = False, script: str = SCRIPT) -> Any:
    """What a process of its own, which knows this hub alone, finds under each name."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_revision_is_what_is_loaded_and_nothing_else_is_fetched(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("org/vl", {**QWEN, "config.json": b'{"old": 1}'}, "v1")
    new = hub.add("org/vl", QWEN, "main")
    main, tagged, pinned = asked(hub, tmp_path, "org/vl", "org/vl@v1", f"org/vl@{old}")
    assert main["commit"] == main["digest"] == new and tagged["commit"] == tagged["digest"] == old
    assert pinned == tagged and set(main["files"]) == set(tagged["files"]) == KEPT
    assert set(hub.fetched) == KEPT
    hub.fetched.clear()
    offline = asked(hub, tmp_path, "org/vl", "org/vl@v1", f"org/vl@{old}", "org/vl@v2", offline=True)
    assert offline[:3] == [main, tagged, pinned] and not hub.fetched
    assert "org/vl@v2: neither a folder here nor a model to be had from the hub" in offline[3]["error"]


def test_what_the_hub_has_not_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/vl", QWEN)
    hub.add("org/gguf", {"config.json": b"{}", "model.gguf": b"1"})
    hub.add("org/clip", {"config.json": b"{}", "model.safetensors": b"1"})
    found = asked(hub, tmp_path, "org/vl@nowhere", "some/body", "org/gguf", "org/clip|open_clip")
    for each, reason in zip(
        found,
        [
            "org/vl@nowhere: the hub's org/vl has no revision 'nowhere'; name a branch, a tag or a commit of it",
            "some/body: neither a folder here nor a model to be had from the hub",
            "org/gguf: the hub's org/gguf holds no model.safetensors or pytorch_model.bin",
            "org/clip: the hub's org/clip holds no open_clip_model.safetensors",
        ],
        strict=True,
    ):
        assert reason in each["error"] and "\n" not in each["error"]
    assert not hub.fetched


def test_half_a_download_is_no_model_offline(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/vl", QWEN)
    (whole,) = asked(hub, tmp_path, "org/vl")
    (half,) = (tmp_path / "hub").rglob("model-2.safetensors")
    half.unlink()
    (found,) = asked(hub, tmp_path, "org/vl", offline=True)
    assert "neither a folder here" in found["error"]
    assert asked(hub, tmp_path, "org/vl") == [whole]


CLIP = """
import json
from capipe.models.scorers.clip import load_clip
from capipe.models.scorers.loading import ScorerConfig, scorer_identity
scorer = load_clip("org/clip@v1")
identity = scorer_identity(ScorerConfig("clip", "org/clip@v1"))
print(json.dumps([scorer.encode_texts(["a red star"])[0].tolist(), identity]))
"""


@pytest.mark.slow
def test_a_clip_of_the_hub_is_the_folder_and_its_commit(hub: Hub, tmp_path: Path) -> None:
    """Its tokenizer lies in another repository, which its configuration names."""
    from capipe.models.scorers.clip import load_clip

    files = {each.name: each.read_bytes() for each in folder_of("clip").iterdir()}
    config = json.loads(files["open_clip_config.json"])
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/words"
    words = {name: data for name, data in files.items() if "tokenizer" in name or name.startswith("vocab")}
    clip = {name: data for name, data in files.items() if name not in words}
    commit = hub.add("org/clip", {**clip, "open_clip_config.json": json.dumps(config).encode()}, "v1")
    hub.add("org/words", {**words, "model.safetensors": b"not to be fetched"})
    features, identity = asked(hub, tmp_path, script=CLIP)
    expected = load_clip("tiny/clip").encode_texts(["a red star"])[0].tolist()
    assert features == pytest.approx(expected, abs=1e-5) and identity["model"] == commit
    assert "model.safetensors" not in hub.fetched


def test_an_index_that_is_none_is_one_line(tmp_path: Path) -> None:
    from capipe.models.hub import _named_in

    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(BadInput, match="is no index of weights"):
        _named_in(tmp_path / "model.safetensors.index.json")
