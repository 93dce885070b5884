"""What ``capipe ingest`` can be pointed at, told apart by look, as a deterministic stream of item references.

Every file, member and row becomes an item, usable or not; only sidecars (``.txt``, ``.json``) ride with their image.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from fsspec.core import url_to_fs

from ..errors import BadInput
from ..manifests.samples import IMAGE_EXTENSIONS, split_name
from ..manifests.shards import expand, read_places
from ..manifests.status import Status
from ..manifests.tar import Member, scan
from . import tables
from .items import Extent, FileRef, ItemRef, ProblemRef, TarRef, join, open_binary, stem_of

_HF = "hf://"
_SIDECARS = ("txt", "json")


def open_sources(sources: Sequence[str], path_column: str | None = None) -> Iterator[ItemRef]:
    """The items of all ``sources``, one source after the other, in an order that depends on their content alone.

    Each may be a folder of images, tars (one, a glob, ``{00..99}.tar``, a folder of them), a table of paths (Parquet,
    CSV, TSV, JSON lines), a saved dataset of Hugging Face or ``hf://name[:split]``, or a single file; local or fsspec.
    Raises BadInput at once where one is missing or holds nothing of these.
    """
    return chain.from_iterable([_open(source, path_column) for source in sources])


def _open(src: str, path_column: str | None) -> Iterator[ItemRef]:
    extension = src.rpartition(".")[2].lower()
    if src.startswith(_HF) and extension not in (*tables.EXTENSIONS, "tar"):
        return _dataset(src)
    if extension == "tar":
        return _tars(src)
    if any(c in src for c in "*?[{") and not _exists(src):
        raise BadInput(f"{src}: only tars are taken by pattern; let the shell expand it, or name the folder")
    if not _exists(src):
        raise BadInput(f"{src}: no such file or folder")
    if not _is_folder(src):
        return tables.refs(src, path_column) if extension in tables.EXTENSIONS else _single_file(src)
    if "://" not in src and ((Path(src) / "dataset_dict.json").is_file() or (Path(src) / "state.json").is_file()):
        return _dataset(src)
    return _tars(src) if _holds_tars(src) else _folder(src)


def source_places(sources: Sequence[str]) -> list[str]:
    """What ``sources`` are, for :func:`refuse_overwriting`: each as it is named, and the tars that a pattern or a
    folder of links names. Raises BadInput where one is missing."""
    places: list[str] = []
    for src in sources:
        places += read_places(src, expand(src)) if _is_of_tars(src) else [src]
    return places


def _is_of_tars(src: str) -> bool:
    if src.rpartition(".")[2].lower() == "tar":
        return True
    return not src.startswith(_HF) and _exists(src) and _is_folder(src) and _holds_tars(src)


def _exists(src: str) -> bool:
    if "://" not in src:
        return os.path.lexists(src)
    try:
        fs, path = url_to_fs(src)
    except (ValueError, ImportError) as error:
        raise BadInput(f"{src}: this kind of path cannot be opened ({error}); install its fsspec driver") from None
    return bool(fs.exists(path))


def _is_folder(src: str) -> bool:
    if "://" not in src:
        return Path(src).is_dir()
    fs, path = url_to_fs(src)
    return bool(fs.isdir(path))


def _dataset(src: str) -> Iterator[ItemRef]:
    from . import hf  # imports the `datasets` package, which takes seconds

    return hf.refs(src)


# --- folders ----------------------------------------------------------------------------------------------------------


def _holds_tars(src: str) -> bool:
    """Whether a folder is one of shards. Raises BadInput where it is that and a folder of images as well."""
    if "://" not in src:
        names = [entry.name for entry in os.scandir(src)]
    else:
        fs, path = url_to_fs(src)
        names = [str(entry).rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)]
    if not any(name.endswith(".tar") for name in names):
        return False
    image = next((name for name in sorted(names) if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS), None)
    if image is not None:
        raise BadInput(f"{src}: holds tars and loose images ({image}); name the tars by {src}/*.tar, or move one kind")
    return True


def _single_file(src: str) -> Iterator[ItemRef]:
    """One file given by itself, with its sidecars; shells expand ``photos/*`` to these."""
    root, _, name = src.rpartition("/")
    if "://" in src:
        fs, path = url_to_fs(src)
        return iter([FileRef(root, name, int(fs.size(path)))])
    listing = {Path(src).name: src}
    for extension in _SIDECARS:
        sidecar = f"{stem_of(src)}.{extension}"
        if sidecar != src and Path(sidecar).is_file():
            listing[Path(sidecar).name] = sidecar
    root = "/" if src.startswith("/") and not root else root
    sizes = {name: _local_entry(path) for name, path in listing.items()}
    return islice(_file_refs(root, "", sizes), 1)  # the file itself comes first


def _folder(src: str) -> Iterator[ItemRef]:
    return _remote_folder(src) if "://" in src else _local_folder(src, "")


def _local_folder(root: str, folder: str) -> Iterator[ItemRef]:
    """Depth first, each folder's files before its sub-folders, both by name; hidden ones are passed over."""
    here = join(root, folder) if folder else root
    try:
        with os.scandir(here) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        yield ProblemRef(here, Status.READ_ERROR, f"folder cannot be listed: {error.strerror}")
        return
    folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    yield from _file_refs(root, folder, {e.name: _local_entry(e.path) for e in entries if e.name not in set(folders)})
    for name in folders:
        yield from _local_folder(root, join(folder, name))


Entry = int | None | tuple[Status, str]  # a file's size; None: it cannot be looked at now; or why it is no file


def _local_entry(path: str) -> Entry:
    """The size of a regular file, or why there is nothing to read (a pipe would block for ever)."""
    try:
        info = Path(path).stat()
    except OSError:  # a link whose share is not mounted, for instance: reading it will say why
        return None
    if stat.S_ISREG(info.st_mode):
        return info.st_size
    if stat.S_ISDIR(info.st_mode):
        return Status.UNSUPPORTED, "a symbolic link to a folder: not followed, name the folder itself"
    return Status.UNSUPPORTED, "not a regular file (a pipe, socket or device)"


def _remote_folder(src: str) -> Iterator[ItemRef]:
    fs, path = url_to_fs(src)
    found = fs.find(path, detail=True)
    prefix = len(path.rstrip("/")) + 1
    folders: dict[str, dict[str, Entry]] = defaultdict(dict)
    for full, info in sorted(found.items()):
        folder, _, name = str(full)[prefix:].rpartition("/")
        if not any(part.startswith(".") for part in (*folder.split("/"), name)):
            folders[folder][name] = int(info["size"])
    for folder in sorted(folders):
        yield from _file_refs(src, folder, folders[folder])


def _file_refs(root: str, folder: str, files: Mapping[str, Entry]) -> Iterator[ItemRef]:
    """The items among one folder's files (sizes, or why unreadable): each file, but for sidecars of another one."""
    stems = {stem_of(name) for name in files if not _is_sidecar(name)}
    for name, size in files.items():
        stem, path = stem_of(name), join(folder, name)
        if _is_sidecar(name) and stem in stems:
            continue
        if isinstance(size, tuple):
            yield ProblemRef(join(root, path), *size)
            continue
        if size is None:
            yield FileRef(root, path, None)
            continue
        sizes = [files.get(f"{stem}.{extension}") for extension in _SIDECARS if not _is_sidecar(name)] or [None, None]
        text, meta = (size if isinstance(size, int) else None for size in sizes)
        yield FileRef(root, path, size, text, meta)


def _is_sidecar(name: str) -> bool:
    return name.endswith((".txt", ".json"))


# --- tars -------------------------------------------------------------------------------------------------------------


def _tars(pattern: str) -> Iterator[ItemRef]:
    shards = expand(pattern)
    return chain.from_iterable(tar_refs(shard.url) for shard in shards)


def tar_refs(url: str) -> Iterator[ItemRef]:
    """The items of one tar, found by its headers: no image is read.

    Unlike a reader that goes forward, this joins sidecars that do not lie beside their image (``tar`` of a folder), and
    keys may repeat: the rows get keys of their own. What is no image by name is tried where nothing else is there.
    """
    groups: dict[str, list[dict[str, Member]]] = {}
    order: list[dict[str, Member] | ProblemRef] = []
    try:
        with open_binary(url) as stream:
            for member in scan(stream):
                if member.problem is not None:
                    status = Status.CORRUPT if member.damaged else Status.UNSUPPORTED
                    order.append(ProblemRef(f"{url}/{member.name or f'byte {member.offset}'}", status, member.problem))
                    continue
                key, extension = split_name(member.name.removeprefix("./"))
                of_key = groups.setdefault(key, [])
                group = next((g for g in reversed(of_key) if extension not in g), None)
                if group is None:
                    group = {}
                    of_key.append(group)
                    order.append(group)
                group[extension] = member
    except OSError as error:
        order.append(ProblemRef(url, Status.READ_ERROR, f"the tar cannot be read: {error.strerror or error}"))
    for entry in order:
        yield from [entry] if isinstance(entry, ProblemRef) else _group_refs(url, entry)


def _group_refs(url: str, group: dict[str, Member]) -> Iterator[ItemRef]:
    sidecars = {extension for extension in group if extension.rpartition(".")[2] in _SIDECARS}
    others = [extension for extension in group if extension not in sidecars]
    images = [extension for extension in others if extension.rpartition(".")[2] in IMAGE_EXTENSIONS] or others
    ignored = tuple(extension for extension in others if extension not in images)
    if not images:
        first = next(iter(group.values()))
        yield ProblemRef(f"{url}/{first.name}", Status.UNSUPPORTED, f"no image with this key ({', '.join(group)})")
    for extension in images:
        prefix = extension.rpartition(".")[0]
        text, meta = (
            _extent(group, [f"{prefix}.{sidecar}", sidecar] if prefix else [sidecar]) for sidecar in _SIDECARS
        )
        yield TarRef(url, Extent(*_place(group[extension])), text, meta, ignored)


def _place(member: Member) -> tuple[str, int, int]:
    return member.name, member.offset, member.size


def _extent(group: Mapping[str, Member], names: Iterable[str]) -> Extent | None:
    return next((Extent(*_place(group[name])) for name in names if name in group), None)
