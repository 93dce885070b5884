"""Options of the vision-language model that checks captions sentence by sentence, in `capipe filter` and `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ....errors import BadInput
from .engine_choice import EngineChoice

if TYPE_CHECKING:
    from ....models.yes_no import YesNoConfig

OPTION = "--vlm-arg"


@dataclass(frozen=True, kw_only=True)
class VlmOptions:
    """The model and how it is asked whether a sentence is true of the image."""

    vlm: Annotated[
        str | None,
        typer.Option(
            help="Vision-language model that says of each sentence how likely it is true of the image: tiny/teacher, a "
            "folder or a hub id."
        ),
    ] = None
    vlm_engine: Annotated[
        str | None, typer.Option(help="Its engine, as --engine of annotate; auto, or the first model's, by default.")
    ] = None
    vlm_mode: Annotated[
        Literal["choose", "sampled"] | None,
        typer.Option(help="By log-probabilities, or shares of sampled answers (servers without log-probabilities)."),
    ] = None
    vlm_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For this model: gpu-memory=0.4, max-pixels=…, template.KEY=…, or vLLM's; may be repeated.",
        ),
    ] = None

    @property
    def config(self) -> YesNoConfig:
        """How a sentence is put."""
        from ....models.yes_no import YesNoConfig

        return YesNoConfig() if self.vlm_mode is None else YesNoConfig(mode=self.vlm_mode)

    def choice(self, first: EngineChoice) -> EngineChoice | None:
        """The model with its engine options, those of ``first`` by default; None without one. Raises BadInput."""
        if self.vlm is None:
            given = {"--vlm-engine": self.vlm_engine, "--vlm-mode": self.vlm_mode, OPTION: self.vlm_arg}
            if option := next((name for name, value in given.items() if value), None):
                raise BadInput(f"{option}: is for the model that checks sentences; name it by --vlm")
            return None
        return first.second(self.vlm, self.vlm_engine, OPTION, self.vlm_arg, same=False, sees=True)
