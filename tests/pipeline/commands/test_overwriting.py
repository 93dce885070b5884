"""An `--out` that is, holds or lies in what a command reads is refused, before anything is touched."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ...conftest import photo
from ..chains import PLAIN, written
from ..conftest import capipe, one_line

CLIP = ("--clip", "tiny/clip")
CAPTIONER = ("--model", "tiny/captioner", "--engine", "transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of ours in ``a``, a link to them in ``link``, and captions in ``captions``."""
    folder = tmp_path_factory.mktemp("overwriting")
    (folder / "photos").mkdir()
    for number in range(3):
        (folder / f"photos/{number}.jpg").write_bytes(photo(number))
    capipe("ingest", folder / "photos", "--out", folder / "a")
    (folder / "link").symlink_to(folder / "a")
    capipe("annotate", "--shards", folder / "a", "--out", folder / "captions", *CAPTIONER, "--max-tokens", 4)
    return folder


def state(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("command", "out"),
    [
        (("annotate", "--shards", "a", *CAPTIONER), "a"),
        (("annotate", "--shards", "a/*.tar", *CAPTIONER), "./a/"),
        (("annotate", "--shards", "a/{00000..00000}.tar", *CAPTIONER), "a"),
        (("annotate", "--shards", "a/00000.tar", *CAPTIONER, "--pack"), "link"),
        (("annotate", "--shards", "link", *CAPTIONER), "a"),
        (("annotate", "--shards", "a", *CAPTIONER), "a/captions"),
        (("embed", "--shards", "a", *CLIP), "a"),
        (("ingest", "a/00000.tar"), "a"),
        (("ingest", "link"), "a"),
        (("dedup", "--shards", "a"), "a"),
        (("filter", "--shards", "a", "--captions", "captions", *CLIP), "a"),
        (("export", "a"), "a/final"),
        (("qa", "--shards", "a", *CAPTIONER, "--screen", "none"), "a"),
    ],
)
def test_refused_with_and_without_fresh(
    made: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], out: str
) -> None:
    monkeypatch.chdir(made)
    before = state(made)
    for fresh in ((), ("--fresh",)):
        line = one_line(capipe(*command, "--out", out, *fresh, code=2))
        assert "choose another --out" in line and ("to read" in line or "to be read" in line)
    assert state(made) == before


def test_captions_that_are_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    before = state(made)
    command = ("filter", "--shards", "a", "--captions", "captions", *CLIP, "--out", "captions", "--fresh")
    assert "captions/scores: lies in" in one_line(capipe(*command, code=2))
    assert state(made) == before


def test_a_chain_that_would_write_over_its_source(made: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, PLAIN)
    photos = tmp_path / "out/shards"
    photos.mkdir(parents=True)
    (photos / "1.jpg").write_bytes(photo(1))
    source = f'stages.shards.inputs.sources={{"path": "{photos}"}}'
    line = one_line(capipe("run", recipe, "--out", tmp_path / "out", "--set", source, code=2))
    assert "is what to read; choose another --out" in line and (photos / "1.jpg").read_bytes() == photo(1)
