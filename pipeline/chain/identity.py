"""Identity of a stage's run: digests of its configuration's meaning, its inputs, and the contents of folders.

Designed to be cheap: an artifact is identified by its manifest, other files by name, size and time. No image or weight
is read, except those of the bundled models, which are small.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.files.patterns import braced
from ...manifests.files.redaction import without_secrets
from ...manifests.files.storage import Folder
from ...manifests.files.stores import filesystem
from ...manifests.fingerprint import canonical
from ...manifests.import_path import is_import_path
from ...manifests.withdrawal.uid_set import list_file
from ...models.bundled import PREFIX, resolve
from ...models.engines.model_folder import folder_digest
from ...models.engines.vllm.arguments import changing_rows
from ...stages.annotate.prompts import parse_fallback, parse_prompt
from ...stages.ask.questions import parse_questions
from ..commands.options.key_values import FIELDS, key_values, second_model
from .options import KEY_VALUES, SET
from .recipe import ChainStage
from .registry import ENGINES, MODELS, SPEED, WITHDRAWING

#: Fields of an engine's configuration that do not affect rows.
SPEED_FIELDS = frozenset(field for key, (field, _) in FIELDS.items() if key in SPEED)


def digest(value: Any) -> str:
    """sha256 (hex) of any JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


# --- meaning of a configuration ---------------------------------------------------------------------------------------


def meaning(stage: ChainStage) -> dict[str, Any]:
    """A stage's options that affect its rows, by key: models by identity, prompts by their text."""
    if stage.recipe is not None:
        return {"recipe": _trained(stage)}
    left_out = SPEED | {WITHDRAWING}
    options = {key: value for key, value in stage.config.items() if value is not None and key not in left_out}
    meanings = {key: _meant(key, value) for key, value in options.items() if key not in ENGINES}
    meanings = {key: value for key, value in meanings.items() if value or key not in KEY_VALUES}  # only speed settings
    if stage.command.name == "ask":
        meanings["ask"] = [asdict(question) for question in parse_questions(options["ask"])]
    return meanings | _engines(stage, options)


def _meant(key: str, value: Any) -> Any:
    if key in MODELS and isinstance(value, str):  # dedup's cosine is a number
        return model_meaning(value)
    if key == "prompt":
        return [asdict(parse_prompt(text)) for text in value]
    if key == "fallback-prompt":
        return [asdict(parse_fallback(text)) for text in value]
    if key == "adapter":
        return model_meaning(value)
    if key in KEY_VALUES:
        return _arguments(key, value)
    return value


def _arguments(key: str, assignments: Sequence[str]) -> dict[str, Any]:
    """The key=value options that affect rows, regardless of order and of those that only affect speed."""
    if key not in ("engine-arg", "screen-arg", "reader-arg", "vlm-arg"):
        return key_values(f"--{key}", assignments)
    options = second_model(f"--{key}", {}, assignments, same=True)
    rows = {name: value for name, value in options.items() if name not in SPEED_FIELDS}
    if "adapter" in rows:
        rows["adapter"] = model_meaning(rows["adapter"])
    if "engine_args" in rows:
        rows["engine_args"] = changing_rows(rows["engine_args"])
    return {name: value for name, value in rows.items() if value}


def _engines(stage: ChainStage, options: Mapping[str, Any]) -> dict[str, Any]:
    """Engines as far as they affect rows. All built-in engines give the same rows; a server hides its weights, so its
    artifacts differ, as do those of a custom engine. Only `qa` prompts an engine with guided decoding differently,
    unless ``guided`` sets it."""
    engines: dict[str, Any] = {}
    for key in ENGINES & set(options):
        whole = stage.command.name == "qa" and key == "engine" and options.get("guided") is None
        whole |= is_import_path(str(options[key]))
        served = "://" in str(options[key])
        if whole or served:
            engines[key] = without_secrets(options[key]) if whole else "served"
    return engines


