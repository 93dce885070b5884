"""`capipe train`: reinforcement learning of a captioner, configured by a recipe."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from ...terminal import print_line
from .options import shared as o
from .run_job import Exit


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a bundled one, e.g. tiny-caprl.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints and logs.", parser=o.local_path)],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Largest image area the model sees; the recipe's max_pixels by default.")
    ] = None,
    fresh: o.Fresh = False,
    allow_host: o.AllowHost = None,
) -> None:
    """Train a captioner by reinforcement learning, e.g. with quiz accuracy from its captions as reward."""
    from ...models.engines.http.api_key import allow, check_recipe_hosts
    from ...trainer.checkpoint import folder_of
    from ...trainer.recipe import load_recipe
    from ...trainer.recipe_file import engines_of
    from ..jobs.train import run_training

    more = [] if max_pixels is None else [f"max_pixels={max_pixels}"]
    loaded = load_recipe(recipe, [*(overrides or []), *more])
    allow(allow_host or [])
    check_recipe_hosts(str(recipe), engines_of(loaded.model_dump()), overrides or [])
    last = asyncio.run(run_training(loaded, out, fresh=fresh, say=print_line))
    if last != folder_of(out, loaded.steps):
        raise typer.Exit(Exit.INTERRUPTED)
