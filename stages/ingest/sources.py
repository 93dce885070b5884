"""Sources of ``capipe ingest``, their kind detected automatically, as a deterministic stream of item references.

Every file, tar member and row becomes an item, usable or not; only sidecars (``.txt``, ``.caption``, ``.json``) are
part of their image's item.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from ...errors import BadInput
from ...manifests.files.compressed import tar_stem
from ...manifests.files.image_types import IMAGE_EXTENSIONS
from ...manifests.files.outside import ANYWHERE, Reach, is_url, refusal, source_folder
from ...manifests.files.stores import filesystem
from ...manifests.samples import (
    META_EXTENSIONS,
    SIDECAR_EXTENSIONS,
    TEXT_EXTENSIONS,
    is_sidecar,
    same_name,
)
from ...manifests.shards import expand, read_places
from ...manifests.status import Status
from ..reading.columns import USUAL, Columns
from ..reading.files import join
from . import tables, tars
from .folder_metadata import METADATA, with_metadata, with_sidecar_captions
from .source_refs import FileRef, ItemRef, ProblemRef, Sidecar, stem_of
from .usable import Opened, with_images

_HF = "hf://"
_KINDS = (TEXT_EXTENSIONS, META_EXTENSIONS)


def open_sources(
    sources: Sequence[str],
    columns: Columns = USUAL,
    image_key: str | None = None,
    reach: Reach = ANYWHERE,
    follow_links: bool = False,
) -> Iterator[ItemRef]:
    """Items of all ``sources``, one source after the other, in an order that depends on their content alone.

    Each may be a folder of images, tars (one, a glob, ``{00..99}.tar``, a folder of them), a table (Parquet, CSV, TSV,
    JSON or JSON lines; a folder of Parquet), a saved Hugging Face dataset or ``hf://name[:split]``, or a single file;
    local or fsspec. Tars may be compressed. ``columns``: the user's column options for tables and datasets. ``reach``:
    the permitted locations of paths in rows; a folder's links and file lists may leave it only with ``follow_links``.
    Raises BadInput at once if a source is missing or is none of these (:mod:`.usable`).
    """
    if columns.folder is not None and not (_exists(columns.folder) and _is_folder(columns.folder)):
        raise BadInput(f"--image-folder {columns.folder}: no such folder")
    if reach.within is not None and not Path(reach.within).is_dir():
        raise BadInput(f"--within {reach.within}: no such folder")
    return with_images([_opened(source, columns, image_key, reach, follow_links) for source in sources])


def _opened(src: str, columns: Columns, image_key: str | None, reach: Reach, follow_links: bool) -> Opened:
    items = _open(src, columns, image_key, reach, follow_links)
    is_file = not src.startswith(_HF) and _exists(src) and not _is_folder(src)
    is_table = src.rpartition(".")[2].lower() in tables.EXTENSIONS and not _is_of_an_image(src)
    return Opened(src, items, one_of_many=tar_stem(src) is not None or (is_file and not is_table))


def _open(src: str, columns: Columns, image_key: str | None, reach: Reach, follow_links: bool) -> Iterator[ItemRef]:
    extension = src.rpartition(".")[2].lower()
    is_tar = tar_stem(src) is not None
    if src.startswith(_HF) and extension not in tables.EXTENSIONS and not is_tar:
        return _dataset(src, columns, reach)
    if is_tar:
        return with_sidecar_captions(tars.refs(src, image_key), columns)
    if any(c in src for c in "*?[{") and not _exists(src):
        raise BadInput(f"{src}: only tars are taken by pattern; let the shell expand it, or name the folder")
    if not _exists(src):
        raise BadInput(f"{src}: no such file or folder")
    if not _is_folder(src):
        is_table = extension in tables.EXTENSIONS and not _is_of_an_image(src)
        if is_table:
            return tables.refs(src, columns, reach)
        return with_sidecar_captions(_single_file(src, reach, follow_links), columns)
    inside = _inside(src, reach, follow_links)
    if "://" not in src and ((Path(src) / "dataset_dict.json").is_file() or (Path(src) / "state.json").is_file()):
        return _dataset(src, columns, reach, inside)
    names = _listed(src)
    if _holds_tars(src, names):
        return with_sidecar_captions(tars.refs(src, image_key, inside), columns)
    if parquets := _parquets(src, names):
        return chain.from_iterable([_part(join(src, name), columns, reach, inside) for name in parquets])
    elsewhere = is_url(src) and not follow_links and not src.startswith(("file://", "local://"))
    names_reach = replace(inside, within=reach.within, source=src if elsewhere else inside.source)
    return with_sidecar_captions(with_metadata(src, _folder(src, inside), columns, inside, names_reach), columns)


def _inside(folder: str, reach: Reach, follow_links: bool) -> Reach:
    """The permitted locations for links in a folder given by the user: --within is only for paths in files."""
    source = None if follow_links or is_url(folder) else source_folder(folder or ".")
    return Reach(public_only=reach.public_only, source=source)


def _part(table: str, columns: Columns, reach: Reach, inside: Reach) -> Iterator[ItemRef]:
    """Rows of a table in a source folder; for a link that leaves the folder, one item with that problem."""
    reason = refusal(table, inside)
    return iter([ProblemRef(table, Status.UNSUPPORTED, reason)]) if reason else tables.refs(table, columns, reach)


def source_places(sources: Sequence[str]) -> list[str]:
    """Paths of ``sources`` for :func:`refuse_overwriting`: each as given, with the tars of a pattern or of a folder of
    links. Raises BadInput if one is missing."""
    places: list[str] = []
    for src in sources:
        places += read_places(src, expand(src)) if _is_of_tars(src) else [src]
    return places


def _is_of_tars(src: str) -> bool:
    if tar_stem(src) is not None:
        return True
    return not src.startswith(_HF) and _exists(src) and _is_folder(src) and _holds_tars(src, _listed(src))


def _exists(src: str) -> bool:
    if "://" not in src:
        return os.path.lexists(src)
    fs, path = filesystem(src)
    return fs.exists(path)


def _is_folder(src: str) -> bool:
    if "://" not in src:
        return Path(src).is_dir()
    fs, path = filesystem(src)
    return fs.isdir(path)


def _dataset(src: str, columns: Columns, reach: Reach, inside: Reach = ANYWHERE) -> Iterator[ItemRef]:
    from . import huggingface  # deferred: importing `datasets` takes seconds

    return huggingface.refs(src, columns, reach, inside)


# --- folders ----------------------------------------------------------------------------------------------------------


def _listed(src: str) -> list[str]:
    """Sorted names of a folder's direct entries."""
    if "://" not in src:
        return sorted(entry.name for entry in os.scandir(src))
    fs, path = filesystem(src)
    return sorted(str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in fs.listed(path))


