"""Scene graphs: one to five coloured shapes on a three by three grid, and sometimes a sign with a word.

Crowded scenes have six to nine shapes; they are drawn on request only.

All training and grading data of the tiny models derives from them. Equal scenes have equal signatures, and the
signature alone decides whether a scene is in the training or the held-out split, so no scene is ever in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Split = Literal["train", "heldout"]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "gray", "brown")
PLACES = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
WORDS = ("STOP", "OPEN", "EXIT", "TAXI", "SALE", "CAFE", "BUS", "MILK", "BOOK", "ZOO", "GYM", "HELP")
MOST_THINGS = 5
CROWDED = (MOST_THINGS + 1, len(PLACES))  # fewest and most things of a crowded scene; the most fill every cell
SIGN_SHARE = 0.3
HELDOUT_SHARE = 10  # one scene in so many is held out


@dataclass(frozen=True, order=True)
class Thing:
    """One shape; ``place`` is one of ``PLACES``."""

    place: str
    shape: str
    color: str
    size: str


@dataclass(frozen=True)
class Sign:
    """A plate with one word of ``WORDS`` on it, in a cell of its own."""

    text: str
    place: str


@dataclass(frozen=True)
class Scene:
    """The content of an image. ``things`` are in reading order of their places, which are all distinct."""

    background: str
    things: tuple[Thing, ...]
    sign: Sign | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if a name is unknown, a place is used twice or the things are out of order."""
        places = [thing.place for thing in self.things]
        used = places + ([self.sign.place] if self.sign else [])
        if self.background not in BACKGROUNDS or any(place not in PLACES for place in used):
            raise ValueError(f"unknown background or place in {self!r}")
        if any(t.shape not in SHAPES or t.color not in COLORS or t.size not in SIZES for t in self.things):
            raise ValueError(f"unknown shape, color or size in {self!r}")
        if self.sign is not None and self.sign.text not in WORDS:
            raise ValueError(f"unknown word on the sign: {self.sign.text!r}")
        if len(set(used)) != len(used) or places != sorted(places, key=PLACES.index):
            raise ValueError(f"places must be distinct and in reading order, not {used}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form that :meth:`from_dict` reads back to an equal scene."""
        return {
            "background": self.background,
            "things": [{"shape": t.shape, "color": t.color, "size": t.size, "place": t.place} for t in self.things],
            "sign": {"text": self.sign.text, "place": self.sign.place} if self.sign else None,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """The scene that :meth:`to_dict` wrote; raises KeyError, TypeError or ValueError on anything else."""
        things = tuple(Thing(**thing) for thing in data["things"])
        return cls(data["background"], things, Sign(**data["sign"]) if data.get("sign") else None)

    @property
    def signature(self) -> str:
        """32 hex digits, equal exactly for equal scenes, the same on every machine."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def split_of(scene: Scene) -> Split:
    """The split of a scene: one in ten is held out, by its signature alone."""
    return "heldout" if int(scene.signature[:8], 16) % HELDOUT_SHARE == 0 else "train"


def sample_scene(rng: Random, most: int = MOST_THINGS, sign_share: float = SIGN_SHARE, least: int = 1) -> Scene:
    """A random scene of ``least`` to ``most`` things; ``sign_share`` of those with an empty cell have a sign."""
    count = rng.randint(least, most)
    cells = rng.sample(range(len(PLACES)), min(count + 1, len(PLACES)))
    things = tuple(
        Thing(PLACES[cell], rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES)) for cell in sorted(cells[:count])
    )
    signed = rng.random() < sign_share and count < len(PLACES)
    sign = Sign(rng.choice(WORDS), PLACES[cells[count]]) if signed else None
    return Scene(rng.choice(BACKGROUNDS), things, sign)


def sample_of(
    split: Split, rng: Random, most: int = MOST_THINGS, sign_share: float = SIGN_SHARE, least: int = 1
) -> Scene:
    """Like :func:`sample_scene`, with rejection sampling until the scene is of ``split``."""
    while split_of(scene := sample_scene(rng, most, sign_share, least)) != split:
        pass
    return scene


def sample_crowded(split: Split, rng: Random, sign_share: float = SIGN_SHARE) -> Scene:
    """A random crowded scene of ``split``."""
    least, most = CROWDED
    return sample_of(split, rng, most, sign_share, least)


def scenes(split: Split, count: int, seed: int, crowded: float = 0.0) -> Iterator[Scene]:
    """``count`` scenes of ``split``, the same ones for the same seed; each is crowded with probability ``crowded``."""
    rng = Random(f"scenes:{split}:{seed}")
    for _ in range(count):
        yield sample_crowded(split, rng) if crowded and rng.random() < crowded else sample_of(split, rng)
