"""Access to a stage's own check of its options, built-in or custom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...manifests.import_path import import_object
from ...stages.stage_spec import StageSpec
from .options.groups import call


def check_of(spec: StageSpec) -> Callable[[Mapping[str, Any]], object] | None:
    """The function that raises BadInput for values of a stage's options, by parameter; None if there is no check."""
    if spec.check is None or callable(spec.check):
        return spec.check
    function: Callable[..., object] = import_object(spec.check)
    return lambda values: call(function, values)
