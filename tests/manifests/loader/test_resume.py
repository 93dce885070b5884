"""Going on after a kill: the samples that follow are those that would have followed, in their order."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import capipe
from capipe.errors import BadInput
from capipe.manifests.loader import stream
from capipe.manifests.loader.dataset import ImageCaptions

from .captioned import ROWS, Batch, Captioned, keys, loaded, write_captions

MIX = {"dense": 0.7, "org": 0.3}


def opened(data: Captioned, **options: Any) -> ImageCaptions:
    return capipe.open_dataset(data.shards, **{"captions": data.captions, "mix": MIX, "shuffle": 8, **options})


def resumed(data: Captioned, state: dict[str, Any], **options: Any) -> ImageCaptions:
    dataset = opened(data, **options)
    dataset.load_state_dict(json.loads(json.dumps(state)))
    return dataset


def first_batch(dataset: ImageCaptions, batch_size: int = 3) -> Batch:
    """By two workers, which are then left."""
    batch: Batch = next(iter(loaded(dataset, 2, batch_size)))
    return batch


def seen(batches: list[Batch]) -> list[list[tuple[str, str]]]:
    return [[(sample["key"], sample["caption"]) for sample in batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_same_samples_follow(workers: int, data: Captioned) -> None:
    """After every batch of a rank's epoch, the smaller last ones of the workers included; twice."""
    options = {"rank": 1, "world": 2, "seed": 5}
    dataset = opened(data, **options)
    dataset.set_epoch(2)
    whole = list(loaded(dataset, workers))
    taken = 0
    for number, batch in enumerate(whole):
        state = dataset.state_dict(taken, 3)
        again = resumed(data, state, **options)
        assert again.epoch == 2
        rest = list(loaded(again, workers))
        assert seen(rest) == seen(whole[number:])
        if number == 1:
            later = again.state_dict(taken + len(rest[0]), 3)
            assert seen(list(loaded(resumed(data, later, **options), workers))) == seen(whole[number + 1 :])
        taken += len(batch)
    assert taken == ROWS // 2
    assert list(loaded(resumed(data, dataset.state_dict(taken, 3), **options), workers)) == []


def test_without_workers_samples_are_counted_here(data: Captioned) -> None:
    dataset = opened(data)
    iterator = iter(dataset)
    first = list(islice(iterator, 7))
    state = dataset.state_dict()
    assert state["delivered"] == 7
    again = resumed(data, state)
    assert again.state_dict()["delivered"] == 7
    assert keys([list(again)]) == keys([list(iterator)]) and len(first) == 7
    assert again.state_dict()["delivered"] == ROWS


@pytest.mark.parametrize("persistent", [False, True])
def test_a_state_holds_for_one_epoch(persistent: bool, data: Captioned) -> None:
    dataset = opened(data)
    whole = keys(loaded(dataset, 2))
    again = resumed(data, dataset.state_dict(12, 3))
    loader = loaded(again, 2, persistent_workers=persistent)
    assert keys(loader) == whole[12:] and keys(loader) == whole
    again.set_epoch(1)
    dataset.set_epoch(1)
    assert keys(loader) == keys(loaded(dataset, 2)) != whole


def test_a_state_of_another_epoch_than_the_next_is_left_behind(data: Captioned) -> None:
    dataset = opened(data)
    again = resumed(data, dataset.state_dict(12, 3))
    again.set_epoch(1)
    dataset.set_epoch(1)
    assert keys([list(again)]) == keys([list(dataset)])


