"""Training step of capipe and of TRL's GRPOTrainer: same random model, images, group size, lengths and optimizer.

Each side samples captions of given lengths with its own transformers engine, scores them by the same function and
makes one on-policy AdamW step; a step is timed from sampling to the weight update. Sides alternate in one process,
with one thread each, then with two (``@2``), for which capipe samples as `capipe train` does on two cores. ``ragged``:
log-normal lengths (mean 64, sigma 0.5, cut at 256), the same row by row on both sides.

Also measured: the parts of our step (``rollout``, ``update``), and a lower bound of the update: :class:`Floor`, once
after each of our updates. ``update_floor_share`` is floor ÷ update: the share of our update that no trainer could save.
``columns_per_token``: positions that the decoder computed in an update ÷ tokens of its prompts and captions.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, quotient, report, version

from capipe.models.engines.base import Completion, Engine, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.engine import TransformersEngine, batched_lm, load_model
from capipe.models.engines.sampling import vision_ids
from capipe.models.images.grid import ImageGrid
from capipe.models.shared_weights import share
from capipe.trainer.policy.batch import Group, RewardResult
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.optimizer import build_optimizer
from capipe.trainer.recipe_sections import OptimizerConfig
from capipe.trainer.sampling.processes import ModelSource, ProcessEngine
from capipe.trainer.update import UpdateConfig, Updater

MODEL = "tiny/captioner"  # its architecture and tokenizer; the weights are random
TEXT = "describe the image in detail."
GROUP, IMAGES, LR = 8, 4, 1e-4
PARTS = ("rollout", "update", "floor")
LONGEST, MEAN, SIGMA = 256, 64, 0.5  # of ragged lengths


@dataclass(frozen=True)
class Setting:
    """``pixels``: of an image's side; ``length``: of every caption in tokens, None for ragged ones."""

    pixels: int
    length: int | None
    threads: int = 1

    @property
    def limit(self) -> int:
        return self.length or LONGEST

    def lengths(self, step: int) -> list[int]:
        """Lengths of a step's captions, image by image."""
        if self.length is not None:
            return [self.length] * (GROUP * IMAGES)
        drawn = np.random.default_rng(step).lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, GROUP * IMAGES)
        return [int(length) for length in drawn.round().clip(1, LONGEST)]


# Image tokens : caption tokens @ threads.
SETTINGS = {
    "16:64": Setting(112, 64),
    "144:64": Setting(336, 64),
    "144:128": Setting(336, 128),
    "144:ragged": Setting(336, None),
    "16:64@2": Setting(112, 64, 2),
    "144:64@2": Setting(336, 64, 2),
    "144:128@2": Setting(336, 128, 2),
}


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

    def __init__(self, folder: Path, setting: Setting) -> None:
        model = load_model(str(folder), sees=True, dtype="float32", device="cpu")
        grid = ImageGrid(28, 56 * 56, setting.pixels**2)
        self.policy = DecoderPolicy(model, vision_ids(model.config))
        self.preparing = batched_lm(model, str(folder), grid)
        self.engine: Engine
        if setting.threads > 1:
            source = ModelSource(str(folder), "random", grid, share(model), None, GROUP * IMAGES)
            self.engine = ProcessEngine(source, self.preparing, setting.threads)
        else:
            lm = batched_lm(model, str(folder), grid)
            self.engine = TransformersEngine(lm, grid, GROUP * IMAGES, keep_prepared=True)
        seen = enumerate(pictures(setting.pixels))
        self.images = [ImageInput(f"{number}", pixels=picture) for number, picture in seen]
        optimizer = build_optimizer(self.policy, OptimizerConfig(lr=LR))
        self.updater = Updater(self.policy, optimizer, UpdateConfig(loss="dapo", limit=setting.limit))
        self.floor = Floor(folder) if setting.length is not None else None
        self.setting, self.columns, self.tokens = setting, 0, 0
        self.policy.base.language_model.layers[0].mlp.register_forward_pre_hook(self._count_columns)

    def steps(self, count: int) -> dict[str, float]:
        """Median seconds of a step, of its parts and of the floor, after one warm-up step."""
        taken = asyncio.run(self._steps(count))
        return {name: statistics.median(step[name] for step in taken[1:]) for name in taken[0]}

    async def _steps(self, count: int) -> list[dict[str, float]]:
        taken = []
        for number in range(count):
            lengths = self.setting.lengths(number)
            started = time.perf_counter()
            groups = await self._groups(number, lengths)
            sampled = time.perf_counter()
            self.columns = 0
            result = self.updater.update(groups)
            done = time.perf_counter()
            assert result.skipped is None and result.tokens == sum(lengths)
            self.tokens = result.tokens + sum(len(group.prompt.ids) for group in groups)
            parts = {"step": done - started, "rollout": sampled - started, "update": done - sampled}
            taken.append(parts | ({"floor": self.floor.seconds(groups)} if self.floor else {}))
        await self.engine.aclose()
        return taken

    async def _groups(self, step: int, lengths: list[int]) -> list[Group]:
        shares = [lengths[start : start + GROUP] for start in range(0, GROUP * IMAGES, GROUP)]
        seed = step * GROUP * IMAGES
        return await asyncio.gather(*(self._group(*pair, seed) for pair in zip(self.images, shares, strict=True)))

    async def _group(self, image: ImageInput, lengths: list[int], seed: int) -> Group:
        prompt = Prompt(TEXT, image)
        samplings = [
            Sampling(1.0, 1.0, length, seed + member, min_tokens=length) for member, length in enumerate(lengths)
        ]
        requests = [GenerationRequest(prompt, sampling, logprobs=True) for sampling in samplings]
        completions: list[Completion] = await asyncio.gather(*map(self.engine.generate, requests))
        rewards = [RewardResult(distinct(completion.token_ids)) for completion in completions]
        known = self.engine.prepared(prompt) if isinstance(self.engine, TransformersEngine) else None
        return Group(image.uid, image.uid, known or self.preparing.prepare(prompt), completions, rewards)

    def _count_columns(self, mlp: Any, inputs: tuple[Any, ...]) -> None:
        if self.policy.training:  # not while sampling
            self.columns += inputs[0].shape[:-1].numel()


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


