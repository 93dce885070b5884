"""Configurations of somebody else's making, signed as ours are: whoever reads a value of one refuses it in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capipe.errors import CapipeError
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.allowed import Allowed
from capipe.manifests.fingerprint import fingerprint
from capipe.pipeline.inspect.status import state
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.artifacts import captions_artifact, question_artifact
from capipe.pipeline.jobs.eval import settings
from capipe.pipeline.jobs.rows.reader_checks import rewarded_by
from capipe.pipeline.report.page import write_report
from capipe.pipeline.view.library import Library
from capipe.stages.export import provenance

DIGEST = "5df5255e6c9130aaf2d8baf79e56fa4b19db365bcb0c35539e019ecaac8ce7a4"
PROMPTS = [{"name": "short", "text": "Describe the image in one short sentence."}]
ANNOTATE = {"prompts": PROMPTS, "samples": 1, "temperature": 0.0, "max_tokens": 12}
CAPTIONS: dict[str, Any] = {"model": DIGEST, "input": DIGEST, "annotate": ANNOTATE}
GRADED: dict[str, Any] = {
    "model": DIGEST,
    "input": DIGEST,
    "captions": DIGEST,
    "questions": DIGEST,
    "reader": {"mode": "choose", "presentations": None},
    "grade": {"presentations": None, "generic": "An image."},
}
VALUES: list[Any] = [None, 7, "../link", ["x"], [{}], {"x": "y"}]

Step = str | int
Look = Callable[[Path], object]


def folder_of(artifacts: Path) -> tuple[Path, Path]:
    captions, graded = artifacts / "captions", artifacts / "graded"
    run = {"model": "tiny/captioner", "engine": "transformers", "shards": str(artifacts / "shards"), "shards_total": 1}
    Artifact.create(str(captions), "annotate", CAPTIONS, run).close()
    run = {**run, "model": "tiny/reader", "questions": str(artifacts / "qa"), "captions": str(captions)}
    Artifact.create(str(graded), "grade", GRADED, run).close()
    return captions, graded


def paths(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Where the values of a JSON value are, itself included."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in pairs:
        yield from paths(inner, (*path, step))


def forged(config: dict[str, Any], path: tuple[Step, ...], change: Callable[[Any, Step], None]) -> str:
    copy = json.loads(json.dumps(config))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    change(inner, path[-1])
    copy.pop("digest", None)
    if isinstance(copy.get("semantic"), dict):
        copy["fingerprint"] = fingerprint(copy["semantic"])
    return json.dumps(copy)


def changes() -> Iterator[Callable[[Any, Step], None]]:
    for value in VALUES:
        yield lambda inner, step, value=value: inner.__setitem__(step, value)  # type: ignore[misc]
    yield lambda inner, step: inner.pop(step)
    yield lambda inner, step: inner.append("x") if isinstance(inner, list) else inner.update({"x": inner.pop(step)})


def asks(captions: Path) -> SimpleNamespace:
    return SimpleNamespace(identity=SimpleNamespace(name="tiny/reader", digest=None))


LOOKS: dict[str, Look] = {
    "captions": lambda root: captions_artifact(str(root / "captions")).setting(
        "semantic", "annotate", "max_tokens", kind=int
    ),
    "questions": lambda root: question_artifact(str(root / "graded")),
    "reward": lambda root: rewarded_by(Artifact.open(str(root / "captions")), asks(root)),  # type: ignore[arg-type]
    "settings": lambda root: settings(Artifact.open(str(root / "graded")), Allowed(str(root / "graded"))),
    "status": lambda root: [state(str(root / name)) for name in ("captions", "graded")],
    "verify": lambda root: [verify(str(root / name)) for name in ("captions", "graded")],
    "provenance": lambda root: provenance.chain(Artifact.open(str(root / "graded"))),
    "report": lambda root: write_report(root, root / "report.html"),
    "view": lambda root: Library(root).catalog(),
}
ONE = {"captions": ("captions",), "questions": ("graded",), "reward": ("captions",)}  # what these look at
SPARSE = {"report": 9, "view": 7, "verify": 7}  # of those that take long, every so many cases


@pytest.mark.parametrize(("by", "name"), [(by, name) for by in LOOKS for name in ONE.get(by, ("captions", "graded"))])
def test_any_value_may_be_anything(tmp_path: Path, name: str, by: str) -> None:
    folder_of(tmp_path)
    file = tmp_path / name / "_capipe/config.json"
    config = json.loads(file.read_text())
    refused = 0
    places = [path for path in paths(config) if path and path[0] in ("semantic", "run", "packages")]
    cases = [(path, change) for path in places for change in changes()]
    for path, change in cases[:: SPARSE.get(by, 1)]:
        file.write_text(forged(config, path, change))
        try:
            LOOKS[by](tmp_path)
        except CapipeError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error)
        except Exception as error:
            raise AssertionError(f"{path}: {file.read_text()}") from error
    assert refused or by in ("report", "view", "reward", "provenance")
