"""The captioner's training prompts and their answers. The first prompt of each kind is the canonical one."""

from __future__ import annotations

from random import Random
from typing import Any

from .captions import dense_caption, short_caption
from .scenes import Scene

PLAIN = (
    "Describe the image.",
    "Please describe this image.",
    "Describe this image.",
    "Write a caption for this image.",
)
SHORT = (
    "Describe the image in one short sentence.",
    "Please describe this image in one short sentence.",
    "Give a short caption of this image.",
)
DENSE = (
    "Describe the image in detail.",
    "Please describe this image in detail.",
    "Describe this image in detail.",
    "Write a detailed caption for this image.",
)
PLAIN_DENSE_SHARE = 0.12  # share of plain prompts with a dense answer, for reinforcement learning to reinforce


def answer(prompt: str, scene: Scene, rng: Random) -> str:
    """A caption of ``scene`` as requested by ``prompt``. Raises ValueError for an unknown prompt."""
    if prompt in DENSE:
        return dense_caption(scene, rng)
    if prompt in SHORT:
        return short_caption(scene, rng)
    if prompt in PLAIN:
        return (dense_caption if rng.random() < PLAIN_DENSE_SHARE else short_caption)(scene, rng)
    raise ValueError(f"not a prompt the captioner is taught: {prompt!r}")


def messages(prompt: str) -> list[dict[str, Any]]:
    """The conversation to render with the chat template: the image, then the prompt."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
