"""Resolving names of open_clip models, and all that decides their features beside the weights; loads nothing heavy.

The activation that weights were trained with is in their tag's entry, or in the configuration beside them. open_clip
goes by the architecture alone, and only warns: OpenAI's weights in ``ViT-L-14`` are then computed with another
function, and every score is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ...errors import BadInput
from ...manifests.files import bounded_json
from ..bundled import PREFIX
from ..bundled import resolve as resolve_bundled
from ..hub import HubName, hub_name, snapshot
from ..images.preprocess import Preprocess

CONFIG = "open_clip_config.json"
Activation = Literal["gelu", "quick_gelu"]
IMAGE_SIZE = 224  # of configurations without one


@dataclass(frozen=True)
class Tag:
    """Weights that open_clip knows by architecture and tag."""

    architecture: str
    pretrained: str


@dataclass(frozen=True)
class ClipSource:
    """``place``: a folder, or a tag of open_clip; ``mean``, ``std``: of levels in [0, 1]."""

    name: str
    place: Path | Tag
    activation: Activation
    preprocess: Preprocess
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def seen_as(self) -> dict[str, Any]:
        """Preprocessing and activation, for fingerprints."""
        return {
            "activation": self.activation,
            "view": asdict(self.preprocess),
            "mean": list(self.mean),
            "std": list(self.std),
        }


def clip_place(name: str) -> Path | Tag | HubName:
    """A folder with an open_clip model, a tag or a hub id; nothing is downloaded. Raises BadInput."""
    import open_clip

    try:
        path = Path(resolve_bundled(name)).expanduser()
    except ValueError as error:
        raise BadInput(str(error)) from error
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise BadInput(f"{name}: the folder has no {CONFIG}; name the one of an open_clip model")
        return path.resolve()
    architecture, _, pretrained = name.partition(":")
    if architecture in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if pretrained not in tags:
            raise BadInput(f"{name}: name its weights, too, e.g. {architecture}:{tags[0] if tags else 'FOLDER'}")
        return Tag(architecture, pretrained)
    named = hub_name(name)
    if name.startswith(PREFIX) or named is None or path.exists():
        raise BadInput(f"{name}: no folder, no open_clip ARCHITECTURE:PRETRAINED, no hub id and no bundled tiny/ model")
    return named


def clip_source(name: str) -> ClipSource:
    """Resolve a name, downloading a hub id's folder. Raises BadInput where that fails."""
    place = clip_place(name)
    if isinstance(place, Tag):
        return _of_tag(name, place)
    return _of_folder(name, snapshot(place, "open_clip") if isinstance(place, HubName) else place)


def _of_tag(name: str, tag: Tag) -> ClipSource:
    from open_clip.factory import get_model_config
    from open_clip.pretrained import get_pretrained_cfg

    model, weights = get_model_config(tag.architecture), get_pretrained_cfg(tag.architecture, tag.pretrained)
    trained_with = bool(weights.get("quick_gelu", False))
    if model.get("quick_gelu", False) and not trained_with:
        instead = hub_name(str(weights.get("hf_hub", "")).rstrip("/"))
        raise BadInput(
            f"{name}: open_clip builds {tag.architecture} with QuickGELU and calls these weights trained with GELU; "
            f"name a model that says it itself{'' if instead is None else f': {instead}'}"
        )
    return _source(name, tag, "quick_gelu" if trained_with else "gelu", model, weights)


def _of_folder(name: str, folder: Path) -> ClipSource:
    config = _json(folder / CONFIG, name)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        raise BadInput(f"{name}: open_clip cannot load it ({CONFIG} has no model_cfg with a vision_cfg)")
    activation: Activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    if (folder / "config.json").is_file():
        _agree(name, activation, _json(folder / "config.json", name))
    return _source(name, folder, activation, model, config.get("preprocess_cfg") or {})


def _agree(name: str, activation: Activation, beside: Mapping[str, Any]) -> None:
    """Refuse a folder whose transformers configuration gives its CLIP another activation."""
    if beside.get("model_type") != "clip":
        return
    for tower in ("vision_config", "text_config"):
        other = (beside.get(tower) or {}).get("hidden_act", "quick_gelu")  # transformers' default for a CLIP
        if (other == "quick_gelu") != (activation == "quick_gelu"):
            raise BadInput(
                f"{name}: {CONFIG} has it compute with {activation}, config.json ({tower}) with {other}; which one the "
                f"weights were trained with is not known here: fix model_cfg.quick_gelu, or remove config.json"
            )


def _source(
    name: str, place: Path | Tag, activation: Activation, model: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> ClipSource:
    """Merges ``preprocess`` as open_clip does; the image size is always the vision encoder's own."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    size = model["vision_cfg"].get("image_size", IMAGE_SIZE)
    try:
        shown = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), {**preprocess, "size": size}))
        height, width = (size, size) if isinstance(size, int) else map(int, size)
    except (AssertionError, TypeError, ValueError) as error:
        raise BadInput(f"{name}: its preprocess_cfg or image_size is none of open_clip's ({error})") from error
    if shown.resize_mode not in ("shortest", "longest", "squash"):
        raise BadInput(f"{name}: resize_mode {shown.resize_mode!r} is none of shortest, longest, squash")
    how = cast(Literal["shortest", "longest", "squash"], shown.resize_mode)
    by: Literal["bicubic", "bilinear"] = "bilinear" if shown.interpolation == "bilinear" else "bicubic"
    sized = Preprocess(height, width, how, by, int(shown.fill_color))
    return ClipSource(name, place, activation, sized, tuple(shown.mean), tuple(shown.std))


def _json(file: Path, name: str) -> dict[str, Any]:
    try:
        content = bounded_json.load(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: open_clip cannot load it ({file.name}: {error})") from error
    if not isinstance(content, dict):
        raise BadInput(f"{name}: open_clip cannot load it ({file.name} is no JSON object)")
    return content
