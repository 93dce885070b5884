"""Images with questions for `capipe train`, and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from capipe.models.tiny.train.texts.quiz import quiz, sample_asked
from capipe.models.tiny.world.corpus import write_corpus
from capipe.models.tiny.world.scenes import Split

from .conftest import capipe


def quizzed(folder: Path, count: int, split: Split, seed: int) -> None:
    """Shards of ``count`` scenes in ``folder``, and three true questions about each."""
    rng, lines = Random(seed), []
    for sample in write_corpus(folder / "corpus", count, split, seed):
        for _ in range(3):
            question = quiz(sample.scene, sample_asked(sample.scene, rng), rng)
            record = {"image": f"{sample.key}.jpg", "question": question.text, "options": question.options}
            lines.append(json.dumps({**record, "answer": question.options[question.answer], "kind": question.kind}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    capipe("ingest", folder / "corpus", "--out", folder / "shards")
    quizzes = ("--import", folder / "set.jsonl", "--screen", "none")
    capipe("qa", "--shards", folder / "shards", "--out", folder / "qa", *quizzes)


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's state, whole, of however many processes it is."""
    reader = HuggingFaceStorageReader(str(checkpoint / "state"))
    sizes = {name: value.size for name, value in reader.read_metadata().state_dict_metadata.items()}
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def same_state(*checkpoints: Path) -> bool:
    """Whether two checkpoints of as many processes hold the same state: the same files, byte for byte."""
    one, two = ({file.name: file.read_bytes() for file in (path / "state").iterdir()} for path in checkpoints)
    return one == two


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
