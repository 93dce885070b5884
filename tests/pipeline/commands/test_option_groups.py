"""Option groups: dataclasses flattened into single options of a Typer command."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from capipe.pipeline.chain.options import options_of
from capipe.pipeline.commands.options.groups import call, flattened, settings

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    seed: Annotated[int, typer.Option(min=0, help="Seed of all sampling.")] = 0


@dataclass(frozen=True, kw_only=True)
class WriterSampling(Sampling):
    temperature: Annotated[float, typer.Option(help="Of the writer.")] = 0.7


@dataclass(frozen=True, kw_only=True)
class Where:
    runner: Annotated[Literal["local", "ray"], typer.Option(help="Processes or actors.")] = "local"
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False


@dataclass(frozen=True, kw_only=True)
class Writing:
    shards: Annotated[str, typer.Option(help="What to read.")]
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None
    sampling: WriterSampling
    tags: Annotated[Path | None, typer.Option("--from", help="A file.")] = None
    where: Where


received: list[Writing] = []


@flattened
def write(options: Writing) -> None:
    """Write something."""
    received.append(options)


def write_out(
    *,
    shards: Annotated[str, typer.Option(help="What to read.")],
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the writer.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all sampling.")] = 0,
    tags: Annotated[Path | None, typer.Option("--from", help="A file.")] = None,
    runner: Annotated[Literal["local", "ray"], typer.Option(help="Processes or actors.")] = "local",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
) -> None:
    """Write something."""


def invoked(command: Any, *words: str) -> Any:
    app = typer.Typer(add_completion=False)
    app.command("write")(command)
    return CliRunner().invoke(app, list(words))


def test_each_single_option_is_in_the_signature_in_order() -> None:
    parameters = inspect.signature(write, eval_str=True).parameters
    assert list(parameters) == ["shards", "prompt", "temperature", "seed", "tags", "runner", "fresh"]
    defaults = [each.default for each in parameters.values()]
    assert defaults == [inspect.Parameter.empty, None, 0.7, 0, None, "local", False]
    assert {name: (o.name, o.kind, o.required, o.least) for name, o in options_of(write).items()} == {
        name: (o.name, o.kind, o.required, o.least) for name, o in options_of(write_out).items()
    }


def test_help_is_that_of_the_options_written_out() -> None:
    ours, plain = (invoked(each, "--help") for each in (write, write_out))
    assert ours.exit_code == 0 and ours.output == plain.output
    assert "Of the writer." in ours.output and "0 is greedy" not in ours.output


def test_values_and_defaults_come_in_their_groups() -> None:
    words = ["--shards", "a", "--prompt", "x", "--prompt", "y", "--seed", "3", "--from", "f", "--runner", "ray"]
    received.clear()
    assert invoked(write, *words).exit_code == 0 and invoked(write, "--shards", "b", "--fresh").exit_code == 0
    sampling, where = WriterSampling(temperature=0.7, seed=3), Where(runner="ray")
    assert received == [
        Writing(shards="a", prompt=["x", "y"], sampling=sampling, tags=Path("f"), where=where),
        Writing(shards="b", sampling=WriterSampling(), where=Where(fresh=True)),
    ]


@pytest.mark.parametrize("words", [["--seed", "1"], ["--shards", "a", "--seed", "-1"], ["--shards", "a", "--sed", "1"]])
def test_typer_refuses_what_it_refuses_of_single_options(words: list[str]) -> None:
    received.clear()
    assert invoked(write, *words).exit_code == 2 and not received


def test_a_flat_command_is_called_by_its_options_names() -> None:
    received.clear()
    write(shards="a", seed=2)
    assert received[0].sampling.seed == 2 and received[0].where == Where()
    with pytest.raises(TypeError, match="sede"):
        write(shards="a", sede=2)


def test_a_check_is_called_by_single_values() -> None:
    def check(options: Writing) -> Fraction:  # whose type is there for type checkers alone
        from fractions import Fraction

        assert options.shards == "a"
        return Fraction(options.sampling.temperature)

    assert call(check, {"shards": "a", "temperature": 1.5, "pack": True}) == 1.5
    with pytest.raises(TypeError, match="shards"):
        call(check, {"temperature": 1.5})


def test_settings_are_a_groups_own() -> None:
    assert settings(WriterSampling(seed=4)) == {"temperature": 0.7, "seed": 4}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    seed: Annotated[int, typer.Option(help="Another one.")] = 0


def test_a_name_that_two_groups_share_is_an_error() -> None:
    def twice(sampling: Sampling, decoding: Decoding) -> None: ...

    def beside(decoding: Decoding, seed: int = 0) -> None: ...

    for command in (twice, beside):
        with pytest.raises(TypeError, match=rf"{command.__name__}: more than one of its option groups has seed"):
            flattened(command)


def test_groups_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Sampling().seed = 1  # type: ignore[misc]
