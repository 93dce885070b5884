"""Hugging Face datasets as a source: a folder written by ``save_to_disk``, or a dataset loaded by name.

Separate from :mod:`.source_refs`, because importing ``datasets`` takes seconds. Images stay encoded (``decode=False``),
and ``datasets`` decodes no column, as it would open any path or URL in it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import yaml

from ...errors import BadInput
from ...manifests.files.names import name_problem
from ...manifests.files.outside import ANYWHERE, Reach, refusal
from ...manifests.files.tar import printable
from ..reading.columns import IMAGE_COLUMNS, Columns, take_caption
from .parquet_images import image_bytes
from .source_refs import Handles, Item

SCHEME = "hf://"
_REVISION = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)@(\w[\w./-]*)")  # name@revision: branch, tag or commit
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOADED: dict[tuple[str, str | None], Any] = {}


@dataclass(frozen=True, slots=True)
class DatasetRef:
    """A row of a Hugging Face dataset; ``version`` is the split's fingerprint in `datasets`. ``text_column``: the
    caption column given by the user. ``reach``: the permitted locations of images that are paths instead of bytes."""

    location: str
    split: str
    index: int
    version: str
    text_column: str | None = None
    reach: Reach = ANYWHERE

    @property
    def source(self) -> str:
        return f"{self.location}:{self.split}[{self.index}]"

    def identity(self) -> str:
        return json.dumps(["dataset", self.split, self.index, self.version])

    def load(self, handles: Handles) -> Item:
        split = handles.dataset((self.location, self.split), Split)
        return split.read(self.index, self.source, self.text_column, self.reach)


def refs(src: str, columns: Columns, reach: Reach = ANYWHERE, inside: Reach = ANYWHERE) -> Iterator[DatasetRef]:
    """All rows of a dataset. ``src``: a saved folder, or ``hf://name[@revision][:split]`` (all splits by default).

    ``reach``: the permitted locations of images that are paths instead of bytes; ``inside``: those of the data files.
    Raises BadInput at once if it cannot be loaded, or has no image column or not the requested text column.
    """
    if not src.startswith(SCHEME):
        check_files(Path(src), inside)
    location, splits = _splits(src)
    for split, dataset in splits.items():
        image_column(dataset, f"{location}:{split}")
        columns.check_text(f"{location}:{split}", dataset.features)
    return (
        DatasetRef(location, split, index, str(dataset._fingerprint), columns.text, reach)
        for split, dataset in splits.items()
        for index in range(len(dataset))
    )


def _splits(src: str) -> tuple[str, dict[str, datasets.Dataset]]:
    location, split = src, ""
    if src.startswith(SCHEME):
        name, colon, after = src.removeprefix(SCHEME).rpartition(":")
        location, split = (SCHEME + name, after) if colon else (src, "")
    loaded = _load(location)
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    if split and split not in loaded:
        raise BadInput(f"{src}: no split {split!r}; it has {', '.join(map(str, loaded))}")
    return location, {split: loaded[split]} if split else dict(loaded)


def _load(location: str) -> Any:
    datasets.disable_progress_bars()
    try:
        if location.startswith(SCHEME):
            check_card(location)
            return _named(location.removeprefix(SCHEME))
        return datasets.load_from_disk(location)
    except BadInput:
        raise
    except Exception as error:  # loaders and the hub raise errors of any type; report name and reason
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{location}: cannot be loaded as a dataset ({reason})") from error


def _named(name: str) -> Any:
    """Load ``org/name``, ``org/name@revision``, or a local folder laid out like a dataset on the hub."""
    return datasets.load_dataset(name) if Path(name).exists() else _of_hub(*_revised(name))


def _revised(name: str) -> tuple[str, str | None]:
    """Split ``name@revision`` into a dataset's hub name and its revision, if any."""
    match = _REVISION.fullmatch(name)
    return (match[1], match[2]) if match is not None else (name, None)


def _of_hub(name: str, revision: str | None) -> Any:
    """Load from the hub once per process, so that a branch that moves meanwhile has no effect."""
    if (name, revision) not in _LOADED:
        _LOADED[name, revision] = datasets.load_dataset(name, revision=revision)
    return _LOADED[name, revision]


def commits() -> dict[str, str]:
    """Hub commits of the datasets loaded by this process, by requested name; read from the cache paths of `datasets`,
    ``…/name/configuration/version/COMMIT/name-train.arrow``, where these have one."""
    by_name: dict[str, str] = {}
    for (name, revision), loaded in _LOADED.items():
        for dataset in loaded.values() if isinstance(loaded, dict) else [loaded]:
            for folder in (Path(file["filename"]).parent.name for file in dataset.cache_files):
                if _COMMIT.fullmatch(folder):
                    by_name[f"{SCHEME}{name}" if revision is None else f"{SCHEME}{name}@{revision}"] = folder
    return by_name


