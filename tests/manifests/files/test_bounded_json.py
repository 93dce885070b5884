"""JSON of somebody else's: what is too large, too deep or no JSON is one error, wherever it lies in an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests import times
from capipe.manifests.artifact import Artifact
from capipe.manifests.files import bounded_json
from capipe.manifests.files.storage import Folder
from capipe.manifests.journal import Journal, _checksum
from capipe.manifests.sharing.owners import living
from capipe.manifests.verify import verify
from capipe.models.model_json import read_json
from capipe.pipeline.inspect.chain_state import load_chain
from capipe.pipeline.inspect.status import run_state
from capipe.trainer.checkpoint import FACTS, read_facts
from capipe.trainer.log import STEPS, read_steps

from ..test_artifact import commit, make

DEEP = ["[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "[" * 300 + "]" * 300]


@pytest.mark.parametrize("text", [*DEEP, "[" * 20_000, "", "[1", "9" * 6000, b"\xff", '{"a": 1} 2'])
def test_whatever_is_wrong_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError) as refused:
        bounded_json.parse(text)
    assert "recursion" not in str(refused.value)


def test_the_bound_of_nesting_is_exact_and_says_nothing_of_width() -> None:
    most = bounded_json.MAX_NESTING
    for opening, middle, closing in (("[", "1", "]"), ('{"a":', "1", "}"), ('[{"a":', "1", "}]")):
        times = most // (2 if len(opening) > 5 else 1)
        text = opening * times + middle + closing * times
        assert bounded_json.parse(text) == json.loads(text) == bounded_json.parse(text.encode())
        with pytest.raises(ValueError, match=f"nested over {most} deep"):
            bounded_json.parse(f"[{text}]")
    wide = [[{"[": "[[{{"}] for _ in range(5000)]
    assert bounded_json.parse(json.dumps(wide)) == wide


def test_a_file_is_read_no_further_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_json, "MAX_BYTES", 1 << 20)
    (tmp_path / "just").write_text(json.dumps("x" * ((1 << 20) - 2)))
    (tmp_path / "over").write_text(json.dumps("x" * ((1 << 20) - 1)))
    assert len(bounded_json.load(tmp_path / "just")) == len(bounded_json.load_from(Folder(str(tmp_path)), "just"))
    for read in (
        lambda: bounded_json.load(tmp_path / "over"),
        lambda: bounded_json.load_from(Folder(str(tmp_path)), "over"),
    ):
        with pytest.raises(ValueError, match="over 1 MiB of JSON"):
            read()


def deeper(path: Path, text: str) -> None:
    """Put a deep value into the object that a file holds."""
    path.write_text(path.read_text().rstrip()[:-1] + f', "deep": {text}}}')


@pytest.mark.parametrize("text", DEEP)
def test_an_artifact_with_depths_in_it_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    artifact = make(out)
    commit(artifact, "00000")
    artifact.quarantine("00001", "a reason")
    artifact.close()
    damages: list[tuple[str, Callable[[Artifact], object]]] = [
        ("config.json", lambda artifact: None),
        ("manifest.jsonl", lambda artifact: artifact.committed()),
        ("quarantine/00001.json", lambda artifact: artifact.quarantined()),
    ]
    for name, read in damages:
        path = out / "_capipe" / name
        before = path.read_text()
        if name == "manifest.jsonl":
            path.write_text(before + f'{{"shard": {text}}}\n')
        else:
            deeper(path, text)
        with pytest.raises(ArtifactMismatch, match=f"{name}.*nested over 100 deep") as refused:
            read(Artifact.open(str(out)))
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
        path.write_text(before)
    read(Artifact.open(str(out)))


@pytest.mark.parametrize("text", DEEP)
def test_what_nothing_hangs_on_is_passed_over(tmp_path: Path, text: str) -> None:
    artifact = make(tmp_path / "out")
    commit(artifact, "00000")
    artifact.close()
    private = tmp_path / "out/_capipe"
    with (private / "times.jsonl").open("a") as file:
        file.write(f'{{"shard": "00000", "seconds": {text}}}\n')
    (private / "owners").mkdir()
    (private / "owners/forged.json").write_text(text)
    folder = Folder(str(tmp_path / "out"))
    assert times.read(folder).created and living(folder) == []
    stats = tmp_path / "out/00000_stats.json"
    stats.write_text(text)
    assert [fault for fault in verify(str(tmp_path / "out")).faults if "00000_stats.json" in fault]


def test_a_forged_line_of_a_journal_is_done_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows", "print")
    journal.append(0, {"key": "a"})
    journal.close()
    for body in (DEEP[0].encode(), b'{"index": []}', b"[]", b'{"index": [], "row": 1}', b"\xff"):
        with (tmp_path / "rows").open("ab") as file:
            file.write(_checksum(body) + b" " + body + b"\n")
        again = Journal(tmp_path / "rows", "print")
        assert again.rows == {0: {"key": "a"}}
        again.close()


@pytest.mark.parametrize("text", [*DEEP, "[]", "{", "null"])
def test_other_documents(tmp_path: Path, text: str) -> None:
    for name in ("chain.json", "run.json", STEPS, FACTS, "config.json"):
        (tmp_path / name).write_text(text + "\n")
    reads: list[Callable[[], object]] = [
        lambda: load_chain(tmp_path),
        lambda: read_facts(tmp_path),
        lambda: read_steps(tmp_path),
        lambda: read_json(tmp_path / "config.json"),
    ]
    for read in reads:
        with pytest.raises(BadInput) as refused:
            read()
        assert "\n" not in str(refused.value) and "recursion" not in str(refused.value)
    assert run_state(tmp_path).step == 0
