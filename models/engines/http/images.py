"""Images for servers, as plain pixels where necessary: many servers ignore EXIF, profiles or 16 bits."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace

from ....manifests.files.image_types import COMMON, IMAGE_TYPES
from ...images.decode import EVERYTHING, ImageLimits, is_plain, plain_copy
from ...images.formats import ImageProblem, sniff
from ..base import ImageInput, Prompt, Rejected

_LIMITS = ImageLimits(min_side=1, accept=EVERYTHING)


async def shown(prompt: Prompt) -> Prompt:
    """``prompt`` with its image as in-process engines see it: rotated, converted, on white where necessary."""
    image = prompt.image
    if image is None or image.encoded is None or is_plain(image.encoded):
        return prompt
    copy = await asyncio.to_thread(plain_copy, image.encoded, _LIMITS)
    return prompt if isinstance(copy, ImageProblem) else replace(prompt, image=replace(image, encoded=copy))


def data_url(image: ImageInput) -> str:
    """The image's encoded bytes as a data URL. Raises Rejected for formats that servers do not read."""
    if image.encoded is None:
        raise Rejected(f"image {image.uid} has no encoded bytes; an HTTP engine sends the file")
    kind = sniff(image.encoded)
    if isinstance(kind, ImageProblem) or kind not in COMMON:
        raise Rejected(f"image {image.uid} is none of JPEG, PNG, WebP, which are what servers read")
    return f"data:{IMAGE_TYPES[kind].media_type};base64,{base64.b64encode(image.encoded).decode()}"
