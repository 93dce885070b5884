"""The data set of torch: what :func:`.opening.open_dataset` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from ...errors import BadInput
from .order import stream_sizes
from .position import Position
from .rows import RowCounts
from .stream import Plan, samples

if TYPE_CHECKING:
    import datasets


class ImageCaptions(IterableDataset[dict[str, Any]]):
    """Images with a caption each, for a DataLoader with any number of workers; see :func:`.opening.open_dataset`.

    A sample: ``key``, ``uid``, ``image`` (bytes, or as ``decode`` makes it), ``caption``, ``caption_name``, ``scores``
    (numbers by name, None where there is none) and ``json`` (of the tar, None if there is none).
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan, self._position, self._delivered = plan, Position(), 0

    @property
    def counts(self) -> RowCounts:
        """All rows of the shards, of all ranks, by what becomes of them."""
        return sum(self._plan.counts, RowCounts())

    @property
    def epoch(self) -> int:
        return self._position.epoch

    def __len__(self) -> int:
        """Samples of this rank in an epoch, which every rank has as many of."""
        return self._plan.share

    def set_epoch(self, epoch: int) -> None:
        """Order and choice of captions of the next iterations, also in workers that live on. Without it they repeat."""
        if type(epoch) is not int or epoch < 0:
            raise BadInput(f"set_epoch({epoch!r}): give a whole number from zero on")
        self._position.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 0) if info is None else (info.id, info.num_workers)
        share = stream_sizes(len(self), max(1, workers))
        stream, start = self._position.begin(worker, workers, share)
        self._delivered = start
        for sample in samples(self._plan, self.epoch, stream, len(share), start):
            self._delivered += 1
            yield sample

    def state_dict(self, delivered: int | None = None, batch_size: int = 1) -> dict[str, Any]:
        """The position in this epoch, as JSON: the same on all ranks, so that one of them may save it.

        ``delivered``: the samples of this epoch that the training loop of a rank has taken, those before a resume
        included; ``batch_size``: the DataLoader's. Both are needed with DataLoader workers, which read ahead; without
        workers the samples are counted here. Raises BadInput if no batch ends after so many samples.
        """
        if get_worker_info() is not None:
            raise BadInput("state_dict: call it where the training loop is, not in a DataLoader worker")
        workers = self._position.workers
        if delivered is None:
            if workers:
                raise BadInput(f"state_dict: {workers} DataLoader workers read ahead; give delivered= and batch_size=")
            delivered, batch_size = self._delivered, 1
        if type(delivered) is not int or type(batch_size) is not int or batch_size < 1:
            raise BadInput(f"delivered={delivered!r}, batch_size={batch_size!r}: give whole numbers")
        share = stream_sizes(len(self), max(1, workers))
        return self._position.state(self._plan.settings(), delivered, batch_size, share)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration after the samples of a state, in its epoch.

        With as many DataLoader workers and the same batch size, the samples that follow are those that would have
        followed, in their order. Raises BadInput if the state is of other data, options, or number of ranks.
        """
        self._position.load(state, self._plan.settings(), len(self))
        self._delivered = int(state["delivered"])

    def as_datasets(self, streams: int = 8) -> datasets.IterableDataset:
        """The samples of this rank and epoch for Hugging Face's `datasets`, in as many shards as there are streams.

        Images are `datasets.Image`, ``json`` is text. Its own ``state_dict`` resumes it; its readers split the shards
        by DataLoader worker. Do not split it by node: this is one rank's share.
        """
        from .huggingface import as_datasets

        return as_datasets(self._plan, self.epoch, streams)
