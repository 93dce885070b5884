"""Training step of capipe and of TRL's GRPOTrainer: same random model, images, group size, lengths and optimizer.

Each side samples captions of a fixed length with its own transformers engine, scores them by the same function and
makes one on-policy AdamW step; a step is timed from sampling to the weight update. Rounds alternate in one process.

Also measured: the parts of our step (``rollout``, ``update``), and a lower bound of the update: :class:`Floor`, once
after each of our updates. ``update_floor_share`` is floor ÷ update: the share of our update that no trainer could save.

    python bench/trainer_vs_trl.py [--rounds 3] [--steps 6]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, quotient, report, version

from capipe.models.engines.base import Completion, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.batched_lm import BatchedLM
from capipe.models.engines.hf.engine import TransformersEngine, batched_lm, load_model
from capipe.models.engines.sampling import vision_ids
from capipe.models.images.grid import ImageGrid
from capipe.trainer.policy.batch import Group, RewardResult
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.update import UpdateConfig, Updater

MODEL = "tiny/captioner"  # its architecture and tokenizer; the weights are random
TEXT = "describe the image in detail."
GROUP, IMAGES, LR = 8, 4, 1e-4
PARTS = ("rollout", "update", "floor")
SETTINGS = {"16:64": (112, 64), "144:64": (336, 64), "144:128": (336, 128)}  # image tokens : caption tokens


def random_model(folder: Path) -> None:
    """A Qwen2.5-VL of 1.8 million parameters with the bundled captioner's tokenizer and processor."""
    from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

    from capipe.models.bundled import resolve

    source = resolve(MODEL)
    config: Any = AutoConfig.from_pretrained(source)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 128, 256, 4
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 4, 2, ["full_attention"] * 4
    text.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 4, 128, 256, 4
    vision.out_hidden_size, vision.window_size, vision.fullatt_block_indexes = 128, 56, [1, 3]
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor: Any = AutoProcessor.from_pretrained(source)
    processor.save_pretrained(folder)


def pictures(pixels: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8) for _ in range(IMAGES)]


def distinct(tokens: list[int] | tuple[int, ...]) -> float:
    """The reward of both sides: cheap, and different for every caption."""
    return len(set(tokens)) / len(tokens)


class Ours:
    """Engine, fast path and updater, combined as in `capipe train`."""

    def __init__(self, folder: Path, pixels: int, length: int) -> None:
        model = load_model(str(folder), sees=True, dtype="float32", device="cpu")
        grid = ImageGrid(28, 56 * 56, pixels * pixels)
        self.policy = DecoderPolicy(model, vision_ids(model.config))
        lm, self.preparing = (endless(batched_lm(model, str(folder), grid)) for _ in range(2))
        self.engine = TransformersEngine(lm, grid, GROUP * IMAGES)
        self.images = [ImageInput(f"{number}", pixels=picture) for number, picture in enumerate(pictures(pixels))]
        learning = [weight for weight in self.policy.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=LR)
        self.updater = Updater(self.policy, optimizer, UpdateConfig(loss="dapo", limit=length))
        self.floor = Floor(folder)
        self.length, self.number = length, 0

    def steps(self, count: int) -> dict[str, float]:
        """Median seconds of a step, of its parts and of the floor, after one warm-up step."""
        taken = asyncio.run(self._steps(count))
        return {name: statistics.median(step[name] for step in taken[1:]) for name in ("step", *PARTS)}

    async def _steps(self, count: int) -> list[dict[str, float]]:
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            groups = await asyncio.gather(*(self._group(image) for image in self.images))
            sampled = time.perf_counter()
            result = self.updater.update(groups)
            done = time.perf_counter()
            assert result.skipped is None and result.tokens == GROUP * IMAGES * self.length
            parts = {"step": done - started, "rollout": sampled - started, "update": done - sampled}
            taken.append({**parts, "floor": self.floor.seconds(groups)})
        await self.engine.aclose()
        return taken

    async def _group(self, image: ImageInput) -> Group:
        self.number += 1
        prompt = Prompt(TEXT, image)
        requests = [
            GenerationRequest(prompt, Sampling(1.0, 1.0, self.length, self.number * GROUP + member), logprobs=True)
            for member in range(GROUP)
        ]
        completions: list[Completion] = await asyncio.gather(*map(self.engine.generate, requests))
        rewards = [RewardResult(distinct(completion.token_ids)) for completion in completions]
        return Group(image.uid, image.uid, self.preparing.prepare(prompt), completions, rewards)


