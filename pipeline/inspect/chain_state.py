"""The state of a chain: ``chain.json`` in its folder, written by `capipe run`, read by status, report and viewer.

The file is replaced whole at every change of state, so a reader never sees half of one. Folders in it are relative to
the chain's own, which may be moved.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import BadInput
from ...manifests.files import bounded_json
from ...manifests.files.names import checked_name
from ...manifests.files.redaction import redacted_data
from ...manifests.files.storage import write_new

FILE = "chain.json"
FORMAT = 1
WAITING, RUNNING, DONE, FAILED, STOPPED = STATES = ("waiting", "running", "done", "failed", "stopped")


@dataclass
class StageState:
    """One stage of a chain. ``name`` is the recipe's, ``stage`` the command.

    ``inputs``: role -> name of the stage it comes from, several separated by commas. ``artifacts``: folders that hold
    capipe artifacts, the main one last. ``digest``: of command, configuration and its inputs' digests. ``seconds``: it
    has run so far, None where that is not known (a kill).
    Only `capipe run` needs the rest. ``begun``: digests by part of what its folder was begun with. ``product``: what
    its output was when it was done, None until then. ``measured``: rows and seconds of its last whole run.
    """

    name: str
    stage: str
    out: str
    inputs: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    state: str = WAITING
    started: str | None = None
    seconds: float | None = None
    error: str | None = None
    begun: dict[str, str] = field(default_factory=dict)
    product: str | None = None
    measured: dict[str, float] | None = None


@dataclass
class ChainState:
    """A whole chain, each stage after its inputs. ``made``: folders it has created."""

    recipe: str
    started: str
    updated: str
    stages: list[StageState] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def stage(self, name: str) -> StageState | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def now() -> str:
    """The time as it stands in the file: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def load_chain(folder: Path) -> ChainState | None:
    """The state of the chain in ``folder``, None where there is none. Raises BadInput where the file is damaged."""
    file = folder / FILE
    try:
        loaded = bounded_json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
        found = loaded.get("format") if isinstance(loaded, dict) else type(loaded).__name__
        raise _damaged(file, f"format {FORMAT} is known here, this is {found}")
    try:
        stages = [StageState(**_known(StageState, stage)) for stage in loaded["stages"]]
        state = ChainState(**{**_known(ChainState, loaded), "stages": stages})
        _check(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    except ValueError as error:
        raise _damaged(file, str(error)) from None
    strange = next((stage for stage in stages if stage.state not in STATES), None)
    if strange is not None:
        raise _damaged(file, f"stage {strange.name} is in state {strange.state!r}")
    return state


def save_chain(folder: Path, state: ChainState) -> None:
    """Replace the file in one step that survives a power cut."""
    state.updated = now()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **redacted_data(asdict(state))}, indent=1, ensure_ascii=False)
    write_new(folder / FILE, text.encode())


def _check(state: ChainState) -> None:
    """Raise TypeError where something is of another type than it is written with, ValueError where a folder lies
    outside of the chain's."""
    texts = [state.recipe, state.started, state.updated]
    for stage in state.stages:
        texts += [stage.name, stage.stage, *stage.arguments, *stage.inputs.values(), stage.digest, stage.state]
    folders = [*state.made, *(each for stage in state.stages for each in (stage.out, *stage.artifacts))]
    if not all(isinstance(each, str) for each in (*texts, *folders)):
        raise TypeError("a name or a time is no text")
    for each in folders:
        checked_name(str(PurePosixPath(each)))  # a recipe may have ./NAME/


def _known(kind: type[Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """A later version may write more keys than this one reads."""
    names = {each.name for each in fields(kind)}
    return {key: value for key, value in loaded.items() if key in names}


def _damaged(file: Path, reason: str) -> BadInput:
    return BadInput(f"{file}: not a chain's state ({reason}); restore it, or give capipe run another --out")
