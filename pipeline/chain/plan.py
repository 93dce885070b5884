"""State of each stage of a chain, from its folder's contents and the inputs recorded when it was started.

Nothing here writes. A stage is done if its configuration, inputs and output match the state file; if its own digest
changed it starts over, and so do all its dependents.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactMismatch, BadInput, CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.redaction import redacted_data
from ..inspect.chain_state import ChainState, StageState
from .identity import changed_keys, digest, identity, meaning, product, withdrawal
from .options import SET
from .recipe import TRAINS_ON, Chain, ChainStage, Source, kind_between

WITHDRAWN = "withdrawn"  # part of a stage's digests that belongs to no folder: a change of it clears none
Verdict = Literal["done", "to do", "goes on", "changed", "edited"]


@dataclass(frozen=True)
class Planned:
    """A stage, its inputs and its state. ``parts``: digests by part, None while an input is not made yet.

    ``verdict`` ``edited``: done, but its output changed afterwards. ``why``: the change.
    """

    stage: ChainStage
    digest: str
    parts: Mapping[str, str] | None
    verdict: Verdict
    why: str = ""
    product: str | None = field(default=None, repr=False)  # identity of its current output, if it is done
    origin: str | None = field(default=None, repr=False)  # the same before rows were withdrawn from it

    @property
    def settled(self) -> bool:
        """True if nothing is left to do."""
        return self.verdict in ("done", "edited")


def outside(chain: Chain) -> dict[str, str]:
    """Current identity of external data, by path; computed once, since it may be millions of files."""
    sources = [source for stage in chain.stages for group in stage.inputs.values() for source in group]
    return {source.path: _outside(source.path) for source in sources if source.path is not None}


def look(chain: Chain, folder: Path, state: ChainState | None, data: Mapping[str, str]) -> dict[str, Planned]:
    """Current state of every stage, by name, in order; ``data`` is the result of :func:`outside`.

    Raises CapipeError if a recorded output cannot be read.
    """
    plans: dict[str, Planned] = {}
    for stage in chain.stages:
        plans[stage.name] = inspect_outputs(stage, folder, state.stage(stage.name) if state else None, plans, data)
    return plans


def inspect_outputs(
    stage: ChainStage, folder: Path, known: StageState | None, before: Mapping[str, Planned], data: Mapping[str, str]
) -> Planned:
    """State of one stage; ``before`` must include the stages that it depends on."""
    meant = meaning(stage)
    inputs = {role: [_named(source, before, data) for source in sources] for role, sources in stage.inputs.items()}
    mark = digest({"stage": stage.command.name, "config": meant, "inputs": inputs})
    if known is not None and known.stage != stage.command.name:
        known = None
    begun = known is not None and bool(known.begun)
    waits_for = [name for name in stage.needs if not before[name].settled]
    if waits_for:
        verdict: Verdict = "changed" if begun else "to do"
        return Planned(stage, mark, None, verdict, f"its input {waits_for[0]}" if begun else "")
    parts = _parts(stage, meant, inputs, {name: before[name].origin for name in stage.needs})
    if (withdrawn := _withdrawn(stage, before)) is not None:
        parts[WITHDRAWN] = withdrawn
    if known is None or not begun:
        return Planned(stage, mark, parts, "to do")
    if known.begun != parts:
        return Planned(stage, mark, parts, "changed", _why(stage, known, mark))
    if known.product is None:
        return Planned(stage, mark, parts, "goes on", f"it was {known.state}")
    try:
        now = product(outputs(stage, folder))
    except ArtifactMismatch as error:
        text = f"{error}; in a chain: remove {located(stage, folder, stage.out)} to have stage {stage.name} done again"
        raise ArtifactMismatch(text) from None
    if now is None:
        return Planned(stage, mark, parts, "to do", "its output is gone")
    if now != known.product:
        return Planned(stage, mark, parts, "edited", product=now, origin=now)
    return Planned(stage, mark, parts, "done", product=now, origin=known.origin or now)


def _outside(path: str) -> str:
    try:
        return identity(path)
    except BadInput:
        return "absent"


def _named(source: Source, before: Mapping[str, Planned], data: Mapping[str, str]) -> list[Any]:
    of = before[source.stage].digest if source.stage is not None else data[source.path or ""]
    return [of, source.first, *([] if source.name is None else [source.name])]


def _parts(
    stage: ChainStage, meant: Mapping[str, Any], inputs: Mapping[str, Any], products: Mapping[str, Any]
) -> dict[str, str]:
    """Digest for each part of a stage's folder: options, inputs, and identities of the inputs' data."""
    own = {
        role: [[*named, products.get(source.stage or "")] for named, source in zip(inputs[role], sources, strict=True)]
        for role, sources in stage.inputs.items()
    }
    return {
        part.name: digest(
            {
                "config": {key: value for key, value in meant.items() if part.depends_on(key)},
                "inputs": {role: value for role, value in own.items() if part.depends_on(role)},
            }
        )
        for part in stage.command.spec.parts
        if not part.given or part.given in meant
    }


def _withdrawn(stage: ChainStage, before: Mapping[str, Planned]) -> str | None:
    """Identity of what is withdrawn from a stage's rows, here or in its inputs; None if nothing is.

    Such stages run again on what they have, which costs the rows touched; a model is not trained anew.
    """
    if stage.recipe is not None or not stage.command.spec.outputs:
        return None
    changed = {name: plan.product for name in stage.needs if (plan := before[name]).product != plan.origin}
    return withdrawal(stage, {name: product for name, product in changed.items() if product is not None})


def _why(stage: ChainStage, known: StageState, mark: str) -> str:
    """Changes since a stage was started, in a few words."""
    keys = changed_keys(known.config, written(stage))
    if keys:
        return ", ".join(keys)
    if known.inputs != named_inputs(stage):
        return "its inputs"
    return "its input is another now" if known.digest == mark or stage.inputs else "what its configuration names"


def places(stage: ChainStage) -> list[str]:
    """Output folders of a stage, relative to the chain's, the main one last."""
    artifacts = artifact_folders(stage)
    if artifacts:
        return artifacts
    return [stage.product(kind) or stage.out for kind in stage.command.spec.products]