def _holds_tars(src: str, names: Sequence[str]) -> bool:
    """True if a folder holds shards. Raises BadInput if it holds images as well."""
    if not any(tar_stem(name) for name in names):
        return False
    image = next((name for name in names if _is_image_name(name)), None)
    if image is not None:
        raise BadInput(f"{src}: holds tars and loose images ({image}); name the tars by {src}/*.tar, or move one kind")
    return True


def _is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _parquets(src: str, names: Sequence[str]) -> list[str]:
    """Parquet files of a folder that is a partitioned table; none if it also has images or other folders."""
    seen = [name for name in names if not name.startswith((".", "_"))]
    parts = [name for name in seen if name.endswith(".parquet") and name not in METADATA]
    if not parts or any(_is_image_name(name) for name in seen):
        return []
    return [] if any(_is_folder(join(src, name)) for name in seen if name not in parts) else parts


def _is_of_an_image(src: str) -> bool:
    """True if a ``.json`` is the sidecar of an image: ``photos/*`` expands to both."""
    if "://" in src or not src.lower().endswith(".json"):
        return False
    return any(Path(f"{stem_of(src)}.{extension}").is_file() for extension in IMAGE_EXTENSIONS)


def _single_file(src: str, reach: Reach, follow_links: bool) -> Iterator[ItemRef]:
    """A single file with its sidecars; shells expand ``photos/*`` to such files.

    The file may be a link to anywhere, as the user gave it; its sidecars must be inside its folder.
    """
    root, _, name = src.rpartition("/")
    if "://" in src:
        fs, path = filesystem(src)
        return iter([FileRef(root, name, fs.size(path), own=True)])
    root = "/" if src.startswith("/") and not root else root
    others = (other for other in _sidecar_names(name) if other != name and Path(join(root, other)).is_file())
    sizes = {file: _local_entry(join(root, file)) for file in (name, *others)}
    refs = islice(_file_refs(root, "", sizes, _inside(root, reach, follow_links)), 1)  # the file itself is first
    return (replace(ref, own=True) if isinstance(ref, FileRef) else ref for ref in refs)


def _sidecar_names(name: str) -> Iterator[str]:
    """Possible names of a file's sidecars: its folder is not listed, as it may have a million files."""
    stem = stem_of(name)
    for same in dict.fromkeys([stem, *(unicodedata.normalize(form, stem) for form in ("NFC", "NFD"))]):
        for extension in SIDECAR_EXTENSIONS:
            yield from (f"{same}.{extension}", f"{same}.{extension.upper()}")


