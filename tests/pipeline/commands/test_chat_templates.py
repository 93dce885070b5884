"""Commands look at a model's chat template before they write anything, and know it in their fingerprints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.engines.base import Prompt
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig
from capipe.pipeline.jobs.rows.engine import EngineSetup

from ...conftest import photo
from ...models.folders import copied, own_template, thinking_reader
from ..conftest import capipe, one_line

MOOD = "{% if mood is defined %}{{ mood }}: {% endif %}"


def setup_of(model: Path, decode_workers: int = 0, **arguments: Any) -> EngineSetup:
    engine = EngineConfig("transformers", str(model), device="cpu", template_args=arguments)
    return EngineSetup(engine, decode_workers=decode_workers)


def test_arguments_are_part_of_the_fingerprint_where_there_are_any(tmp_path: Path) -> None:
    folder = copied("captioner", tmp_path / "model", MOOD + own_template("captioner"))
    plain, wild = setup_of(folder, 1).semantic(), setup_of(folder, 1, mood="wild").semantic()
    assert "template_args" not in plain
    assert wild == {**plain, "template_args": {"mood": "wild"}}


def test_what_cannot_be_asked_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="moods: no argument of the chat template"):
        setup_of(folder_of("captioner"), 1, moods="wild").semantic()
    with pytest.raises(BadInput, match="reads no chat template"):
        setup_of(folder_of("vit-gpt2"), 1, mood="wild").semantic()
    with pytest.raises(BadInput, match="no chat template"):
        setup_of(copied("reader", tmp_path / "reader")).semantic()


async def test_a_stages_engine_has_the_arguments_and_tells_whether_it_thinks(tmp_path: Path) -> None:
    folder = thinking_reader(tmp_path / "reader")
    for arguments, thinking in [({}, True), ({"enable_thinking": False}, False)]:
        loaded = await setup_of(folder, **arguments).load()
        assert await loaded.engine.thinks() is thinking
        inner = loaded.engine._inner
        assert isinstance(inner, TransformersEngine)
        written = inner.lm.encoder.decode(list(inner.lm.encoder.encode(Prompt("Hm"))))
        assert written.endswith("assistant\n" if thinking else "<think>\n\n</think>\n\n")
        await loaded.aclose()


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no chats today') }}"])
def test_annotate_says_it_in_one_line(template: str | None, make_tar: Any, tmp_path: Path) -> None:
    folder = copied("captioner", tmp_path / "model", template)
    tar = make_tar({"a.jpg": photo(1)})
    options = ("--shards", tar, "--out", tmp_path / "out", "--model", folder, "--engine", "transformers")
    line = one_line(capipe("annotate", *options, "--prompt", "short", code=2))
    assert ("no chat template" if template is None else "no chats today") in line and str(folder) in line
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_prompt_that_no_image_could_be_asked_with_is_refused_before_the_first_one(
    make_tar: Any, tmp_path: Path
) -> None:
    tar = make_tar({"a.jpg": photo(1)})
    options = ("--shards", tar, "--out", tmp_path / "out", "--model", "tiny/captioner", "--engine", "transformers")
    line = one_line(capipe("annotate", *options, "--prompt", "ask=" + "word " * 20_000, code=2))
    assert re.search("--prompt ask: the prompt's .* tokens leave no room to answer in .* shorter prompt", line)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_prompt_that_spells_the_placeholder_claims_no_second_image(make_tar: Any, tmp_path: Path) -> None:
    tar = make_tar({"a.jpg": photo(1)})
    options = ("--shards", tar, "--out", tmp_path / "out", "--model", "tiny/captioner", "--engine", "transformers")
    capipe("annotate", *options, "--prompt", "ask=What is <|image_pad|> here?")
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1
