"""Artifacts, training runs, evaluations and the chain of a folder, for status, report and viewer.

Nothing is locked or written. Parts that are damaged, or vanish meanwhile, are listed with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import BadInput, CapipeError
from ...manifests.artifact import CONFIG, Artifact
from ...manifests.files.storage import PRIVATE
from ...stages.export.provenance import inputs
from . import chain_state
from .chain_state import ChainState, load_chain

DEPTH = 6  # maximum depth of the search
RUN, EVALUATION = "run.json", "report.json"
HERE = "."  # the name of the folder itself


@dataclass
class Found:
    """Contents of a folder, by name: the path below ``root``, with ``/``; ``.`` is ``root`` itself.

    ``artifacts`` come after their inputs. ``damaged``: reasons by name.
    """

    root: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    evaluations: dict[str, Path] = field(default_factory=dict)
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
        folder = os.path.realpath(url.rpartition("/")[0])
        return next((name for name in self.artifacts if os.path.realpath(self.root / name) == folder), None)


def find(root: Path) -> Found:
    """Search ``root`` without following links. Raises BadInput if it holds nothing of capipe."""
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder; give one with artifacts of capipe in it")
    contents = Found(root)
    for name, folder in _folders(root, HERE, DEPTH):
        _look(contents, name, folder)
    try:
        contents.chain = load_chain(root)
    except CapipeError as error:
        contents.damaged[chain_state.FILE] = str(error)
    if contents.empty:
        raise BadInput(f"{root}: no artifact, training run or chain of capipe in it; check the path")
    contents.artifacts = _ordered(contents)
    return contents


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
        try:
            contents.artifacts[name] = Artifact.open(str(folder))
        except (CapipeError, OSError) as error:
            contents.damaged[name] = str(error)
    if (folder / RUN).is_file():
        contents.runs[name] = folder
    if (folder / EVALUATION).is_file():
        contents.evaluations[name] = folder


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
