"""A task that confirms candidates by their signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ....manifests.artifact import Artifact
from ....manifests.manifest import ShardRecord
from ..arrays import Bools, Indices
from ..perceptual_hash import SIGNATURE_BYTES, Signatures
from ..signatures.confirm import same_picture
from .files import all_numbers, read_numbers, write_numbers
from .joining import Joining, Members
from .looks import read_looks
from .partition import CANDIDATE_COLUMNS, MEMBER_COLUMNS, candidates_of, members_of

JOINED_COLUMNS = pa.schema([("left", pa.int64()), ("right", pa.int64())])  # nodes: see Joining.result
_AT_ONCE = 4096  # pairs whose signatures are copied at once: 50 MB


@dataclass(frozen=True)
class ConfirmTask:
    """``number``: of the task in the plan; ``looks``: shards with its signatures, in order; ``files``: nodes from this
    number on are references."""

    name: str
    number: int
    looks: Sequence[str]
    files: int
    radius: int


def write_joined(task: ConfirmTask, artifact: Artifact) -> ShardRecord:
    """Confirm the candidates of a task; write and commit what they join."""
    value, hashes, own, cluster, node, kinds, row = all_numbers(artifact, members_of(task.number), MEMBER_COLUMNS)
    rows, first, places = np.unique(row, return_index=True, return_inverse=True)
    starts = np.flatnonzero(np.diff(value, prepend=-1))
    members = Members(hashes[starts], np.append(starts, len(value)), places, kinds, node[first], task.files)
    with artifact.begin_files(f"{task.name}-signatures") as scratch:  # they may exceed memory
        shape = len(rows), SIGNATURE_BYTES
        signatures: Signatures = np.memmap(scratch.path("all"), dtype=np.uint8, mode="w+", shape=shape)
        count = 0
        for shard in task.looks:
            count += read_looks(artifact, shard, task.number, signatures[count:])
        joining = Joining(members, _Compared(signatures))
        joining.add(*(np.flatnonzero(own[starts]),) * 2)
        for left, right in read_numbers(artifact, candidates_of(task.number), CANDIDATE_COLUMNS.names):
            joining.add(left, right)
        for name in np.unique(cluster[cluster >= 0]):
            joining.add_cluster(np.flatnonzero(cluster[starts] == name), task.radius)
    left, right = joining.result()
    return write_numbers(artifact, task.name, JOINED_COLUMNS, [{"left": left, "right": right}])


class _Compared:
    """Compares images by their places in ``signatures``."""

    def __init__(self, signatures: Signatures) -> None:
        self._signatures = signatures

    def __call__(self, a: Indices, b: Indices) -> Bools:
        same = np.zeros(len(a), dtype=bool)
        for start in range(0, len(a), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            same[part] = same_picture(self._signatures[a[part]], self._signatures[b[part]])
        return same
