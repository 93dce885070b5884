"""Registry of export formats by name; a user's own are given by import path."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import BadInput
from ...manifests.import_path import import_object, is_import_path
from .folder import FolderWriter
from .lance.writer import LanceWriter
from .llava import LlavaWriter, MessagesWriter
from .parquet import TrainingParquet
from .webdataset import RewrittenTar
from .writer import ShardWriter

FORMATS: Mapping[str, type[ShardWriter]] = {
    "webdataset": RewrittenTar,
    "parquet": TrainingParquet,
    "llava": LlavaWriter,
    "folder": FolderWriter,
    "messages": MessagesWriter,
    "lance": LanceWriter,
}


def writer_class(name: str, option: str = "format") -> type[ShardWriter]:
    """Writer class of a format. ``option``: the option that names it. Raises BadInput."""
    if name in FORMATS:
        return FORMATS[name]
    if not is_import_path(name):
        raise BadInput(f"{option} {name}: unknown; one of {', '.join(FORMATS)}")
    writer = import_object(name)
    if not (isinstance(writer, type) and issubclass(writer, ShardWriter)):
        raise BadInput(f"{option} {name}: not a subclass of capipe.stages.export.writer.ShardWriter")
    return writer
