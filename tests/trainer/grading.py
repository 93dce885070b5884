"""Rows of graded captions as a Parquet file gives them back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from capipe.manifests.schema import GRADE
from capipe.models.tiny.world.scenes import Scene

Chosen = Sequence[int | None]


def question(name: str, options: int = 2, answer: int = 0, kind: str = "color") -> dict[str, Any]:
    return {"id": name, "kind": kind, "options": options, "answer": answer}


def caption(
    name: str, text: str | None, answers: Mapping[str, Chosen], status: str = "ok", n_tokens: int | None = None
) -> dict[str, Any]:
    """A caption with ``answers``, what was chosen by question id; :func:`row` counts them."""
    return {"name": name, "text": text, "n_tokens": n_tokens, "status": status, "answers": answers}


def row(
    key: str,
    questions: Sequence[Mapping[str, Any]] | None,
    captions: Sequence[Mapping[str, Any]] | None,
    scene: Scene | None = None,
    uid: str | None = "",
    status: str = "ok",
    error: str | None = None,
) -> dict[str, Any]:
    """A row through the schema, with its counts filled in. ``uid``: "" makes one of the key."""
    by_id = {each["id"]: each for each in questions or ()}
    counted = [
        {**each, "answers": [_answer(by_id.get(name), name, chosen) for name, chosen in each["answers"].items()]}
        for each in captions or ()
    ]
    record = {
        "key": key,
        "uid": f"uid-{key}" if uid == "" else uid,
        "status": status,
        "error": error,
        "questions": questions,
        "captions": None if captions is None else counted,
        "scene": None if scene is None else json.dumps(scene.to_dict()),
    }
    back: dict[str, Any] = pa.Table.from_pylist([record], schema=GRADE).to_pylist()[0]
    return back


def _answer(of: Mapping[str, Any] | None, name: str, chosen: Chosen) -> dict[str, Any]:
    of = of or question(name)
    return {
        "id": name,
        "chosen": list(chosen),
        "right": sum(each == of["answer"] for each in chosen),
        "abstained": sum(each == of["options"] for each in chosen),
        "scored": sum(each is not None for each in chosen),
    }
