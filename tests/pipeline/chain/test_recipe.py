"""Chain recipes: what is read, what is refused before anything starts, and in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal

from capipe.errors import BadInput, Problems
from capipe.pipeline.chain.command import checked, show_plan
from capipe.pipeline.chain.plan import arguments, look
from capipe.pipeline.chain.recipe import Source, load_chain_recipe
from capipe.pipeline.chain.validate import check_chain
from capipe.pipeline.commands.options.shared import RunnerOptions
from capipe.trainer.recipe import load_recipe
from capipe.trainer.recipe_file import RECIPES, bundled

from ...stages.scored import foreign_shards
from ..chains import PLAIN, chain_of, written
from ..conftest import capipe, one_line

CAPTIONS: dict[str, Any] = {"stage": "annotate", "inputs": {"shards": "shards"}, "config": {"model": "tiny/captioner"}}
TRAIN: dict[str, Any] = {
    "stage": "train",
    "inputs": {"shards": "shards", "questions": "questions"},
    "config": {"recipe": "tiny-caprl", "set": {"validation": None, "steps": 7}},
}
WHOLE: dict[str, Any] = {
    **PLAIN,
    "captions": CAPTIONS,
    "questions": {"stage": "qa", "inputs": {"shards": "shards"}, "config": {"model": "tiny/teacher"}},
    "train": TRAIN,
    "better": {"stage": "annotate", "inputs": {"shards": "shards", "model": "train"}},
    "filtered": {
        "stage": "filter",
        "inputs": {"shards": "shards", "captions": "captions", "marks": "marks"},
        "config": {"clip": "tiny/clip"},
    },
    "eval": {
        "stage": "eval",
        "inputs": {"shards": {"stage": "shards", "first": 1}, "questions": "questions", "captions": "better"},
        "config": {"reader": "tiny/holdout-reader"},
    },
}


def refusals(folder: Path, *overrides: str, stages: dict[str, Any] = WHOLE) -> list[str]:
    """What is wrong with a chain, a line each."""
    try:
        chain = chain_of(folder, *overrides, stages=stages)
    except Problems as error:
        return error.lines
    except BadInput as error:
        return [str(error)]
    found = check_chain(chain)
    return [*found.problems, *found.absent]


def test_a_sound_chain_is_resolved_by_role(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, stages=WHOLE)
    found = check_chain(chain)
    assert not found.problems and not found.absent
    at = tmp_path / "out"
    lines = {stage.name: " ".join(arguments(chain, stage, at)) for stage in chain.stages}
    assert lines["better"] == f"annotate --shards {at}/shards --model {at}/train/step-000007 --out {at}/better"
    assert f"--captions {at}/captions --clip tiny/clip --marks {at}/marks/marked" in lines["filtered"]
    assert (
        f"--questions {at}/questions" in lines["eval"] and f"--shards {at}/shards/{{00000..00000}}.tar" in lines["eval"]
    )
    trained = f"--set data.shards={at}/shards --set data.questions={at}/questions"
    assert lines["train"] == f"train tiny-caprl --set validation=null --set steps=7 {trained} --out {at}/train"


def test_a_captioner_imitates_what_another_stage_wrote(tmp_path: Path) -> None:
    config = {"recipe": "tiny-sft", "set": {"validation": None}}
    tuned = {"stage": "train", "inputs": {"shards": "shards", "captions": "captions"}, "config": config}
    chain = chain_of(tmp_path, stages={**PLAIN, "captions": CAPTIONS, "tuned": tuned})
    assert not check_chain(chain).problems
    at = tmp_path / "out"
    words = " ".join(arguments(chain, chain.stage("tuned"), at))
    given = f"--set data.shards={at}/shards --set data.captions={at}/captions"
    assert words == f"train tiny-sft --set validation=null {given} --out {at}/tuned"


def test_a_runner_is_given_to_every_stage_that_has_one(tmp_path: Path) -> None:
    """Except where the recipe says so itself; a stage's rows do not depend on it."""
    stages = {**WHOLE, "better": {**WHOLE["better"], "config": {"runner": "local"}}}
    ray = RunnerOptions(runner="ray", ray_address="head:6379", share=True)
    chain, _ = checked(written(tmp_path, stages), [], ray)
    words = {stage.name: arguments(chain, stage, tmp_path / "out") for stage in chain.stages}
    given = ["--runner", "ray", "--ray-address", "head:6379", "--share"]
    have = {name for name, line in words.items() if all(word in line for word in given)}
    assert have == words.keys() - {"pictures", "train", "better"} and "marks" in have and "final" in have
    assert not {"ray", "--share"} & {*words["pictures"], *words["train"], *words["better"]}
    plain = look(chain_of(tmp_path, stages=stages), tmp_path / "out", None, {})
    assert {name: stage.digest for name, stage in plain.items()} == {
        name: stage.digest for name, stage in look(chain, tmp_path / "out", None, {}).items()
    }


