"""Measure a plain captioner on held-out scenes.

``python -m capipe.models.tiny.train.eval.plain_captioner tiny/vit-gpt2``
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
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    VisionEncoderDecoderModel,
)

from ....bundled import resolve
from ....pretrained import load_weights
from ...world.corpus import samples
from ...world.grade import KINDS, total
from ..plain_models import LONGEST
from ..texts.web_captions import OPENINGS
from .captioner import BATCH, graded_captions

SEED = 1


@dataclass(frozen=True)
class PlainReport:
    """Metrics of one plain captioner, greedy or sampled; shares are between 0 and 1."""

    precision: float  # stated attributes that are true
    recall: float
    by_kind: dict[str, float]  # precision
    hallucinated: float  # absent things and signs stated per scene
    colored: float  # named things whose colour is stated
    boilerplate: float  # captions that begin with boilerplate
    dense: float  # captions that state as much as a dense one
    complete: float  # correct captions that omit nothing but the count
    finished: float  # captions that end with the EOS token


class PlainCaptioner:
    """An exported plain captioner, loaded with transformers in float32."""

    def __init__(self, folder: str) -> None:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        cls = Blip2ForConditionalGeneration if kind == "blip-2" else VisionEncoderDecoderModel
        self.model = load_weights(cls, folder, dtype=torch.float32, called=folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    @torch.inference_mode()
    def caption(self, pictures: Sequence[bytes], sample: bool = False) -> list[tuple[str, bool]]:
        """A caption for each image, greedy or sampled at temperature 1, and whether it ended with the EOS token."""
        choice: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
        captions: list[tuple[str, bool]] = []
        for start in range(0, len(pictures), BATCH):
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures[start : start + BATCH]]
            pixels = self.images(images, return_tensors="pt").pixel_values
            out = self.model.generate(pixel_values=pixels, max_new_tokens=LONGEST // 2 + 32, **choice)
            texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
            captions += zip(texts, (out == self.tokenizer.eos_token_id).any(1).tolist(), strict=True)
        return captions


def plain_report(captioner: PlainCaptioner, count: int, seed: int = SEED, sample: bool = False) -> PlainReport:
    """Metrics over ``count`` held-out scenes, the same scenes for the same seed."""
    corpus = list(samples(count, "heldout", seed))
    torch.manual_seed(seed)
    captions = captioner.caption([item.image for item in corpus], sample)
    texts = [text for text, _ in captions]
    grades = graded_captions(corpus, texts)
    whole = total(grades)
    return PlainReport(
        precision=whole.precision(),
        recall=whole.recall(),
        by_kind={kind: whole.precision(kind) for kind in KINDS if whole.stated[kind]},
        hallucinated=whole.hallucinated / count,
        colored=whole.stated["color"] / max(1, whole.stated["shape"]),
        boilerplate=sum(text.startswith(OPENINGS[1:]) for text in texts) / count,
        dense=sum(grade.dense for grade in grades) / count,
        complete=sum(
            grade.stated == grade.correct and not (grade.expected - grade.recalled).keys() - {"count"}
            for grade in grades
        )
        / count,
        finished=sum(ended for _, ended in captions) / count,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="an exported plain captioner, or tiny/vit-gpt2")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    captioner = PlainCaptioner(resolve(options.folder))
    reports = {
        name: asdict(plain_report(captioner, options.scenes, options.seed, sample))
        for name, sample in (("greedy", False), ("sampled", True))
    }
    print(json.dumps(reports, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