def test_only_what_is_needed_is_read_again(data: Captioned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that were delivered are passed over as numbers: shards without others are not opened."""
    opens: list[str] = []
    given = stream.selected_rows
    monkeypatch.setattr(stream, "selected_rows", lambda *each: (opens.append(each[0].name), given(*each))[1])
    dataset = opened(data)
    list(resumed(data, dataset.state_dict(ROWS - 2)))
    assert 1 <= len(opens) <= 2


def _train(data: Captioned, log: Path, workers: int) -> None:
    """A training loop that saves its state after each batch, in a process group of its own."""
    os.setsid()
    dataset = opened(data)
    delivered = 0
    for batch in loaded(dataset, workers):
        with log.open("a") as file:
            file.write(json.dumps([sample["key"] for sample in batch]) + "\n")
        delivered += len(batch)
        scratch = log.with_suffix(".new")
        scratch.write_text(json.dumps(dataset.state_dict(delivered, 3)))
        scratch.replace(log.with_suffix(".state"))
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed(workers: int, data: Captioned, tmp_path: Path) -> None:
    whole = keys(loaded(opened(data), workers))
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=_train, args=(data, log, workers))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < 4):
        time.sleep(0.002)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    state = json.loads(log.with_suffix(".state").read_text())
    logged = [key for line in log.read_text().splitlines() for key in json.loads(line)]
    assert 6 <= state["delivered"] < ROWS and logged[: state["delivered"]] == whole[: state["delivered"]]
    assert keys(loaded(resumed(data, state), workers)) == whole[state["delivered"] :]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_state_of_other_data(data: Captioned, tmp_path: Path) -> None:
    state = opened(data).state_dict(3)
    write_captions(data.shards, tmp_path / "captions", model="another")
    with pytest.raises(BadInput, match=r"of another data set or order \(rows: "):
        resumed(data._replace(captions=tmp_path / "captions"), state)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"shuffle": 9}, "shuffle: 8 -> 9"),
        ({"tail": "repeat"}, 'tail: "drop" -> "repeat"'),
        ({"mix": {"dense": 1}}, "mix.dense"),
        ({"rank": 0, "world": 2}, "world: 1 -> 2"),
        ({"where": "width > 1"}, "where: null"),
    ],
)
def test_a_state_of_other_options(options: dict[str, Any], problem: str, data: Captioned) -> None:
    state = opened(data).state_dict(3)
    with pytest.raises(BadInput, match=problem):
        resumed(data, state, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_of_other_workers(workers: int, data: Captioned) -> None:
    dataset = opened(data)
    first_batch(dataset)
    again = resumed(data, dataset.state_dict(3, 3))
    with pytest.raises(BadInput, match=f"saved with 2 DataLoader workers, and there are {workers or 1}"):
        list(loaded(again, workers))


def test_a_state_while_workers_read_ahead(data: Captioned) -> None:
    dataset = opened(data)
    first_batch(dataset)
    with pytest.raises(BadInput, match="2 DataLoader workers read ahead; give delivered= and batch_size="):
        dataset.state_dict()
    with pytest.raises(BadInput, match="no batch of 3 ends after 4 samples"):
        dataset.state_dict(4, 3)
    with pytest.raises(BadInput, match="100 samples of 32"):
        dataset.state_dict(100, 3)
    with pytest.raises(BadInput, match="whole numbers"):
        dataset.state_dict(3, 0)


def test_another_batch_size_within_an_epoch(data: Captioned) -> None:
    dataset = opened(data)
    first_batch(dataset)
    again = resumed(data, dataset.state_dict(6, 3))
    first_batch(again, 4)
    with pytest.raises(BadInput, match="batch_size=4: this epoch began with 3"):
        again.state_dict(10, 4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "of version 2"),
        ({"epoch": -1}, "none that a data set saves"),
        ({"delivered": 33}, "none that a data set saves"),
        ({"delivered": "3"}, "none that a data set saves"),
        ({"delivered": 4, "batch_size": 3, "streams": 2}, "none that a data set saves"),
        ({"streams": 0}, "none that a data set saves"),
        ({"batch_size": 0}, "none that a data set saves"),
        ({"settings": None}, "none of a data set of capipe's"),
        ({"settings": {}}, "of another data set"),
    ],
)
def test_a_damaged_state(change: dict[str, Any], problem: str, data: Captioned) -> None:
    state = opened(data).state_dict(3)
    with pytest.raises(BadInput, match=problem):
        resumed(data, {**state, **change})


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"epoch": 0}])
def test_no_state(state: dict[str, Any], data: Captioned) -> None:
    with pytest.raises(BadInput, match="none of a data set of capipe's"):
        resumed(data, state)


def test_an_epoch_is_a_number(data: Captioned) -> None:
    for epoch in (-1, 1.5, "1"):
        with pytest.raises(BadInput, match="set_epoch"):
            opened(data).set_epoch(epoch)  # type: ignore[arg-type]
