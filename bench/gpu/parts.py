"""The parts of `bench/gpu.sh train`, each a process of its own: what it has measured is written after every step.

python bench/gpu/parts.py trl --out trl.json --folder MODEL --until 1796000000 --image-tokens 1024 --caption 400 ...
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent))

import arithmetic
import noise
from carried import stand_in
from model import freeze_vision, pictures, random_model

from capipe.errors import BadInput
from capipe.models.engines.base import Completion, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.engine import TransformersEngine, batched_lm, speed_up
from capipe.models.engines.sampling import kernel_runs_on, vision_ids
from capipe.models.images.grid import ImageGrid
from capipe.trainer.policy.batch import Group, RewardResult, pack
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.policy.packing.attention import tree_attention
from capipe.trainer.policy.packing_check import check_packing
from capipe.trainer.update import UpdateConfig, Updater

TEXT = "describe the image in detail."
LR = 1e-6
Save = Callable[..., None]


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> float:
    """The time, after all work that was given to the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Steps:
    """Seconds of a side's steps and their parts; saved after each, the first left out as a warm-up."""

    def __init__(self, options: argparse.Namespace, save: Save, operations: dict[str, float]) -> None:
        self.options, self.save, self.operations = options, save, operations
        self.taken: list[dict[str, float]] = []

    def add(self, rollout: float, update: float) -> None:
        self.taken.append({"step": rollout + update, "rollout": rollout, "update": update})
        if len(self.taken) == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # memory of a first step is no smaller, but its kernels are tried out
        self.save(**self.results())

    def ended(self) -> bool:
        """Whether all steps are done, or another would outlast this part's time."""
        left = self.options.until - time.time()
        return len(self.taken) > self.options.steps or (bool(self.taken) and self.taken[-1]["step"] > left)

    def results(self) -> dict[str, Any]:
        timed = self.taken[1:]
        if not timed:
            return {"steps": 0, "first_step": {name: round(value, 3) for name, value in self.taken[0].items()}}
        medians = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
        sampled, peak = self.options.lengths.sampled, self.options.peak
        return {
            "steps": len(timed),
            **{f"{name}_s": round(value, 3) for name, value in medians.items()},
            "tokens_per_s": round(sampled / medians["step"], 1),
            "rollout_tokens_per_s": round(sampled / medians["rollout"], 1),
            "update_tokens_per_s": round(sampled / medians["update"], 1),
            "mfu": {name: arithmetic.mfu(count, medians["update"], peak) for name, count in self.operations.items()},
            "peak_gib": memory(),
            "rounds": [{name: round(value, 3) for name, value in step.items()} for step in timed],
        }


def memory() -> dict[str, float] | None:
    """Peak of GPU memory in this process: in tensors, and held by torch."""
    if not torch.cuda.is_available():
        return None
    bytes_of = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: round(value / (1 << 30), 2) for name, value in bytes_of.items()}


def describe_device(options: argparse.Namespace, save: Save) -> None:
    """The device, versions, and the rate of a large matrix product and of a copy."""
    device = device_of()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    save(name=name, versions=versions)
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    seconds = _seconds(lambda: left @ right)
    save(matrix={"size": size, "dtype": str(kind).split(".")[1], "tflops": round(2 * size**3 / seconds / 1e12, 1)})
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 24), device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    save(copy_gb_per_s=round(2 * source.numel() * 4 / _seconds(lambda: target.copy_(source)) / 1e9, 1))


def _seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    started = wait()
    for _ in range(repeats):
        call()
    return (wait() - started) / repeats


def measure_noise(options: argparse.Namespace, save: Save) -> None:
    """The fused kernel of the sampling noise against its torch twin."""
    device = device_of()
    save(rows=options.rows, vocabulary=options.vocabulary, kernel_runs=kernel_runs_on(device))
    for case, top_p in noise.CASES.items():
        entry: dict[str, Any] = {"bytes_per_logit": noise.bytes_per_logit(options.vocabulary, top_p)}
        if device.type == "cuda" and kernel_runs_on(device):
            step = noise.Step(options.rows, options.vocabulary, top_p, device)
            rounds, agreement = noise.measure(step, options.rounds)
            medians = {side: statistics.median(values) for side, values in rounds.items()}
            entry |= {f"{side}_ms": round(value, 4) for side, value in medians.items()}
            entry |= {"ratio": round(medians["torch"] / medians["kernel"], 2), **agreement}
        save(**{case: entry})


