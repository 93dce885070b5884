"""The tiny family: small trained models of real architectures, and the rendered world whose truth they describe.

Importing this package loads nothing heavy: whoever is given a model's name asks :func:`resolve` first.
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "tiny/"
BUNDLED: tuple[str, ...] = ("captioner", "teacher", "reader", "holdout-reader")


def resolve(name: str) -> str:
    """The absolute folder of a bundled model (``tiny/captioner``); any name outside ``tiny/`` is returned unchanged.

    Raises ValueError, naming the known ones, for a ``tiny/`` name that is not bundled.
    """
    if not name.startswith(PREFIX):
        return name
    model = name.removeprefix(PREFIX)
    if model not in BUNDLED:
        known = ", ".join(PREFIX + each for each in BUNDLED)
        raise ValueError(f"no bundled model is called {name!r}; the known ones are: {known}")
    return str(Path(__file__).resolve().parent / model)
