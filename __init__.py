"""capipe: image shards in, verified caption datasets out. ``docs/architecture.md`` is the map of the house."""

__version__ = "0.1.0"
