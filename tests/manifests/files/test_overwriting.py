"""An output that is its own input: refused in each of the ways in which a path can lead there."""

from __future__ import annotations

from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.manifests.files.overwriting import refuse_overwriting


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``a`` with a tar, and links to both elsewhere; the working directory is around them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(b"x")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/00000.tar").symlink_to(folder / "00000.tar")
    return folder


@pytest.mark.parametrize(
    ("out", "read", "said"),
    [
        ("a", "a", "a: is what to read"),
        ("a", "./a/", "a: is what to read"),
        ("a/../a/", "a", "is what to read"),
        ("link", "a", "link: is what to read"),
        ("a", "link", "a: is what to read"),
        ("a", "file://{folder}", "a: is what to read"),
        ("file://{folder}/", "a", "is what to read"),
        ("a", "a/00000.tar", "a: holds a/00000.tar, which is to be read"),
        ("a", "link/00000.tar", "a: holds link/00000.tar"),
        ("a", "tars/00000.tar", "a: holds tars/00000.tar"),
        ("tars", "tars/00000.tar", "tars: holds tars/00000.tar"),
        ("a/captions", "a", "a/captions: lies in a, which is to be read"),
        ("link/captions", "a", "link/captions: lies in a"),
        ("a", "simplecache::file://{folder}/00000.tar", "a: holds simplecache"),
        ("s3://b/a", "s3a://b/a/", "is what to read"),
        ("s3://b/a", "s3://b/x/../a/00000.tar", "holds s3://b/x/../a/00000.tar"),
        ("memory://a", "memory:///a", "is what to read"),
    ],
)
def test_refused(shards: Path, out: str, read: str, said: str) -> None:
    with pytest.raises(BadInput) as refused:
        refuse_overwriting(out.format(folder=shards), ["elsewhere", read.format(folder=shards)])
    assert said in str(refused.value) and str(refused.value).endswith("; choose another --out")


@pytest.mark.parametrize(
    ("out", "read"),
    [
        ("b", "a"),
        ("ab", "a"),
        ("a", "ab"),
        ("captions", "a/00000.tar"),
        ("a/captions", "a/00000.tar"),
        ("s3://b/a", "gs://b/a"),
        ("s3://b/a", "s3://b/ab"),
        ("x/a", "hf://x/a"),
    ],
)
def test_taken(shards: Path, out: str, read: str) -> None:
    refuse_overwriting(out, [read])
