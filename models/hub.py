"""Hugging Face hub models, named ``org/name`` or ``org/name@revision``: only what is loaded is downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from ..errors import BadInput
from ..manifests.files import bounded_json

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
Library = Literal["transformers", "open_clip", "tokenizer"]
# Configs, vocabularies and chat templates, at the top level of a repository; its folders hold other formats.
BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".vocab")
MORE_TEMPLATES = "additional_chat_templates/"
SHARDS = ".index.json"
# Weights by library, in order of preference: files for torch's weights-only loader only where there are no safetensors.
WEIGHTS: dict[Library, tuple[str, ...]] = {
    "transformers": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "tokenizer": (),
}
MARKERS: dict[Library, tuple[str, ...]] = {
    "transformers": ("config.json",),
    "open_clip": ("open_clip_config.json",),
    "tokenizer": ("tokenizer_config.json", "tokenizer.json"),
}
PIPELINE = "model_index.json"  # of diffusers, which selects the files itself


@dataclass(frozen=True)
class HubName:
    """``revision``: a branch, a tag or a commit; None for the repository's main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_name(text: str) -> HubName | None:
    """Parse a hub id; None where ``text`` is none."""
    match = HUB_ID.fullmatch(text)
    return None if match is None else HubName(*match.groups())


@cache
def snapshot(name: HubName, library: Library = "transformers") -> Path:
    """The folder of a repository at a commit (named after it), with the files that ``library`` loads downloaded.

    A process asks the hub once, so that a branch that moves meanwhile changes nothing. Where the hub cannot be reached,
    an earlier download is used. Raises BadInput where there is none.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    at_commit = re.fullmatch(r"[0-9a-f]{40}", name.revision or "")
    if at_commit and (known := cached(name, library)) is not None:
        return known
    try:
        info = HfApi().model_info(name.repo, revision=name.revision)
    except RevisionNotFoundError:
        raise BadInput(
            f"{name}: the hub's {name.repo} has no revision {name.revision!r}; name a branch, a tag or a commit of it"
        ) from None
    except (OSError, HFValidationError) as error:  # offline, no such repository, or one that requires a login
        if (known := cached(name, library)) is not None:
            return known
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{name}: neither a folder here nor a model to be had from the hub ({reason})") from error

    def shards(index: str) -> Iterable[str]:
        return _named_in(Path(hf_hub_download(name.repo, index, revision=info.sha)))

    files = wanted([sibling.rfilename for sibling in info.siblings or ()], library, shards)
    if files is None:
        looked_for = " or ".join(MARKERS[library] if library == "tokenizer" else WEIGHTS[library])
        raise BadInput(f"{name}: the hub's {name.repo} holds no {looked_for}; name a repository of {library}")
    try:
        return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=files))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{name}: its files could not be downloaded from the hub ({reason})") from error


def cached(name: HubName, library: Library = "transformers") -> Path | None:
    """The folder of an earlier download; None where it is missing or incomplete. Makes no request."""
    from huggingface_hub import try_to_load_from_cache

    for marker in MARKERS[library]:
        path = try_to_load_from_cache(name.repo, marker, revision=name.revision)
        if isinstance(path, str):
            folder = Path(path).parent
            here = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            files = wanted(here, library, lambda index, folder=folder: _named_in(folder / index))  # type: ignore[misc]
            return folder if files is not None and set(files) <= set(here) else None
    return None


def is_cached(name: HubName) -> bool:
    """Whether anything that a library here loads was downloaded from this repository before."""
    from huggingface_hub import try_to_load_from_cache

    markers = [*(marker for names in MARKERS.values() for marker in names), PIPELINE]
    return any(isinstance(try_to_load_from_cache(name.repo, marker, revision=name.revision), str) for marker in markers)


def wanted(files: Sequence[str], library: Library, shards: Callable[[str], Iterable[str]]) -> list[str] | None:
    """Those of a repository's ``files`` to load; None where it has no weights, or nothing, of ``library``.

    ``shards``: the files named by an index of weights.
    """
    top = [name for name in files if "/" not in name]
    beside = [name for name in top if name.endswith(BESIDE) and not name.endswith(SHARDS)]
    beside += [name for name in files if name.startswith(MORE_TEMPLATES) and name.endswith(".jinja")]
    if library == "tokenizer":
        return beside if any(marker in top for marker in MARKERS[library]) else None
    weights = _weights(top, library, shards)
    return None if weights is None else sorted({*beside, *weights})


def _weights(top: Sequence[str], library: Library, shards: Callable[[str], Iterable[str]]) -> list[str] | None:
    for whole in WEIGHTS[library]:
        if whole in top:
            return [whole]
        if (index := whole + SHARDS) in top:
            return [index, *sorted(set(shards(index)))]
    if library == "open_clip":
        return None
    # Other file names: vLLM reads weights whatever they are called.
    return next((files for end in (".safetensors", ".bin") if (files := [e for e in top if e.endswith(end)])), None)


def _named_in(index: Path) -> Iterable[str]:
    return weight_map(index).values()


def weight_map(index: Path) -> dict[str, str]:
    """The file of each weight, from an index of weights. Raises BadInput."""
    try:
        weights = bounded_json.load(index)["weight_map"]
        return {str(weight): str(file) for weight, file in weights.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{index.name}: is no index of weights ({error})") from error
