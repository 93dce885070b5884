"""What data may name: rows of tables and data sets, links and lists of folders. Somebody else wrote them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.files.outside import Reach
from capipe.manifests.verify import verify
from capipe.stages.reading import files

from ...conftest import tar_bytes
from ..hostile import SECRET, A, B, C, Pictures, hostile, reach
from ..ingesting import fill, ingest, lines, load, names, reasons, rows, write


def table(path: Path, named: list[str]) -> Path:
    """A table of these rows, in the format of its name."""
    if path.suffix == ".jsonl":
        return lines(path, [{"path": name} for name in named])
    if path.suffix == ".json":
        return write(path, [{"image": name, "conversations": []} for name in named])
    if path.suffix == ".csv":
        path.write_text("path\n" + "".join(f'"{name}"\n' for name in named))
        return path
    held = [{"bytes": None, "path": name} for name in named] if path.stem == "cells" else named
    pq.write_table(pa.table({"image": held}), path)
    return path


@pytest.mark.parametrize("kind", ["t.csv", "t.jsonl", "t.json", "t.parquet", "cells.parquet"])
def test_what_a_row_may_not_name(tmp_path: Path, server: str, elsewhere: Path, kind: str) -> None:
    """One row each, with the reason; those around them are as they would be, and nothing was asked of the network."""
    folder = fill(tmp_path / "list", {"a.jpg": A, "sub/b.png": B})
    bad = hostile(folder, server)
    if kind == "t.csv":
        bad.pop("a\0.jpg")  # Python's reader takes no such line
    good = ["a.jpg", "sub/b.png", str(elsewhere / "private.jpg"), "../home/private.jpg"]
    listed = table(folder / kind, [*good[:2], *bad, *good[2:]])
    out = tmp_path / "out"
    ingest(listed, out=out)
    found = rows(out)
    assert [row["status"] for row in found] == ["ok", "ok", *["unsupported"] * len(bad), "ok", "ok"]
    for said, row in zip(bad.values(), found[2:-2], strict=True):
        assert said in row["error"], row
    assert Pictures.seen == [] and verify(str(out)).faults == []
    assert all(row["error"] is None for row in (*found[:2], *found[-2:]))


def test_a_table_of_coco_or_conversations(tmp_path: Path, server: str) -> None:
    folder = fill(tmp_path / "list", {"a.jpg": A})
    bad = hostile(folder, server)
    images = [{"id": n, "file_name": name} for n, name in enumerate(["a.jpg", *bad])]
    said = [{"id": n, "image_id": n, "caption": "c"} for n in range(len(images))]
    for listed in (
        write(folder / "coco.json", {"images": images, "annotations": said}),
        lines(folder / "chat.jsonl", [{"messages": [asking(name)]} for name in ["a.jpg", *bad]]),
    ):
        first, *others = load(listed)
        assert first.data == A and all(item.data is None and item.problem is not None for item in others)
    assert Pictures.seen == []


def asking(name: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": name}]}


def test_within_binds_a_table_to_a_folder(tmp_path: Path, server: str, elsewhere: Path) -> None:
    folder = fill(tmp_path / "list", {"a.jpg": A, "sub/b.png": B})
    (folder / "link.jpg").symlink_to(elsewhere / "private.jpg")
    (folder / "inner.jpg").symlink_to("a.jpg")
    (tmp_path / "alias").symlink_to(folder)
    named = ["a.jpg", str(folder / "sub/b.png"), "inner.jpg", str(tmp_path / "alias/a.jpg")]
    out = ["link.jpg", str(elsewhere / "private.jpg"), "../home/private.jpg", f"{server}/a.jpg", "s3://bucket/a.jpg"]
    gone = str(elsewhere / "not-there.jpg")  # no word on whether it is
    for within in (folder, tmp_path / "alias"):
        items = load(lines(folder / "t.jsonl", [{"path": each} for each in (*named, *out, gone)]), reach=reach(within))
        assert [item.data for item in items] == [A, B, A, A, *[None] * 6]
        assert all("--within" in str(reason) for reason in reasons(items)[4:])
        assert {item.problem.status.value for item in items if item.problem} == {"unsupported"}
    assert Pictures.seen == []
    with pytest.raises(BadInput, match=r"--within .*nowhere: no such folder"):
        load(folder / "t.jsonl", reach=reach(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match=r"of 5 items a path or link .* out of --within"):
        load(lines(folder / "u.jsonl", [{"path": each} for each in out]), reach=reach(folder))


def test_public_only(tmp_path: Path, server: str) -> None:
    listed = lines(tmp_path / "t.jsonl", [{"path": f"{server}/a.jpg"}, {"path": "b.png"}])
    fill(tmp_path, {"b.png": B})
    assert [item.data for item in load(listed)] == [A, B]
    refused, local = load(listed, reach=Reach(public_only=True))
    assert "--public-only" in str(reasons([refused])[0]) and local.data == B


def test_tables_of_buckets_work_without_an_option(tmp_path: Path, s3: str) -> None:
    fs, name = fsspec.filesystem("s3"), f"{s3}/{tmp_path.name}"
    fs.pipe({f"{name}/a.jpg": A, f"{name}/sub/b.png": B})
    fill(tmp_path, {"c.webp": C})
    named = [f"{name}/a.jpg", f"{name}/sub/b.png".replace("s3:", "s3a:"), f"{name}/sub/b.png".replace("s3:", "S3:")]
    listed = lines(tmp_path / "t.jsonl", [{"path": each} for each in (*named, "c.webp", f"{name}/no.jpg")])
    items = load(listed)
    assert [item.data for item in items] == [A, B, B, C, None] and "no.jpg" in str(reasons(items)[4])
    fs.pipe(f"{name}/t.jsonl", lines(tmp_path / "u.jsonl", [{"path": "a.jpg"}, {"path": "b::c"}]).read_bytes())
    first, chained = load(f"{name}/t.jsonl")  # rows are relative to it
    assert first.data == A and "a chain of file systems" in str(reasons([chained])[0])


def test_a_file_that_is_larger_than_any_image_or_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_MEMBER_BYTES", len(B) + 1)
    fill(tmp_path, {"b.png": B, "long.png": B + bytes(100), "long.txt": b"word " * len(B)})
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    named = ["b.png", "long.png", "long.txt", "sparse.png"]
    items = load(lines(tmp_path / "t.jsonl", [{"path": each} for each in named]))
    assert items[0].data == B and [item.data for item in items[1:]] == [None] * 3
    assert f"file of {len(B) + 100} bytes, over the limit" in str(reasons(items)[1])
    (tmp_path / "b.png").write_bytes(B)
    monkeypatch.setattr(files, "_size", lambda file: len(B) - 10)  # as it was asked before the rest was written
    (item,) = load(tmp_path / "b.png")
    assert item.problem is not None and item.problem.status.value == "read_error" and "it grew" in item.problem.reason


# --- folders ---------------------------------------------------------------------------------------------------------


def test_links_that_leave_a_folder(tmp_path: Path, elsewhere: Path) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A, "d.jpg": A, "real.txt": b"own", "sub/e.png": B})
    (root / "a.txt").symlink_to("../home/key")
    (root / "d.txt").symlink_to("real.txt")
    (root / "sub/e.json").symlink_to("../../home/creds.json")
    (root / "sub/gone.jpg").symlink_to("../../home/not-there.jpg")
    (root / "c.jpg").symlink_to("../home/private.jpg")
    (root / "in.png").symlink_to("sub/e.png")
    out = tmp_path / "out"
    ingest(root, out=out)
    found = {row["source"].removeprefix(f"{root}/"): row for row in rows(out)}
    assert {name for name, row in found.items() if row["status"] == "ok"} == {"a.jpg", "d.jpg", "in.png", "sub/e.png"}
    assert found["a.jpg"]["text"] is None and found["d.jpg"]["text"] == "own"
    assert "txt" in found["a.jpg"]["error"] and "leads out of its source" in found["a.jpg"]["error"]
    assert found["c.jpg"]["status"] == found["sub/gone.jpg"]["status"] == "unsupported"
    assert "--follow-links takes it" in found["c.jpg"]["error"]
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert SECRET.encode() not in written and b"token" not in written and C not in written
    items = {item.source: item for item in load(root, follow_links=True)}
    assert items[f"{root}/a.jpg"].text == SECRET and items[f"{root}/c.jpg"].data == C
    assert items[f"{root}/sub/e.png"].meta == {"token": "secret"}


def test_a_folder_that_is_all_links(tmp_path: Path, elsewhere: Path) -> None:
    root = tmp_path / "split"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.jpg").symlink_to(elsewhere / "private.jpg")
    with pytest.raises(BadInput, match=r"of 5 items .* leads out of the source.*; --follow-links takes links"):
        load(root)
    assert [item.data for item in load(root, follow_links=True)] == [C] * 5
    (tmp_path / "name").symlink_to(elsewhere)  # the source itself is what the user named
    assert C in [item.data for item in load(tmp_path / "name")]


def test_a_file_that_was_named_may_be_a_link_and_its_sidecar_may_not(tmp_path: Path, elsewhere: Path) -> None:
    root = fill(tmp_path / "photos", {"real.txt": b"own"})
    for name in ("c", "d"):
        (root / f"{name}.jpg").symlink_to(elsewhere / "private.jpg")
    (root / "c.txt").symlink_to(elsewhere / "key")
    (root / "d.txt").symlink_to("real.txt")
    first, second = load(root / "c.jpg", root / "d.jpg")
    assert first.data == second.data == C
    assert first.text is None and "leads out" in first.notes[0] and second.text == "own"
    assert load(root / "c.jpg", follow_links=True)[0].text == SECRET


def test_a_snapshot_in_a_hugging_face_cache(tmp_path: Path, elsewhere: Path) -> None:
    """Its files are links to blobs beside it: they work as they are, and others do not."""
    repo = fill(tmp_path / "hub/datasets--org--name", {"blobs/1": A, "blobs/2": b"its caption", "refs/main": b"0a1b"})
    snapshot = repo / "snapshots/0a1b"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data/a.jpg").symlink_to("../../../blobs/1")
    (snapshot / "data/a.txt").symlink_to("../../../blobs/2")
    (snapshot / "data/c.jpg").symlink_to(elsewhere / "private.jpg")
    for source in (snapshot, snapshot / "data"):
        kept, refused = load(source)
        assert (kept.data, kept.text) == (A, "its caption")
        assert "leads out of its source" in str(reasons([refused])[0])
    assert load(snapshot / "data/a.jpg")[0].text == "its caption"


def test_parquet_and_tars_of_a_folder(tmp_path: Path, elsewhere: Path) -> None:
    pq.write_table(pa.table({"image": [C]}), elsewhere / "private.parquet")
    (elsewhere / "private.tar").write_bytes(tar_bytes({"c.webp": C}))
    for kind in ("parquet", "tar"):
        root = tmp_path / kind
        root.mkdir()
        if kind == "tar":
            (root / "0.tar").write_bytes(tar_bytes({"a.jpg": A}))
        else:
            pq.write_table(pa.table({"image": [A]}), root / "0.parquet")
        (root / f"1.{kind}").symlink_to(elsewhere / f"private.{kind}")
        (root / f"2.{kind}").symlink_to(f"0.{kind}")
        os.mkfifo(root / f"3.{kind}")
        items = load(root)
        assert [item.data for item in items] == [A, None, A, None]
        assert "--follow-links" in str(reasons(items)[1]) and "not a regular file" in str(reasons(items)[3])
        assert [item.data for item in load(root, follow_links=True)] == [A, C, A, None]
    assert [item.data for item in load(elsewhere / "private.tar", tmp_path / "tar/1.tar")] == [C, C]
    assert [item.data for item in load(f"{tmp_path}/tar/[12].tar")] == [C, A]  # named by a pattern of the user's


def test_the_names_in_a_folders_metadata(tmp_path: Path, elsewhere: Path, server: str) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A, "sub/b.png": B})
    os.mkfifo(root / ".pipe")
    bad = ["../home/private.jpg", str(elsewhere / "private.jpg"), f"{server}/a.jpg", "reference://k::x", ".pipe"]
    lines(root / "metadata.jsonl", [{"file_name": each, "text": each} for each in ("a.jpg", "sub/b.png", *bad)])
    items = load(root)
    assert [item.data for item in items] == [A, B, *[None] * len(bad)] and items[1].text == "sub/b.png"
    assert {item.problem.status.value for item in items[2:] if item.problem} == {"unsupported"}
    followed = load(root, follow_links=True)
    assert [item.data for item in followed][2:4] == [C, C] and Pictures.seen == ["/a.jpg"]
    (root / "metadata.jsonl").unlink()
    write(elsewhere / "rows.jsonl", {"file_name": "a.jpg", "text": SECRET})
    (root / "metadata.jsonl").symlink_to(elsewhere / "rows.jsonl")
    items = load(root)
    assert names(items, root) == ["a.jpg", "metadata.jsonl", "sub/b.png"] and items[0].text is None
    assert "leads out of its source" in str(reasons(items)[1])


def test_names_of_a_listing_that_are_paths_of_their_own(tmp_path: Path) -> None:
    """An object store takes any name: put behind the folder's URL, some would mean another place."""
    fs, root = fsspec.filesystem("memory"), f"/names-{tmp_path.name}"
    fill(tmp_path, {"private.jpg": C})
    fs.pipe(f"{root}/a.jpg", A)
    fs.store[f"{root}/{tmp_path}/private.jpg"] = fs.store[f"{root}/a.jpg"]  # two slashes: an absolute path by itself
    fs.pipe(f"{root}/x::reference:/k.jpg", A)
    items = load(f"memory:/{root}")
    assert sorted(str(reason) for reason in reasons(items)) == ["None", *["its name is a path or URL of its own"] * 2]
    assert [item.data for item in items if item.data] == [A]


def test_metadata_of_a_remote_folder(tmp_path: Path, elsewhere: Path, server: str) -> None:
    fs, root = fsspec.filesystem("memory"), f"/meta-{tmp_path.name}"
    bad = [str(elsewhere / "private.jpg"), f"{server}/a.jpg", "../x.jpg", "s3://bucket/a.jpg"]
    listed = lines(tmp_path / "m.jsonl", [{"file_name": each, "text": each} for each in ("a.jpg", *bad)])
    fs.pipe({f"{root}/a.jpg": A, f"{root}/metadata.jsonl": listed.read_bytes()})
    items = load(f"memory:/{root}")
    assert [(item.data, item.text) for item in items[:1]] == [(A, "a.jpg")]
    assert [item.data for item in items[1:]] == [None] * 4 and Pictures.seen == []
    assert all("leads out of its source" in str(reason) for reason in reasons(items)[1:])
    assert load(f"memory:/{root}", follow_links=True)[1].data == C
