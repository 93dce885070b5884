"""Rendering of HTML reports: templates, text truncation, inline images.

A report is one self-contained HTML file without scripts, which may not load anything. Text from data or models is
escaped.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ... import __version__
from ..inspect.images import small_jpeg
from ..runners.progress import clock
from .charts import status_bar

_HERE = Path(__file__).parent
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SIDE, _QUALITY = 256, 78  # of images in a page
_LONGEST = 1500  # characters of a caption


def render(template: str, **values: Any) -> bytes:
    """Render one of the templates in this folder."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {"clock": clock, "status_bar": status_bar, "number": "{:,}".format}
    style = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(**values, style=style, version=__version__).encode()


def data_uri(image: bytes | None) -> str | None:
    """Thumbnail of an image as a ``data:`` URI; None without an image, or if it cannot be decoded."""
    small = None if image is None else small_jpeg(image, _SIDE, _QUALITY)
    return None if small is None else f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"


def cut(text: str) -> str:
    """Truncate a text to :data:`_LONGEST` characters."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _printable(value: Any) -> Any:
    """Replace control characters and bidirectional overrides in text; leave the templates' markup unchanged."""
    if isinstance(value, Markup):
        return value
    return _CONTROL.sub("\ufffd", value) if isinstance(value, str) else value
