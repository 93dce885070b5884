"""Exports as the loaders of pretraining teams read them: each with its own code, none of ours."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from capipe.stages.export.formats import FORMATS

from ...stages.exporting import captioned, export, final_shards, kept


def came_with(index: int) -> dict[str, Any]:
    """JSON as it comes from the web: other keys and types from row to row, numbers no reader has room for."""
    odd: list[Any] = [1, "one", {"two": [index]}, None, [], 2.5]
    address = {} if index % 4 == 1 else {"url": f"http://host/{index}.jpg" if index % 4 else index}
    return {**address, "mixed": odd[index % 6], "big": 2**70 + index, "image": {"deep": [{}]}, f"own{index}": index}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Final shards of jpg, png and webp images, the second one without any sample, in every format."""
    folder = tmp_path_factory.mktemp("exports")
    source = final_shards(folder / "final", shards=3, formats=("jpg", "png", "webp"), empty=(1,), meta=came_with)
    for format in FORMATS:
        export(source, folder / format, format)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``datasets.load_dataset`` with a cache of its own and no network."""
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return lambda *args, **options: datasets.load_dataset(
        *args, split="train", **({} if options.get("streaming") else {"cache_dir": str(tmp_path / "hf")}), **options
    )


def checked(found: list[tuple[str, str, Any]], source: Path) -> None:
    """(key, caption, PIL image) of every ok row, each image of the size that was rendered, once each and no more."""
    expected = {key: row["caption"] for key, row in kept(source).items()}
    assert {key: text for key, text, _ in found} == expected and len(found) == len(expected)
    assert {image.size for *_, image in found} == {(112, 112)}


def test_webdataset(mixed: dict[str, Path]) -> None:
    import webdataset

    tars = sorted(str(path) for path in mixed["webdataset"].glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("__key__", "txt", "jpg")
    checked(list(samples), mixed["final"])


def test_datasets_webdataset(mixed: dict[str, Path], hub: Callable[..., Any]) -> None:
    rows = hub("webdataset", data_files=str(mixed["webdataset"] / "*.tar"), features=card_features(mixed["webdataset"]))
    checked([(row["__key__"], row["txt"], row["jpg"]) for row in rows], mixed["final"])


def test_datasets_webdataset_without_the_card(tmp_path: Path, hub: Callable[..., Any]) -> None:
    source = captioned(tmp_path / "captions", 8)
    export(source, tmp_path / "out")
    rows = hub("webdataset", data_files=str(tmp_path / "out/*.tar"))
    texts = {key: row["captions"][0]["text"] for key, row in kept(source).items()}
    assert {row["__key__"]: row["txt"] for row in rows} == texts
    assert all(row["png"].size == (112, 112) for row in rows)


def card_features(folder: Path) -> Any:
    """The features that the card of a folder lists."""
    import datasets

    card = yaml.safe_load((folder / "README.md").read_text().split("\n---\n")[0].removeprefix("---\n"))
    return datasets.Features._from_yaml_list(card["dataset_info"]["features"])


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_folder_of_tars(mixed: dict[str, Path], hub: Callable[..., Any], streaming: bool) -> None:
    rows = list(hub(str(mixed["webdataset"]), streaming=streaming))
    checked([(row["__key__"], row["txt"], row["jpg"]) for row in rows], mixed["final"])
    notes = {row["json"]["note"] for row in rows}
    assert notes == {None, "text"}  # null in the first five: what `datasets` guesses without the card fails on the text


def test_datasets_parquet(mixed: dict[str, Path], hub: Callable[..., Any]) -> None:
    import datasets

    rows = hub("parquet", data_files=str(mixed["parquet"] / "data/*.parquet"))
    assert rows.features["image"] == datasets.Image()
    checked([(row["key"], row["caption"], row["image"]) for row in rows], mixed["final"])
    scores = {row["key"]: row["re_clip_score"] for row in rows}
    assert scores == {key: row["re_clip_score"] for key, row in kept(mixed["final"]).items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_folder_of_parquet(mixed: dict[str, Path], hub: Callable[..., Any], streaming: bool) -> None:
    rows = list(hub(str(mixed["parquet"]), streaming=streaming))
    checked([(row["key"], row["caption"], row["image"]) for row in rows], mixed["final"])
    for row in hub(str(mixed["parquet"])).cast_column("image", importlib.import_module("datasets").Image(decode=False)):
        assert hashlib.sha256(row["image"]["bytes"]).hexdigest()[:32] == row["uid"]


def test_what_came_with_an_image_is_in_parquet(mixed: dict[str, Path], hub: Callable[..., Any]) -> None:
    rows = {row["key"]: row for row in hub(str(mixed["parquet"]), streaming=True)}
    assert {row["url"] for row in rows.values()} == {None, *(f"http://host/{i}.jpg" for i in (2, 3, 6, 7))}
    told = json.loads(rows["000000003"]["json"])
    assert told["own3"] == 3 and told["big"] == str(2**70 + 3) and told["uid"] == rows["000000003"]["uid"]
    frame = importlib.import_module("pandas").read_parquet(mixed["parquet"] / "data")
    assert dict(zip(frame["key"], frame["json"], strict=True)) == {key: row["json"] for key, row in rows.items()}
    for key, row in rows.items():  # as it is in the tars
        assert json.loads(row["json"]) == tar_json(mixed["webdataset"])[key]


@functools.cache
def tar_json(folder: Path) -> dict[str, Any]:
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=False).to_tuple("__key__", "json")
    return {key: json.loads(data) for key, data in samples}


def test_more_workers_than_the_source_has_shards(mixed: dict[str, Path], tmp_path: Path) -> None:
    """With one shard and two workers webdataset stops; smaller shards are what they can share."""
    import torch
    import webdataset

    export(mixed["final"], tmp_path / "one", shard_size=100)
    export(mixed["final"], tmp_path / "small", shard_size=5)

    def read(folder: Path) -> list[Any]:
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        samples = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=webdataset.split_by_node)
        loader = torch.utils.data.DataLoader(
            samples.decode("pil").to_tuple("__key__", "txt", "jpg"), None, num_workers=2
        )
        return list(loader)

    with pytest.raises(ValueError, match=r"(?i)no samples|not enough shards|fewer shards"):
        read(tmp_path / "one")
    checked(read(tmp_path / "small"), mixed["final"])


@pytest.mark.parametrize("given", ["card", "imagefolder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_folder_of_pictures(
    mixed: dict[str, Path], hub: Callable[..., Any], given: str, streaming: bool
) -> None:
    folder = mixed["folder"]
    where = (str(folder),) if given == "card" else ("imagefolder",)
    rows = list(hub(*where, streaming=streaming, **({} if given == "card" else {"data_dir": str(folder)})))
    checked([(row["key"], row["text"], row["image"]) for row in rows], mixed["final"])


def test_trainers_of_image_models_read_a_folder_of_pictures(mixed: dict[str, Path]) -> None:
    """Their way: every picture, and the text file of the same name."""
    from PIL import Image

    pictures = [path for path in mixed["folder"].glob("images/*/*") if path.suffix in (".jpg", ".png", ".webp")]
    found = [(path.stem, path.with_suffix(".txt").read_text(), Image.open(path)) for path in pictures]
    checked(found, mixed["final"])


def test_datasets_chat_messages(mixed: dict[str, Path], hub: Callable[..., Any]) -> None:
    from PIL import Image

    folder = mixed["messages"]
    for rows in (hub(str(folder)), hub("json", data_files=str(folder / "messages.jsonl"))):
        found = [(r["id"], r["messages"][1]["content"], Image.open(folder / r["images"][0])) for r in rows]
        checked(found, mixed["final"])


def test_trls_own_code_takes_chat_messages(mixed: dict[str, Path]) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    for line in (mixed["messages"] / "messages.jsonl").read_text().splitlines():
        row = json.loads(line)
        image = object()
        for message in row["messages"]:  # its placeholder is a part of the content, as docs/consumers.md says
            message["content"] = message["content"].removeprefix("<image>\n")
        user, assistant = data_utils.prepare_multimodal_messages(row["messages"], [image])
        assert [part["type"] for part in user["content"]] == ["image", "text"] and user["content"][0]["image"] is image
        assert assistant["content"][0]["type"] == "text" and len(row["images"]) == 1


def test_llama_factorys_description_fits_the_messages(mixed: dict[str, Path]) -> None:
    """Its loader looks up these keys, and wants as many marks as images."""
    folder = mixed["messages"]
    about = json.loads((folder / "dataset_info.json").read_bytes())["captions"]
    columns, tags = about["columns"], about["tags"]
    for line in (folder / about["file_name"]).read_text().splitlines():
        row = json.loads(line)
        turns = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in row[columns["messages"]]]
        assert [role for role, _ in turns] == [tags["user_tag"], tags["assistant_tag"]]
        assert "".join(text for _, text in turns).count("<image>") == len(row[columns["images"]]) == 1
        assert all((folder / image).is_file() for image in row[columns["images"]])


def test_datasets_folder_of_conversations(mixed: dict[str, Path], hub: Callable[..., Any]) -> None:
    from PIL import Image

    rows = list(hub(str(mixed["llava"])))
    found = [(r["id"], r["conversations"][1]["value"], Image.open(mixed["llava"] / r["image"])) for r in rows]
    checked(found, mixed["final"])


def test_open_clips_training_loader(mixed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import open_clip_train.data
    import torch
    from open_clip_train.data import get_dataset_size, get_wds_dataset

    # open_clip 3.3 is written for webdataset 0.2, which has no mark between tars; with 1.0 it stops at the first one.
    expand = open_clip_train.data.tar_file_expander
    if "eof_value" in inspect.signature(expand).parameters:
        monkeypatch.setattr(open_clip_train.data, "tar_file_expander", functools.partial(expand, eof_value=None))
    folder = mixed["webdataset"]
    shards = f"{folder}/{{00000,00002}}.tar"
    assert get_dataset_size(shards) == (16, 2)  # from sizes.json
    args = argparse.Namespace(
        train_data=shards,
        train_num_samples=None,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=4,
        workers=0,
        world_size=1,
    )
    texts = [row["caption"] for row in kept(mixed["final"]).values()]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    info = get_wds_dataset(
        args,
        lambda image: torch.from_numpy(np.asarray(image).copy()),
        is_train=True,
        tokenizer=lambda text: torch.tensor([[vocabulary[text]]]),
    )
    batches = list(info.dataloader)
    assert info.dataloader.num_samples == 16 and [len(images) for images, _ in batches] == [4] * 4
    assert {images.shape[1:] for images, _ in batches} == {(112, 112, 3)}
    seen = sorted(int(number) for _, tokens in batches for number in tokens.flatten())
    assert seen == sorted(vocabulary[text] for text in texts)


def energon_index(folder: Path) -> dict[str, Any]:
    """Everything of an index but Energon's version and the random identity."""
    database = sqlite3.connect(folder / ".nv-meta/index.sqlite")
    tables = {name: sorted(database.execute(f"select * from {name}")) for name in ("samples", "sample_parts")}
    columns = {
        name: [row[1:4] for row in database.execute(f"pragma table_info({name})")]
        for name in ("samples", "sample_parts")
    }
    indexes = {row[0] for row in database.execute("select name from sqlite_master where type = 'index'")}
    database.close()
    offsets = {path.name: path.read_bytes() for path in folder.glob("*.idx")}
    counts = json.loads((folder / ".nv-meta/.info.json").read_bytes())["shard_counts"]
    return {**tables, "columns": columns, "indexes": indexes, "offsets": offsets, "counts": list(counts.items())}


