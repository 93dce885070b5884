"""Example commands and recipes hold as far as a machine without weights can tell: values are taken, models are named so
that they can be found, CLIP tags exist and are computed with the activation that their weights were trained with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from open_clip.factory import get_model_config
from open_clip.pretrained import get_pretrained_cfg

from capipe.errors import BadInput
from capipe.models.bundled import PREFIX
from capipe.models.bundled import resolve as resolve_bundled
from capipe.models.hub import hub_name
from capipe.models.scorers.clip_source import Tag, clip_place, clip_source
from capipe.pipeline.chain import validate
from capipe.pipeline.chain.recipe import load_chain_recipe
from capipe.pipeline.commands.stage_check import check_of
from capipe.pipeline.specs import STAGES
from capipe.trainer.recipe import load_recipe
from capipe.trainer.recipe_file import read_mapping

from ..test_docs import FENCE, PAGES, RECIPES, ROOT, command_lines, commands

MODELS = ("model", "screen_model", "reader", "itm", "language_model", "adapter")
CLIPS = ("clip", "cosine")
PLACES = re.compile(r"(runs|data|demo|models)/.+|[A-Z_]+")  # folders that a page's own commands make, and MODEL


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_values_of_example_commands_are_taken(page: Path) -> None:
    assert list(page_faults(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_recipes_and_the_commands_in_their_comments_can_be_meant(recipe: Path) -> None:
    comments = [line[1:] for line in recipe.read_text(encoding="utf-8").splitlines() if re.match(r"#\s+capipe ", line)]
    assert [fault for words in command_lines("\n".join(comments)) for fault in value_faults(words)] == []
    if "stages" in read_mapping(recipe):
        assert validate.check_chain(load_chain_recipe(recipe)).problems == []
    else:
        assert list(recipe_faults(recipe, [])) == []


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("annotate --shards a --out b --model org/name --engine-arg max_num_batchd_tokens=4096", "batch"),
        ("annotate --shards a --out b --model org/name --engine-arg gpu_memory_utilization=0.5", "--gpu"),
        ("annotate --shards a --out b --model nowhere --engine transformers", "nowhere"),
        ("annotate --shards a --out b --model tiny/captainer", "captainer"),
        ("annotate --shards a --out b --model tiny/captioner --engine htp://host", "htp://host"),
        ("annotate --shards a --out b --model tiny/captioner --prompt nothing-of-the-kind", "nothing-of-the-kind"),
        ("filter --shards a --captions b --out c --clip ViT-L-14:opnai --keep 'clip_score > 0.2'", "opnai"),
        ("filter --shards a --captions b --out c --clip tiny/clip --keep 'clip_score >> 0.2'", ">>"),
        ("qa --shards a --out b --model tiny/teacher --screen lenient", "lenient"),
        ("eval --shards a --questions b --out c --captions d --reader org/name --reader-arg dtype=int4", "int4"),
        ("export a --out b --license 'CC BY'", "CC BY"),
        ("train caprl-paper --out b --set optimizer.lrate=1", "lrate"),
        ("run tiny --out b --set stages.filtered.config.keeep=x", "keeep"),
    ],
)  # fmt: skip
def test_a_value_that_no_command_takes_is_found(command: str, fault: str) -> None:
    found = [fault for words in command_lines(f"capipe {command}") for fault in value_faults(words)]
    assert len(found) == 1 and fault in found[0]


def page_faults(text: str) -> Iterator[str]:
    for language, block in FENCE.findall(text):
        for words in command_lines(block) if language == "sh" else ():
            yield from value_faults(words)


def value_faults(words: list[str]) -> Iterator[str]:
    """What a command would refuse before it reads data or weights, one line each."""
    name, *rest = [*words, ""] if len(words) < 2 else words
    if name not in commands() or not rest or not rest[0]:
        return
    given = commands()[name].make_context(name, list(rest)).params
    given = {key: value for key, value in given.items() if value is not None}
    try:
        check_values(name, given)
        for model in (given[key] for key in MODELS if key in given and "://" not in str(given.get("engine", ""))):
            check_model(str(model))
        for clip in (given[key] for key in CLIPS if isinstance(given.get(key), str)):
            check_clip(clip)
    except BadInput as error:
        yield f"capipe {name}: {error}"


def check_values(name: str, given: dict[str, Any]) -> None:
    """Raises BadInput."""
    check = check_of(STAGES[name]) if name in STAGES else None
    if check is not None:
        check({key: value for key, value in given.items() if key != "adapter"})
    if name in ("train", "run") and Path(given["recipe"]).suffix != ".yaml":  # else one of the reader's own
        overrides = given["overrides"] or ()
        if name == "train":
            load_recipe(Path(given["recipe"]), overrides)
        elif problems := validate.check_chain(load_chain_recipe(Path(given["recipe"]), overrides)).problems:
            raise BadInput("; ".join(problems))


def recipe_faults(recipe: Path, overrides: list[str]) -> Iterator[str]:
    """What a training recipe names that cannot be."""
    loaded = load_recipe(recipe, overrides)
    named = [loaded.model] + ([loaded.validation.reader] if loaded.validation else [])
    for reward in loaded.rewards:
        values = reward.model_dump()
        if reward.kind == "clip":
            check_clip(values["model"])
        else:
            named += [values[key] for key in ("model", "reader") if isinstance(values.get(key), str)]
    for name in named:
        try:
            check_model(name)
        except BadInput as error:
            yield f"{recipe.name}: {error}"


def check_model(name: str) -> None:
    """Raises BadInput for what is no bundled model, no hub id and no folder of an example."""
    if name.startswith(PREFIX):
        try:
            resolve_bundled(name)
        except ValueError as error:
            raise BadInput(str(error)) from error
    elif not (PLACES.fullmatch(name) or hub_name(name)):
        raise BadInput(f"{name}: no bundled model and no hub id")


def check_clip(name: str) -> None:
    """Raises BadInput for a tag that is not open_clip's, or whose weights it would compute with another function."""
    if PLACES.fullmatch(name):
        return
    place = clip_place(name)
    if not isinstance(place, Tag):
        return
    weights, model = get_pretrained_cfg(place.architecture, place.pretrained), get_model_config(place.architecture)
    trained_with = bool(weights.get("quick_gelu", False))
    assert clip_source(name).activation == ("quick_gelu" if trained_with else "gelu")
    assert trained_with or not model.get("quick_gelu", False)
