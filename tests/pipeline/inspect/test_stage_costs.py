"""What a server counts for each stage is what its artifact, the report and the plan say that it cost."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from capipe.manifests.artifact import Artifact
from capipe.pipeline.chain.command import show_plan
from capipe.pipeline.chain.recipe import load_chain_recipe
from capipe.pipeline.inspect.chain_state import load_chain
from capipe.pipeline.inspect.costs import stage_cost
from capipe.pipeline.inspect.discover import find
from capipe.pipeline.report.facts import gather

from ...conftest import photo
from ...models.chat_server import Answer, Double, serving
from ..conftest import capipe

PROBE = "Is one and one two?"  # asked before the first row: no row's cost
IMAGE = 7


class Billing:
    """A server that says what each answer cost, with the image's share or without; ``billed`` has the sums."""

    def __init__(self, images: bool = True) -> None:
        self.images, self.billed = images, Counter[str]()

    def __call__(self, number: int, body: dict[str, Any]) -> Answer:
        content = body["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        image = IMAGE * any(part["type"] == "image_url" for part in parts)
        said = "A red star. A blue ring." if text.startswith("Describe") else "A"
        cost = {"prompt_tokens": len(text.split()) + image, "completion_tokens": len(said.split())}
        usage = {**cost, "prompt_tokens_details": {"image_tokens": image}} if self.images else cost
        if PROBE not in text:
            self.billed += Counter(prompt_tokens=cost["prompt_tokens"], output_tokens=cost["completion_tokens"])
            self.billed += Counter(image_tokens=image)
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        return 200, {}, {"choices": [choice], "usage": usage}

    def bill(self) -> dict[str, int]:
        billed, self.billed = self.billed, Counter[str]()
        return {name: billed[name] for name in ("prompt_tokens", "image_tokens", "output_tokens")}


def pictures(folder: Path) -> Path:
    (folder / "photos").mkdir()
    for number in range(3):
        (folder / f"photos/{number}.jpg").write_bytes(photo(number))
    (folder / "photos/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    capipe("ingest", folder / "photos", "--out", folder / "shards", "--shard-size", 2)
    return folder / "shards"


@pytest.mark.slow
def test_each_stage_s_columns_sum_up_to_what_the_server_counted(tmp_path: Path) -> None:
    """captions, screened questions, yes-or-no answers, grades also in words, checked sentences: five stages."""
    shards, server = ("--shards", pictures(tmp_path)), Billing()
    asked = {"question": "What is it?", "options": ["star", "ring"], "answer": "star"}
    lines = [{"image": f"{number}.jpg", **asked} for number in range(3)]
    lines += [{"image": "0.jpg", "question": "How many?", "answer": "2"}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines[:3])))
    (tmp_path / "open.jsonl").write_text("\n".join(map(json.dumps, lines)))
    bills: dict[str, dict[str, int]] = {}
    with serving(Double(server)) as url:
        model, sampled = ("--model", "captioner", "--engine", url), ("--reader-mode", "sampled")
        capipe("annotate", *shards, "--out", tmp_path / "captions", *model, "--prompt", "c=Describe it.")
        bills["captions"] = server.bill()
        screen = ("--screen-model", "captioner", "--screen-engine", url, *sampled)
        capipe("qa", *shards, "--out", tmp_path / "qa", "--import", tmp_path / "set.jsonl", *screen)
        bills["qa/screened"] = server.bill()
        what = ("--import", tmp_path / "open.jsonl", "--open-ended", "--screen", "none")
        capipe("qa", *shards, "--out", tmp_path / "opened", *what)
        assert not any(server.bill().values()), "an import asks nobody"
        capipe("ask", *shards, "--out", tmp_path / "asked", "--ask", "watermark", *model, *sampled, "--samples", 2)
        bills["asked"] = server.bill()
        graded = ("--questions", tmp_path / "opened", "--captions", tmp_path / "captions", "--out", tmp_path / "eval")
        capipe("eval", *shards, *graded, "--reader", "captioner", "--reader-engine", url, *sampled)
        bills["eval/graded"] = server.bill()
        vlm = ("--vlm", "captioner", "--vlm-engine", url, "--vlm-mode", "sampled", "--text", "re")
        capipe("filter", *shards, "--captions", tmp_path / "captions", "--out", tmp_path / "filtered", *vlm)
        bills["filtered/sentences"] = server.bill()
    for name, bill in bills.items():
        cost = stage_cost(name, Artifact.open(str(tmp_path / name)))
        assert cost is not None and cost.rows == 3, name
        assert {column: cost.total(column) for column in bill} == bill, name
        assert cost.core_seconds > 0 and cost.gpu_seconds == 0, "of a server's GPUs nothing is known"
    assert bills["eval/graded"]["image_tokens"] == 0 and min(bills["eval/graded"]["prompt_tokens"], 1) == 1
    assert all(bills[name]["image_tokens"] for name in bills if name != "eval/graded")
    facts = gather(find(tmp_path))
    assert {each.name for each in facts.costs} == set(bills) and facts.damaged == {}
    page = Path(capipe("report", tmp_path, "--price", "core=3.6").stdout.strip()).read_text()
    for each in facts.costs:
        row = page.partition("What the stages that ask a model cost")[2].partition(f"<td>{each.name}</td>")[2]
        cells = re.findall(r'<td class="n">([^<]*)</td>', row.partition("</tr>")[0])
        means = [f"{each.per_row(column) or 0:.1f}" for column in ("prompt_tokens", "image_tokens", "output_tokens")]
        assert cells[:4] == ["3", *means]
        assert cells[-1] == f"{each.core_seconds * 3.6 / 3600 / 3 * 1e6:.2f}"


@pytest.mark.parametrize("images", [True, False])
def test_a_plan_says_what_rows_cost_so_far(tmp_path: Path, images: bool) -> None:
    shards, server = pictures(tmp_path), Billing(images)
    with serving(Double(server)) as url:
        config = {"model": "captioner", "engine": url, "prompt": ["c=Describe it."]}
        stages = {"captions": {"stage": "annotate", "inputs": {"shards": {"path": str(shards)}}, "config": config}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}))
        capipe("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
        done = capipe("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--dry-run", "--price", "core=3.6")
    cost = stage_cost("captions", Artifact.open(str(tmp_path / "out/captions")))
    assert cost is not None
    part = f"{IMAGE}.0 image, " if images else ""
    price = f"{cost.core_seconds / 1000 / 3 * 1e6:,.2f}"
    expected = f"a row cost {2 + IMAGE}.0 prompt, {part}6.0 output tokens so far; {price} per million rows, start not"
    assert expected in " ".join(done.stdout.split())
    told: list[str] = []
    chain, out = load_chain_recipe(tmp_path / "recipe.yaml"), tmp_path / "out"
    show_plan(chain, out, load_chain(out), [], told.append, {"GPU": 2.5})
    assert any(line.strip().endswith("tokens so far") for line in told), "no price for what it ran on"