@pytest.mark.parametrize("name", ["mixed", "captioned"])
def test_energons_own_tool_makes_the_same_index(mixed: dict[str, Path], tmp_path: Path, name: str) -> None:
    pytest.importorskip("megatron.energon")
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    ours = mixed["webdataset"]
    if name == "captioned":  # folders, long names and names beyond ASCII
        ours = tmp_path / "ours"
        export(captioned(tmp_path / "captions"), ours)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tars = sorted(path.name for path in ours.glob("*.tar"))
    for tar in tars:
        (theirs / tar).write_bytes((ours / tar).read_bytes())
    WebdatasetPreparator.prepare_dataset(theirs, tars, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1)
    assert energon_index(ours) == energon_index(theirs)


def test_energon_reads_it(mixed: dict[str, Path]) -> None:
    energon = pytest.importorskip("megatron.energon")
    from megatron.energon.epathlib import EPath
    from megatron.energon.tools.lint import check_index
    from torchvision.transforms.functional import to_pil_image

    folder = mixed["webdataset"]
    assert check_index(EPath(folder))
    dataset = energon.get_val_dataset(
        str(folder),
        split_part="train",
        batch_size=1,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    found = []
    for sample in energon.get_loader(dataset):
        caption = sample.caption[0] if isinstance(sample.caption, list) else sample.caption
        found.append((sample.__key__[0].rsplit("/", 1)[-1], caption, to_pil_image(sample.image[0])))
    checked(found, mixed["final"])


def test_pylance(mixed: dict[str, Path]) -> None:
    import io

    import lance
    from PIL import Image

    rows = lance.dataset(str(mixed["lance"] / "train.lance")).to_table(columns=["key", "caption", "image"]).to_pylist()
    checked([(row["key"], row["caption"], Image.open(io.BytesIO(row["image"]))) for row in rows], mixed["final"])
    assert {row["key"]: row["image"] for row in rows} == tar_images(mixed["webdataset"])


@functools.cache
def tar_images(folder: Path) -> dict[str, bytes]:
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    return dict(webdataset.WebDataset(tars, shardshuffle=False).to_tuple("__key__", "jpg"))


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_lance(mixed: dict[str, Path], hub: Callable[..., Any], streaming: bool) -> None:
    """As it is on the Hub, by the card; and the bytes of each image are those in the tars, of whatever format."""
    import datasets

    rows = hub(str(mixed["lance"]), streaming=streaming)
    assert rows.features["image"] == datasets.Image()
    checked([(row["key"], row["caption"], row["image"]) for row in rows], mixed["final"])
    raw = rows.cast_column("image", datasets.Image(decode=False))
    assert {row["key"]: row["image"]["bytes"] for row in raw} == tar_images(mixed["webdataset"])
    scores = {row["key"]: row["re_clip_score"] for row in rows}
    assert scores == {key: row["re_clip_score"] for key, row in kept(mixed["final"]).items()}


def test_a_first_image_that_is_a_webp_is_no_video(tmp_path: Path, hub: Callable[..., Any]) -> None:
    source = final_shards(tmp_path / "final", formats=("webp", "jpg"), shards=1)
    export(source, tmp_path / "out", "lance")
    checked([(row["key"], row["caption"], row["image"]) for row in hub(str(tmp_path / "out"))], source)


def decoded(batch: Any, **options: Any) -> list[tuple[str, str, bytes]]:
    """A batch as a training loop wants it: at module level, for worker processes."""
    return [(row["key"], row["caption"], row["image"]) for row in batch.to_pylist()]


def test_torch_reads_lance_in_batches(mixed: dict[str, Path]) -> None:
    import io

    import torch
    from lance.torch.data import LanceDataset
    from PIL import Image

    table = str(mixed["lance"] / "train.lance")
    batches = LanceDataset(table, batch_size=4, columns=["key", "caption", "image"], to_tensor_fn=decoded)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=0)
    found = [sample for batch in loader for sample in batch]
    checked([(key, caption, Image.open(io.BytesIO(data))) for key, caption, data in found], mixed["final"])
    assert {key: data for key, _, data in found} == tar_images(mixed["webdataset"])
