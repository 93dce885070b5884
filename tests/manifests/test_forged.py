"""An artifact of somebody else's making: whatever its records hold, it is read, or refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import CapipeError
from capipe.manifests import manifest
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
from capipe.manifests.fingerprint import canonical, fingerprint
from capipe.manifests.schema import INGEST
from capipe.manifests.shards import RowReader, expand
from capipe.manifests.sharing.owners import living
from capipe.manifests.verify import verify

VALUES: list[Any] = [None, True, -1, 0, 1.5, 1e400, "", "..", "../victim", "a/b", "\ud800", "::", "x" * 5000]
VALUES += [[], {}, [[]], {"a": 1}, ["../victim"], {"../victim": 1}, 2**70, "00000"]
RECORDS = ["manifest", "config", "quarantine", "times", "stats", "redo", "owner"]


def make(out: Path) -> None:
    run = {"extras": ["README.md"], "shards": "x", "finals": {}}
    artifact = Artifact.create(str(out), "ingest", {"model": "m"}, run)
    for shard in ("00000", "00001"):
        with artifact.begin(shard, INGEST, tar=True) as transaction:
            for key in "ab":
                row = {"key": shard + key, "uid": "0" * 32, "status": "ok", "error": None}
                transaction.write(row, {"jpg": b"x", "json": b"{}"})
            transaction.commit(rows_in=2, input_info={"digest": "x", "url": "u", "bytes": 3})
    artifact.quarantine("00002", "bad")
    artifact.close()


class Forger:
    """Changes one value, or one name, somewhere in a record."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict) and value and self.random.random() < 0.8:
            key, changed, kind = self.random.choice(list(value)), dict(value), self.random.random()
            if kind < 0.1:
                del changed[key]
            elif kind < 0.25:
                changed[self.random.choice(["../victim", "a\\b", "", "..", "x"])] = changed.pop(key)
            else:
                changed[key] = self(changed[key])
            return changed
        if isinstance(value, list) and value and self.random.random() < 0.7:
            at = self.random.randrange(len(value))
            return [*value[:at], self(value[at]), *value[at + 1 :]]
        return self.random.choice(VALUES)

    def forge(self, out: Path, which: str) -> None:
        private = out / "_capipe"
        first, *rest = (private / "manifest.jsonl").read_text().splitlines()
        line = {key: value for key, value in json.loads(first).items() if key != manifest.CHECKSUM}
        if which == "manifest":
            entry = self(line)
            try:
                entry = {**entry, manifest.CHECKSUM: manifest._checksum(entry)}
                text = canonical(entry)
            except (TypeError, ValueError):  # no object, or nothing that a checksum can be made of
                text = json.dumps(entry)
            (private / "manifest.jsonl").write_bytes("\n".join([text, *rest, ""]).encode(errors="surrogatepass"))
        elif which == "config":
            entry = self(json.loads((private / "config.json").read_text()))
            if isinstance(entry, dict) and isinstance(entry.get("semantic"), dict):
                with contextlib.suppress(ValueError):
                    entry["fingerprint"] = fingerprint(entry["semantic"])
            (private / "config.json").write_text(json.dumps(entry))
        else:
            owner = {"run": "0" * 16, "host": "h", "pid": 1, "machine": None, "born": None}
            place, entry = {
                "quarantine": ("_capipe/quarantine/00002.json", {"shard": "1", "error": "x"}),
                "times": ("_capipe/times.jsonl", {"shard": "1", "seconds": 1}),
                "stats": ("00000_stats.json", {"count": 1, "successes": 1}),
                "redo": ("_capipe/redo/00000/line.json", [line, line]),
                "owner": (f"_capipe/owners/{'0' * 16}.json", owner),
            }[which]
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            (out / place).write_text(json.dumps(self(entry)) + "\n")


@pytest.mark.parametrize("which", RECORDS)
def test_forged_records_are_read_or_refused_in_a_line(tmp_path: Path, which: str) -> None:
    victim, base, out = tmp_path / "victim", tmp_path / "base", tmp_path / "out"
    victim.mkdir()
    (victim / "keep").write_text("kept")
    make(base)
    forger = Forger(RECORDS.index(which))

    def begin(**options: bool) -> None:
        Artifact.create(str(out), "ingest", {"model": "m"}, {}, **options).close()

    uses: list[Callable[[], object]] = [
        lambda: Artifact.open(str(out)).committed(),
        lambda: Artifact.open(str(out)).created,
        lambda: verify(str(out)),
        lambda: living(Folder(str(out))),
        begin,
        lambda: begin(fresh=True),
    ]
    refused = 0
    for _ in range(25):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)
        forger.forge(out, which)
        for use in uses:
            try:
                use()
            except CapipeError as error:
                refused += 1
                assert "\n" not in str(error)
    assert (victim / "keep").read_text() == "kept"
    assert {each.name for each in tmp_path.iterdir()} == {"victim", "base", "out"}
    assert refused or which in ("times", "stats", "owner")


def test_a_pipe_in_the_place_of_a_shard_is_refused_by_whoever_reads_it(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (shard, _) = expand(str(tmp_path / "out"))
    for name in ("00000.parquet", "00000.tar"):
        kept = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).unlink()
        os.mkfifo(tmp_path / "out" / name)
        with pytest.raises(OSError, match="not a regular file"):
            list(RowReader(shard))
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).write_bytes(kept)
