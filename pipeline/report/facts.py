"""Data of a chain's report, from manifests, logs and a few shards.

Of an artifact, the manifest and at most :data:`SHARDS` evenly spaced Parquets are read. Unreadable parts are left out
and listed in ``damaged``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files import bounded_json
from ...manifests.files.outside import is_url
from ...manifests.schema import ASK_COLUMN
from ...stages.export.provenance import last_part, public
from ...stages.filter.select import Rule, SelectConfig
from ...stages.filter.spec import SELECTION
from ..inspect.costs import StageCost, stage_cost
from ..inspect.discover import Found
from ..inspect.fallbacks import fallback_lines
from ..inspect.histograms import Histogram, histograms
from ..inspect.sampled import sampled
from ..inspect.screening import screening_lines
from ..inspect.shared_captions import warning
from ..inspect.status import RunState, State, read_metrics, run_state, state_of, validation_of
from ..specs import artifact_spec
from .charts import Line
from .evaluations import Evaluation, read_evaluations

SHARDS = 32  # of an artifact, read for histograms
_SCORES = [f"{scorer}_score{part}" for scorer in ("clip", "itm") for part in ("", "_min")] + ["length", "unsafe"]


@dataclass(frozen=True)
class Link:
    """An artifact in the chain: state, inputs by role, models."""

    name: str
    stage: str
    title: str
    state: State
    parents: dict[str, str]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """A training run: state, curves by chart, settings."""

    name: str
    state: RunState
    charts: dict[str, list[Line]]
    settings: str


@dataclass(frozen=True)
class Scores:
    """Histograms of an artifact's scores, from ``seen`` of its ``shards``."""

    name: str
    histograms: list[Histogram]
    seen: int
    shards: int


@dataclass(frozen=True)
class Origin:
    """Provenance of an artifact, without machine paths."""

    name: str
    stage: str
    fingerprint: str
    created: str
    packages: dict[str, str]
    settings: str


@dataclass
class Facts:
    """All data. ``commands``: stage, state and command of a chain; ``shared``: captions shared by many images;
    ``notes``: lines about an artifact's rows."""

    title: str
    links: list[Link] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    costs: list[StageCost] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    commands: list[tuple[str, str, str]] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def first(self, *stages: str) -> Link | None:
        """First artifact of these stages."""
        return next((link for link in self.links if link.stage in stages), None)

    def last(self, *stages: str) -> Link | None:
        return next((link for link in reversed(self.links) if link.stage in stages), None)


def gather(contents: Found) -> Facts:
    """Collect all data except images and captions."""
    recipe = contents.chain.recipe if contents.chain else None
    root = contents.root if is_url(contents.root) else str(Path(contents.root).resolve())
    facts = Facts(recipe or last_part(root), damaged=dict(contents.damaged))
    for name, artifact in contents.artifacts.items():
        try:
            facts.links.append(_link(contents, name, artifact))
            facts.origins.append(_origin(name, artifact))
        except (CapipeError, OSError, ValueError) as error:
            facts.damaged[name] = str(error)
            continue
        try:
            if (cost := stage_cost(name, artifact)) is not None:
                facts.costs.append(cost)
        except (CapipeError, OSError) as error:
            facts.damaged[f"{name} (costs)"] = str(error)
        try:
            if artifact_spec(artifact.stage).histograms:
                facts.scores.append(_scores(name, artifact))
            elif artifact_spec(artifact.stage).shown == "captions":
                if shared := warning(artifact, SHARDS):
                    facts.shared[name] = shared
                facts.notes[name] = fallback_lines(artifact, SHARDS)
            elif artifact_spec(artifact.stage).shown == "screened questions":
                facts.notes[name] = screening_lines(artifact, SHARDS)
        except (CapipeError, OSError, ValueError, KeyError) as error:
            part = "scores" if artifact_spec(artifact.stage).histograms else artifact_spec(artifact.stage).shown
            facts.damaged[f"{name} ({part})"] = str(error)
    facts.scores = _informative(facts.scores)
    facts.trainings = [_training(name, run) for name, run in contents.runs.items()]
    facts.evaluations, damaged = read_evaluations(contents)
    facts.damaged |= damaged
    for stage in contents.chain.stages if contents.chain else ():
        facts.commands.append((stage.name, stage.state, shlex.join(map(str, public(list(stage.arguments))))))
    return facts


