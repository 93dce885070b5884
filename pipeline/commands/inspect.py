"""`capipe status`, `capipe report`, `capipe view`: read-only commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...terminal import print_err, print_line
from .options.shared import Images, Price, local_path
from .run_job import Exit


def status(
    folder: Annotated[
        str, typer.Argument(help="An artifact, a training run, or a folder (or URL) of them, as a chain's is.")
    ],
    live: Annotated[bool, typer.Option("--live", help="Update until all is done; Ctrl-C ends it.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates of --live.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show the progress of runs, from any machine that sees their files: shards, rows by status, rate, time left."""
    from ..inspect.status_view import follow, lines, overview

    if live and as_json:
        raise typer.BadParameter("--live is for people and --json for programs; give one of them")
    if live:
        try:
            follow(lambda: overview(folder), every, Console())
        except KeyboardInterrupt:  # the normal way to exit: no run is stopped by it
            raise typer.Exit(Exit.OK) from None
        return
    result = overview(folder)
    if as_json:
        print(json.dumps(result.as_json(), indent=1))
        return
    for line, _ in lines(result):
        print_line(line)


def report(
    folder: Annotated[str, typer.Argument(help="A chain's folder, or any folder (or URL) with artifacts.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; report.html in the folder.", parser=local_path)
    ] = None,
    images: Images = None,
    price: Price = None,
) -> None:
    """Write the results of a chain as one HTML file: counts, costs, curves, quiz, scores, images, provenance."""
    from ..inspect.costs import parse_prices
    from ..report.page import write_report

    print_line(write_report(folder, out, images or (), print_err, parse_prices(price or [])))


def view(
    folder: Annotated[str, typer.Argument(help="A folder (or URL) with artifacts, at any depth.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8642,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    token: Annotated[str | None, typer.Option(help="Token to ask for; a random one by default, in the link.")] = None,
    no_token: Annotated[
        bool,
        typer.Option("--no-token", help="Ask for none: all users of this machine have access (on loopback alone)."),
    ] = False,
    images: Images = None,
) -> None:
    """Browse artifacts in a browser: images, captions, scores; search, filters, thresholds, comparisons."""
    from ..view.server import chosen_token, serve

    serve(folder, host, port, chosen_token(host, token, no_token), images or ())
