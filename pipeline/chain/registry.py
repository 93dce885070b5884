"""Properties of a command that a chain needs beside its spec: its options, and which of them do not affect rows.

The options come from the command itself (:mod:`.options`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...stages.stage_spec import StageSpec, keys
from ..specs import command_of, stage_spec
from .options import Option, options_of

#: Options that affect speed, placement or logging, and never the rows. Engines are handled separately: see
#: :func:`.identity.meaning`.
SPEED = keys(
    "workers concurrency gpus gpu-memory decode-workers timeout trace max-model-len link images "
    "runner ray-address ray-workers share tensor-parallel"
)
#: Options that take rows out after they were made: of no stage's meaning. See :func:`.plan.inspect_outputs`.
WITHDRAWING = "drop"
ENGINES = keys("engine screen-engine reader-engine vlm-engine")
MODELS = keys("model screen-model reader clip itm vlm cosine language-model")


@dataclass(frozen=True)
class Command:
    """A stage's command. ``name``: as in recipes and command lines; an import path for a custom stage."""

    name: str
    spec: StageSpec

    @cached_property
    def function(self) -> Callable[..., Any]:
        return command_of(self.spec)

    @property
    def options(self) -> Mapping[str, Option]:
        return options_of(self.function)


def command_named(name: str) -> Command:
    """A command by name. Raises BadInput if there is none."""
    return Command(name, stage_spec(name))