def check_guard(options: argparse.Namespace, save: Save) -> None:
    """The packing guard: largest differences in nats, and that it refuses attention that does not know packing."""
    model = random_model(options.folder, device_of()).eval()
    save(initialised=True, weights=sum(weight.numel() for weight in model.parameters()))
    speed_up(model, sees=True)
    grid = grid_of(options)
    lm = batched_lm(model, str(options.folder), grid)
    prompt = lm.prepare(Prompt(TEXT, ImageInput("guard", pixels=pictures(1, options.image_tokens)[0])))
    kinds = {"float32": None, "autocast": torch.bfloat16}
    for name, dtype in kinds.items():
        policy = DecoderPolicy(model, vision_ids(model.config), dtype=dtype)
        started = wait()
        check = check_packing(policy, prompt, "random weights")
        save(**{name: {**dataclasses.asdict(check), "holds": check.holds, "seconds": round(wait() - started, 3)}})
    completions = [Completion("", tuple(range(length)), "length", length) for length in (options.caption, 7, 1)]
    tree = pack([Group("tree", "tree", prompt, completions)]).tree
    save(attention=attention_errors(tree, model.config.get_text_config()))
    policy = DecoderPolicy(model, vision_ids(model.config))
    policy.attend("sdpa")  # every caption sees those before it in its row
    try:
        check_packing(policy, prompt, "random weights")
    except BadInput as error:
        save(refuses_plain_attention=True, message=str(error))
    else:
        save(refuses_plain_attention=False)


def attention_errors(tree: Any, text: Any) -> dict[str, float]:
    """Relative errors of attention over a packed row in bfloat16, of its output and gradients, against float32."""
    generator = torch.Generator().manual_seed(0)
    width = text.hidden_size // text.num_attention_heads

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tree.columns, width, generator=generator).to(device_of(), torch.bfloat16)

    states = [normal(heads) for heads in (text.num_attention_heads, *[text.num_key_value_heads] * 2)]
    grad = normal(text.num_attention_heads).transpose(1, 2)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [state.to(dtype).requires_grad_() for state in states]
        out, _ = tree_attention(None, *inputs, None, tree=tree)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(dtype))])
    names = ("output", "query", "key", "value")
    pairs = zip(names, *([tensor.float() for tensor in side] for side in results), strict=True)
    return {name: round(float((rough - exact).norm() / exact.norm()), 6) for name, rough, exact in pairs}


def train_capipe(options: argparse.Namespace, save: Save) -> None:
    """Our steps: drawn by the transformers engine from the policy's own modules, as in `capipe train`."""
    decoder, vision = arithmetic.sizes(options.config)
    operations = {"needed": arithmetic.needed(decoder, vision, options.lengths)}
    steps = Steps(options, save, operations)
    asyncio.run(_train_capipe(options, steps))


