"""`bench/gpu.sh`: its arithmetic, its results when parts end early, what it carries. What it measures needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench/gpu.sh"
SCRIPTS = ("arithmetic", "carried", "model", "train", "annotate")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The scripts' modules, which import each other by their bare names."""
    folders = [str(ROOT / "bench/gpu"), str(ROOT / "bench")]
    sys.path[:0] = folders
    before = set(sys.modules)
    yield SimpleNamespace(**{name: import_module(name) for name in SCRIPTS})
    for folder in folders:
        sys.path.remove(folder)
    for name in {*SCRIPTS, "_common", "_runs"} - before:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written: Path = gpu.model.write_config(tmp_path_factory.mktemp("gpu") / "small", 2, True, 16)
    return written


def test_operations_are_those_that_torch_counts(gpu: Any, folder: Path) -> None:
    """Of one sequence with its image, forward; torch counts attention to all tokens, later ones too."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder)
    decoder, vision = gpu.arithmetic.sizes(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # its products are counted one by one
        network = gpu.model.random_model(folder, torch.device("cpu")).eval()
        patches, length = 64, 40
        with FlopCounterMode(display=False) as seen:
            network.model.get_image_features(torch.zeros(patches, vision.patch), torch.tensor([[1, 8, 8]]))
        with FlopCounterMode(display=False) as read:
            network(input_ids=torch.full((1, length), 9), use_cache=False)
    assert seen.get_total_flops() == pytest.approx(vision.image(patches), rel=0.01)
    counted = decoder.tokens(length) + decoder.attention(length**2) + decoder.head(length)
    assert read.get_total_flops() == pytest.approx(counted, rel=0.01)


def test_the_model_has_the_sizes_of_3b(gpu: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config: Any = AutoConfig.from_pretrained(gpu.model.write_config(tmp_path / "3b"))
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(weight.numel() for weight in network.parameters()) == 3_754_622_976
    assert gpu.arithmetic.sizes(config)[0].tokens(1) == 2 * 36 * (2048 * (4096 + 512) + 3 * 2048 * 11008)


def test_a_step_by_hand(gpu: Any) -> None:
    a = gpu.arithmetic
    decoder = a.Decoder(layers=1, width=2, inner=3, heads=2, kv=1, vocabulary=5)
    vision = a.Vision(layers=1, width=2, inner=3, patch=6, merge=4, out=2, full=1, window=64)
    assert decoder.tokens(1) == 2 * (2 * (4 + 2) + 18) and decoder.attention(1) == 8 and decoder.head(1) == 20
    image = 2 * 4 * (4 * 4 + 18 + 12) + 4 * 4 * 4 * 2 + 2 * 8 * (8 + 2)
    assert vision.image(4) == image
    lengths = a.Lengths(images=1, group=2, prompt=3, patches=4, caption=2)
    # five tokens: the prompt's three, and the first of each caption; pairs: 6 in the prompt, 3 + 1 of each caption
    assert a.needed(decoder, vision, lengths) == image + 3 * (5 * 60 + 14 * 8 + 4 * 20)
    assert a.by_sequence(decoder, vision, lengths) == 2 * (image + 3 * (5 * 60 + 15 * 8 + 2 * 20))
    assert lengths.sampled == 4


def test_share_of_the_peak(gpu: Any) -> None:
    a = gpu.arithmetic
    assert a.peak_of("NVIDIA H200") == a.peak_of("NVIDIA H100 80GB HBM3") == 989.4e12
    assert a.peak_of("NVIDIA H100 PCIe") == 756e12 and a.peak_of("cpu") is None
    assert a.mfu(989.4e12, 2.0, a.peak_of("NVIDIA H200")) == 0.5 and a.mfu(1.0, 1.0, None) is None


SIDE = {"ended": "ok", "steps": 3, "step_s": 10.0, "rollout_s": 6.0, "update_s": 4.0}


def test_ratios_need_timed_steps_of_both_sides(gpu: Any) -> None:
    device = {"ended": "ok", "name": "NVIDIA H200"}
    both = {"device": device, "capipe": SIDE, "trl": {**SIDE, "step_s": 25.0, "update_s": 19.0}}
    report = gpu.train.summary(both, {"images": 4, "dry_run": False})
    assert report["ratios"] == {"step": 2.5, "rollout": 1.0, "update": 4.75} and report["ratio"] == 2.5
    assert {"name", "device", "dry_run", "images", "parts"} <= set(report) and report["device"] == "NVIDIA H200"
    late = {**both, "trl": {"ended": "out of time", "steps": 0}}
    assert "ratios" not in gpu.train.summary(late, {}) and gpu.train.summary(late, {})["parts"] == late


@pytest.mark.parametrize(
    ("then", "limit", "ended"),
    [("time.sleep(90)", 3.0, "out of time"), ("sys.exit(3)", 60.0, "failed with 3"), ("pass", 60.0, "ok")],
)
def test_a_part_that_ends_early_leaves_what_it_measured(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, limit: float, ended: str
) -> None:
    (tmp_path / "parts.py").write_text(
        "import sys, time, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        f"out.write_text('{{\"steps\": 2}}')\n{then}\n"
    )
    monkeypatch.setattr(gpu.train, "HERE", tmp_path)
    result = gpu.train.run_part("trl", [], limit, tmp_path / "trl.json", {})
    assert result["ended"] == ended and result["steps"] == 2


def test_parts_fit_into_nine_minutes(gpu: Any) -> None:
    assert sum(gpu.train.LIMITS.values()) <= gpu.train.BUDGET < 9 * 60


def wheel(folder: Path, name: str, package: str) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"{package}/__init__.py", "")


def test_only_what_the_machine_lacks_is_unpacked(gpu: Any, tmp_path: Path) -> None:
    for name, package in (
        ("absent_here-1.0-py3-none-any.whl", "absent_here"),
        ("numpy-1.0-py3-none-any.whl", "numpy"),
        ("of_another_python-1.0-py27-none-any.whl", "of_another_python"),
    ):
        wheel(tmp_path, name, package)
    assert gpu.carried.unpack(tmp_path, tmp_path / "site") == ["absent_here 1.0"]
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["absent_here"]
    wheel(tmp_path, "compiled-1.0-cp311-cp311-linux_x86_64.whl", "compiled")
    with pytest.raises(ValueError, match="only pure Python"):
        gpu.carried.unpack(tmp_path, tmp_path / "again")


def test_a_stand_in_replaces_datasets_only_where_it_cannot_be_imported(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "datasets.fingerprint", None)
    assert gpu.carried.stand_in() == ["datasets"]  # pyarrow and pandas are here
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["a", "b"], "image": [1, 2]})
    assert isinstance(rows, gpu.carried.Rows) and len(rows) == 2 and rows[1] == {"prompt": "b", "image": 2}


def test_rates_are_read_from_the_words_of_vllm(gpu: Any) -> None:
    said = (
        "Throughput: 2.50 requests/s, 3,600.1 total tokens/s, 1000.25 output tokens/s\nTotal num prompt tokens:  2080"
    )
    assert gpu.annotate.OUTPUT.search(said)[1] == "1000.25" and gpu.annotate.PROMPTS.search(said)[1] == "2080"


def test_the_script_parses_and_shows_its_use() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    shown = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert shown.returncode == 2 and "bench/gpu.sh train" in shown.stdout and "set -e" not in shown.stdout


#: What a machine with torch and transformers may lack: of capipe's dependencies, and of what TRL imports.
ABSENT = ("pyarrow", "pandas", "datasets", "webdataset", "open_clip", "tensorboard", "py3langid", "vllm")


@pytest.mark.slow
def test_a_dry_run_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    """Both trainers make a step on a small model, and the guard refuses attention that leaks; `ratio` is no claim."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({ABSENT})\n")
    sizes = {"images": 1, "steps": 1, "caption": 6, "image-tokens": 16, "limit": 170, "peak-tflops": 1}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    environ = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(SCRIPT), "train", "--parts", "device", "guard", "capipe", "trl", *words],
        capture_output=True, text=True, env=environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry_run"] is True and report["ratio"] > 0
    guard = report["parts"]["guard"]
    assert guard["float32"]["holds"] and guard["refuses_plain_attention"]
    assert 0 < max(guard["attention"].values()) < 0.02  # bfloat16 has 8 bits
    ours, theirs = report["parts"]["capipe"], report["parts"]["trl"]
    assert theirs["stand_ins"] == ["datasets", "pandas", "pyarrow"]
    assert ours["steps"] == theirs["steps"] == 1 and ours["mfu"]["needed"] > 0
    assert theirs["mfu"]["by_sequence"] > theirs["mfu"]["needed"] > 0
