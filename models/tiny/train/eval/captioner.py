"""Measure an exported captioner on held-out scenes.

``python -m capipe.models.tiny.train.eval.captioner FOLDER --scenes 1000``
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ....bundled import resolve
from ....pretrained import load_weights
from ...world.corpus import CorpusSample, samples
from ...world.grade import KINDS, Grade, grade, total
from ...world.prompts import DENSE, PLAIN, SHORT, messages

BATCH = 50
LONGEST = 128  # new tokens; the longest captions of up to five things have seventy
SEED = 1


@dataclass(frozen=True)
class CaptionerReport:
    """Metrics of one captioner; shares and rates are between 0 and 1."""

    parameters: int
    scenes: int
    precision: float  # greedy, the canonical dense prompt, over all attributes
    recall: float
    by_kind: dict[str, tuple[float, float]]  # precision and recall of each kind of attribute
    exact: float  # scenes described completely and without error
    hallucinated: float  # absent things and signs stated per scene
    plain_dense: float  # dense captions among those sampled at temperature 1 for the canonical plain prompt
    plain_precision: float
    short_dense: float  # the same, for the canonical short prompt
    finished: float  # dense captions that end with a full stop


def load(folder: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The exported bf16 weights, loaded in float32, and their processor."""
    model = load_weights(AutoModelForImageTextToText, folder, dtype=torch.float32, called=folder).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=False)


@torch.inference_mode()
def caption(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[bytes],
    prompt: str,
    sample: bool = False,
    longest: int = LONGEST,
) -> list[str]:
    """A caption for each encoded image: greedy, or sampled at temperature 1 from the whole vocabulary.

    ``longest``: new tokens; longer captions are cut off.
    """
    text = processor.apply_chat_template(messages(prompt), add_generation_prompt=True)
    captions: list[str] = []
    for start in range(0, len(pictures), BATCH):
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures[start : start + BATCH]]
        inputs = processor(text=[text] * len(images), images=images, return_tensors="pt")
        choice: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
        out = model.generate(**inputs, max_new_tokens=longest, **choice)
        captions += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return captions


def graded_captions(corpus: Sequence[CorpusSample], captions: Sequence[str]) -> list[Grade]:
    """The grade of each caption against its scene."""
    return [grade(sample.scene, text) for sample, text in zip(corpus, captions, strict=True)]


def evaluate(model: PreTrainedModel, processor: ProcessorMixin, count: int, seed: int = SEED) -> CaptionerReport:
    """Metrics over ``count`` held-out scenes, the same scenes for the same seed."""
    corpus = list(samples(count, "heldout", seed))
    pictures = [item.image for item in corpus]
    captions = caption(model, processor, pictures, DENSE[0])
    grades = graded_captions(corpus, captions)
    torch.manual_seed(seed)
    plain = graded_captions(corpus, caption(model, processor, pictures, PLAIN[0], sample=True))
    short = graded_captions(corpus, caption(model, processor, pictures, SHORT[0], sample=True))
    whole = total(grades)
    return CaptionerReport(
        parameters=model.num_parameters(),
        scenes=count,
        precision=whole.precision(),
        recall=whole.recall(),
        by_kind={kind: (whole.precision(kind), whole.recall(kind)) for kind in KINDS},
        exact=sum(grade.exact for grade in grades) / count,
        hallucinated=whole.hallucinated / count,
        plain_dense=sum(grade.dense for grade in plain) / count,
        plain_precision=total(plain).precision(),
        short_dense=sum(grade.dense for grade in short) / count,
        finished=sum(text.endswith(".") for text in captions) / count,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="an exported captioner, or tiny/captioner")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    model, processor = load(resolve(options.folder))
    print(json.dumps(asdict(evaluate(model, processor, options.scenes, options.seed)), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
