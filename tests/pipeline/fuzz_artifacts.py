"""Hostile artifacts: every string that a sound one holds is replaced in turn, and every command that reads it is run.

An artifact that somebody shared is signed anew (checksums and fingerprints are no secrets), so what is tested is what
its strings are used for. Beside it lie canaries, watched by the kernel (inotify), and a socket that counts who
connects.
The test does a few; the long trial is a command:

    python -m tests.pipeline.fuzz_artifacts --cases 2000 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import random
import shutil
import socket
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capipe.manifests import manifest
from capipe.manifests.config_file import DIGEST, digest
from capipe.manifests.fingerprint import canonical, fingerprint

from .forked import MEGABYTE, import_all, run, watched
from .sound_artifacts import KINDS, commands, prepare

MOST_MEMORY = 1 << 30  # bytes
Json = Any
Step = str | int


# --- hostile strings --------------------------------------------------------------------------------------------------


CANARY_FILES = ("canary/secret", "canary.tar", "canary.parquet", "canary.json", "canary.jsonl", "canary_stats.json")


@dataclass(frozen=True)
class Canaries:
    """What lies beside the artifact, and what a hostile string says to get there."""

    folder: Path
    port: int

    def strings(self) -> dict[str, str]:
        web = f"http://127.0.0.1:{self.port}"
        return {
            "climbs": "../canary",
            "absolute": str(self.folder / "canary"),
            "url": f"{web}/00000.tar",
            "chain": f"reference://x::{web}/evil.json/00000.tar",
            "link": "link/canary",
            "long": "a" * MEGABYTE,
            "controls": "\x1b]0;owned\x07\x1b[2J\r\n\x00\u202e",
        }

    def plant(self, artifact: Path) -> list[Path]:
        """Lay them out afresh, where each string leads from ``artifact``; returns the files."""
        files = []
        for folder in {self.folder, artifact.parent}:
            shutil.rmtree(folder / "canary", ignore_errors=True)
            (folder / "canary").mkdir(parents=True)
            for name in CANARY_FILES:
                (folder / name).write_text(f"secret of {name}")
                files.append(folder / name)
        return files


@dataclass(frozen=True)
class Case:
    """One string of one file of one artifact, by its path in the JSON, and what is put there."""

    kind: str
    file: str  # below the artifact; a sidecar's is tar!member
    line: int  # of a file of JSON lines; -1: the file is one value
    path: tuple[Step, ...]
    is_key: bool
    string: str  # its name among Canaries.strings
    fingerprints: bool  # whether a new fingerprint is written everywhere, too


def cases(data: Path, count: int, seed: int) -> list[Case]:
    """``count`` cases over all strings, evenly over artifacts, files and hostile strings."""
    names = list(Canaries(Path(), 0).strings())
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for kind in KINDS:
        for file, line, value in _texts(data / kind):
            for path, is_key in _strings(value):
                for name in names:
                    case = Case(kind, file, line, path, is_key, name, fingerprints=True)
                    groups.setdefault((kind, file.partition("!")[0], name), []).append(case)
    rng, chosen = random.Random(seed), []
    for group in groups.values():
        rng.shuffle(group)
    while len(chosen) < count and any(groups.values()):
        chosen += [group.pop() for group in groups.values() if group]
    rng.shuffle(chosen)
    return chosen[:count]


def _texts(artifact: Path) -> Iterator[tuple[str, int, Json]]:
    yield "_capipe/config.json", -1, json.loads((artifact / "_capipe/config.json").read_bytes())
    for number, line in enumerate((artifact / "_capipe/manifest.jsonl").read_bytes().splitlines()):
        yield "_capipe/manifest.jsonl", number, json.loads(line)
    for number, line in enumerate((artifact / "_capipe/times.jsonl").read_bytes().splitlines()):
        yield "_capipe/times.jsonl", number, json.loads(line)
    for name, value in _claims().items():
        yield name, -1, value
    for path in sorted(artifact.glob("*.tar"))[:1]:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    yield f"{path.name}!{member.name}", -1, json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    break


def _claims() -> dict[str, Json]:
    """Of a run that shares the folder, alive as far as anybody can tell, and one that is dead."""
    owner = {"run": "0123456789abcdef", "host": "elsewhere", "pid": 7, "machine": None, "born": None}
    claim = {"token": "0123456789abcdef-0", "run": "fedcba9876543210", "host": "elsewhere", "pid": 7}
    return {"_capipe/owners/0123456789abcdef.json": owner, "_capipe/claims/00000.json": claim}


def _strings(value: Json, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], bool]]:
    """Where the strings of a JSON value are: keys (True) and values."""
    if isinstance(value, str):
        yield path, False
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key), True
            yield from _strings(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _strings(inner, (*path, number))


def replaced(value: Json, path: Sequence[Step], is_key: bool, string: str) -> Json:
    """``value`` with one string, or key, replaced."""
    if not path:
        return string
    step, rest = path[0], path[1:]
    if isinstance(value, list):
        return [replaced(v, rest, is_key, string) if n == step else v for n, v in enumerate(value)]
    if is_key and not rest:
        return {string if k == step else k: v for k, v in value.items()}
    return {k: replaced(v, rest, is_key, string) if k == step else v for k, v in value.items()}


# --- hostile artifacts ------------------------------------------------------------------------------------------------


def build(data: Path, case: Case, canaries: Canaries) -> Path:
    """The artifacts, the one of ``case`` with its string replaced and signed anew; returns the folder of all."""
    place = canaries.folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(data, place, symlinks=True, ignore=shutil.ignore_patterns("corpus"))
    artifact, string = place / case.kind, canaries.strings()[case.string]
    (artifact / "link").symlink_to(canaries.folder)
    if case.file.startswith(("_capipe/claims", "_capipe/owners")):
        for name, value in _claims().items():
            path = artifact / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(value))
    if "!" in case.file:
        _replace_sidecar(artifact, case, string)
    else:
        _replace_line(artifact / case.file, case, string)
    _sign(artifact)
    return place


def _replace_line(path: Path, case: Case, string: str) -> None:
    lines = [path.read_bytes()] if case.line < 0 else path.read_bytes().splitlines()
    number = max(case.line, 0)
    value = replaced(json.loads(lines[number]), case.path, case.is_key, string)
    lines[number] = canonical(value).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def _replace_sidecar(artifact: Path, case: Case, string: str) -> None:
    """Write the tar again with that member changed, and its new hash and size into the manifest."""
    name, _, wanted = case.file.partition("!")
    out = io.BytesIO()
    with tarfile.open(artifact / name) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            body = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == wanted:
                body = json.dumps(replaced(json.loads(body), case.path, case.is_key, string)).encode()
            member.size = len(body)
            new.addfile(member, io.BytesIO(body))
    (artifact / name).write_bytes(out.getvalue())
    lines = []
    for line in (artifact / "_capipe/manifest.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        if name in entry["files"]:
            digest = hashlib.sha256(out.getvalue()).hexdigest()
            entry["files"][name] = {"bytes": len(out.getvalue()), "sha256": digest}
        lines.append(canonical(entry).encode())
    (artifact / "_capipe/manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def _sign(artifact: Path) -> None:
    """Checksums and fingerprints that fit, as an attacker would write them; what has lost its shape stays as it is."""
    path = artifact / "_capipe/config.json"
    config = json.loads(path.read_bytes())
    if isinstance(config, dict) and isinstance(config.get("semantic"), dict):
        if "fingerprint" in config:
            config["fingerprint"] = fingerprint(config["semantic"])
        if DIGEST in config:
            config[DIGEST] = digest(config)
        path.write_text(json.dumps(config, sort_keys=True))
    lines = []
    for line in (artifact / "_capipe/manifest.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        if "fingerprint" in entry and isinstance(config, dict):
            entry["fingerprint"] = config.get("fingerprint")
        if manifest.CHECKSUM in entry:
            del entry[manifest.CHECKSUM]
            entry[manifest.CHECKSUM] = manifest._checksum(entry)
        lines.append(canonical(entry).encode())
    (artifact / "_capipe/manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")


# --- attacks ----------------------------------------------------------------------------------------------------------


ALWAYS = ("verify", "status", "report", "view")
IN_TURN = 2  # of the others, for each case


def _requests(server: socket.socket) -> int:
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            count += 1


def _listing(folder: Path) -> set[str]:
    """All that lies outside of the hostile folder and of what was asked to be written."""
    return {str(path) for path in folder.rglob("*") if "case" not in path.relative_to(folder).parts[:1]}


def attack(data: Path, case: Case, folder: Path, server: socket.socket, only: Sequence[str]) -> list[str]:
    """Run the commands on one hostile artifact; returns what went wrong, each with its command."""
    canaries = Canaries(folder, server.getsockname()[1])
    faults: list[str] = []
    (folder / "cwd").mkdir(parents=True, exist_ok=True)
    (folder / "said").touch()
    place = build(data, case, canaries)
    files = canaries.plant(place / case.kind)
    before = _listing(folder)
    with watched(files) as events:
        for name, words in commands(place, case.kind).items():
            if name not in only:
                continue
            outcome = run(words, folder / "cwd")
            found = events()
            if any("ResourceWarning" in line or "Traceback" in line for line in outcome.said.splitlines()):
                found.append(f"traceback: {outcome.said[-1200:]}")
            if outcome.code not in (0, 1, 2, 3):
                found.append(f"exit {outcome.code}: {outcome.said[-300:]}")
            if outcome.memory > MOST_MEMORY:
                found.append(f"{outcome.memory / MEGABYTE:.0f} MB of memory")
            if "\x1b]0;owned" in outcome.said or "\x1b[2J" in outcome.said:
                found.append("control characters reached the terminal")
            if requests := _requests(server):
                found.append(f"{requests} requests were sent")
            if (after := _listing(folder)) != before:
                found.append(f"files came or went: {sorted(after ^ before)[:3]}")
                before = after
            faults += [f"{name}: {fault}" for fault in found]
    return faults


def trial(data: Path, chosen: Sequence[Case], folder: Path, tell: Callable[[Case, list[str]], None]) -> Counter[str]:
    """Attack with every case: by the commands that look, and two of the others in turn."""
    import_all()
    counts: Counter[str] = Counter()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        server.setblocking(False)
        others = [name for name in commands(Path(), chosen[0].kind) if name not in ALWAYS] if chosen else []
        for number, case in enumerate(chosen):
            only = (*ALWAYS, *(others[(IN_TURN * number + n) % len(others)] for n in range(IN_TURN)))
            faults = attack(data, case, folder, server, only)
            counts.update(only)
            counts["cases"] += 1
            counts["faults"] += len(faults)
            tell(case, faults)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help="sound artifacts, kept from an earlier trial")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case from i on, to share the work")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    with tempfile.TemporaryDirectory() as temporary:
        data = given.data or Path(temporary) / "data"
        if not data.exists():
            prepare(data)
        chosen = cases(data, given.cases, given.seed)[part::parts]

        done = itertools.count(1)

        def tell(case: Case, faults: list[str]) -> None:
            if (number := next(done)) % 100 == 0:
                print(json.dumps({"done": number}), flush=True)
            for fault in faults:
                print(json.dumps({"case": vars(case), "fault": fault}, default=str)[:4000], flush=True)

        print(json.dumps(trial(data, chosen, Path(temporary) / "attack", tell)))


if __name__ == "__main__":
    main()
