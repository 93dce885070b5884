"""`capipe run`: plans or runs a whole chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput, Problems
from ...manifests.files.outside import is_url
from ...terminal import print_err, print_line
from ..commands.options import shared as o
from ..commands.options.groups import flattened, settings
from ..commands.run_job import Exit
from ..runners.interrupts import CODES, say

if TYPE_CHECKING:
    from ..inspect.chain_state import ChainState
    from .estimate import Estimate
    from .plan import Planned
    from .recipe import Chain

REPORT = "report.html"


@flattened
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with stages, or the name of a bundled one: tiny.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the chain; each stage has one inside it.", parser=o.local_path)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="stages.NAME.config.KEY=value; stages.NAME=null leaves one out; may be repeated."),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Store for the artifacts, e.g. s3://bucket/chain; --out keeps the rest."),
    ] = None,
    allow_host: o.AllowHost = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; write nothing.")] = False,
    price: o.Price = None,
    *,
    runner: o.RunnerOptions,
) -> None:
    """Run a chain of commands: finished stages are kept, changed ones run again with their dependents."""
    from ...models.engines.http.api_key import allow
    from ..inspect.chain_state import load_chain
    from ..inspect.costs import parse_prices

    allow(allow_host or [])
    if price and not dry_run:
        raise BadInput("--price: belongs to --dry-run; what a run did cost is in `capipe report --price`")
    prices = parse_prices(price or [])
    runner.check_runner()
    chain, absent = checked(recipe, overrides or [], runner)
    if artifacts is not None:
        chain = chain.stored_at(_store(artifacts))
    if dry_run:
        show_plan(chain, out, load_chain(out), absent, print_line, prices)
        return
    if absent:
        raise Problems(absent)
    raise typer.Exit(run_checked(chain, out))


def _store(url: str) -> str:
    """The URL without a slash at its end. Raises BadInput if no run could write there, or `--out` is the place."""
    from ...manifests.files.storage import Folder

    if not is_url(url):
        raise BadInput(f"--artifacts {url}: not a URL; a local folder is given by --out alone")
    folder = Folder(url)
    if folder.is_local or not folder.is_shared:
        raise BadInput(f"--artifacts {url}: no store that every stage can open; give s3://bucket/folder, or the like")
    folder.make()
    return folder.url


def checked(recipe: Path, overrides: list[str], runner: o.RunnerOptions | None = None) -> tuple[Chain, list[str]]:
    """The chain, and a list of missing inputs, models or data. Raises Problems with all errors.

    ``runner``: for the stages that have such options, unless the recipe says where one runs.
    """
    from ...models.engines.http.api_key import check_recipe_hosts
    from ...trainer.recipe_file import engines_of
    from .recipe import load_chain_recipe
    from .validate import check_chain

    chain = load_chain_recipe(recipe, overrides)
    if runner is not None:
        chain = _run_by(chain, runner)
    result = check_chain(chain)
    for stage in chain.stages:
        asked = stage.config if stage.recipe is None else stage.recipe.model_dump()
        try:
            check_recipe_hosts(f"{chain.file}: stages.{stage.name}", engines_of(dict(asked)), overrides)
        except BadInput as error:
            result.problems.append(str(error))
    if result.problems:
        raise Problems([*result.problems, *result.absent])
    return chain, result.absent


def _run_by(chain: Chain, runner: o.RunnerOptions) -> Chain:
    """The chain with options for where its stages run."""
    named = {name.replace("_", "-"): value for name, value in settings(runner).items()}
    own = {name: value for name, value in named.items() if value != getattr(o.RunnerOptions(), name.replace("-", "_"))}
    stages = [
        stage
        if "runner" in stage.config
        else replace(stage, config={**{k: v for k, v in own.items() if k in stage.command.options}, **stage.config})
        for stage in chain.stages
    ]
    return replace(chain, stages=tuple(stages))


def run_checked(chain: Chain, out: Path) -> int:
    """Run a chain and report its result; returns the exit code."""
    from .run import run_chain

    code = run_chain(chain, out, print_err)
    if code in CODES:
        say("stopped; run the same command to go on")
    elif code == Exit.OK:
        print_line(
            f"chain {chain.name}: {len(chain.stages)} stages done in {out}; capipe report {out} writes {out / REPORT}"
        )
    return code


def show_plan(
    chain: Chain,
    out: Path,
    state: ChainState | None,
    absent: list[str],
    say: Callable[[str], None],
    prices: Mapping[str, float] | None = None,
) -> None:
    """Print the plan: each stage with its state, rows, cost and command line; then the totals. ``prices``: of an hour
    of a unit."""
    from .estimate import cost_so_far, estimate
    from .plan import arguments, look, outside, shown_command
    from .selection_bytes import selection_bytes

    planned = look(chain, out, state, outside(chain))
    estimates = estimate(chain, planned, out, state)
    say(f"chain {chain.name} ({chain.file}): {len(chain.stages)} stages into {out}")
    for number, stage in enumerate(chain.stages, start=1):
        say(_line(number, len(chain.stages), planned[stage.name], estimates[stage.name], prices or {}))
        say(f"    $ {shown_command(stage, arguments(chain, stage, out))}")
        if line := selection_bytes(chain, stage, planned[stage.name], estimates[stage.name], out):
            say(f"    {line}")
        if line := cost_so_far(stage, out, prices or {}):
            say(f"    {line}")
    for line in _sums(planned, estimates, prices or {}):
        say(line)
    for line in absent:
        say(f"not there yet: {line}")


def _line(number: int, total: int, planned: Planned, estimate: Estimate, prices: Mapping[str, float]) -> str:
    stage = planned.stage
    why = f" ({planned.why})" if planned.why else ""
    line = f"{number}/{total} {stage.name}: {stage.command.name}, {planned.verdict}{why}"
    if estimate.rows is None:
        line += "; rows unknown"
    else:
        line += f"; {'at most ' if estimate.at_most_in else ''}{estimate.rows:,} rows"
    if planned.settled:
        return line
    return f"{line}; {estimate.cost.line(estimate.rows or 0, prices) if estimate.cost else 'cost unknown'}"


def _sums(planned: Mapping[str, Planned], estimates: Mapping[str, Estimate], prices: Mapping[str, float]) -> list[str]:
    """Stages left to do, and their cost as far as it is known."""
    from .estimate import MACHINE, shown

    left = [name for name, stage in planned.items() if not stage.settled]
    if not left:
        return ["nothing to do"]
    costs = [cost for name in left if (cost := estimates[name].cost) is not None]
    lines = [f"to do: {len(left)} of {len(planned)} stages"]
    if costs:
        units = dict.fromkeys(cost.unit for cost in costs if cost.unit != MACHINE)
        sums = [f", {sum(c.device_hours for c in costs if c.unit == unit):,.1f} {unit}-hours" for unit in units]
        lines.append(f"cost, one stage after the other: {shown(sum(c.hours for c in costs))}{''.join(sums)}")
        priced = [price for cost in costs if (price := cost.price(prices)) is not None]
        if priced:
            rest = len(costs) - len(priced)
            lines.append(
                f"price: {sum(priced):,.2f}" + (f", without {rest} stages on units without one" if rest else "")
            )
    unknown = [name for name in left if estimates[name].cost is None]
    if unknown:
        lines.append(f"cost unknown of: {', '.join(unknown)}; a rate: in the recipe, or one run, tells it")
    return lines
