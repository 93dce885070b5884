"""A stage as everything above it knows it: its command, what it reads, what it writes, what decides which of that.

A spec stands beside its stage. The command line, chains, the report, the viewer and verification read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..manifests.artifact_spec import ArtifactSpec

#: Whether an artifact is written, given the command's options by their long names and the inputs it has.
Condition = Callable[[Mapping[str, Any], frozenset[str]], bool]

#: What ``inputs`` and ``products`` are made of: kinds of folders.
PICTURES, SHARDS, FINAL, CHECKPOINT = "pictures", "shards", "final", "model"
ANYTHING = (PICTURES, SHARDS, FINAL)  # all that holds images


def keys(text: str) -> frozenset[str]:
    """Words as a set."""
    return frozenset(text.split())


@dataclass(frozen=True)
class OutputFolder:
    """A piece of a stage's folder that stays as long as what it was made of does.

    ``folder``: below the stage's own, empty for all of it; None for files that every run writes anew. It depends on the
    options and inputs ``only``, or on all but those ``without``.
    """

    folder: str | None
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return "files" if self.folder is None else self.folder or "all"

    def depends_on(self, key: str) -> bool:
        return key not in self.without if self.only is None else key in self.only


@dataclass(frozen=True)
class Output:
    """An artifact in ``folder`` below the stage's own, written where ``when`` holds."""

    artifact: ArtifactSpec
    folder: str = ""
    when: Condition = lambda config, inputs: True


@dataclass(frozen=True)
class StageSpec:
    """``name``: the command's word. ``command``: its function, or the import path of it.

    ``inputs``: options that take what other stages make, with the kinds that each takes. ``products``: kind -> folder
    below --out; a kind in ``optional`` is made only with the switch that it names there. ``outputs``: artifacts, the
    main one last. ``rows``: the input whose rows it goes over, empty where it makes them. ``selects``: rows may be
    fewer after it. ``check``: raises BadInput for options that cannot be meant, before a chain begins: a function of
    their values by parameter, or the import path of one whose parameters are the command's option groups.
    """

    name: str
    command: str | Callable[..., Any]
    inputs: Mapping[str, tuple[str, ...]]
    products: Mapping[str, str]
    outputs: tuple[Output, ...] = ()
    parts: tuple[OutputFolder, ...] = (OutputFolder(""),)
    rows: str = SHARDS
    optional: Mapping[str, str] = field(default_factory=dict)
    selects: bool = False
    check: str | Callable[[Mapping[str, Any]], object] | None = None

    def folders(self, config: Mapping[str, Any], inputs: frozenset[str]) -> list[str]:
        """Folders below the stage's own that will hold artifacts, the main one last."""
        return [output.folder for output in self.outputs if output.when(config, inputs)]
