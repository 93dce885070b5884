"""Captions that lie beside the tests as text files: ``@@ name`` heads each."""

from __future__ import annotations

from pathlib import Path


def caption_texts(name: str) -> dict[str, str]:
    """The texts of ``<name>.txt`` in this folder, by name, in the file's order."""
    _, *entries = ("\n" + (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8")).split("\n@@ ")
    return {title: text.removesuffix("\n") for title, _, text in (entry.partition("\n") for entry in entries)}
