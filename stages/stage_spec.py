"""Stage specifications: command, inputs, products, output artifacts and the options that they depend on.

Each stage has a ``spec.py``. The command line, chains, the report, the viewer and verification read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..manifests.artifact_spec import ArtifactSpec

#: Predicate: True if an artifact is written, given the command's options (by long name) and its inputs.
Condition = Callable[[Mapping[str, Any], frozenset[str]], bool]

#: Kinds of folders, used in ``inputs`` and ``products``.
PICTURES, SHARDS, FINAL, INDEX, CHECKPOINT = "pictures", "shards", "final", "index", "model"
ANYTHING = (PICTURES, SHARDS, FINAL)  # every kind that holds images
MARKED = ("marks", INDEX)  # every kind by whose statuses rows of shards are left out


def keys(text: str) -> frozenset[str]:
    """Set of the whitespace-separated words."""
    return frozenset(text.split())


@dataclass(frozen=True)
class OutputFolder:
    """A part of a stage's folder that is reused while the options and inputs it depends on are unchanged.

    ``folder``: relative to the stage's folder, empty for all of it; None for files that every run rewrites. It depends
    on the options and inputs in ``only``, or on all except those in ``without``. ``given``: an option without which
    there is no such part; empty for none.
    """

    folder: str | None
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    given: str = ""

    @property
    def name(self) -> str:
        return "files" if self.folder is None else self.folder or "all"

    def depends_on(self, key: str) -> bool:
        return key not in self.without if self.only is None else key in self.only


@dataclass(frozen=True)
class Output:
    """An artifact in ``folder`` (relative to the stage's folder), written if ``when`` holds."""

    artifact: ArtifactSpec
    folder: str = ""
    when: Condition = lambda config, inputs: True


@dataclass(frozen=True)
class StageSpec:
    """Specification of a stage. ``name``: command name. ``command``: its function, or the function's import path.

    ``inputs``: options that take outputs of other stages, with the accepted kinds. ``products``: kind -> folder below
    --out; a kind in ``optional`` is produced only with the switch named there, one in ``unless`` only without it.
    ``outputs``: artifacts, the main one last. ``rows``: the input whose rows the stage processes, empty if it creates
    them. ``named``: inputs whose sources may have a name of their own. ``selects``: the stage may drop rows. ``skips``:
    the input whose rows that are not ok cost nothing, or empty. ``check``: raises BadInput for invalid options before a
    chain starts: a function of the option values by parameter name, or the import path of a function whose parameters
    are the command's option groups.
    """

    name: str
    command: str | Callable[..., Any]
    inputs: Mapping[str, tuple[str, ...]]
    products: Mapping[str, str]
    outputs: tuple[Output, ...] = ()
    parts: tuple[OutputFolder, ...] = (OutputFolder(""),)
    rows: str = SHARDS
    optional: Mapping[str, str] = field(default_factory=dict)
    unless: Mapping[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    selects: bool = False
    skips: str = ""
    check: str | Callable[[Mapping[str, Any]], object] | None = None

    def folders(self, config: Mapping[str, Any], inputs: frozenset[str]) -> list[str]:
        """Subfolders of the stage's folder that will hold artifacts, the main one last."""
        return [output.folder for output in self.outputs if output.when(config, inputs)]
