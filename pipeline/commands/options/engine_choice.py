"""A command's model with its engine options: checked, placed, and described for workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import BadInput
from ...jobs.rows.engine import EngineSetup
from ...runners.placement import Placement
from ..gpus import default_decode_workers
from .key_values import second_model
from .shared import EngineOptions, RunOptions

if TYPE_CHECKING:
    from ....models.engines.base import Sampling
    from ....models.engines.loading import EngineConfig

_OF_IMAGES = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class EngineChoice:
    """``settings``: as of :meth:`.shared.EngineOptions.engine_settings`, None for an engine's own default.

    ``sees``: the model gets images. ``option``: the option with a second model's settings.
    """

    model: str
    engine: str
    settings: Mapping[str, Any]
    gpus: str | None
    run: RunOptions
    sees: bool = True
    option: str | None = None

    @classmethod
    def of(cls, model: str, engine: str, options: EngineOptions, run: RunOptions) -> EngineChoice:
        """A command's first model. Raises BadInput for a malformed key=value."""
        return cls(model, engine, options.engine_settings(), options.gpus, run)

    def second(
        self, model: str, engine: str | None, option: str, given: Sequence[str] | None, *, same: bool, sees: bool
    ) -> EngineChoice:
        """Another model with these settings, overridden by ``option``. Raises BadInput."""
        settings = second_model(option, self.settings, given, same=same, sees=sees)
        return EngineChoice(model, engine or self.engine, settings, self.gpus, self.run, sees, option)

    def check(self, sampling: Sampling | None = None) -> None:
        """Raises BadInput for settings that no engine of this kind accepts, Missing if the adapter does not exist."""
        from ....models.engines.lora import check_adapter

        self.run.check(self.engine, self.gpus, self.settings["tensor_parallel_size"])
        self._config(None, sampling)
        if self.settings["adapter"]:
            check_adapter(self.settings["adapter"])

    def placement(self) -> Placement:
        """Placement of its workers. Raises BadInput."""
        return self.run.placement(self.engine, self.gpus, self.settings["tensor_parallel_size"])

    def setup(
        self, place: Placement, room: int | None, trace: Path | None = None, sampling: Sampling | None = None
    ) -> EngineSetup:
        """The setup for workers; ``room``: tokens beside an image, None for the full context.

        ``sampling``: what the engine must support. Raises BadInput.
        """
        from ....models.engines.loading import check_servers, vllm_runs

        config = self._config(room, sampling)
        if sampling is not None:
            check_servers(config, sampling)
        if config.engine_args and config.kind == "auto" and place.ray is None and not vllm_runs():
            option = self.option or "--engine-arg"
            raise BadInput(f"{option}: is for vLLM, which does not run here; `capipe doctor` says why")
        workers = self.settings["decode_workers"] or default_decode_workers(place)
        return EngineSetup(config, decode_workers=workers if self.sees else 0, trace=trace)

    def refuse_own(self, why: str) -> None:
        """Raises BadInput for settings that only apply to this model, if the command runs without it."""
        for option, name in (
            ("--engine-arg", "engine_args"),
            ("--template-arg", "template_args"),
            ("--adapter", "adapter"),
        ):
            if self.settings[name]:
                raise BadInput(f"{option}: {why}")

    def _config(self, room: int | None, sampling: Sampling | None = None) -> EngineConfig:
        from ....models.engines.decoding import engine_kind
        from ....models.engines.loading import EngineConfig
        from ....models.engines.vllm.arguments import check_engine_args

        unused = ("decode_workers", *(() if self.sees else _OF_IMAGES))
        settings = {name: value for name, value in self.settings.items() if name not in unused}
        try:
            kind = self.engine if sampling is None else engine_kind(self.engine, sampling)
            config = EngineConfig(kind=kind, model=self.model, room=room, **settings)
            check_engine_args(config.engine_args)
        except BadInput as error:
            raise BadInput(f"{self.option}: {error}") if self.option else error from None
        return config