def capipe_steps(folder: Path, setting: Setting, count: int, parts: dict[str, list[float]]) -> float:
    """Median seconds of one of our steps; those of its parts, and columns per token, are appended to ``parts``."""
    torch.set_num_threads(setting.threads)
    ours = Ours(folder, setting)
    medians = ours.steps(count)
    for name in PARTS:
        if name in medians:
            parts[name].append(medians[name])
    parts["columns_per_token"].append(ours.columns / ours.tokens)
    return medians["step"]


def trl_steps(folder: Path, setting: Setting, count: int) -> float:
    """Median seconds of a step of TRL's trainer; its set-up before the first step is not counted."""
    torch.set_num_threads(setting.threads)
    from datasets import Dataset
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor: Any = AutoProcessor.from_pretrained(folder, padding_side="left")
    processor.tokenizer.padding_side = "left"
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": setting.pixels**2}
    rows = {
        "prompt": [[{"role": "user", "content": TEXT}]] * IMAGES,
        "image": [Image.fromarray(picture) for picture in pictures(setting.pixels)],
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
            max_completion_length=setting.limit, num_iterations=1, beta=0.0, temperature=1.0, loss_type="dapo",
            learning_rate=LR, lr_scheduler_type="constant", max_steps=count, logging_steps=10**6, disable_tqdm=True,
            dataloader_num_workers=0, remove_unused_columns=False, use_vllm=False, seed=0,
            generation_kwargs={"suppress_tokens": barred(folder)},
        )  # fmt: skip
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model.generate = partial(ForcedLengths(setting, processor.tokenizer.eos_token_id).generate, model.generate)
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict(rows),
            processing_class=processor, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return statistics.median(taken[1:])


class ForcedLengths:
    """Ends each row of a batch at its length, by an end token as its last: a processor of TRL's logits."""

    def __init__(self, setting: Setting, end: int) -> None:
        self._setting, self._end = setting, end
        self._step = -1
        self._prompt = 0
        self._lengths = torch.zeros(0)

    def generate(self, generate: Any, *arguments: Any, **options: Any) -> Any:
        """The model's ``generate`` with the next step's lengths."""
        self._step += 1
        self._prompt = options["input_ids"].shape[1]
        self._lengths = torch.tensor(self._setting.lengths(self._step))
        out = generate(*arguments, **options, logits_processor=[self])
        assert out.shape == (GROUP * IMAGES, self._prompt + int(self._lengths.max()))
        return out

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self._lengths <= ids.shape[1] - self._prompt + 1
        scores[:, self._end] = float("-inf")
        scores[ends] = float("-inf")
        scores[ends, self._end] = 0.0
        return scores


def barred(folder: Path) -> list[int]:
    """Vision token ids to suppress: if TRL's policy samples image tokens, its next forward pass fails."""
    from transformers import AutoConfig

    return vision_ids(AutoConfig.from_pretrained(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings, all by default")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    figures: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    shares: dict[str, float] = {}
    columns: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder)
        for named in options.only:
            setting = SETTINGS[named]
            parts: dict[str, list[float]] = {name: [] for name in (*PARTS, "columns_per_token")}
            timings = alternate(sides(folder, named, options.steps, parts), options.rounds)
            columns[named] = round(max(parts.pop("columns_per_token")), 3)
            figures |= timings | {f"{named} {name}": values for name, values in parts.items() if values}
            if setting.length is not None and setting.threads == 1:
                shares[named] = quotient(parts["floor"], parts["update"])
            ratios[named] = quotient(timings[f"{named} trl"], timings[f"{named} capipe"])
    report(
        "trainer_vs_trl",
        figures,
        ratio=ratios.get("144:64"),
        ratios=ratios,
        update_floor_share=shares,
        columns_per_token=columns,
        unit="s/step",
        group=GROUP,
        images=IMAGES,
        versions={name: version(name) for name in ("transformers", "trl", "torch")},
    )


def sides(folder: Path, named: str, steps: int, parts: dict[str, list[float]]) -> dict[str, Callable[[int], float]]:
    setting = SETTINGS[named]
    return {
        f"{named} trl": lambda _: trl_steps(folder, setting, steps),
        f"{named} capipe": lambda _: capipe_steps(folder, setting, steps, parts),
    }


if __name__ == "__main__":
    main()
