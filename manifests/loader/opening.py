"""``capipe.open_dataset``: everything that a training run names is checked here, before the first image is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import get_args

import torch

from ...errors import BadInput
from .catalog import query
from .counts import count_all, save, saved
from .dataset import ImageCaptions
from .images import Decode, decoder
from .order import Tail
from .rows import RowCounts, refuse_other_images
from .sources import opened
from .stream import Plan, identity


def open_dataset(
    shards: str | os.PathLike[str],
    *,
    captions: str | os.PathLike[str] | Mapping[str, str] | None = None,
    scores: str | os.PathLike[str] | Sequence[str] = (),
    where: str | None = None,
    mix: Mapping[str, float] | None = None,
    columns: Sequence[str] | None = None,
    decode: Decode = None,
    seed: int = 0,
    shuffle: int = 1000,
    tail: Tail = "drop",
    rank: int | None = None,
    world: int | None = None,
    images: Sequence[str] = (),
    counts: str | os.PathLike[str] | None = None,
) -> ImageCaptions:
    """Images of original tars, each with a caption and scores from artifacts that were made of them.

    ``shards``: an artifact, a folder, a glob, ``{000..099}.tar``, or an index of `capipe filter --index`; any URL.
    ``captions``: an artifact of `capipe annotate`, or several by labels of your own. ``scores``: artifacts with a row
    for each row of the shards: scores, marks of `dedup`, a selection. Rows that one of them leaves out are left out.
    ``where``: a condition as of `capipe filter --keep`, over the columns of all of these; ``clip_score`` is that of the
    new caption. ``mix``: weights of captions by name (prompts; ``re``: the first of the new captions; ``org``: the
    original one; ``caption``: that of a selection); which one a sample has depends on seed, epoch and uid alone. An
    image that lacks some takes one of the others by their weights; without any of them it is left out.
    ``columns``: those in a sample's ``scores``; by default all numbers. ``decode``: None for the bytes, ``"pil"``,
    ``"array"`` (uint8, height x width x 3) or a function of the bytes.
    ``seed`` orders shards and rows anew each epoch; ``shuffle``: images in the buffer of each worker, 0 for the order
    of the shards. ``tail``: ranks have equal counts; what is left over, fewer samples than ranks, is dropped, or the
    first samples are repeated. ``rank``, ``world``: of torch.distributed, else of the environment, else 0 of 1.
    ``images``: folders and URLs below which the tars of an index may be read. ``counts``: a file that keeps the counts
    of selected rows, so that the next start reads no sidecar for them.

    Raises BadInput or ArtifactMismatch, in one line, for whatever does not fit together.
    """
    by_label = {str(label): os.fspath(url) for label, url in captions.items()} if isinstance(captions, Mapping) else {}
    if captions is not None and not isinstance(captions, Mapping):
        by_label = {"": os.fspath(captions)}
    elif "" in by_label:
        raise BadInput("captions: a label is empty; name each artifact, or give one without a label")
    urls = [os.fspath(scores)] if isinstance(scores, str | os.PathLike) else [os.fspath(url) for url in scores]
    place = _place(rank, world)
    _check_numbers(seed, shuffle, tail)
    function = decoder(decode)
    sources, tables = opened(os.fspath(shards), by_label, urls, [images] if isinstance(images, str) else images)
    wanted, weights = query(tables, where, mix, columns)
    same = identity(sources, wanted, weights)
    kept = os.fspath(counts) if counts is not None else None
    found = saved(kept, same) if kept is not None else None
    if found is None:
        refuse_other_images(sources[0], wanted)
        found = count_all(sources, wanted)
        if kept is not None and place[0] == 0:
            save(kept, same, found)
    plan = Plan(sources, found, wanted, weights, seed, shuffle, tail, *place, function)
    _refuse_nothing(plan, os.fspath(shards))
    return ImageCaptions(plan)


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and number of ranks. Raises BadInput if they are none, or if one of them is given alone."""
    if (rank is None) != (world is None):
        raise BadInput(f"rank={rank}, world={world}: give both, or leave both to torch.distributed")
    if rank is None or world is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world = _of_environment("RANK", 0), _of_environment("WORLD_SIZE", 1)
    if type(rank) is not int or type(world) is not int or not 0 <= rank < world:
        raise BadInput(f"rank={rank!r}, world={world!r}: give a rank from 0 on, under the number of ranks")
    return rank, world


def _of_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise BadInput(f"{name}={text!r} in the environment: not a whole number; give rank= and world=")
    return int(text)


def _check_numbers(seed: int, shuffle: int, tail: Tail) -> None:
    if type(seed) is not int:
        raise BadInput(f"seed={seed!r}: give a whole number")
    if type(shuffle) is not int or shuffle < 0:
        raise BadInput(f"shuffle={shuffle!r}: give the number of images in the buffer, 0 for the order of the shards")
    if tail not in get_args(Tail):
        raise BadInput(f"tail={tail!r}: drop or repeat")


def _refuse_nothing(plan: Plan, shards: str) -> None:
    """Raise BadInput unless every rank has a sample."""
    if plan.share and plan.selected:
        return
    total = sum(plan.counts, RowCounts())
    if plan.selected:
        text = f"{plan.selected:,} samples for {plan.world:,} ranks; use fewer, or tail='repeat'"
    else:
        text = f"no row of {total.rows:,} is selected: {total.left_out:,} have no usable image or are left out, "
        text += f"{total.filtered:,} are not kept by where=, {total.without_caption:,} have no caption of the mix"
    raise BadInput(f"{shards}: {text}")
