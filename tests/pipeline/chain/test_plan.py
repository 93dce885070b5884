"""What decides whether a stage, or a part of its folder, is done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.pipeline.chain.plan import look, outside
from capipe.pipeline.inspect.chain_state import FILE, ChainState, StageState, load_chain, now, save_chain

from ..chains import chain_of


def of_outside(command: str, config: dict[str, Any], **inputs: str) -> dict[str, Any]:
    """A stage whose inputs all come from outside: its parts are known before anything has run."""
    return {"s": {"stage": command, "config": config, "inputs": {role: {"path": p} for role, p in inputs.items()}}}


def parts(folder: Path, stages: dict[str, Any], *overrides: str) -> dict[str, str]:
    chain = chain_of(folder, *overrides, stages=stages)
    found = look(chain, folder / "out", None, outside(chain))["s"]
    assert found.parts is not None and found.verdict == "to do"
    return {**found.parts, "digest": found.digest}


def changed(folder: Path, stages: dict[str, Any], *overrides: str) -> set[str]:
    before, after = parts(folder, stages), parts(folder, stages, *overrides)
    return {name for name in before if before[name] != after[name]}


FILTER = of_outside("filter", {"clip": "tiny/clip", "keep": "clip_score > 0.2"}, shards="a", captions="b")
DEDUP = of_outside("dedup", {}, shards="a")
TEXTS = of_outside("dedup", {"texts": True}, shards="a")
QA = of_outside("qa", {"model": "tiny/teacher", "engine": "transformers"}, shards="a")
EVAL = of_outside("eval", {"model": "tiny/captioner", "reader": "tiny/reader"}, shards="a", questions="b")
ANNOTATE = of_outside("annotate", {"model": "tiny/captioner", "prompt": ["plain"]}, shards="a")
TRAIN = of_outside("train", {"recipe": "tiny-caprl", "set": {"validation": None}}, shards="a", questions="b")
SENTENCES = of_outside("filter", {"clip": "tiny/clip", "vlm": "tiny/teacher"}, shards="a", captions="b")
CHECKED = of_outside(
    "eval", {"model": "tiny/captioner", "reader": "tiny/reader", "vlm": "tiny/teacher"}, shards="a", questions="b"
)
NOTHING: set[str] = set()


@pytest.mark.parametrize(
    ("stages", "override", "what"),
    [
        (FILTER, "config.keep=clip_score > 0.3", {"shards"}),
        (FILTER, "inputs.marks={path: c}", {"shards"}),
        (FILTER, "inputs.scores=[{path: c}]", {"shards"}),
        (FILTER, "inputs.scores=[{path: c, as: d}]", {"shards"}),
        (FILTER, "config.clip=tiny/eval-clip", {"scores", "shards"}),
        (FILTER, "config.workers=3", NOTHING),
        (DEDUP, "config.radius=3", {"images", "marked"}),
        (DEDUP, "inputs.against={path: d}", {"against", "images", "marked"}),
        (DEDUP, "config.texts=true", {"texts", "marked"}),
        (TEXTS, "config.radius=3", {"images", "marked"}),
        (TEXTS, "config.text-threshold=0.9", {"marked"}),
        (TEXTS, "config.per-text=2", {"marked"}),
        (FILTER, "config.drop=uids.txt", NOTHING),
        (ANNOTATE, "config.drop=uids.txt", NOTHING),
        (QA, "config.screen=caprl", {"screened"}),
        (QA, "config.screen-model=tiny/captioner", {"screened"}),
        (QA, "config.seed=3", {"written", "screened"}),
        (QA, "config.engine=vllm", {"written", "screened"}),  # it can hold a writer to a form
        (QA, "config.concurrency=3", NOTHING),
        (EVAL, "config.clip=tiny/eval-clip", {"files"}),
        (EVAL, "config.reader=tiny/holdout-reader", {"graded", "files"}),
        (EVAL, "config.samples=2", {"captions", "graded", "files"}),
        (EVAL, "config.vlm=tiny/teacher", {"files"}),  # and a folder more
        (CHECKED, "config.reader=tiny/holdout-reader", {"graded", "files"}),
        (CHECKED, "config.vlm=tiny/captioner", {"checked", "files"}),
        (SENTENCES, "config.clip=tiny/eval-clip", {"scores", "shards"}),
        (SENTENCES, "config.vlm=tiny/captioner", {"sentences", "shards"}),
        (SENTENCES, "config.keep=vlm_min > 0.3", {"shards"}),
        (EVAL, "config.engine=transformers", NOTHING),
        (ANNOTATE, "config.engine=vllm", NOTHING),
        (ANNOTATE, "config.engine=http://127.0.0.1:1", {"all"}),
        (ANNOTATE, "config.prompt=[plain=Describe the image.]", NOTHING),  # the same words
        (ANNOTATE, "config.prompt=[dense]", {"all"}),
        (ANNOTATE, "config.model=tiny/teacher", {"all"}),
        (ANNOTATE, "inputs.shards.first=2", {"all"}),
        (TRAIN, "config.set.budget=100", NOTHING),
        (TRAIN, "processes=2", NOTHING),
        (TRAIN, "config.set.optimizer.lr=0.1", {"all"}),
    ],
)
def test_only_what_an_option_decides_is_done_again(
    tmp_path: Path, stages: dict[str, Any], override: str, what: set[str]
) -> None:
    assert changed(tmp_path, stages, f"stages.s.{override}") == (what | {"digest"} if what else NOTHING)


def test_a_prompt_in_a_file_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("What is it?")
    stages = of_outside("annotate", {"model": "tiny/captioner", "prompt": [f"ask=@{tmp_path}/ask.txt"]}, shards="a")
    before = parts(tmp_path, stages)
    (tmp_path / "ask.txt").write_text("Where is it?")
    assert parts(tmp_path, stages) != before


def test_the_state_file_survives_a_round_and_names_its_damage(tmp_path: Path) -> None:
    assert load_chain(tmp_path) is None
    state = ChainState("tiny", now(), now(), [StageState("a", "ingest", "a", inputs={"sources": "b"})], ["a"])
    save_chain(tmp_path, state)
    assert load_chain(tmp_path) == state and [path.name for path in tmp_path.iterdir()] == [FILE]
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace('"made"', '"later": 1, "made"'))
    assert load_chain(tmp_path) == state  # a later version's key
    for old, new, said in [
        ('"format": 1', '"format": 2', "format 1 is known here, this is 2"),
        ('"waiting"', '"asleep"', "stage a is in state 'asleep'"),
        ('"stages"', '"stage"', "KeyError"),
        ("{", "", "not a chain's state"),
    ]:
        (tmp_path / FILE).write_text(text.replace(old, new, 1))
        with pytest.raises(BadInput, match=said):
            load_chain(tmp_path)