def _link(contents: Found, name: str, artifact: Artifact) -> Link:
    label = artifact_spec(artifact.stage).label
    return Link(name, artifact.stage, label, state_of(artifact), contents.parents(name), models_of(artifact))


def models_of(artifact: Artifact) -> tuple[str, ...]:
    """Models of an artifact, as named in its command."""
    run = artifact.config["run"]
    named = [run.get("model"), *(run.get("models") or {}).values()]
    return tuple(dict.fromkeys(str(public(model)) for model in named if isinstance(model, str)))


def _origin(name: str, artifact: Artifact) -> Origin:
    config = artifact.config
    settings = {key: value for key, value in config["semantic"].items() if key != "stage"}
    shown = json.dumps({"run": public(config["run"]), "settings": public(settings)}, indent=1, ensure_ascii=False)
    packages = {str(key): str(value) for key, value in config.get("packages", {}).items()}
    return Origin(name, artifact.stage, artifact.fingerprint, artifact.created, packages, shown)


# --- scores ----------------------------------------------------------------------------------------------------------


def rule_of(artifact: Artifact) -> Rule | None:
    """Rule of a selection; None for other stages, or if this version cannot read it."""
    semantic = artifact.config["semantic"]
    if artifact.stage != SELECTION.stage:
        return None
    try:
        return Rule.of(SelectConfig(**semantic["select"]), semantic["text"], semantic.get("threshold"))
    except (CapipeError, ValueError, KeyError, TypeError):
        return None


def _scores(name: str, artifact: Artifact) -> Scores:
    shards = list(artifact.committed())
    seen = sampled(shards, SHARDS)
    rule = rule_of(artifact)
    names = list(dict.fromkeys([*_SCORES, *_answered(artifact, seen), *(rule.config.joined_numbers if rule else ())]))
    return Scores(name, histograms(artifact, names, rule.bounds() if rule else [], seen), len(seen), len(shards))


def _answered(artifact: Artifact, shards: Sequence[str]) -> list[str]:
    """Columns with answers of a vision-language model: to questions of `capipe ask`, about sentences."""
    if not shards:
        return []
    with artifact.parquet(shards[0]) as parquet:
        names: list[str] = parquet.schema_arrow.names
    return [name for name in names if name.startswith(ASK_COLUMN) or re.fullmatch("(re|org)_vlm_(min|mean)", name)]


def _informative(scores: list[Scores]) -> list[Scores]:
    """Scores of selections, which have thresholds; of others only those that no selection has."""
    known = {h.name for item in scores if _selects(item) for h in item.histograms}
    left = [item for item in scores if _selects(item) or known.isdisjoint(h.name for h in item.histograms)]
    return [item for item in left if item.histograms]


def _selects(scores: Scores) -> bool:
    return any(histogram.bounds for histogram in scores.histograms)


# --- training --------------------------------------------------------------------------------------------------------


def _training(name: str, run: Path) -> Training:
    entries = read_metrics(run)
    rewards = sorted({key for item in entries for key in item if key.startswith("reward/") and not key.endswith("_se")})
    charts = {
        "Reward": [_line(entries, "reward", "weighted sum")] + [_line(entries, key, key[7:]) for key in rewards],
        "Tokens a caption": [_line(entries, "tokens_per_caption", "tokens")],
        "Shares of captions": [_line(entries, "truncated", "cut"), _line(entries, "repeating", "looping")],
    }
    if not any(entry.get("reward") is not None for entry in entries):  # captions were given, not scored
        charts["Loss"] = [_line(entries, "loss", "nats a token")]
    checked = [(entry["step"] + 1, validation_of(entry)) for entry in entries if validation_of(entry)]
    for key in sorted({key for _, figures in checked for key in figures}):
        points = [(float(step), figures[key]) for step, figures in checked if key in figures]
        charts[f"Validation: {key}"] = [Line(key, points)]
    kept = {title: [line for line in lines if line.points] for title, lines in charts.items()}
    try:
        settings = json.dumps(public(bounded_json.load(run / "run.json")), indent=1, ensure_ascii=False)
    except (OSError, ValueError):
        settings = ""
    return Training(name, run_state(run), {title: lines for title, lines in kept.items() if lines}, settings)


def _line(entries: Sequence[Mapping[str, Any]], key: str, name: str) -> Line:
    values = ((entry["step"] + 1, entry.get(key)) for entry in entries)
    return Line(name, [(step, float(value)) for step, value in values if isinstance(value, int | float)])
