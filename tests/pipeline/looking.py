"""A chain's folder as the stages write it, in a moment: shards, captions, questions, answers, scores, of no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, GRADE, INGEST, SCREEN
from capipe.manifests.shards import RowReader, expand, uid_of
from capipe.pipeline.commands.filter import select_step
from capipe.stages.filter.select import SelectConfig

from ..conftest import photo
from ..stages.scored import clip, write_scores

WORDS = ("red", "green", "blue", "square", "circle", "star", "left", "right", "large", "small")
Text = Callable[[int], str]


def words(index: int, count: int = 6) -> str:
    """A caption that is another one for each index."""
    digest = hashlib.sha256(b"%d" % index).digest()
    return "A " + " ".join(WORDS[byte % len(WORDS)] for byte in digest[:count]) + f" number {index}."


def write_images(out: Path, sizes: list[int], *, text: Text = words, only: int | None = None) -> Artifact:
    """Ingested shards; the last row of each is corrupt. ``only``: commit no more than so many, as a run under way."""
    artifact = Artifact.create(str(out), "ingest", {"sizes": sizes}, {"sources": ["x"], "shards_total": len(sizes)})
    number = 0
    for shard, size in enumerate(sizes):
        if only is not None and shard >= only:
            break
        with artifact.begin(f"{shard:05d}", INGEST, tar=True) as made:
            for row in range(size):
                key, broken = f"{number:07d}", row == size - 1
                data = photo(number, (48, 32))
                values = dict.fromkeys(INGEST.names) | {"key": key, "uid": uid_of(data), "status": "ok"}
                values |= {"text": text(number), "format": "jpg", "width": 48, "height": 32, "source": f"{key}.jpg"}
                if broken:
                    values |= {"status": "corrupt", "error": "truncated", "uid": None, "format": None}
                members = {"jpg": data, "txt": text(number).encode(), "json": b"{}"}
                made.write(values, None if broken else members)
                number += 1
            made.commit(rows_in=size, input_info={"digest": f"{shard:064x}", "items": size})
    artifact.close()
    return artifact


def write_captions(shards: Path, out: Path, text: Text = words, model: str = "m", only: int | None = None) -> Artifact:
    """Captions under two prompts: ``plain``, and ``dense``, which says more."""
    source = Artifact.open(str(shards))
    inputs = {"input": source.fingerprint, "model": model}
    run = {"shards": str(shards), "model": model, "shards_total": len(source.committed())}
    artifact = Artifact.create(str(out), "annotate", inputs, run)
    number = 0
    for place, shard in enumerate(expand(str(shards))):
        if only is not None and place >= only:
            break
        if shard.name in artifact.committed():
            number += artifact.committed()[shard.name].count
            continue
        reader, start = RowReader(shard), number
        with artifact.begin(shard.name, ANNOTATE) as made:
            for row in reader:
                base = {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error, "text": row.text}
                said = {"plain": text(number), "dense": f"{text(number)} It has {model}."} if row.image else {}
                captions = [caption(name, told, model) for name, told in said.items()]
                made.write({**base, "captions": captions})
                number += 1
            made.commit(rows_in=number - start, input_info=reader.info)
    artifact.close()
    return artifact


def caption(name: str, text: str, model: str = "m") -> dict[str, Any]:
    more = {"prompt_id": "p", "finish_reason": "stop", "n_tokens": len(text.split()), "attempts": 1, "status": "ok"}
    return {"name": name, "text": text, "model": model, **more}


def write_quiz(
    shards: Path, folder: Path, right: Callable[[int], int], controls: bool = True, text: Text = words
) -> Artifact:
    """Screened questions, and answers graded from captions: of four presentations ``right`` of an index are."""
    source = Artifact.open(str(shards))
    screened = Artifact.create(
        str(folder / "screened"), "screen", {"input": source.fingerprint}, {"shards": str(shards)}
    )
    semantic = {
        "input": source.fingerprint,
        "questions": screened.fingerprint,
        "captions": "c" * 64,
        "model": "r" * 64,
        "grade": {"presentations": None, "generic": "g", "controls": controls},
        "reader": {"presentations": None},
        "of": str(folder),
    }
    run = {"shards": str(shards), "model": "reader", "questions": str(folder / "screened"), "captions": "gone"}
    graded = Artifact.create(str(folder / "graded"), "grade", semantic, run)
    number = 0
    for shard in expand(str(shards)):
        reader, start = RowReader(shard), number
        with screened.begin(shard.name, SCREEN) as asked, graded.begin(shard.name, GRADE) as answered:
            for row in reader:
                base = {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}
                sound = row.image is not None
                asked.write({**base, "questions": [_question(number)] if sound else [], "screener": "s"})
                names = ["plain", *(["blind"] if controls else [])]
                captions = [_graded(name, text(number), number, right(number) * (name == "plain")) for name in names]
                told = {"id": f"q{number}", "kind": "color", "options": 3, "answer": 1}
                answered.write({**base, "questions": [told] if sound else [], "captions": captions if sound else []})
                number += 1
            asked.commit(rows_in=number - start, input_info=reader.info)
            answered.commit(rows_in=number - start, input_info=reader.info)
    screened.close()
    graded.close()
    return graded


def _question(number: int) -> dict[str, Any]:
    text = {"id": f"q{number}", "kind": "color", "question": f"What is number {number}?", "options": ["a", "b", "c"]}
    return {**text, "answer": 1, "status": "ok", "with_image": [1, 1], "without_image": [0, 2], "image_accuracy": 1.0}


def _graded(name: str, text: str, number: int, right: int) -> dict[str, Any]:
    chosen = [1] * right + [0] * (4 - right)
    answer = {"id": f"q{number}", "chosen": chosen, "right": right, "abstained": 0, "scored": 4}
    return {"name": name, "text": None if name == "blind" else text, "n_tokens": 5, "status": "ok", "answers": [answer]}


def write_run(folder: Path, steps: int, done: int) -> Path:
    """A training run's log after ``done`` of ``steps`` steps, validated every second one."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"steps": steps, "questions": "q"}))
    lines, times = [], []
    for step in range(done):
        if step % 2 == 0:
            lines.append({"step": step - 1, "validation/plain": 0.5 + step / 100})
        reward = {"reward": 0.2 + step / 50, "reward/quiz": 0.3 + step / 50, "tokens_per_caption": 10.0 + step}
        lines.append({"step": step, **reward, "truncated": 0.0, "repeating": 0.1})
        times.append({"step": step, "seconds/rollout": 2.0})
    for name, entries in (("steps", lines), ("times", times)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def write_chain(folder: Path, sizes: list[int], text: Text = words) -> Path:
    """Shards, two captioners, a quiz before and after training, scores, final shards."""
    shards = folder / "shards"
    write_images(shards, sizes, text=text)
    write_captions(shards, folder / "captions", text)
    write_captions(shards, folder / "other", lambda index: text(index).replace("red", "crimson"), "other")
    write_quiz(shards, folder / "eval", lambda index: 2 * (index % 2), text=text)
    write_quiz(
        shards, folder / "eval-trained", lambda index: 4 - 2 * (index % 4 == 0), False, lambda i: f"Trained: {text(i)}"
    )
    write_run(folder / "run", 10, 7)

    def values(index: int, row: Any) -> dict[str, Any]:
        told = {"re_caption": text(index), "re_length": 8, "re_sentences": 1, "re_clip_score": clip(index)}
        return {**told, "org_caption": row.text, "org_length": 8, "org_clip_score": clip(index) / 2}

    scores = write_scores(shards, folder / "filtered/scores", values)
    rule = SelectConfig(keep="clip_score > 0.4")
    select_step(scores, str(shards), str(folder / "filtered/shards"), rule, workers=0)
    return folder