def located(stage: ChainStage, folder: Path, name: str) -> str:
    """Where a stage writes ``name``: in the chain's ``folder``, or below the URL of its artifacts."""
    return f"{stage.store}/{name}" if stage.store else str(folder / name)


def outputs(stage: ChainStage, folder: Path) -> list[str]:
    """Locations of :func:`places`."""
    return [located(stage, folder, name) for name in places(stage)]


def artifact_folders(stage: ChainStage) -> list[str]:
    """Folders for artifacts, relative to the chain's, the main one last."""
    folders = stage.command.spec.folders(stage.config, frozenset(stage.inputs))
    return [f"{stage.out}/{sub}" if sub else stage.out for sub in folders]


def written(stage: ChainStage) -> dict[str, Any]:
    """A stage's configuration as stored in the state file."""
    return {key: redacted_data(value) for key, value in stage.config.items() if value is not None}


def named_inputs(stage: ChainStage) -> dict[str, str]:
    """Inputs by role: the stages they come from, or paths."""
    return {
        role: ",".join(named_place(source, source.stage or redacted_data(source.path or "")) for source in sources)
        for role, sources in stage.inputs.items()
    }


def arguments(chain: Chain, stage: ChainStage, folder: Path) -> list[str]:
    """The command line of a stage, without options for resuming."""
    placed = {role: places_of(chain, stage, role, folder) for role in stage.inputs}
    options, merged = stage.command.options, dict(stage.config)
    if stage.recipe is not None:
        own = [f"{TRAINS_ON[role]}={urls[0]}" for role, urls in placed.items()]
        merged[SET] = [*(merged.get(SET) or []), *own]
    else:
        merged |= {role: urls if options[role].many else urls[0] for role, urls in placed.items()}
    ordered = sorted(options.values(), key=lambda option: not option.positional)
    words = [word for option in ordered for word in option.words(merged.get(option.name))]
    return [stage.command.name, *words, "--out", located(stage, folder, stage.out)]


def shown_command(stage: ChainStage, words: Sequence[str]) -> str:
    """A command line as a user would type it."""
    program = ["capipe"]
    if stage.processes is not None:
        program = ["torchrun", *_torchrun(stage.processes)]
    return shlex.join([*program, *words])


def started_command(stage: ChainStage, words: Sequence[str]) -> list[str]:
    """The same command line for this Python interpreter."""
    if stage.processes is not None:
        return [sys.executable, "-m", "torch.distributed.run", *_torchrun(stage.processes), *words]
    return [sys.executable, "-m", "capipe.pipeline", *words]


def _torchrun(processes: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(processes), "-m", "capipe.pipeline"]


def places_of(chain: Chain, stage: ChainStage, role: str, folder: Path) -> list[str]:
    """Current or future locations of a stage's inputs of one role, after their names if they have any."""
    sources = stage.inputs.get(role, ())
    return [named_place(source, _place(chain, stage, role, source, folder)) for source in sources]


def named_place(source: Source, place: str) -> str:
    """A source's place as options take it."""
    return place if source.name is None else f"{source.name}={place}"


def _place(chain: Chain, stage: ChainStage, role: str, source: Source, folder: Path) -> str:
    """Current or future location of an input."""
    if source.stage is None:
        url = source.path or ""
        if url.startswith("-"):  # a path, also as a positional argument
            url = f"./{url}"
    else:
        maker = chain.stage(source.stage)
        kind = kind_between(maker, stage.command.spec.inputs[role])
        url = located(maker, folder, maker.product(kind or "") or maker.out)
    if source.first is None:
        return url
    return f"{url.rstrip('/')}/{{{0:05d}..{source.first - 1:05d}}}.tar"


def trustworthy(stage: ChainStage, folder: Path) -> list[str]:
    """Faults in a stage's output, whose manifest or files changed after it was done: none if the stage was continued
    elsewhere (`--retry` by hand), some if files were edited. Reads all of it."""
    from ..inspect.verify import verify

    faults = []
    for sub in artifact_folders(stage):
        url = located(stage, folder, sub)
        try:
            faults += [f"{url}: {fault}" for fault in verify(url).faults]
        except CapipeError as error:
            faults.append(str(error))
    return faults


def committed_rows(url: str) -> dict[str, int] | None:
    """Row counts by status of an artifact, None if there is no readable one."""
    try:
        records = Artifact.open(url).committed().values()
    except CapipeError:
        return None
    counts: dict[str, int] = {}
    for record in records:
        for status, count in record.rows.items():
            counts[status] = counts.get(status, 0) + count
    return counts
