"""Small chains to plan and run: without any model, quick enough to be run many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from capipe.pipeline.chain.plan import look, outside
from capipe.pipeline.chain.recipe import Chain, load_chain_recipe
from capipe.pipeline.inspect.chain_state import load_chain

PLAIN: dict[str, Any] = {
    "pictures": {"stage": "render", "config": {"images": 8, "split": "heldout", "seed": 3}},
    "shards": {"stage": "ingest", "inputs": {"sources": "pictures"}, "config": {"shard-size": 4}},
    "marks": {"stage": "dedup", "inputs": {"shards": "shards"}},
    "final": {"stage": "export", "inputs": {"artifact": "shards"}, "config": {"title": "Pictures"}},
}


def written(folder: Path, stages: dict[str, Any] = PLAIN) -> Path:
    """A recipe's file with these stages."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return path


def chain_of(folder: Path, *overrides: str, stages: dict[str, Any] = PLAIN) -> Chain:
    return load_chain_recipe(written(folder, stages), overrides)


def verdicts(chain: Chain, out: Path) -> dict[str, str]:
    """How each stage stands, by name."""
    found = look(chain, out, load_chain(out), outside(chain))
    return {name: planned.verdict for name, planned in found.items()}
