"""State of a chain: ``chain.json`` in its folder, written by `capipe run`, read by status, report and viewer.

The file is replaced atomically at every change of state. Folders in it are relative to the chain's folder, which may be
moved.
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
from ...manifests.files.outside import is_url
from ...manifests.files.redaction import redacted_data
from ...manifests.files.storage import Folder, write_new
from ...manifests.files.store_errors import StoreUnavailable

FILE = "chain.json"
FORMAT = 1
WAITING, RUNNING, DONE, FAILED, STOPPED = STATES = ("waiting", "running", "done", "failed", "stopped")


@dataclass
class StageState:
    """One stage of a chain. ``name``: its name in the recipe; ``stage``: its command.

    ``inputs``: role -> name of the stage that produces it, several separated by commas. ``artifacts``: folders that
    hold capipe artifacts, the main one last. ``digest``: hash of command, configuration and its inputs' digests.
    ``seconds``: run time so far; None if unknown (after a kill).
    The rest is for `capipe run` only. ``begun``: digests, by part, of the settings its folder was begun with.
    ``product``: digest of its finished output, None until then; ``origin``: the same before rows were withdrawn from
    it, of which its dependents are made. ``measured``: rows and seconds of its last whole run.
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
    origin: str | None = None
    measured: dict[str, float] | None = None


@dataclass
class ChainState:
    """A whole chain; each stage comes after its inputs. ``made``: folders that it created. ``store``: URL of its
    artifacts, "" if they are in its folder; nothing is opened there for a state that was read."""

    recipe: str
    started: str
    updated: str
    stages: list[StageState] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    store: str = ""

    def stage(self, name: str) -> StageState | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def now() -> str:
    """Current time in the file's format: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def load_chain(folder: Path | str) -> ChainState | None:
    """State of the chain in a folder, or beside its artifacts in a store; None without one. Raises BadInput if the
    file is damaged."""
    file, url = f"{folder}/{FILE}", str(folder)
    try:
        loaded = bounded_json.load_from(Folder(url), FILE) if is_url(url) else bounded_json.load(Path(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StoreUnavailable:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
        version = loaded.get("format") if isinstance(loaded, dict) else type(loaded).__name__
        raise _damaged(file, f"format {FORMAT} is known here, this is {version}")
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
    """Replace the file atomically and durably (fsync)."""
    state.updated = now()
    folder.mkdir(parents=True, exist_ok=True)
    write_new(folder / FILE, _written(state))


def copy_chain(folder: Folder, state: ChainState) -> None:
    """Write a copy of the file beside the artifacts in a store."""
    folder.write(FILE, _written(state))


def _written(state: ChainState) -> bytes:
    return json.dumps({"format": FORMAT, **redacted_data(asdict(state))}, indent=1, ensure_ascii=False).encode()


def _check(state: ChainState) -> None:
    """Validate a loaded state. Raises TypeError for a value of the wrong type, ValueError for a folder outside the
    chain's."""
    texts = [state.recipe, state.started, state.updated, state.store]
    for stage in state.stages:
        texts += [stage.name, stage.stage, *stage.arguments, *stage.inputs.values(), stage.digest, stage.state]
    folders = [*state.made, *(folder for stage in state.stages for folder in (stage.out, *stage.artifacts))]
    if not all(isinstance(text, str) for text in (*texts, *folders)):
        raise TypeError("a name or a time is no text")
    for folder in folders:
        checked_name(str(PurePosixPath(folder)))  # a recipe may have ./NAME/


def _known(kind: type[Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """The keys that this version knows; a later version may write more."""
    names = {known.name for known in fields(kind)}
    return {key: value for key, value in loaded.items() if key in names}


def _damaged(file: str, reason: str) -> BadInput:
    return BadInput(f"{file}: not a chain's state ({reason}); restore it, or give capipe run another --out")
