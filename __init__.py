"""capipe: image shards in, verified caption datasets out. ``docs/architecture.md`` describes the layout of the code."""

__version__ = "0.1.0"