async def _train_capipe(options: argparse.Namespace, steps: Steps) -> None:
    device = device_of()
    model = random_model(options.folder, device)
    speed_up(model, sees=True)
    freeze_vision(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = torch.bfloat16 if device.type == "cuda" else None
    policy = DecoderPolicy(model.eval(), vision_ids(model.config), dtype=dtype)
    grid = grid_of(options)
    lm, preparing = (batched_lm(model, str(options.folder), grid) for _ in range(2))
    lm._end_ids = frozenset()  # only its length ends a caption
    lm.computes_in = dtype
    engine = TransformersEngine(lm, grid, options.group * options.images)
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    updater = Updater(policy, torch.optim.AdamW(learning, lr=LR), UpdateConfig(loss="dapo", limit=options.caption))
    images = [
        ImageInput(str(number), pixels=picture)
        for number, picture in enumerate(pictures(options.images, options.image_tokens))
    ]

    async def group_of(image: ImageInput, step: int) -> Group:
        prompt = Prompt(TEXT, image)
        seeds = range(step * options.group, (step + 1) * options.group)
        requests = [GenerationRequest(prompt, Sampling(1.0, 1.0, options.caption, seed), True) for seed in seeds]
        completions: list[Completion] = await asyncio.gather(*map(engine.generate, requests))
        rewards = [RewardResult(distinct(completion.token_ids)) for completion in completions]
        return Group(image.uid, image.uid, preparing.prepare(prompt), completions, rewards)

    while not steps.ended():
        started = wait()
        groups = await asyncio.gather(*(group_of(image, len(steps.taken)) for image in images))
        sampled = wait()
        result = updater.update(groups)
        done = wait()
        if result.skipped is not None or result.tokens != options.lengths.sampled:
            sys.exit(f"no step like the others: {result}")
        steps.add(sampled - started, done - sampled)
        steps.save(prompt_tokens=len(groups[0].prompt.ids), mismatch=result.mismatch)
    await engine.aclose()


def train_trl(options: argparse.Namespace, save: Save) -> None:
    """TRL's GRPOTrainer, drawing by transformers: a micro-batch is a group, with its captions one after another."""
    save(stand_ins=stand_in())
    from datasets import Dataset
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    save(versions={package: metadata.version(package) for package in ("trl", "accelerate")})
    device = device_of()
    model = random_model(options.folder, device)
    freeze_vision(model)
    decoder, vision = arithmetic.sizes(options.config)
    operations = {
        "needed": arithmetic.needed(decoder, vision, options.lengths),
        "by_sequence": arithmetic.by_sequence(decoder, vision, options.lengths),
    }
    steps = Steps(options, save, operations)
    processor: Any = AutoProcessor.from_pretrained(options.folder)
    processor.tokenizer.padding_side = "left"
    shown = [Image.fromarray(picture) for picture in pictures(options.images, options.image_tokens)]
    rows = {"prompt": [[{"role": "user", "content": TEXT}]] * options.images, "image": shown}

    def reward(completion_ids: list[list[int]], **rest: Any) -> list[float]:
        return [distinct(tokens) for tokens in completion_ids]

    class Timed(GRPOTrainer):  # type: ignore[misc]
        sampling = 0.0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = wait()
            batch = super()._generate_and_score_completions(inputs)
            self.sampling += wait() - started
            count = int(batch["completion_mask"].sum())
            if count != options.lengths.sampled:
                sys.exit(f"{count} tokens, not {options.lengths.sampled}")
            return batch

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *arguments: Any, **rest: Any) -> None:
            trainer.sampling, self.started = 0.0, wait()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:
            whole = wait() - self.started
            steps.add(trainer.sampling, whole - trainer.sampling)
            control.should_training_stop = steps.ended()

    with tempfile.TemporaryDirectory() as out:
        cuda = device.type == "cuda"
        config = GRPOConfig(
            output_dir=out, use_cpu=not cuda, bf16=cuda, fp16=False, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none", save_strategy="no",
            per_device_train_batch_size=options.group, gradient_accumulation_steps=options.images,
            num_generations=options.group, max_completion_length=options.caption, num_iterations=1, beta=0.0,
            temperature=1.0, loss_type="dapo", learning_rate=LR, lr_scheduler_type="constant",
            max_steps=options.steps + 1, logging_steps=10**6, disable_tqdm=True, dataloader_num_workers=0,
            remove_unused_columns=False, use_vllm=False, seed=0,
            generation_kwargs={"min_new_tokens": options.caption, "suppress_tokens": vision_ids(model.config)},
        )  # fmt: skip
        trainer = Timed(
            model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict(rows),
            processing_class=processor, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()


def distinct(tokens: list[int] | tuple[int, ...]) -> float:
    """The reward of both sides: cheap, and different for most captions."""
    return sum(tokens) % 1009 / 1009


def grid_of(options: argparse.Namespace) -> ImageGrid:
    return ImageGrid(28, 56 * 56, options.image_tokens * 28 * 28)


PARTS = {
    "device": describe_device,
    "noise": measure_noise,
    "guard": check_guard,
    "capipe": train_capipe,
    "trl": train_trl,
}


def saver(path: Path) -> Save:
    """A function that adds to the file's JSON object; a kill leaves the old one or the new one."""
    kept: dict[str, Any] = {}

    def save(**more: Any) -> None:
        kept.update(more)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(kept))
        beside.replace(path)

    return save


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="time.time() after which no step begins")
    parser.add_argument("--peak", type=float)
    for name in ("image-tokens", "caption", "group", "images", "steps", "rows", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from transformers import AutoConfig, AutoTokenizer

    options.config = AutoConfig.from_pretrained(options.folder)
    options.vocabulary = options.config.text_config.vocab_size
    tokenizer: Any = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}],
        add_generation_prompt=True,
        return_dict=False,
    )
    prompt = len(ids) - 1 + options.image_tokens
    options.lengths = arithmetic.Lengths(
        options.images, options.group, prompt, 4 * options.image_tokens, options.caption
    )
    PARTS[options.part](options, saver(options.out))


if __name__ == "__main__":
    main()