class Floor:
    """The minimal work of an update, by a plain model (with our fast vision encoder), one batch of each.

    Forward and backward: each image through the vision encoder once, each prompt through the decoder once, each
    caption's tokens without a prompt before them, the head and the softmax at positions that predict a caption's token;
    then AdamW. Nothing is packed or padded, no caption attends to its prompt, no entropy, ratio or norm is computed.
    """

    def __init__(self, folder: Path) -> None:
        self.model: Any = load_model(str(folder), sees=True, dtype="float32", device="cpu").train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)

    def seconds(self, groups: Sequence[Group]) -> float:
        """Seconds of one update on captions of equal length with advantages set."""
        prompts = [group.prompt for group in groups]
        images = [prompt.image for prompt in prompts if prompt.image is not None]
        ids = torch.stack([prompt.ids for prompt in prompts])
        positions = torch.stack([prompt.positions for prompt in prompts], dim=1)
        patches, grids = (torch.cat(tensors) for tensors in ([i.patches for i in images], [i.grid for i in images]))
        captions = torch.tensor([completion.token_ids for group in groups for completion in group.completions])
        read = captions[:, :-1]  # the last token predicts nothing
        begins = torch.tensor([prompt.next_position for prompt in prompts]).repeat_interleave(GROUP)
        places = (begins[:, None] + torch.arange(read.shape[1])).expand(len(positions), -1, -1)
        advantages = torch.cat([group.advantages for group in groups])[:, None]

        started = time.perf_counter()
        base = self.model.model
        seen = {"image": base.get_image_features(patches, grids, return_dict=True)}
        before = base(input_ids=ids, position_ids=positions, mm_encoder_outputs=seen, use_cache=False)
        after = base.language_model(input_ids=read, position_ids=places, use_cache=False)
        first = before.last_hidden_state[:, -1:].repeat_interleave(GROUP, dim=0)
        logits = self.model.lm_head(torch.cat([first, after.last_hidden_state], dim=1))
        logps = logits.log_softmax(dim=-1).gather(2, captions[..., None])[..., 0]
        (-advantages * logps).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started


def capipe_steps(folder: Path, pixels: int, length: int, count: int, parts: dict[str, list[float]]) -> float:
    """Median seconds of one of our steps; those of its parts are appended to ``parts``."""
    medians = Ours(folder, pixels, length).steps(count)
    for name in PARTS:
        parts[name].append(medians[name])
    return medians["step"]


def endless(lm: BatchedLM) -> BatchedLM:
    """Disable the end tokens: only its length ends a caption."""
    lm._end_ids = frozenset()
    return lm


def trl_steps(folder: Path, pixels: int, length: int, count: int) -> float:
    """Median seconds of a step of TRL's trainer; its set-up before the first step is not counted."""
    from datasets import Dataset
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor: Any = AutoProcessor.from_pretrained(folder, padding_side="left")
    processor.tokenizer.padding_side = "left"
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": pixels * pixels}
    rows = {
        "prompt": [[{"role": "user", "content": TEXT}]] * IMAGES,
        "image": [Image.fromarray(picture) for picture in pictures(pixels)],
    }

    def reward(completion_ids: list[list[int]], **rest: Any) -> list[float]:
        return [distinct(tokens) for tokens in completion_ids]

    taken: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *arguments: Any, **rest: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            taken.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", per_device_train_batch_size=GROUP * IMAGES, num_generations=GROUP,
            max_completion_length=length, num_iterations=1, beta=0.0, temperature=1.0, loss_type="dapo",
            learning_rate=LR, lr_scheduler_type="constant", max_steps=count, logging_steps=10**6, disable_tqdm=True,
            dataloader_num_workers=0, remove_unused_columns=False, use_vllm=False, seed=0,
            generation_kwargs={"min_new_tokens": length, "suppress_tokens": barred(folder)},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward, args=config, train_dataset=Dataset.from_dict(rows), processing_class=processor,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return statistics.median(taken[1:])


def barred(folder: Path) -> list[int]:
    """Vision token ids to suppress: if TRL's policy samples image tokens, its next forward pass fails."""
    from transformers import AutoConfig

    return vision_ids(AutoConfig.from_pretrained(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="both sides'; more are no faster at this size")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    figures: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder)
        for setting, (pixels, length) in SETTINGS.items():
            parts: dict[str, list[float]] = {name: [] for name in PARTS}
            run = (folder, pixels, length, options.steps)
            sides = {
                f"{setting} trl": lambda _, run=run: trl_steps(*run),
                f"{setting} capipe": lambda _, run=run, parts=parts: capipe_steps(*run, parts),
            }
            timings = alternate(sides, options.rounds)
            figures |= timings | {f"{setting} {name}": values for name, values in parts.items()}
            shares[setting] = quotient(parts["floor"], parts["update"])
            ratios[setting] = quotient(timings[f"{setting} trl"], timings[f"{setting} capipe"])
    report(
        "trainer_vs_trl",
        figures,
        ratio=ratios["144:64"],
        ratios=ratios,
        update_floor_share=shares,
        unit="s/step",
        group=GROUP,
        images=IMAGES,
        threads=options.threads,
        versions={name: version(name) for name in ("transformers", "trl", "torch")},
    )


if __name__ == "__main__":
    main()
