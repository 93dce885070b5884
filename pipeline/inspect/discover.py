"""Artifacts, training runs, evaluations and the chain of a folder, for status, report and viewer.

The folder may be in a store; there it has artifacts and evaluations. Nothing is locked or written. Parts that are
damaged, or vanish meanwhile, are listed with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import BadInput, CapipeError
from ...manifests.artifact import CONFIG, Artifact
from ...manifests.files.outside import is_url
from ...manifests.files.storage import PRIVATE, Folder
from ...manifests.files.stores import filesystem
from ...stages.export.provenance import inputs
from . import chain_state
from .chain_state import ChainState, load_chain

DEPTH = 6  # maximum depth of the search
RUN, EVALUATION = "run.json", "report.json"
HERE = "."  # the name of the folder itself


@dataclass
class Found:
    """Contents of a folder (or URL), by name: the path below ``root``, with ``/``; ``.`` is ``root`` itself.

    ``artifacts`` come after their inputs. ``evaluations``: their folders. ``damaged``: reasons by name.
    """

    root: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    evaluations: dict[str, str] = field(default_factory=dict)
    chain: ChainState | None = None
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.artifacts or self.runs or self.evaluations or self.chain or self.damaged)

    def of_fingerprint(self, fingerprint: object) -> str | None:
        """Name of the artifact with this fingerprint."""
        return next((name for name, artifact in self.artifacts.items() if artifact.fingerprint == fingerprint), None)

    def parents(self, name: str) -> dict[str, str]:
        """Input artifacts of an artifact, by role."""
        read = inputs(self.artifacts[name].config)
        asked = ((role, self.of_fingerprint(mark) if mark else self._holding(url)) for role, url, mark in read)
        return {role: parent for role, parent in asked if parent is not None and parent != name}

    def _holding(self, url: str) -> str | None:
        """Artifact whose folder holds the tars of ``url``."""
        folder = _place(url.rpartition("/")[0])
        return next((name for name, artifact in self.artifacts.items() if _place(artifact.url) == folder), None)


def _place(url: str) -> str:
    """A folder in one spelling: links resolved, or a store's URL."""
    if not is_url(url):
        return os.path.realpath(url)
    try:
        fs, path = filesystem(url)
    except BadInput:
        return url
    return os.path.realpath(path) if fs.is_local else fs.url(path)


def find(root: str | Path) -> Found:
    """Search ``root`` without following links. Raises BadInput if it holds nothing of capipe."""
    contents = Found(str(root).rstrip("/") or "/")
    if is_url(contents.root):
        _find_remote(contents)
    else:
        _find_local(contents, Path(root))
    try:
        contents.chain = load_chain(contents.root)
    except CapipeError as error:
        contents.damaged[chain_state.FILE] = str(error)
    if contents.empty:
        raise BadInput(f"{root}: no artifact, training run or chain of capipe in it; check the path")
    contents.artifacts = _ordered(contents)
    return contents


def _find_local(contents: Found, root: Path) -> None:
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder; give one with artifacts of capipe in it")
    for name, folder in _folders(root, HERE, DEPTH):
        _look(contents, name, folder)


def _folders(folder: Path, name: str, depth: int) -> Iterator[tuple[str, Path]]:
    """The folder and its subfolders, except those inside an artifact or a run."""
    yield name, folder
    if depth == 0 or (folder / CONFIG).exists() or (folder / RUN).exists():
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for child in names:
        if child != PRIVATE and not child.startswith("."):
            yield from _folders(folder / child, child if name == HERE else f"{name}/{child}", depth - 1)


def _look(contents: Found, name: str, folder: Path) -> None:
    if (folder / CONFIG).exists():
        _open(contents, name, str(folder))
    if (folder / RUN).is_file():
        contents.runs[name] = folder
    if (folder / EVALUATION).is_file():
        contents.evaluations[name] = str(folder)


def _open(contents: Found, name: str, url: str) -> None:
    try:
        contents.artifacts[name] = Artifact.open(url)
    except (CapipeError, OSError) as error:
        contents.damaged[name] = str(error)


def _find_remote(contents: Found, name: str = HERE, depth: int = DEPTH) -> None:
    """Search a store. An artifact's own folder, with perhaps a million objects, is not listed."""
    url = contents.root if name == HERE else f"{contents.root}/{name}"
    folder = Folder(url)
    if folder.exists(CONFIG):
        _open(contents, name, url)
        return
    try:
        entries = folder.fs.listed(folder.path) if depth else []
    except FileNotFoundError:
        return
    for entry in entries:
        child = str(entry["name"]).rstrip("/").rpartition("/")[2]
        if entry.get("type") != "directory":
            if child == EVALUATION:
                contents.evaluations[name] = url
        elif child != PRIVATE and not child.startswith("."):
            _find_remote(contents, child if name == HERE else f"{name}/{child}", depth - 1)


def _ordered(contents: Found) -> dict[str, Artifact]:
    """Artifacts in topological order, inputs first; independent ones by age, oldest first."""
    names = sorted(contents.artifacts, key=lambda name: (contents.artifacts[name].created, name))
    ordered: dict[str, Artifact] = {}

    def take(name: str, above: tuple[str, ...]) -> None:
        if name in ordered or name in above:
            return
        for parent in contents.parents(name).values():
            take(parent, (*above, name))
        ordered[name] = contents.artifacts[name]

    for name in names:
        take(name, ())
    return ordered