def test_processes_of_a_recipe_are_none_of_a_cluster(tmp_path: Path) -> None:
    recipe = written(tmp_path, {**PLAIN, "final": {**PLAIN["final"], "config": {"workers": 3}}})
    line = one_line(capipe("run", recipe, "--out", tmp_path / "out", "--runner", "ray", code=2))
    assert "--workers 3: processes of this machine; with --runner ray, give --ray-workers" in line
    line = one_line(capipe("run", recipe, "--out", tmp_path / "out", "--ray-workers", 3, code=2))
    assert line.startswith("capipe: --ray-workers: only means something with --runner ray")


def test_a_path_is_no_option(tmp_path: Path) -> None:
    photos = {"photos": {"stage": "ingest", "inputs": {"sources": {"path": "--fresh"}}}}
    chain = chain_of(tmp_path, stages=photos)
    assert arguments(chain, chain.stages[0], tmp_path) == ["ingest", "./--fresh", "--out", f"{tmp_path}/photos"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.captions.config.loop-repeats=1", r"captions\.config: --loop-repeats: .* equal to 2 \(got 1\)"),
        ("stages.captions.config.max-tokns=3", r"captions\.config\.max-tokns: capipe annotate has no such option"),
        ("stages.captions.config.max-tokens=many", r"captions\.config\.max-tokens: .* valid integer \(got 'many'\)"),
        ("stages.captions.config.max-tokens=0", r"captions\.config: --max-tokens: .* greater than or equal to 1"),
        ("stages.captions.config.pack=1", r"captions\.config\.pack: .* valid boolean \(got 1\)"),
        ("stages.captions.config.prompt=pretty", r"captions\.config: --prompt 'pretty': no such prompt"),
        ("stages.captions.config.engine=warp", r"captions\.config: --engine 'warp' is none of"),
        ("stages.captions.config.out=x", r"captions\.config\.out: .* no such option that a recipe may give"),
        ("stages.captions.config.shards=x", r"captions\.config\.shards: is an input; write it under inputs"),
        ("stages.captions.config={}", r"captions\.config: model is missing, which capipe annotate needs"),
        ("stages.captions.config.model=tiny/nobody", r"captions\.config\.model: no bundled model is called"),
        ("stages.captions.config.model=./nowhere", r"captions\.config\.model: \./nowhere: no such model folder"),
        ("stages.captions.config.model=some/body", r"captions\.config\.model: some/body: neither .* HF_HUB_OFFLINE"),
        ("stages.better.config.model=tiny/captioner", r"better\.config\.model: is among the inputs, too"),
        ("stages.captions.stage=caption", r"captions\.stage: 'caption' is no stage; there are render, ingest"),
        ("stages.captions.color=red", r"captions\.color: Extra inputs are not permitted; no such key"),
        ("stages.captions.inputs.shards=shrads", r"captions\.inputs\.shards: no stage is called 'shrads'; there are"),
        ("stages.captions.inputs.shards=marks", r"shards: stage marks \(dedup\) makes marks; this takes what ingest"),
        ("stages.captions.inputs.shards=better", r"shards: stage better writes captions without tars; set its pack"),
        ("stages.captions.inputs.shards={path: /nowhere}", r"captions\.inputs\.shards: /nowhere: nothing is there"),
        ("stages.captions.inputs.shards={file: x}", r"captions\.inputs\.shards"),
        ("stages.captions.inputs.pictures=pictures", r"inputs\.pictures: annotate has no such input; its inputs: sh"),
        ("stages.captions.inputs.shards=[shards, shards]", r"captions\.inputs\.shards: takes one, not 2"),
        ("stages.filtered.inputs.captions={stage: captions, first: 2}", r"inputs\.captions: first: is for shards"),
        ("stages.filtered.config.keep=clip_score >", r"filtered\.config: .*keep"),
        ("stages.filtered.config={}", r"filtered\.config: name what is to score"),
        ("stages.filtered.config.by=clip_score", r"filtered\.config: --by clip_score: ranks nothing without --top"),
        ("stages.filtered.config.clip=tiny/none", r"filtered\.config\.clip: no bundled model"),
        ("stages.questions.config.screen=hard", r"questions\.config: --screen 'hard'"),
        ("stages.questions.config={}", r"questions\.config: give either --model, who is to write"),
        ("stages.eval.inputs.model=train", r"eval\.config: give either --model, a captioner to evaluate"),
        ("stages.eval.config.controls=maybe", r"eval\.config\.controls: .* valid boolean"),
        (
            "stages.captions.config.ray-workers=2",
            r"captions\.config: --ray-workers: only means something with --runner",
        ),
        (
            "stages.captions.config={model: a, runner: ray, gpus: '0'}",
            r"captions\.config: --gpus 0: a Ray cluster hands",
        ),
        ("stages.filtered.config.dtype=int4", r"filtered\.config: dtype 'int4' is none of auto"),
        ("stages.questions.config.screen-arg=dtype=int4", r"questions\.config: --screen-arg: dtype 'int4' is none of"),
        (
            "stages.questions.config={model: a, screen: none, screen-arg: a=1}",
            r"config: --screen-arg: --screen none has",
        ),
        ("stages.questions.inputs.import={path: a}", r"questions\.config: give either --model, .* or --import"),
        (
            "stages.eval.config.reader-arg=max-pixels=9",
            r"eval\.config: --reader-arg max-pixels=9: this model reads text",
        ),
        ("stages.eval.config.adapter=a", r"eval\.config: --adapter: --captions has no captioner"),
        ("stages.final.config.format=zip", r"final\.config: --format zip: unknown; one of"),
        ("stages.final.config.shard-size=0", r"final\.config\.shard-size: at least 1 \(got 0\)"),
        ("stages.final.config.license=My Own", r"final\.config: --license 'My Own'"),
        ("stages.pictures.config.images=0", r"pictures\.config\.images: at least 1 \(got 0\)"),
        ("stages.pictures.config.split=test", r"pictures\.config: --split 'test'"),
        ("stages.marks.config.cosine=0.9", r"marks\.config: --cosine 0\.9: compares embeddings"),
        ("stages.train.config.recipe=tiny", r"train\.config\.recipe: .* recipe of a chain; run it by: capipe run tiny"),
        ("stages.train.config.recipe=nothing", r"train\.config\.recipe: nothing: no recipe there"),
        ("stages.train.config.set.rollout.gruop=4", r"train\.config\.recipe: .*rollout\.gruop: .* no such key"),
        ("stages.train.config.set.rewards=[]", r"train\.config\.recipe: .*rewards"),
        ("stages.train.config.set.model=tiny/none", r"train\.config\.recipe: no bundled model"),
        (
            "stages.train.config.set.validation={shards: /no, questions: /no}",
            r"inputs\.validation-shards: /no: nothing is",
        ),
        ("stages.marks.out=shards", r"marks\.out: 'shards' is where stage shards writes, too"),
        ("stages.marks.out=shards/marks", r"marks\.out: 'shards/marks' is where stage shards writes, too"),
        ("stages.marks.out=../marks", r"marks\.out: '\.\./marks' is no place for it"),
        ("stages.marks.rate={per_device: 0, source: a}", r"marks\.rate\.per_device: .* greater than 0"),
        ("stages.marks.processes=2", r"stages\.marks: processes: torchrun starts so many of a train stage"),
        ("stages={}", r"stages: Dictionary should have at least 1 item"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, override: str, said: str) -> None:
    lines = refusals(tmp_path, override)
    assert any(re.search(said, line) for line in lines), lines
    assert all(line.startswith(f"{tmp_path}/recipe.yaml: ") and "\n" not in line for line in lines)


def test_what_an_ingest_may_open_stands_in_its_recipe(tmp_path: Path) -> None:
    config = {"shard-size": 4, "within": str(tmp_path), "public-only": True, "follow-links": True}
    chain = chain_of(tmp_path, stages={**PLAIN, "shards": {**PLAIN["shards"], "config": config}})
    assert check_chain(chain).problems == []
    words = " ".join(arguments(chain, chain.stage("shards"), tmp_path / "out"))
    assert f"--within {tmp_path} --public-only --follow-links" in words


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    lines = refusals(
        tmp_path, "stages.captions.config.beam-width=4", "stages.marks.inputs.shards=gone", "stages.eval.stage=x"
    )
    assert len(lines) == 3


def test_a_cycle_is_named_by_its_members(tmp_path: Path) -> None:
    stages = {
        "a": {"stage": "ingest", "inputs": {"sources": "c"}},
        "b": {"stage": "annotate", "inputs": {"shards": "a"}, "config": {"model": "tiny/captioner", "pack": True}},
        "c": {"stage": "export", "inputs": {"artifact": "b"}},
        "d": {"stage": "dedup", "inputs": {"shards": "a"}},
    }
    (line,) = refusals(tmp_path, stages=stages)
    assert "a cycle, each waits for the next: a -> c -> b -> a; cut it" in line


def test_a_stage_written_twice_is_not_lost_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("stages:\n  a: {stage: render}\n  b: {stage: render}\n  a: {stage: render}\n")
    with pytest.raises(BadInput, match="'a' is written twice"):
        load_chain_recipe(path)


def test_stages_are_put_in_order_and_can_be_left_out(tmp_path: Path) -> None:
    turned = dict(reversed(PLAIN.items()))
    names = [stage.name for stage in chain_of(tmp_path, stages=turned).stages]
    assert names == ["pictures", "shards", "final", "marks"]
    left = chain_of(tmp_path, "stages.marks=null", stages=turned)
    assert [stage.name for stage in left.stages] == ["pictures", "shards", "final"]


def test_each_command_knows_its_own_kind_of_recipe(tmp_path: Path) -> None:
    train = one_line(capipe("train", "tiny", "--out", tmp_path / "x", code=2))
    assert train.endswith("this is the recipe of a chain; run it by: capipe run tiny")
    run = one_line(capipe("run", "tiny-caprl", "--out", tmp_path / "x", code=2))
    assert run.endswith("this is the recipe of a training; run it by: capipe train tiny-caprl")
    assert not (tmp_path / "x").exists()
    assert "tiny-caprl" in bundled("training") and bundled("chain").split(", ") == ["caprl-5m", "tiny"]


@pytest.mark.parametrize("name", bundled("chain").split(", "))
def test_every_chain_that_comes_along_can_be_planned(name: str, tmp_path: Path) -> None:
    found = check_chain(load_chain_recipe(Path(name)))
    assert not found.problems and (name != "tiny" or not found.absent)
    plan = capipe("run", name, "--out", tmp_path / "x", "--dry-run").stdout
    assert "to do: " in plan and plan.count("not there yet: ") == len(found.absent)
    assert not (tmp_path / "x").exists()


def test_the_figures_in_the_comments_of_caprl_5m_are_those_of_its_plan() -> None:
    comments = "".join(line for line in (RECIPES / "caprl-5m.yaml").read_text().splitlines() if line.startswith("#"))
    told: list[str] = []
    show_plan(load_chain_recipe(Path("caprl-5m")), Path("nowhere"), None, [], told.append)
    plan = "\n".join(told)
    assert "$ torchrun --standalone --nproc-per-node 8 -m capipe.pipeline train caprl-released" in plan
    total = re.search(r"54\.1 h, .*, (\d+\.\d) GPU-hours", plan)
    assert total is not None and total[1] == "457.2" and f"  {total[1]}#" in comments
    for rows, rate, gpu_hours in [
        ("4,000,000", "896", "9.9"),
        ("230,400", "2.133", "270.0"),
        ("3,000,000", "96", "69.4"),
        ("3,000,000", "1,800", "3.7"),
    ]:
        assert re.search(rf"{rows} / {rate} a second = .* on \d GPUs, {gpu_hours} GPU-hours", plan)


def test_a_plan_is_priced_where_its_unit_has_a_price(tmp_path: Path) -> None:
    told: list[str] = []
    show_plan(load_chain_recipe(Path("caprl-5m")), Path("nowhere"), None, [], told.append, {"GPU": 2.5})
    plan = "\n".join(told)
    assert re.search(r"96 a second = .* on \d GPUs, 69\.4 GPU-hours at 173\.61, 57\.87 per million rows", plan)
    total = re.search(r"^price: ([\d,.]+), without \d+ stages on units without one$", plan, re.MULTILINE)
    assert total is not None and float(total[1].replace(",", "")) == pytest.approx(457.2 * 2.5, abs=0.2)
    line = one_line(capipe("run", "caprl-5m", "--out", tmp_path / "x", "--price", "GPU=2.5", code=2))
    assert "--price: belongs to --dry-run" in line
    assert "give an hour's price" in one_line(capipe("run", "tiny", "--out", "x", "--dry-run", "--price", "1", code=2))


def test_no_image_of_the_web_is_paid_twice_in_caprl_5m() -> None:
    """One stage looks at all of them; scores take what it wrote; captions are for what is selected, uncopied."""
    chain = load_chain_recipe(Path("caprl-5m"))
    reads = [stage for stage in chain.stages if Source(stage="web") in stage.inputs.get("shards", ())]
    assert [stage.name for stage in reads if stage.command.name == "embed"] == ["web-embeddings"]
    for stage in reads:
        if stage.command.name == "filter":
            assert stage.inputs["embeddings"] == (Source(stage="web-embeddings"),) and "itm" not in stage.config
            assert stage.config["clip"] == chain.stage("web-embeddings").config["clip"]
    assert chain.stage("web-embeddings").config["safety"] and chain.stage("web-kept").config["index"]
    assert chain.stage("captions-web").inputs["marks"] == (Source(stage="web-kept"),)
    assert arguments(chain, chain.stage("captions-web"), Path("out"))[1:5] == [
        *("--shards", "out/web", "--model"),
        "out/train/step-001800",
    ]


def test_training_recipes_of_chains_are_the_bundled_ones() -> None:
    for name in bundled("chain").split(", "):
        for stage in load_chain_recipe(RECIPES / f"{name}.yaml").stages:
            if stage.recipe is not None:
                assert load_recipe(Path(stage.config["recipe"])).model == stage.recipe.model


def test_an_index_is_for_export_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its plan says what it saves, where the tars are there to be measured."""
    shards = foreign_shards(tmp_path / "crawl", [4, 4])
    chosen = {"stage": "filter", "inputs": {"shards": {"path": str(shards)}}, "config": {"clip": "tiny/clip"}}
    stages = {
        "chosen": {**chosen, "expects": 8},
        "final": {"stage": "export", "inputs": {"artifact": "chosen"}},
        "again": {"stage": "annotate", "inputs": {"shards": "chosen"}, "config": {"model": "tiny/captioner"}},
    }
    index, without = "stages.chosen.config.index=true", "stages.again=null"
    assert refusals(tmp_path, stages=stages) == []
    (line,) = refusals(tmp_path, index, stages=stages)
    assert "again.inputs.shards: stage chosen writes no tars with index: true; leave that out" in line
    chain = chain_of(tmp_path, index, without, stages=stages)
    assert arguments(chain, chain.stage("final"), tmp_path)[1] == f"{tmp_path}/chosen/shards"
    size = decimal(sum(path.stat().st_size for path in shards.iterdir()))
    show_plan(chain, tmp_path / "out", None, [], print)
    told = f"writes an index: about 1.3 kB of rows; without index: true it would copy at most {size} of images as well"
    assert f"    {told}\n" in capsys.readouterr().out
    show_plan(chain_of(tmp_path, without, stages=stages), tmp_path / "out", None, [], print)
    told = f"copies at most {size} of images; with index: true it would write about 1.3 kB of rows alone"
    assert f"    {told}\n" in capsys.readouterr().out


def test_a_refused_chain_writes_nothing(tmp_path: Path) -> None:
    path = written(
        tmp_path, {**PLAIN, "captions": {**CAPTIONS, "config": {"model": "tiny/captioner", "beam-width": 4}}}
    )
    line = one_line(capipe("run", path, "--out", tmp_path / "out", code=2))
    assert "stages.captions.config.beam-width" in line and not (tmp_path / "out").exists()
    outside = json.dumps({"path": str(tmp_path / "gone")})
    path = written(tmp_path, PLAIN)
    sets = ("--set", f"stages.shards.inputs.sources={outside}")
    assert "gone: nothing is there" in one_line(capipe("run", path, "--out", tmp_path / "out", *sets, code=2))
    planned = capipe("run", path, "--out", tmp_path / "out", *sets, "--dry-run").stdout
    assert "not there yet: " in planned and "2/4 shards: ingest, to do; rows unknown" in planned
    assert not (tmp_path / "out").exists()


def test_scores_of_several_sources(tmp_path: Path) -> None:
    """As a list of stages and places, with names for their columns; only those of scores may have one."""
    sources = ["filtered", {"stage": "marks", "as": "m"}, {"path": "mine.parquet", "as": "mine"}]
    best = {"stage": "filter", "inputs": {"shards": "shards", "scores": sources}, "config": {"keep": "mine_x > 1"}}
    stages = {
        **WHOLE,
        "marks": {"stage": "filter", "inputs": WHOLE["filtered"]["inputs"], "config": {"clip": "tiny/clip"}},
    }
    stages["marks"]["inputs"] = {"shards": "shards"}
    stages["filtered"] = {**WHOLE["filtered"], "inputs": {"shards": "shards", "captions": "captions"}}
    chain = chain_of(tmp_path, stages={**stages, "best": best})
    words = arguments(chain, chain.stage("best"), tmp_path / "out")
    given = [words[at + 1] for at, word in enumerate(words) if word == "--scores"]
    assert given == [f"{tmp_path}/out/filtered/scores", f"m={tmp_path}/out/marks/scores", "mine=mine.parquet"]
    wrong = {**best, "inputs": {**best["inputs"], "shards": {"stage": "shards", "as": "s"}}}
    said = refusals(tmp_path, stages={**stages, "best": wrong})
    assert any("stages.best.inputs.shards: as: is for sources of columns alone" in line for line in said)
    named = {**best, "inputs": {**best["inputs"], "scores": {"stage": "filtered", "as": "a b"}}}
    assert any("String should match pattern" in line for line in refusals(tmp_path, stages={**stages, "best": named}))