def _folder(src: str, inside: Reach) -> Iterator[ItemRef]:
    return _remote_folder(src, inside) if "://" in src else _local_folder(src, "", inside)


def _local_folder(root: str, folder: str, inside: Reach) -> Iterator[ItemRef]:
    """Items of a folder, depth first, files before sub-folders, both by name; hidden ones are skipped."""
    here = join(root, folder) if folder else root
    try:
        with os.scandir(here) as listing:
            entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        yield ProblemRef(here, Status.READ_ERROR, f"folder cannot be listed: {error.strerror}")
        return
    folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    apart = set(folders)
    yield from _file_refs(root, folder, {e.name: _local_entry(e.path) for e in entries if e.name not in apart}, inside)
    for name in folders:
        yield from _local_folder(root, join(folder, name), inside)


Entry = int | None | tuple[Status, str]  # a file's size; None if stat fails; or why it is not a file


def _local_entry(path: str) -> Entry:
    """Size of a regular file, or why it cannot be read (a pipe would block forever)."""
    try:
        info = Path(path).stat()
    except OSError:  # for instance a link to an unmounted share: reading it will give the error
        return None
    if stat.S_ISREG(info.st_mode):
        return info.st_size
    if stat.S_ISDIR(info.st_mode):
        return Status.UNSUPPORTED, "a symbolic link to a folder: not followed, name the folder itself"
    return Status.UNSUPPORTED, "not a regular file (a pipe, socket or device)"


def _remote_folder(src: str, inside: Reach) -> Iterator[ItemRef]:
    fs, path = filesystem(src)
    listing = fs.find(path)
    prefix = len(path.rstrip("/")) + 1
    folders: dict[str, dict[str, Entry]] = defaultdict(dict)
    for full, info in sorted(listing.items()):
        folder, _, name = str(full)[prefix:].rpartition("/")
        if not any(part.startswith(".") for part in (*folder.split("/"), name)):
            elsewhere = _leads_elsewhere(str(full)[prefix:])
            folders[folder][name] = (Status.UNSUPPORTED, _ELSEWHERE) if elsewhere else int(info["size"])
    for folder in sorted(folders):
        yield from _file_refs(src, folder, folders[folder], inside)


_ELSEWHERE = "its name is a path or URL of its own"


def _leads_elsewhere(name: str) -> bool:
    """True if an object's name, appended to its folder's URL, would lead elsewhere: stores allow any names."""
    return name.startswith("/") or "::" in name or "://" in name or ".." in name.split("/")


def _file_refs(root: str, folder: str, files: Mapping[str, Entry], inside: Reach) -> Iterator[ItemRef]:
    """Items of one folder's files (name to size or problem): every file except the sidecars of another one."""
    beside: dict[str, list[Sidecar]] = defaultdict(list)
    for name, size in files.items():
        if _names_sidecar(name) and isinstance(size, int):
            beside[same_name(stem_of(name))].append(Sidecar(name, size))
    pairs = {
        name: [_nearest(name, beside.get(same_name(stem_of(name)), []), kind) for kind in _KINDS]
        for name in files
        if not _names_sidecar(name)
    }
    taken = {sidecar.name for pair in pairs.values() for sidecar in pair if sidecar is not None}
    away = {same_name(stem_of(name)) for name in pairs if files[name] is None}
    taken |= {name for name in files if name not in pairs and files[name] is None and same_name(stem_of(name)) in away}
    for name, size in files.items():
        if name in taken:
            continue
        path = join(folder, name)
        if isinstance(size, tuple):
            yield ProblemRef(join(root, path), *size)
        elif size is None:
            yield FileRef(root, path, None, reach=inside)
        else:
            text, meta = pairs.get(name, (None, None))
            yield FileRef(root, path, size, text, meta, inside)


def _names_sidecar(name: str) -> bool:
    return "." in name and is_sidecar(name.lower())


def _nearest(image: str, beside: Iterable[Sidecar], kind: tuple[str, ...]) -> Sidecar | None:
    """The sidecar of a kind whose name is closest to the image's; others of that kind are separate items."""
    stem = stem_of(image)

    def distance(sidecar: Sidecar) -> tuple[bool, int, str]:
        return stem_of(sidecar.name) != stem, kind.index(_extension(sidecar.name)), sidecar.name

    return min((sidecar for sidecar in beside if _extension(sidecar.name) in kind), key=distance, default=None)


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()
