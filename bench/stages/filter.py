"""Overhead of scoring in `capipe filter` over its models, and cost of the same scores by a plain script (DESIGN §9).

Three sides compute the CLIP and ITM scores of every image's new and original caption, whole and by sentence:

- capipe: the work of a worker process. It reads tars, decodes in a pool, scores chunk by chunk, journals and commits.
- forward: the bare models on batches that were decoded, split, tokenized and collated beforehand.
- plain: open_clip's and transformers' own preprocessing in a DataLoader (one worker process, as capipe's pool has one),
  in pairs of an image and a caption as in those libraries' examples: batches of pairs, the image encoded for each pair,
  texts padded to the model's context (CLIP) or to the longest of the batch (ITM).

Torch uses all cores on each side, its default. Rounds alternate; the figures are images per second, the ratios medians
over the rounds.

    python bench/stages/filter.py [--images 1024] [--shards 4] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import report, version
from _corpus import rendered_shards

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand
from capipe.models.bundled import folder_of
from capipe.models.images.decode import ImageLimits
from capipe.models.images.preprocess import decode_preprocessed
from capipe.models.scorers.base import Pair, Scorer, by_length
from capipe.models.scorers.clip import encode_trimmed
from capipe.models.scorers.loading import ScorerConfig
from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.corpus import samples
from capipe.pipeline.jobs.rows.engine import plan
from capipe.pipeline.jobs.score import ScoreProcessor, ScoreSetup, ScoreStage
from capipe.pipeline.runners.inline import DirectChannel
from capipe.pipeline.runners.worker import Worker
from capipe.stages.filter.score import CAPTIONS, CHUNK

SCORERS = (ScorerConfig("clip", "tiny/clip"), ScorerConfig("itm", "tiny/itm"))
SEED = 5
PAIRS = 32  # batch size of the plain script


def write_captions(shards: Path, out: Path, images: int) -> None:
    """Write a dense caption for every image in the format of `capipe annotate`."""
    texts = (dense_caption(item.scene, Random(number)) for number, item in enumerate(samples(images, "heldout", SEED)))
    artifact = Artifact.create(str(out), "annotate", {"bench": "filter"}, {})
    for shard in expand(str(shards)):
        rows = list(RowReader(shard))
        with artifact.begin(shard.name, ANNOTATE) as writer:
            for row in rows:
                caption = {"name": "dense", "text": next(texts), "status": "ok"}
                base = {"key": row.key, "uid": row.uid, "status": "ok", "text": row.text}
                writer.write({**base, "captions": [caption]})
            writer.commit(rows_in=len(rows), input_info={"digest": "bench"})
    artifact.close()


# --- capipe -----------------------------------------------------------------------------------------------------------


async def through_capipe(shards: Path, captions: Path, out: Path) -> float:
    """Images per second of a whole worker whose models and decoders are already started."""
    stage = ScoreStage(ScoreSetup(SCORERS, decode_workers=1))
    job = plan(stage, str(shards), str(out), beside={CAPTIONS: Artifact.open(str(captions))})
    processor = ScoreProcessor(stage.setup)
    await processor._pool.decode(b"")
    started = time.perf_counter()
    await Worker(processor, job.artifact, DirectChannel(job.todo, job.artifact, lambda event: None)).run()
    seconds = time.perf_counter() - started
    await processor.aclose()
    rows = sum(record.rows["ok"] for record in job.artifact.committed().values())
    job.artifact.close()
    return rows / seconds


# --- the bare models --------------------------------------------------------------------------------------------------


class Forward:
    """Forward passes of the models on tensors prepared beforehand."""

    def __init__(self, shards: Path, captions: Path, scorers: Sequence[Scorer]) -> None:
        artifact = Artifact.open(str(captions))
        rows = [row for shard in expand(str(shards)) for row in RowReader(shard)]
        new = [row["captions"][0]["text"] for shard in artifact.committed() for row in artifact.read_rows(shard)]
        decode = functools.partial(
            decode_preprocessed, preprocesses=tuple(scorer.preprocess for scorer in scorers), limits=ImageLimits()
        )
        self.images = len(rows)
        self.calls: list[Callable[[], Any]] = []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            views = [decode(row.image or b"") for row in chunk]
            captions_of = [(i, text) for i, row in enumerate(chunk) for text in (new[start + i], row.text or "")]
            wanted = [Pair(i, part) for i, text in captions_of for part in (text, *split_sentences(text))]
            pairs = list(dict.fromkeys(wanted))
            for position, scorer in enumerate(scorers):
                pixels = [view[position] for view in views]  # type: ignore[index]
                prepare = self._clip if scorer.name == "clip" else self._itm
                self.calls.append(prepare(scorer, pixels, pairs))

    def _clip(self, scorer: Any, pixels: Any, pairs: list[Pair]) -> Callable[[], Any]:
        ids = scorer._tokenizer(list(dict.fromkeys(pair.text for pair in pairs)))
        lengths = (ids.argmax(-1) + 1).tolist()
        texts = [ids[batch, : lengths[batch[0]]] for batch in by_length(lengths)]

        def call() -> None:
            scorer.encode_images(pixels)
            for batch in texts:
                encode_trimmed(scorer._model, batch)

        return call

    def _itm(self, scorer: Any, pixels: Any, pairs: list[Pair]) -> Callable[[], Any]:
        ids = scorer._tokenizer([pair.text for pair in pairs], truncation=True, max_length=512).input_ids
        width = scorer.encode_images(pixels[:1]).shape[1]
        batches = []
        for batch in by_length([len(tokens) + width // 4 for tokens in ids]):
            padded = scorer._tokenizer.pad({"input_ids": [ids[index] for index in batch]}, return_tensors="pt")
            owners = torch.tensor([pairs[index].image for index in batch])
            batches.append((padded.input_ids, padded.attention_mask, owners))

        def call() -> None:
            states = scorer.encode_images(pixels)
            for ids, mask, owners in batches:
                scorer._match(ids, mask, states[owners])

        return call

    @torch.inference_mode()
    def run(self) -> float:
        """Images per second."""
        started = time.perf_counter()
        for call in self.calls:
            call()
        return self.images / (time.perf_counter() - started)


# --- a plain script ---------------------------------------------------------------------------------------------------


class PairsOfShards(Dataset[tuple[Tensor, Tensor, list[str]]]):
    """An item per image and caption: pixels for both models, and the caption with its sentences."""

    def __init__(self, pairs: list[tuple[bytes, str]], preprocess: Any, processor: Any) -> None:
        self.pairs, self.preprocess, self.processor = pairs, preprocess, processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, list[str]]:
        data, caption = self.pairs[index]
        image = Image.open(io.BytesIO(data)).convert("RGB")
        shown = self.processor.image_processor(image, return_tensors="pt").pixel_values[0]
        return self.preprocess(image), shown, [caption, *split_sentences(caption)]


def collate(items: list[tuple[Tensor, Tensor, list[str]]]) -> tuple[Tensor, Tensor, list[list[str]]]:
    clip, itm, texts = zip(*items, strict=True)
    return torch.stack(clip), torch.stack(itm), list(texts)


class Plain:
    """Models loaded by their libraries, pairs read from the tars."""

    def __init__(self, shards: Path, captions: Path) -> None:
        from transformers import AutoProcessor, Blip2ForImageTextRetrieval

        source = f"local-dir:{folder_of('clip')}"
        self.clip, _, self.preprocess = open_clip.create_model_and_transforms(source)
        self.tokenizer = open_clip.get_tokenizer(source)
        self.itm = Blip2ForImageTextRetrieval.from_pretrained(folder_of("itm"), dtype=torch.float32)
        self.processor = AutoProcessor.from_pretrained(folder_of("itm"))
        self.clip.eval(), self.itm.eval()
        self.shards, self.captions = shards, captions

    @torch.inference_mode()
    def run(self) -> float:
        """Images per second."""
        started = time.perf_counter()
        artifact = Artifact.open(str(self.captions))
        new = iter([row["captions"][0]["text"] for shard in artifact.committed() for row in artifact.read_rows(shard)])
        pairs = []
        for shard in expand(str(self.shards)):
            for row in RowReader(shard):
                pairs += [(row.image or b"", next(new)), (row.image or b"", row.text or "")]
        dataset = PairsOfShards(pairs, self.preprocess, self.processor)
        for clip_pixels, itm_pixels, texts in DataLoader(dataset, batch_size=PAIRS, num_workers=1, collate_fn=collate):
            owners = torch.tensor([number for number, parts in enumerate(texts) for _ in parts])
            said = [part for parts in texts for part in parts]
            shown = self.clip.encode_image(clip_pixels, normalize=True)
            encoded = self.clip.encode_text(self.tokenizer(said), normalize=True)
            (shown[owners] * encoded).sum(-1).tolist()
            asked = self.processor.tokenizer(said, padding=True, truncation=True, max_length=512, return_tensors="pt")
            logits = self.itm(
                pixel_values=itm_pixels[owners],
                input_ids=asked.input_ids,
                attention_mask=asked.attention_mask,
                use_image_text_matching_head=True,
            ).logits_per_image
            logits.softmax(-1)[:, 1].tolist()
        return len(pairs) / 2 / (time.perf_counter() - started)


def measure(folder: Path, shards: int, images: int, rounds: int) -> dict[str, list[float]]:
    """Rounds of all sides, in reversed order each time, after a warm-up round."""
    source, captions = rendered_shards(folder / "shards", shards, images // shards, SEED), folder / "captions"
    write_captions(source, captions, images)
    loaded = ScoreProcessor(ScoreSetup(SCORERS, decode_workers=1))
    forward, plain = Forward(source, captions, loaded._scorer.scorers), Plain(source, captions)
    asyncio.run(loaded.aclose())
    threads = torch.get_num_threads()
    figures: dict[str, list[float]] = {"capipe": [], "forward": [], "plain": []}
    for number in range(-1, rounds):
        for side in list(figures)[:: 1 if number % 2 else -1]:
            torch.set_num_threads(threads)  # capipe's side changes it process-wide, to divide cores among chunks
            if side == "capipe":
                figure = asyncio.run(through_capipe(source, captions, folder / f"out{number}"))
            else:
                figure = forward.run() if side == "forward" else plain.run()
            print(f"round {number + 1}/{rounds}: {side} {figure:.2f}", flush=True)
            if number >= 0:
                figures[side].append(figure)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.shards, options.images, options.rounds)
    ratios = {
        f"vs_{side}": round(median(a / b for a, b in zip(figures["capipe"], figures[side], strict=True)), 3)
        for side in ("forward", "plain")
    }
    versions = {name: version(name) for name in ("torch", "open_clip_torch", "transformers")}
    shared = {"images": options.images, "threads": torch.get_num_threads()}
    report("filter", figures, versions, unit="images/s", **shared, ratio=ratios["vs_forward"], ratios=ratios)


if __name__ == "__main__":
    main()
