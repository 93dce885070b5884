"""The image formats of an export, settled before its first shard: what is refused, and what members are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.files.image_types import COMMON
from ...manifests.manifest import ShardRecord
from ...models.images.decode import ANIMATED
from ...models.images.encoding import Codec
from ...stages.export.provenance import chain
from ...stages.export.source import image_extensions
from ...stages.export.transcode import refuse, unread
from ...stages.export.writer import ShardWriter

EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # the extensions that OpenCLIP reads
_CODEC_EXTENSIONS: dict[Codec, str] = {"jpeg": "jpg", "webp": "webp", "png": "png"}


def check_extension(name: str) -> None:
    """Raises BadInput for an invalid image extension."""
    if name not in ("auto", "keep", *EXTENSIONS):
        raise BadInput(f"--image-extension {name}: use auto, keep, or one of {', '.join(EXTENSIONS)}")


def check_encoding(transcode: str | None, quality: int | None) -> Codec | None:
    """The codec that --transcode names. Raises BadInput for another name, or a quality of none."""
    codec = next((codec for codec in _CODEC_EXTENSIONS if codec == transcode), None)
    if transcode is not None and codec is None:
        raise BadInput(f"--transcode {transcode}: use one of {', '.join(_CODEC_EXTENSIONS)}")
    if quality is not None and codec not in ("jpeg", "webp"):
        raise BadInput("--quality: of --transcode jpeg or webp; leave it out")
    return codec


def check_formats(
    source: Artifact, shards: Sequence[ShardRecord], writer: type[ShardWriter], images: Sequence[str]
) -> None:
    """Raises BadInput if the source has images that the readers of a format do not decode.

    Reads nothing of a source of which no `ingest` took further formats. Where that is not known any more, each image is
    looked at when it is written.
    """
    if may_have_further(source):
        for record in shards:
            refuse(
                unread(image_extensions(source, record, images), writer.images), f"{source.url}: shard {record.shard}"
            )


def may_have_further(source: Artifact) -> bool:
    """True if the source may have images in other formats than the common ones."""
    for step in chain(source):
        options = {} if step.config is None else step.config["semantic"]
        accepted = options.get("accept")
        further = [name for name in accepted if name != ANIMATED] if isinstance(accepted, list) else []
        if further and options.get("transcode") is None:
            return True
    return False


def chosen_extension(
    source: Artifact, shards: Sequence[ShardRecord], wish: str, images: Sequence[str], codec: Codec | None
) -> str | None:
    """The extension for all images, or None if they keep theirs.

    If they differ, `datasets` rejects the tars, or silently reads null for every image with another extension than the
    first five. Readers decode by content, so one extension works for all.
    """
    if wish == "keep":
        return None
    if wish != "auto":
        check_extension(wish)
        return wish
    present: set[str] = set()
    for extension in _extensions(source, shards, images):
        further = codec is not None and bool(unread([extension], COMMON))
        present.add(_CODEC_EXTENSIONS[codec] if further and codec is not None else extension)
        if len(present) > 1:
            break
    return None if len(present) == 1 and present <= set(EXTENSIONS) else EXTENSIONS[0]


def _extensions(source: Artifact, shards: Sequence[ShardRecord], images: Sequence[str]) -> Iterator[str]:
    for record in shards:
        yield from image_extensions(source, record, images)
