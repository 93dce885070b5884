"""A Lance table of an export: its rows, its files, and its versions, which follow the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.samples import read_samples
from capipe.pipeline.inspect.verify import verify
from capipe.stages.export.card import CardWords
from capipe.stages.export.lance import schema

from ...exporting import export, final_shards, kept, table_of

DATA = "train.lance/data"


def images(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Extension and bytes of each image in an artifact's tars, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            for sample in read_samples(stream):
                (extension,) = [name for name in sample.members if name not in ("txt", "json")]
                found[sample.key] = (extension, sample.members[extension].data or b"")
    return found


def data_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / DATA).iterdir())}


def versions(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "train.lance/_versions").iterdir())


def test_a_table_has_the_pairs_of_the_shards_in_their_order(tmp_path: Path) -> None:
    source = final_shards(
        tmp_path / "final",
        shards=3,
        formats=("jpg", "png", "webp"),
        empty=(1,),
        meta=lambda index: {"url": f"http://host/{index}.jpg", "odd": index},
    )
    export(source, tmp_path / "out", "lance")
    expected, tars, rows = kept(source), images(source), table_of(tmp_path / "out").to_pylist()
    assert [row["key"] for row in rows] == list(expected)
    for row in rows:
        listed, (extension, data) = expected[row["key"]], tars[row["key"]]
        assert row["image"] == data and hashlib.sha256(data).hexdigest()[:32] == row["uid"]
        assert (row["format"], row["width"], row["height"]) == (extension, 112, 112)
        scores = ("caption", "re_caption", "org_caption", "re_clip_score", "org_clip_score", "re_length", "re_language")
        assert {name: row[name] for name in scores} == {name: listed[name] for name in scores}
        assert row["url"] == f"http://host/{json.loads(row['json'])['odd']}.jpg"
    table = lance.dataset(str(tmp_path / "out/train.lance"))
    names = [[file.path for file in fragment.data_files()] for fragment in table.get_fragments()]
    assert [[name.partition("-")[0] for name in files] for files in names] == [["00000"], ["00002"]]
    assert table.schema.field("image").type == pa.large_binary()
    assert table.take([9], columns=["image"])["image"][0].as_py() == rows[9]["image"]
    assert verify(str(tmp_path / "out")).faults == [] and verify(str(tmp_path / "out")).notes == []


def test_sizes_are_those_of_the_image_as_it_is_shown(tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    from capipe.models.images.decode import upright_header

    exif, data = Image.Exif(), BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(data, "JPEG", exif=exif)
    header = upright_header(data.getvalue())
    assert (header.width, header.height, header.format) == (20, 40, "jpg")  # type: ignore[union-attr]
    data = BytesIO()
    Image.new("RGB", (40, 20)).save(data, "PNG", exif=exif)
    header = upright_header(data.getvalue())
    assert (header.width, header.height) == (20, 40)  # type: ignore[union-attr]


def test_two_runs_have_the_same_data_files_and_equal_tables(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", formats=("jpg", "png"))
    for name in ("one", "two"):
        export(source, tmp_path / name, "lance")
    assert data_files(tmp_path / "one") == data_files(tmp_path / "two") != {}
    one, two = (table_of(tmp_path / name) for name in ("one", "two"))
    assert one.equals(two, check_metadata=True)
    for name, data in data_files(tmp_path / "one").items():
        assert name.endswith(f"-{hashlib.sha256(data).hexdigest()[:16]}.lance")


def test_the_table_has_its_provenance(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", "lance", words=CardWords("Scenes", "cc-by-4.0", ("en",)))
    metadata = table_of(tmp_path / "out").schema.metadata
    about = json.loads(metadata[schema.METADATA])
    assert (about["title"], about["license"], about["languages"]) == ("Scenes", "cc-by-4.0", ["en"])
    assert [step["stage"] for step in about["provenance"]] == ["select"]
    assert about["fingerprint"] == Artifact.open(str(tmp_path / "out")).fingerprint


def test_the_same_command_commits_no_version_and_another_licence_one_without_data(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    export(source, out, "lance")
    before, files = versions(out), data_files(out)
    export(source, out, "lance")
    assert versions(out) == before and len(before) == 1
    export(source, out, "lance", license="cc0-1.0")
    assert len(versions(out)) == 2 and data_files(out) == files
    assert json.loads(table_of(out).schema.metadata[schema.METADATA])["license"] == "cc0-1.0"
    assert table_of(out, version=1).num_rows == table_of(out).num_rows == 16


def test_a_table_that_another_program_changed_is_left_alone(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    export(source, out, "lance")
    lance.dataset(str(out / "train.lance")).add_columns({"twice": "width * 2"})
    assert verify(str(out)).faults == []
    with pytest.raises(BadInput, match=r"version 2 of the table is not capipe's .* another --out"):
        export(source, out, "lance", license="cc0-1.0")
    assert table_of(out)["twice"].to_pylist() == [224] * 16
    export(source, out, "lance", fresh=True)
    assert "twice" not in table_of(out).schema.names


def test_verify_names_a_fragment_that_is_missing_or_damaged(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    export(source, out, "lance")
    first, second = sorted((out / DATA).iterdir())
    damaged = bytearray(first.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    first.write_bytes(damaged)
    second.unlink()
    faults = verify(str(out)).faults
    assert len(faults) == 2
    assert f"{DATA}/{first.name}: its sha256 is not the one that was committed" in faults[0]
    assert f"{DATA}/{second.name}: missing, though its shard is committed" in faults[1]


def test_versions_that_were_lost_are_found_missing_and_written_again(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    export(source, out, "lance")
    rows, files = table_of(out), data_files(out)
    for path in (out / "train.lance/_versions").iterdir():
        path.unlink()
    (fault,) = verify(str(out)).faults
    assert "train.lance: has no version; run the same command again" in fault
    export(source, out, "lance")
    assert verify(str(out)).faults == [] and table_of(out).equals(rows) and data_files(out) == files


def test_a_version_of_other_shards_is_a_fault(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", "lance")
    export(final_shards(tmp_path / "other", shards=1), tmp_path / "less", "lance")
    for path in (tmp_path / "out/train.lance/_versions").iterdir():
        (other,) = (tmp_path / "less/train.lance/_versions").iterdir()
        path.write_bytes(other.read_bytes())
    (fault,) = verify(str(tmp_path / "out")).faults
    assert "train.lance: version 1 is not of the committed shards" in fault


def test_without_pylance_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = final_shards(tmp_path / "final")
    monkeypatch.setattr(schema, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"--format lance: the package pylance is not installed; pip install 'capipe\[l"):
        export(source, tmp_path / "out", "lance")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_written_again_gets_another_file_name(tmp_path: Path) -> None:
    """Readers of Lance keep what they know of a data file by its name."""
    found = []
    for name in ("one", "other"):
        source = final_shards(tmp_path / name, shards=1, caption=lambda index, text, name=name: f"{name} {index}")
        export(source, tmp_path / f"{name}-out", "lance")
        found.append(set(data_files(tmp_path / f"{name}-out")))
    assert len(found[0]) == len(found[1]) == 1 and not found[0] & found[1]
