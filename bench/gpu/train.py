"""Part A of `bench/gpu.sh`: capipe's training step against TRL's, and what else of the trainer needs a GPU.

Needs torch and transformers; TRL and its parts come as wheels (`bench/gpu.sh prepare`). The model is a Qwen2.5-VL of
3B's sizes with random weights, made on the device. Each part is a process with its own time limit and writes what it
has after every step; the file of results is written after every part, so a time-out loses only what was not done.

    bench/gpu.sh train [--images 4] [--steps 3] [--layers 2] [--small]

Without a CUDA device it is a dry run, with a small model and short lengths: it shows that the script runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import arithmetic
import carried
from model import write_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: Seconds that each part may take, its imports included.
LIMITS = {"device": 75, "noise": 45, "guard": 75, "capipe": 150, "trl": 180}
BUDGET = 530  # seconds of all of them
GRACE, LEAST = 10, 20  # seconds that a part has to end by itself, and that are worth a start
NEEDED = ("torch", "torchvision", "transformers", "PIL")  # a Qwen-VL's processor needs all four


def environment(site: Path) -> dict[str, str]:
    """Environment of the parts: this checkout as `capipe`, whatever its folder's name, and the carried packages."""
    link = site / "capipe"
    link.symlink_to(ROOT, target_is_directory=True)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def run_part(name: str, words: Sequence[str], limit: float, out: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """What a part measured, and how it ended: ``ended`` is ok, failed or out of time."""
    started, until = time.perf_counter(), time.time() + limit - GRACE
    command = [sys.executable, str(HERE / "parts.py"), name, "--out", str(out), "--until", str(until), *words]
    print(f"{name}: at most {limit:.0f} s", flush=True)
    try:
        code = subprocess.run(command, env=dict(environ), stdin=subprocess.DEVNULL, timeout=limit).returncode
        ended = "ok" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    measured = json.loads(out.read_text()) if out.exists() else {}
    return {"ended": ended, "seconds": round(time.perf_counter() - started, 1), **measured}


def summary(results: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of all parts; ``ratios`` once both trainers have timed steps."""
    device = results.get("device", {}).get("name", "unknown")
    report: dict[str, Any] = {"name": "gpu_train", "device": device, **settings}
    sides = [results.get(side, {}) for side in ("trl", "capipe")]
    if all(side.get("steps") for side in sides):
        seconds = [{name: side[f"{name}_s"] for name in ("step", "rollout", "update")} for side in sides]
        report["ratios"] = arithmetic.step_ratios(*seconds)
        report["ratio"] = report["ratios"]["step"]
    return {**report, "parts": dict(results)}


def write(report: Mapping[str, Any], target: Path | None) -> None:
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(".new")
        beside.write_text(json.dumps(report, indent=1) + "\n")
        beside.replace(target)


def dry(options: argparse.Namespace) -> None:
    """Sizes of a dry run, where none were given."""
    options.small = True
    for name, value in {"layers": 2, "image_tokens": 64, "caption": 12, "images": 2, "steps": 2, "rows": 16}.items():
        if getattr(options, name) == PARSER.get_default(name):
            setattr(options, name, value)


def measure(options: argparse.Namespace, target: Path | None) -> dict[str, Any]:
    started = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = folder / "site"
        site.mkdir()
        carries = carried.unpack(options.wheels, site) if options.wheels.is_dir() else []
        environ = environment(site)
        write_config(folder / "model", options.layers, options.small, options.image_tokens)
        named = ("image_tokens", "caption", "group", "images", "steps", "rows", "rounds")
        words = ["--folder", str(folder / "model")]
        words += [word for key in named for word in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]
        settings = {key: getattr(options, key) for key in ("dry_run", *named, "layers", "small")}
        settings["carried"] = carries
        for part in options.parts:
            peak = options.peak_tflops * 1e12 if options.peak_tflops else None
            peak = peak or arithmetic.peak_of(results.get("device", {}).get("name", ""))
            extra = [] if peak is None else ["--peak", str(peak)]
            limit = min(options.limit or LIMITS[part], BUDGET - (time.monotonic() - started))
            if limit < LEAST:
                results[part] = {"ended": "no time was left"}
                continue
            results[part] = run_part(part, [*words, *extra], limit, folder / f"{part}.json", environ)
            settings["peak_tflops"] = None if peak is None else peak / 1e12
            write(summary(results, settings), target)
    return summary(results, settings)


PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--wheels", type=Path, default=ROOT / "build/gpu-wheels", help="of `bench/gpu.sh prepare`")
PARSER.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
PARSER.add_argument("--images", type=int, default=4, help="of a step")
PARSER.add_argument("--group", type=int, default=8, help="captions of an image")
PARSER.add_argument("--image-tokens", type=int, default=1024)
PARSER.add_argument("--caption", type=int, default=400, help="tokens")
PARSER.add_argument("--steps", type=int, default=3, help="timed; one more goes before them")
PARSER.add_argument("--rows", type=int, default=256, help="of the noise kernel's batch")
PARSER.add_argument("--rounds", type=int, default=9, help="of the noise kernel")
PARSER.add_argument("--layers", type=int, help="of text decoder and vision encoder; 36 and 32 by default")
PARSER.add_argument("--small", action="store_true", help="narrow layers")
PARSER.add_argument("--peak-tflops", type=float, help="of the device in bfloat16; known for some by their names")
PARSER.add_argument("--limit", type=float, help="seconds of each part, instead of its own")


def main() -> None:
    options = PARSER.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"{' and '.join(missing)} not found by {sys.executable}; set PYTHON to an interpreter that has them")
    import torch

    options.dry_run = not torch.cuda.is_available()
    if options.dry_run:
        print("no CUDA device: a dry run with a small model, whose seconds say nothing", flush=True)
        dry(options)
    out = os.environ.get("OUT")
    report = measure(options, Path(out) / "gpu.json" if out else None)
    print(json.dumps(report))
    if any(result["ended"] != "ok" for result in report["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
