"""Data that tests of the loader share, and none of them changes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from .captioned import Captioned, ingested


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Captioned:
    return ingested(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(autouse=True)
def _loaders_end() -> Iterator[None]:
    """End the workers of loaders that a test left: where the collector finds one later, it may wait 5 s for each."""
    yield
    gc.collect()