class Split:
    """One split as listed by :func:`refs`, with images left encoded."""

    def __init__(self, location: str, split: str) -> None:
        dataset = _splits(location)[1][split]
        self._column = image_column(dataset, location)
        image, listed = datasets.Image(decode=False), _of_list(dataset.features[self._column]) is not None
        dataset = dataset.cast_column(self._column, datasets.Sequence(image) if listed else image)
        self._features = datasets.Features({name: undecoded(feature) for name, feature in dataset.features.items()})
        self._dataset = dataset.with_format("arrow")

    def read(self, index: int, source: str, text_column: str | None, reach: Reach = ANYWHERE) -> Item:
        row: dict[str, Any] = self._features.decode_example(self._dataset[index].to_pylist()[0])
        item = Item(source)
        item.data, item.problem = image_bytes(row.pop(self._column), self._column, reach=reach)
        item.text, whole = take_caption(row, text_column)
        item.url = row["url"] if isinstance(row.get("url"), str) else None
        item.meta = {name: value for name, value in row.items() if name != whole}
        return item


def undecoded(feature: Any) -> Any:
    """A feature, nested ones included, without the decoding that opens files (image, audio, video, PDF)."""
    if isinstance(feature, dict):
        return {name: undecoded(element) for name, element in feature.items()}
    if isinstance(feature, list | tuple):
        return [undecoded(element) for element in feature]
    if (inner := getattr(feature, "feature", None)) is not None:
        return dataclasses.replace(feature, feature=undecoded(inner))
    opens = hasattr(feature, "decode") and not isinstance(feature, getattr(datasets, "Json", ()))
    return dataclasses.replace(feature, decode=False) if opens else feature


def check_card(location: str) -> None:
    """Raise BadInput if a dataset card has data files elsewhere: `datasets` would fetch any of them."""
    for file, text in _cards(location.removeprefix(SCHEME)):
        try:
            card = huggingface_hub.DatasetCard(text).data if file.endswith(".md") else yaml.safe_load(text)
            configs = card.get("configs")
        except Exception:  # `datasets` reads it in the same way, and reports the error
            continue
        for name in _texts_in(configs):
            own = "::" not in name and (name.startswith(SCHEME) or "://" not in name)
            if not own or name.startswith(("/", "~")) or ".." in name.replace("\\", "/").split("/"):
                where = f"its card names data files elsewhere ({printable(name[:200])})"
                raise BadInput(f"{location}: {where}; download those yourself, and give what you have then")


def _cards(name: str) -> Iterator[tuple[str, str]]:
    """Name and text of a dataset's card and of the YAML file that may replace it."""
    for file in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        path = Path(name) / file
        try:
            if not Path(name).exists():
                on_hub, revision = _revised(name)
                path = Path(huggingface_hub.hf_hub_download(on_hub, file, repo_type="dataset", revision=revision))
            text = path.read_bytes().decode("utf-8", "replace")
        except Exception:  # missing, or the hub is unreachable: then `datasets` cannot read it either
            continue
        yield file, text


def _texts_in(configs: object) -> Iterator[str]:
    """Strings in ``data_files`` and ``data_dir`` of each configuration; YAML aliases are visited once."""
    entries = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    waiting = [entry.get(key) for entry in entries for key in ("data_files", "data_dir")]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def check_files(folder: Path, inside: Reach) -> None:
    """Raise BadInput if a saved dataset refers to files outside its folder: `datasets` would open any of them."""
    splits = _json(folder / "dataset_dict.json", inside).get("splits")
    names = splits if isinstance(splits, list) else [""]
    for name in names:
        if name and (problem := name_problem(name)) is not None:
            raise BadInput(f"{folder}/dataset_dict.json: {problem}; take it out")
        part = folder / str(name)
        files = _json(part / "state.json", inside).get("_data_files")
        for entry in files if isinstance(files, list) else []:
            file = entry.get("filename") if isinstance(entry, dict) else None
            problem = name_problem(file) or refusal(str(part / str(file)), inside)
            if problem is not None:
                raise BadInput(f"{part}/state.json: {problem}")


def _json(path: Path, inside: Reach) -> dict[str, Any]:
    """A JSON object that `datasets` will read; empty if there is none. Raises BadInput if access is not permitted."""
    if (reason := refusal(str(path), inside)) is not None:
        raise BadInput(reason)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # `datasets` reports the error
        return {}
    return value if isinstance(value, dict) else {}


def image_column(dataset: datasets.Dataset, where: str) -> str:
    """The column of type Image or list of Image, else one with a usual name. Raises BadInput if there is none."""
    features = dataset.features
    kinds = {name: _of_list(feature) or feature for name, feature in features.items()}
    typed = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    named = [name for name in IMAGE_COLUMNS if name in features]
    if len(typed) > 1 and not set(typed) & set(named):
        raise BadInput(f"{where}: several columns of images ({', '.join(typed)}); rename the one to take to 'image'")
    usable = [name for name in named if name in typed] or typed or named
    if not usable:
        raise BadInput(f"{where}: no column of images; its columns are {', '.join(features)}")
    return usable[0]


def _of_list(feature: Any) -> Any:
    """Element feature of a list; None for other features. `datasets` has had three notations for lists."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)
