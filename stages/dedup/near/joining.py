"""Candidates confirmed by their signatures and joined into groups as they come.

What is in one group already is not confirmed again, and a group that is known to repeat a reference is compared only
with references of a lower number: a million pictures of one kind cost a million confirmations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arrays import NONE, U64, Bools, Indices
from ..groups import Components
from ..search.near_hashes import near_in_cluster
from .hash_values import Kinds, are_compared

Same = Callable[[Indices, Indices], Bools]  # whether nodes a[k] and b[k] show the same image

NO_MATCH = np.iinfo(np.int64).max
PRODUCTS = 1 << 20  # candidates at once: some 100 MB


@dataclass(frozen=True)
class Members:
    """Who has which hash. ``starts``: of each hash in ``nodes`` and ``kinds``, and their number.

    ``names``: number of each node; from ``files`` on they are references.
    """

    hashes: U64
    starts: Indices
    nodes: Indices
    kinds: Kinds
    names: Indices
    files: int


class Joining:
    """Groups of the nodes of one task, by candidates that are given as pairs of positions in ``members.hashes``."""

    def __init__(self, members: Members, same: Same) -> None:
        self._members, self._same = members, same
        self._groups = Components(len(members.names))
        self._is_file = members.names < members.files
        self._matches = np.full(len(members.names), NO_MATCH)  # by root: the lowest reference that it repeats

    def result(self) -> tuple[Indices, Indices]:
        """Pairs of names: each file with the first one of its group, and that one with the reference it repeats."""
        names = self._members.names
        nodes = np.flatnonzero(self._is_file)
        roots = self._groups.roots(nodes)
        joined = nodes != roots
        first = nodes[~joined]
        matched = first[self._matches[first] != NO_MATCH]
        left = np.concatenate([names[nodes[joined]], names[matched]])
        return left, np.concatenate([names[roots[joined]], self._matches[matched]])

    def add(self, left: Indices, right: Indices) -> None:
        """Confirm the images with hashes ``left[k]`` and ``right[k]``, which may be the same hash."""
        hashes, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        labels = self.labels(hashes)()[places]
        apart = (labels[: len(left)] != labels[len(left) :]) | (labels[: len(left)] < 0)
        left, right = left[apart], right[apart]
        counts = np.diff(self._members.starts)
        products = counts[left] * counts[right]
        large = products > PRODUCTS
        for i, j in zip(left[large].tolist(), right[large].tolist(), strict=True):
            self._add_large(i, j)
        left, right, ends = left[~large], right[~large], np.cumsum(products[~large])
        first = 0
        while first < len(left):
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + PRODUCTS, side="right")))
            self._confirm(*_products(self._members.starts, left[first:last], right[first:last]))
            first = last

    def add_cluster(self, chosen: Indices, radius: int) -> None:
        """Confirm all near pairs among some hashes (ascending), most of which are near each other."""
        hashes = self._members.hashes[chosen]

        def labels(some: U64) -> Callable[[], Indices]:
            return self.labels(chosen[np.searchsorted(hashes, some)])

        for left, right, _ in near_in_cluster(hashes, radius, labels):
            self.add(*(chosen[np.searchsorted(hashes, side)] for side in (left, right)))

    def labels(self, hashes: Indices) -> Callable[[], Indices]:
        """A function that returns the present group of each hash, ``(n,)``: a negative number of its own where its
        images are of several groups, or where one is a reference."""
        if not len(hashes):
            return lambda: NONE
        starts, counts = self._members.starts[hashes], np.diff(self._members.starts)[hashes]
        first = np.cumsum(counts) - counts
        nodes = self._members.nodes[np.arange(counts.sum()) + np.repeat(starts - first, counts)]
        files_only = np.logical_and.reduceat(self._is_file[nodes], first)

        def now() -> Indices:
            roots = self._groups.roots(nodes)
            lowest = np.minimum.reduceat(roots, first)
            one = files_only & (lowest == np.maximum.reduceat(roots, first))
            return np.where(one, lowest, -1 - hashes)

        return now

    def _add_large(self, left: int, right: int) -> None:
        """Two hashes, or one, of so many images that not all of their pairs are listed at once: some rows at a time,
        those outside the largest group first, the first of all alone."""
        starts = self._members.starts
        rows, columns = (np.arange(starts[side], starts[side + 1]) for side in (left, right))
        budget = 1
        while True:
            largest = self._largest(columns)
            outside = rows[self._roots(rows) != largest]
            if not len(outside):
                break
            block = outside[: max(1, budget // len(columns))]
            self._confirm(np.repeat(block, len(columns)), np.tile(columns, len(block)))
            rows = np.setdiff1d(rows, block, assume_unique=True)
            if left == right:
                columns = rows
            budget = min(max(2 * budget, len(columns)), PRODUCTS)
        if left == right:
            return
        outside = columns[self._roots(columns) != largest]
        height = max(1, PRODUCTS // max(len(rows), 1))
        for start in range(0, len(outside), height):
            block = outside[start : start + height]
            self._confirm(np.repeat(rows, len(block)), np.tile(block, len(rows)))

    def _roots(self, members: Indices) -> Indices:
        return self._groups.roots(self._members.nodes[members])

    def _largest(self, members: Indices) -> int:
        """Root of the group with most of these members, -1 where there are none."""
        roots, counts = np.unique(self._roots(members), return_counts=True)
        return int(roots[counts.argmax()]) if len(roots) else -1

    def _confirm(self, left: Indices, right: Indices) -> None:
        """Confirm pairs of members, of those that are compared and not in one group."""
        members = self._members
        a, b = members.nodes[left], members.nodes[right]
        wanted = are_compared(members.kinds[left], members.kinds[right]) & (a != b)
        a, b = a[wanted], b[wanted]
        a, b = np.where(self._is_file[a], a, b), np.where(self._is_file[a], b, a)
        files = self._is_file[b]
        self._join(np.minimum(a[files], b[files]), np.maximum(a[files], b[files]))
        self._match(a[~files], b[~files])

    def _join(self, a: Indices, b: Indices) -> None:
        """Join files ``a[k] < b[k]`` that show the same image.

        First one pair for each group, which joins all if all are the same image; then twice as many each time.
        """
        a, b = _distinct(a, b)
        most = 1
        while True:
            roots = self._groups.roots(a), self._groups.roots(b)
            apart = roots[0] != roots[1]
            a, b = a[apart], b[apart]
            if not len(a):
                return
            now = _rank(np.maximum(*roots)[apart]) < most
            same = self._same(a[now], b[now])
            self._merge(a[now][same], b[now][same])
            a, b = a[~now], b[~now]
            most *= 2

    def _merge(self, a: Indices, b: Indices) -> None:
        before = self._groups.roots(np.concatenate([a, b]))
        self._groups.join(a, b)
        np.minimum.at(self._matches, self._groups.roots(before), self._matches[before])

    def _match(self, files: Indices, references: Indices) -> None:
        """Compare files with references, the lowest ones first, until each group has its match."""
        files, references = _distinct(files, references)
        order = np.argsort(self._members.names[references], kind="stable")
        files, references = files[order], references[order]
        most = 1
        while True:
            names, roots = self._members.names[references], self._groups.roots(files)
            lower = names < self._matches[roots]
            files, references, names, roots = (part[lower] for part in (files, references, names, roots))
            if not len(files):
                return
            now = _rank(roots) < most
            same = self._same(files[now], references[now])
            np.minimum.at(self._matches, roots[now][same], names[now][same])
            files, references = files[~now], references[~now]
            most *= 2


def _products(starts: Indices, left: Indices, right: Indices) -> tuple[Indices, Indices]:
    """All pairs of a member of ``left[k]`` and one of ``right[k]``; of one hash, each pair of its members once."""
    heights, widths = (starts[side + 1] - starts[side] for side in (left, right))
    sizes = heights * widths
    which = np.repeat(np.arange(len(left)), sizes)
    within = np.arange(len(which)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    row, column = np.divmod(within, widths[which])
    kept = (left[which] != right[which]) | (row < column)
    return (starts[left[which]] + row)[kept], (starts[right[which]] + column)[kept]


def _distinct(a: Indices, b: Indices) -> tuple[Indices, Indices]:
    """The pairs, each once, in order."""
    width = int(b.max()) + 1 if len(b) else 1
    codes = np.unique(a * width + b)
    return codes // width, codes % width


def _rank(owners: Indices) -> Indices:
    """For each entry the number of earlier ones with the same owner."""
    order = np.argsort(owners, kind="stable")
    ordered = owners[order]
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    rank = np.empty(len(owners), dtype=np.int64)
    rank[order] = np.arange(len(owners)) - np.repeat(first, np.diff(first, append=len(owners)))
    return rank
