"""Measure a language model on held-out captions and on texts nobody writes.

``python -m capipe.models.tiny.train.eval.lm tiny/opt --scenes 300``
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from random import Random

import torch
from transformers import AutoTokenizer, OPTForCausalLM

from ....bundled import resolve
from ....pretrained import load_weights
from ...world.captions import dense_caption, short_caption
from ...world.scenes import Scene, scenes
from ..texts.web_captions import plain_caption

SEED = 5


def salad(scene: Scene, rng: Random) -> str:
    """A plain caption with its words shuffled."""
    words = plain_caption(scene, rng).split(" ")
    rng.shuffle(words)
    return " ".join(words)


def phrase_again(scene: Scene, rng: Random) -> str:
    """A caption that names one thing four times."""
    thing = rng.choice(scene.things)
    return ", ".join([f"a {thing.color} {thing.shape}"] * 4)


def tail_again(scene: Scene, rng: Random) -> str:
    """A plain caption with its last word repeated four more times."""
    text = plain_caption(scene, rng)
    return text + f" {text.split(' ')[-1]}" * 4


KINDS: dict[str, Callable[[Scene, Random], str]] = {
    "plain": plain_caption,
    "short": short_caption,
    "dense": dense_caption,
    "word salad": salad,
    "repeated phrase": phrase_again,
    "repeated last word": tail_again,
}


@torch.inference_mode()
def perplexities(folder: str, count: int, seed: int = SEED) -> dict[str, float]:
    """Perplexity per token, the end token included, of ``count`` texts of each kind about held-out scenes."""
    model = load_weights(OPTForCausalLM, folder, dtype=torch.float32, called=folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    results = {}
    for kind, tell in KINDS.items():
        total, tokens = 0.0, 0
        for at, scene in enumerate(scenes("heldout", count, seed)):
            text = tell(scene, Random(f"{kind}:{seed}:{at}"))
            ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        results[kind] = math.exp(total / tokens)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="tiny/opt")
    parser.add_argument("--scenes", type=int, default=300)
    options = parser.parse_args(arguments)
    print(json.dumps(perplexities(resolve(options.folder), options.scenes)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
