"""An artifact of every kind, and every command that reads one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

from capipe.models.tiny.train.texts.quiz import quiz, sample_asked
from capipe.models.tiny.world.corpus import CorpusSample, write_corpus

from .conftest import capipe

TINY = ("--engine", "transformers", "--concurrency", "4")


def prepare(data: Path, images: int = 6, seed: int = 5) -> None:
    """One artifact of every kind that capipe writes, each with strings of its own, some shared with others."""
    _write_questions(data / "set.jsonl", write_corpus(data / "corpus", images, "heldout", seed))
    for number, picture in enumerate(sorted(path for path in (data / "corpus").rglob("*.*g") if path.is_file())):
        picture.with_suffix(".json").write_text(
            json.dumps({"url": "https://example.org/a.png", "tags": ["a", str(number)]})
        )
    (data / "pictures").mkdir()
    shutil.copy(data / "corpus/000000.jpg", data / "pictures")
    shards = data / "shards"
    capipe("ingest", data / "corpus", "--out", shards, "--shard-size", 4)
    annotate = ["annotate", "--shards", shards, "--model", "tiny/captioner", "--prompt", "short", "--max-tokens", 12]
    capipe(*annotate, *TINY, "--out", data / "captions")
    capipe("embed", "--shards", shards, "--clip", "tiny/clip", "--out", data / "embeddings")
    capipe("dedup", "--shards", shards, "--out", data / "dedup")
    scored = ["filter", "--shards", shards, "--captions", data / "captions", "--clip", "tiny/clip", "--top", 0.9]
    capipe(*scored, "--out", data / "filtered")
    capipe("export", data / "filtered/shards", "--title", "Pictures", "--out", data / "exported")
    capipe("qa", "--shards", shards, "--import", data / "set.jsonl", "--screen", "none", "--out", data / "qa")
    capipe(*_evaluation(data), "--out", data / "eval")


def _write_questions(path: Path, samples: Iterable[CorpusSample]) -> None:
    rng, lines = random.Random(7), []
    for sample in samples:
        question = quiz(sample.scene, sample_asked(sample.scene, rng), rng)
        record = {"image": f"{sample.key}.jpg", "question": question.text, "options": question.options}
        lines.append(json.dumps({**record, "answer": question.options[question.answer], "kind": question.kind}))
    path.write_text("\n".join(lines))


def _evaluation(place: Path) -> list[object]:
    made_of = ("--shards", place / "shards", "--questions", place / "qa", "--captions", place / "captions")
    return ["eval", *made_of, "--reader", "tiny/reader", "--reader-engine", "transformers"]


KINDS = ("shards", "captions", "embeddings", "dedup/marked", "filtered/scores", "filtered/shards", "exported")
KINDS += ("qa/written", "eval/graded")


def _training(place: Path) -> list[object]:
    recipe = {
        "model": "tiny/captioner",
        "prompt": "Describe the image.",
        "data": {"shards": str(place / "shards"), "questions": str(place / "qa")},
        "rewards": [{"kind": "quiz", "engine": "transformers"}],
        "rollout": {"images": 2, "group": 2, "max_tokens": 12},
        "preflight": False,
        "steps": 1,
    }
    if (place / "shards").exists():  # not where only names are asked for
        (place / "recipe.yaml").write_text(json.dumps(recipe))
    return ["train", place / "recipe.yaml"]


def commands(place: Path, kind: str) -> dict[str, list[object]]:
    """Every command that reads an artifact, on the hostile one where it can, else on one that it stands beside."""
    artifact, shards, captions = place / kind, place / "shards", place / "captions"
    tars = artifact if kind in ("shards", "filtered/shards", "exported") else shards
    out = place / "out"
    annotate = ["annotate", "--shards", tars, "--model", "tiny/captioner", "--prompt", "short", "--max-tokens", 12]
    return {
        "verify": ["verify", artifact],
        "status": ["status", artifact],
        "report": ["report", place],
        "view": ["view", place],
        "export": ["export", artifact, "--title", "x", "--out", out / "exported"],
        "export folder": ["export", artifact, "--title", "x", "--format", "folder", "--out", out / "folder"],
        "dedup": ["dedup", "--shards", tars, "--out", out / "dedup"],
        "dedup --embeddings": [
            "dedup",
            "--shards",
            shards,
            "--embeddings",
            place / "embeddings",
            "--out",
            out / "near",
        ],
        "filter": [*("filter", "--shards", tars, "--captions", captions, "--clip", "tiny/clip"), "--out", out / "f"],
        "select": [
            *("filter", "--shards", shards, "--scores", place / "filtered/scores"),
            "--top",
            0.5,
            "--out",
            out / "s",
        ],
        "qa": ["qa", "--shards", tars, "--import", place / "set.jsonl", "--screen", "none", "--out", out / "qa"],
        "eval": [*_evaluation(place), "--out", out / "eval"],
        "compare": ["compare", place / "eval", place / "eval"],
        "train": [*_training(place), "--out", out / "train"],
        "annotate": [*annotate, *TINY, "--out", out / "captions"],
        "embed": ["embed", "--shards", tars, "--clip", "tiny/clip", "--out", out / "embeddings"],
        "ingest": ["ingest", artifact, "--out", out / "shards"],
        "ingest --fresh": ["ingest", place / "pictures", "--out", artifact, "--fresh"],
        "annotate --share": [*annotate, *TINY, "--share", "--out", captions],
        "annotate --fresh": [*annotate, *TINY, "--fresh", "--out", captions if tars != captions else out / "c"],
    }