def _trained(stage: ChainStage) -> dict[str, Any]:
    """The meaning of a training recipe, without the locations of its data: those are inputs."""
    assert stage.recipe is not None
    semantic = stage.recipe.semantic()
    paths = ("shards", "questions", "captions")
    semantic["data"] = {key: v for key, v in semantic["data"].items() if key not in paths}
    if semantic["validation"] is not None:
        kept = {key: v for key, v in semantic["validation"].items() if key not in ("shards", "questions")}
        semantic["validation"] = kept
    semantic["model"] = None if "model" in stage.inputs else model_meaning(stage.recipe.model)
    return semantic


def model_meaning(name: str) -> Any:
    """A model's name, and its folder's contents if they are cheap to identify."""
    if name.startswith(PREFIX):
        try:
            return [name, _bundled_digest(resolve(name))]
        except ValueError as error:
            raise BadInput(str(error)) from None
    path = Path(name).expanduser()
    return [name, digest(list(_files(str(path))))] if path.is_dir() else name


@cache
def _bundled_digest(folder: str) -> str:
    return folder_digest(Path(folder))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Options that differ between two configurations as written; nested ``set`` by its assignments."""
    before, after = ({**item, SET: None} if SET in item else dict(item) for item in (old, new))
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    sets = set(old.get(SET) or []) ^ set(new.get(SET) or [])
    return [*keys, *sorted({f"{SET} {item.partition('=')[0]}" for item in sets})]


# --- contents of a folder ---------------------------------------------------------------------------------------------


def identity(url: str) -> str:
    """Identity of data from any source. Raises BadInput if it does not exist."""
    if url.startswith("hf://"):
        return digest(["hub", without_secrets(url)])
    if not any(c in url for c in "{*?[") and Artifact.exists(url):
        return contents(Artifact.open(url))
    listed = list(_files(url))
    if not listed:
        raise BadInput(f"{url}: nothing is there")
    return digest(listed)


def is_there(url: str) -> bool:
    """True if there is any data at all; the hub is not queried."""
    return url.startswith("hf://") or next(_files(url), None) is not None


def contents(artifact: Artifact) -> str:
    """Identity of an artifact's contents: the committed shards, without the times in older ``_stats.json``."""
    records = [
        [r.shard, dict(r.rows), {name: dict(f) for name, f in r.files.items() if not name.endswith("_stats.json")}]
        for r in artifact.committed().values()
    ]
    return digest([artifact.fingerprint, records])


def withdrawal(stage: ChainStage, changed: Mapping[str, str]) -> str | None:
    """Identity of what is withdrawn from a stage's output: by a list of its own, and in ``changed`` outputs of other
    stages that it reads; None if there is nothing."""
    given = stage.config.get(WITHDRAWING)
    if given is None and not changed:
        return None
    file = None if given is None else list_file(str(given))
    return digest([None if file is None else [given, list(_files(file))], dict(changed)])


def product(places: Sequence[str]) -> str | None:
    """Identity of a stage's output in these folders or URLs; None if one of them is missing. Raises
    ArtifactMismatch."""
    identities = []
    for place in places:
        if not Folder(place).exists():
            return None
        identities.append(identity(place))
    return digest(identities)


def _files(url: str) -> Iterator[list[Any]]:
    """Name, size and time of every file, in order; hidden files and the folder's own name are left out."""
    if "://" in url:
        yield from _remote_files(url)
        return
    for pattern in braced(url):
        path = Path(pattern)
        if path.is_dir():
            yield from _walk(path, path)
        elif path.is_file():
            yield _entry(path, path.name)
        elif any(c in pattern for c in "*?["):
            anchor = Path(path.anchor or ".")
            for file in sorted(anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path))):
                yield _entry(file, str(file))


def _walk(root: Path, folder: Path) -> Iterator[list[Any]]:
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(root, Path(entry.path))
        elif entry.is_file():
            yield _entry(Path(entry.path), str(Path(entry.path).relative_to(root)))


def _entry(path: Path, name: str) -> list[Any]:
    facts = path.stat()
    return [name, facts.st_size, facts.st_mtime_ns]


def _remote_files(url: str) -> Iterator[list[Any]]:
    for pattern in braced(url):
        fs, path = filesystem(pattern)
        files = fs.glob(path) if any(c in path for c in "*?[") else fs.find(path)
        for name, facts in sorted(files.items()):
            yield [without_secrets(str(name)), facts.get("size"), str(facts.get("ETag") or facts.get("mtime") or "")]
