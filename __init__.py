"""capipe: image shards in, verified caption datasets out. ``docs/architecture.md`` describes the layout of the code."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .manifests.loader.opening import open_dataset as open_dataset

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import :func:`.manifests.loader.opening.open_dataset`, and torch with it, when it is first asked for."""
    if name == "open_dataset":
        from .manifests.loader.opening import open_dataset

        return open_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
