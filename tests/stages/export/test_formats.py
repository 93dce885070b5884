"""What an export writes: bytes that are copies, names that are one, conversations, Parquet."""

from __future__ import annotations

import hashlib
import io
import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.samples import read_samples
from capipe.manifests.shards import expand
from capipe.manifests.verify import verify
from capipe.stages.export.formats import FORMATS
from capipe.stages.export.llava import INSTRUCTIONS, instruction

from ..exporting import VERSIONED, captioned, export, final_shards, kept, rows_of, table_of


def tar_images(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Extension and bytes of every image, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            for sample in read_samples(stream):
                (extension,) = [ext for ext in sample.members if ext not in ("txt", "json")]
                found[sample.key] = (extension, sample.members[extension].data or b"")
    return found


def test_tars_of_one_format_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    assert export(source, tmp_path / "out") == []
    for path in source.glob("0*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "out" / path.name).stat().st_ino != path.stat().st_ino
    assert json.loads((tmp_path / "out/sizes.json").read_bytes()) == {"00000.tar": 8, "00001.tar": 8}
    assert verify(str(tmp_path / "out")).faults == []
    assert [shard.name for shard in expand(str(tmp_path / "out"))] == ["00000", "00001"]  # an input like any other


def test_two_runs_alike_differ_in_their_times_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the source on: what is copied from stage to stage, the card above all, holds no time either."""
    moment, found = time.gmtime, []
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(time, "gmtime", lambda now=None, day=number: moment((now or 0) + 86400 * day))
        source = final_shards(Path("final"), formats=("jpg", "png"))
        for format in FORMATS:
            export(source, Path(format), format)
        files = [path for path in Path().rglob("*") if path.is_file() and path.parent.name not in VERSIONED]
        found.append({str(path): path.read_bytes() for path in files})
    assert found[0].keys() == found[1].keys()
    differing = {name for name, data in found[0].items() if data != found[1][name]}
    assert differing == {f"{name}/_capipe/times.jsonl" for name in ("final", *FORMATS)}


def test_linked_tars_are_the_same_files(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", link=True)
    assert (source / "00000.tar").samefile(tmp_path / "out/00000.tar")
    assert not (source / "00000.parquet").samefile(tmp_path / "out/00000.parquet")
    assert verify(str(tmp_path / "out")).faults == []


def test_images_of_several_formats_get_one_name_and_keep_their_bytes(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", formats=("jpg", "png", "webp"))
    notes = export(source, tmp_path / "out")
    assert notes is not None and "called .jpg" in notes[0]
    before, after = tar_images(source), tar_images(tmp_path / "out")
    assert {extension for extension, _ in before.values()} == {"jpg", "png", "webp"}
    assert {extension for extension, _ in after.values()} == {"jpg"}
    assert {key: data for key, (_, data) in before.items()} == {key: data for key, (_, data) in after.items()}
    assert verify(str(tmp_path / "out")).faults == []
    export(source, tmp_path / "kept", image_extension="keep")
    assert tar_images(tmp_path / "kept") == before
    loader = yaml.safe_load((tmp_path / "kept/.nv-meta/dataset.yaml").read_text())
    assert set(loader["field_map"]["image"].split(",")) == {"jpg", "png", "webp"}
    export(source, tmp_path / "webp", image_extension="webp")
    assert {extension for extension, _ in tar_images(tmp_path / "webp").values()} == {"webp"}


def test_a_shard_without_a_sample_has_no_tar_and_its_rows(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", shards=3, empty=(0,))
    for format in FORMATS:
        out = tmp_path / format
        export(source, out, format)
        assert rows_of(out) == rows_of(source)
        assert verify(str(out)).faults == []
    assert sorted(path.name for path in (tmp_path / "webdataset").glob("*.tar")) == ["00001.tar", "00002.tar"]
    assert "00000.tar" not in (tmp_path / "webdataset/.nv-meta/split.yaml").read_text()
    assert sorted(path.name for path in (tmp_path / "parquet/data").iterdir()) == ["00001.parquet", "00002.parquet"]


def test_parquet_has_image_caption_and_scores_of_the_ok_rows_in_small_groups(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", shards=1, rows=300, formats=("jpg", "png"))
    export(source, tmp_path / "out", "parquet")
    file = pq.ParquetFile(tmp_path / "out/data/00000.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert groups == [100, 100]
    expected, images = kept(source), tar_images(source)
    rows = file.read().to_pylist()
    assert [row["key"] for row in rows] == list(expected)
    for row in rows:
        listed = expected[row["key"]]
        assert (row["caption"], row["uid"]) == (listed["caption"], listed["uid"])
        assert {name: row[name] for name in ("re_clip_score", "org_clip_score", "org_caption")} == {
            name: listed[name] for name in ("re_clip_score", "org_clip_score", "org_caption")
        }
        extension, data = images[row["key"]]
        assert row["image"] == {"bytes": data, "path": f"{row['key']}.{extension}"}
        assert json.loads(row["json"])["uid"] == row["uid"] and row["url"] is None
    assert not {"status", "error"} & set(file.schema_arrow.names)


def test_llava_has_a_conversation_and_a_file_for_every_pair(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", formats=("jpg", "png"), rows=24)
    export(source, tmp_path / "out", "llava")
    conversations = json.loads((tmp_path / "out/llava.json").read_bytes())
    expected = kept(source)
    assert [entry["id"] for entry in conversations] == list(expected)
    asked = set()
    for entry in conversations:
        row, image = expected[entry["id"]], (tmp_path / "out" / entry["image"]).read_bytes()
        assert hashlib.sha256(image).hexdigest()[:32] == row["uid"]
        Image.open(io.BytesIO(image)).verify()
        human, answer = entry["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{instruction(row['uid'])}"}
        assert answer == {"from": "gpt", "value": row["caption"]}
        asked.add(human["value"])
    assert 3 <= len(asked) <= len(INSTRUCTIONS)


def test_llava_captions_that_would_mislead_a_trainer(tmp_path: Path) -> None:
    odd = {0: "", 1: "look at <image> here", 2: 'a "quoted"\nline\u2028 and {braces}'}
    source = final_shards(tmp_path / "final", caption=lambda index, text: odd.get(index, text))
    notes = export(source, tmp_path / "out", "llava")
    entries = {entry["id"]: entry for entry in json.loads((tmp_path / "out/llava.json").read_bytes())}
    assert "000000000" not in entries and not (tmp_path / "out/images/00000/000000000.jpg").exists()
    assert entries["000000001"]["conversations"][1]["value"] == "look at [image] here"
    assert entries["000000002"]["conversations"][1]["value"] == odd[2]
    assert notes is not None and len(notes) == 2 and "2 pairs with an empty caption" in notes[0]
    assert verify(str(tmp_path / "out")).faults == []


def test_no_pair_makes_an_empty_list(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", caption=lambda index, text: " ")
    export(source, tmp_path / "out", "llava")
    assert json.loads((tmp_path / "out/llava.json").read_bytes()) == []


@pytest.mark.parametrize("format", list(FORMATS))
def test_captioned_tars_of_another_tool(tmp_path: Path, format: str) -> None:
    source = captioned(tmp_path / "captions")
    export(source, tmp_path / "out", format)
    assert verify(str(tmp_path / "out")).faults == []
    captions = {row["key"]: row["captions"][0]["text"] for row in rows_of(source)}
    match format:
        case "parquet":
            rows = pq.read_table(tmp_path / "out/data/crawl.parquet").to_pylist()
            assert {row["key"]: row["caption"] for row in rows} == captions
        case "llava":
            entries = json.loads((tmp_path / "out/llava.json").read_bytes())
            assert {entry["id"]: entry["conversations"][1]["value"] for entry in entries} == captions
            assert all((tmp_path / "out" / entry["image"]).is_file() for entry in entries)
        case "lance":
            rows = table_of(tmp_path / "out").to_pylist()
            assert {row["key"]: row["caption"] for row in rows} == captions
            assert [row["captions"] for row in rows] == [row["captions"] for row in rows_of(source)]
        case "folder":
            lines = (tmp_path / "out/metadata.jsonl").read_text().splitlines()
            assert {entry["key"]: entry["text"] for entry in map(json.loads, lines)} == captions
        case "messages":
            lines = (tmp_path / "out/messages.jsonl").read_text().splitlines()
            told = {entry["id"]: entry["messages"][1]["content"] for entry in map(json.loads, lines)}
            assert told == captions
        case _:
            assert list(tar_images(tmp_path / "out")) == list(captions)


def test_another_licence_rewrites_the_card_and_no_shard(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out")
    manifest = (tmp_path / "out/_capipe/manifest.jsonl").read_bytes()
    export(source, tmp_path / "out", license="cc0-1.0")
    assert (tmp_path / "out/_capipe/manifest.jsonl").read_bytes() == manifest
    assert "license: cc0-1.0" in (tmp_path / "out/README.md").read_text()


def test_fresh_removes_what_another_format_left(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out")
    with pytest.raises(ArtifactMismatch, match="format"):
        export(source, tmp_path / "out", "llava")
    export(source, tmp_path / "out", "llava", fresh=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json", "_capipe"} | {
        "README.md",
        "croissant.json",
        "llava.json",
        "images",
    }
    export(source, tmp_path / "out", "parquet", fresh=True)
    assert not (tmp_path / "out/images").exists() and (tmp_path / "out/data/00000.parquet").exists()
    export(source, tmp_path / "out", fresh=True)
    assert not (tmp_path / "out/data").exists()
    assert verify(str(tmp_path / "out")).faults == []


def test_verify_sees_what_was_changed_afterwards(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out")
    (tmp_path / "out/sizes.json").write_text("{}")
    (tmp_path / "out/00001.tar.idx").write_bytes(b"")
    faults = verify(str(tmp_path / "out")).faults
    assert len(faults) == 2 and "sizes.json" in "".join(faults) and "00001.tar.idx" in "".join(faults)
    export(source, tmp_path / "llava", "llava")
    (tmp_path / "llava/images/00000/000000001.jpg").write_bytes(b"other")
    (tmp_path / "llava/images/00000/000000002.jpg").unlink()
    faults = verify(str(tmp_path / "llava")).faults
    assert len(faults) == 2 and "not the image of its uid" in faults[0] and "cannot be read" in faults[1]


def test_a_source_that_is_not_what_it_says(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    tar = source / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    for format in FORMATS:
        assert export(source, tmp_path / format, format) is None
        out = Artifact.open(str(tmp_path / format))
        assert "00001.tar: its bytes are not those its manifest lists" in out.quarantined()["00001"]
        assert list(out.committed()) == ["00000"]
        assert not (tmp_path / format / "README.md").exists()


def test_a_source_that_was_made_again(tmp_path: Path) -> None:
    export(final_shards(tmp_path / "final"), tmp_path / "out")
    Artifact.create(str(tmp_path / "final"), "other", {}, {}, fresh=True).close()
    (tmp_path / "final/_capipe/config.json").unlink()
    final_shards(tmp_path / "final", caption=lambda index, text: text + " again")
    with pytest.raises(ArtifactMismatch, match=r"shard 00000 of .* changed since this export was made"):
        export(tmp_path / "final", tmp_path / "out")
    (tmp_path / "final/_capipe/config.json").unlink()
    (tmp_path / "final/_capipe/manifest.jsonl").unlink()
    for path in (tmp_path / "final").glob("0*"):
        path.unlink()
    final_shards(tmp_path / "final", shards=1)
    with pytest.raises(ArtifactMismatch, match="no shard 00001 any more"):
        export(tmp_path / "final", tmp_path / "out")


def test_formats_need_unique_keys_where_readers_go_by_them(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", key=lambda shard, index: f"k{index}")
    for format in ("webdataset", "llava"):
        with pytest.raises(BadInput, match=r"key 'k0' is in shard 00000 and in 00001.*capipe ingest"):
            export(source, tmp_path / format, format)
        assert not (tmp_path / format).exists()
    export(source, tmp_path / "parquet", "parquet")
    assert pq.ParquetFile(tmp_path / "parquet/data/00001.parquet").metadata.num_rows == 8


def test_keys_of_rows_without_a_sample_may_repeat(tmp_path: Path) -> None:
    names = {4: "left-out", 5: "broken"}
    source = final_shards(tmp_path / "final", rows=6, key=lambda s, i: names.get(i, f"{s}{i}"))
    export(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/sizes.json").read_bytes()) == {"00000.tar": 4, "00001.tar": 4}


def test_a_folder_has_names_that_every_system_takes(tmp_path: Path) -> None:
    names = {
        0: "a/b",
        1: "A/B",
        2: "a_b",
        3: ".hidden/c ",
        6: "x" * 300,
        7: "x" * 300 + "y",
        8: 'q:"*?<>|',
        9: "日本 ü",
        12: "CON",
        13: "trail ",
        14: "100%2F",
        15: "Con",
    }
    source = final_shards(tmp_path / "final", shards=1, rows=18, key=lambda shard, index: names.get(index, f"k{index}"))
    for format in ("folder", "messages", "llava"):
        export(source, tmp_path / format, format)
        assert verify(str(tmp_path / format)).faults == []
    entries = [json.loads(line) for line in (tmp_path / "folder/metadata.jsonl").read_text().splitlines()]
    found = {entry["key"]: entry["file_name"] for entry in entries}
    expected = {"a/b": "a%2Fb", "A/B": "%41%2F%42", "a_b": "a_b", ".hidden/c ": "%2Ehidden%2Fc%20", "日本 ü": "日本 ü"}
    expected |= {"CON": "%43ON", "Con": "%43%6F%6E", "trail ": "trail%20", "100%2F": "100%252F"}
    assert {key: found[key] for key in expected} == {k: f"images/00000/{v}.jpg" for k, v in expected.items()}
    assert len({name.casefold() for name in found.values()}) == len(entries) == 12
    assert all(len(name.rpartition("/")[2].encode()) < 180 for name in found.values())
    listed = kept(source)
    for entry in entries:
        path = tmp_path / "folder" / entry["file_name"]
        assert path.with_name(path.name.removesuffix(".jpg") + ".txt").read_text() == entry["text"]
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:32] == entry["uid"] == listed[entry["key"]]["uid"]


def test_captions_in_text_files_are_byte_for_byte(tmp_path: Path) -> None:
    odd = {0: "", 1: "look at <image> here", 2: "two\nlines\n", 3: "  \ufeff cr\r\nlf "}
    source = final_shards(tmp_path / "final", caption=lambda index, text: odd.get(index, text))
    notes = export(source, tmp_path / "out", "folder")
    for index, text in odd.items():
        assert (tmp_path / f"out/images/00001/00001000{index}.txt").read_bytes() == text.encode()
    assert (
        notes is not None
        and "2 pairs have an empty caption" in notes[0]
        and "4 captions have several lines" in notes[1]
    )
    (tmp_path / "out/images/00001/000010001.txt").write_text("other")
    (tmp_path / "out/images/00001/000010002.txt").unlink()
    faults = verify(str(tmp_path / "out")).faults
    assert len(faults) == 2 and "not the caption that was written" in faults[0] and "cannot be read" in faults[1]


def test_messages_that_would_mislead_a_trainer(tmp_path: Path) -> None:
    odd = {0: "", 1: "look at <image> here"}
    source = final_shards(tmp_path / "final", caption=lambda index, text: odd.get(index, text))
    notes = export(source, tmp_path / "out", "messages")
    lines = (tmp_path / "out/messages.jsonl").read_text().splitlines()
    entries = {entry["id"]: entry for entry in map(json.loads, lines)}
    assert "000000000" not in entries and len(entries) == 14
    uid = kept(source)["000000001"]["uid"]
    assert entries["000000001"] == {
        "id": "000000001",
        "messages": [
            {"role": "user", "content": f"<image>\n{instruction(uid)}"},
            {"role": "assistant", "content": "look at [image] here"},
        ],
        "images": ["images/00000/000000001.jpg"],
    }
    assert notes is not None and len(notes) == 2 and "2 pairs with an empty caption" in notes[0]


def test_parquet_without_what_came_with_images_is_not_gone_on_with(tmp_path: Path) -> None:
    """Files with and without those columns are no data set; other formats go on with what older versions began."""
    source = final_shards(tmp_path / "final")
    for format in FORMATS:
        config = {"format": format, "image_extension": None}
        semantic = {"input": Artifact.open(str(source)).fingerprint, "export": config}
        Artifact.create(str(tmp_path / format), "export", semantic, {}).close()
        if format in ("parquet", "lance"):
            with pytest.raises(ArtifactMismatch, match=r"columns|storage"):
                export(source, tmp_path / format, format)
        else:
            export(source, tmp_path / format, format)
            assert verify(str(tmp_path / format)).faults == []
