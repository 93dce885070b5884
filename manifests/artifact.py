"""Artifacts: folders of shards, each with its configuration and a manifest of the committed shards."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ArtifactMismatch, BadInput
from . import config_file, manifest, publishing, replacing, times
from .file_transaction import FileTransaction
from .files import bounded_json
from .files.locks import LockHeld, Patience
from .files.names import checked_name, name_problem
from .files.overwriting import refuse_overwriting
from .files.redaction import identity_of, redacted_data
from .files.storage import PRIVATE, Folder, NotAFile, clear, expecting, parquet_file
from .fingerprint import canonical, differences, encodable, fingerprint
from .journal import Journal
from .manifest import Manifest, ShardRecord
from .object_store.log import ATTEMPTS
from .sharing import quarantine
from .sharing.claims import Claim, Claims
from .sharing.guard import GUARD, threshold
from .sharing.output_lock import LOCK, OutputLock
from .sharing.owners import OWNERS
from .transaction import ShardTransaction

CONFIG = f"{PRIVATE}/config.json"
_LEAVING = Patience(seconds=2.0)  # for a last cleaning up, which the next run does as well
T = TypeVar("T")


@dataclass
class Artifact:
    """An artifact on disk. Get one by :meth:`open` (to read) or :meth:`create` (to write, new or resumed)."""

    folder: Folder
    config: dict[str, Any]
    claims: Claims | None = None  # assignment of shards, if several workers may take the same one
    shared: bool = False
    _lock: OutputLock | None = None
    _claim: Claim | None = None  # of the worker that writes
    _retracted: dict[str, ShardRecord] | None = None  # read from the manifest when the first shard is begun
    _rows: dict[str, int] = field(default_factory=dict, repr=False)  # row counts, as last read from the manifest
    _manifest: Manifest | None = field(default=None, repr=False)  # of this process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "claims": None, "_lock": None, "_manifest": None}

    @property
    def url(self) -> str:
        return self.folder.url

    @property
    def stage(self) -> str:
        return str(self.config["stage"])

    @property
    def fingerprint(self) -> str:
        return str(self.config["fingerprint"])

    @property
    def created(self) -> str:
        """Creation time, ISO 8601 in UTC; empty if unknown. Configurations older than ``times.jsonl`` contain it."""
        return str(self.config.get("created") or times.created(self.folder))

    @property
    def generation(self) -> str:
        """An id that `--fresh` changes in a store: what a run of before it still writes there counts no more."""
        return str(self.config.get("generation", ""))

    @property
    def manifest(self) -> Manifest:
        """The manifest, which is read again only as far as it has grown."""
        if self._manifest is None:
            self._manifest = Manifest(self.folder, self.generation)
        return self._manifest

    def seconds(self) -> dict[str, float]:
        """Seconds from first row to commit, by shard; without those that are not known."""
        self.manifest.last_lines()
        return dict(times.read(self.folder, self.manifest.notes).seconds)

    def setting(self, *path: str, kind: type[T]) -> T:
        """The configuration's value at a path. Raises ArtifactMismatch if it is missing or of another type."""
        return config_file.setting(f"{self.url}/{CONFIG}", self.config, path, kind)

    def prompts(self) -> list[tuple[str, str]]:
        """Names and texts of the captioning prompts. Raises ArtifactMismatch if there are none."""
        return config_file.prompts(f"{self.url}/{CONFIG}", self.config)

    @classmethod
    def exists(cls, url: str) -> bool:
        return Folder(url).exists(CONFIG)

    @classmethod
    def open(cls, url: str) -> Artifact:
        """Open an existing artifact for reading. Raises BadInput if there is none."""
        folder = Folder(url)
        if not folder.exists(CONFIG):
            raise BadInput(f"{url}: not an artifact of capipe (no {CONFIG}); check the path")
        try:
            config = bounded_json.load_from(folder, CONFIG)
            stage, semantic, run = config["stage"], config["semantic"], config["run"]
            if not (isinstance(semantic, dict) and isinstance(run, dict)):
                raise TypeError("semantic and run are no objects")
            if not isinstance(stage, str):
                raise TypeError("stage is no text")
            config_file.check(config)
            problem = next(filter(None, map(name_problem, config_file.named(run))), None)
            sound = fingerprint(semantic) == config["fingerprint"] and semantic["stage"] == stage
        except (NotAFile, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ArtifactMismatch(f"{url}/{CONFIG}: unreadable ({reason}); restore it, or use --fresh") from None
        if problem is not None:
            raise ArtifactMismatch(f"{url}/{CONFIG}: {problem}; {config_file.NOT_OURS}")
        if not sound:
            text = f"{url}/{CONFIG}: its fingerprint does not fit its contents; was it edited? Restore it"
            raise ArtifactMismatch(text)
        return cls(folder, config)

    @property
    def is_as_written(self) -> bool:
        """True if ``config.json`` is exactly as capipe wrote it. Configurations older than digests have none."""
        known = {"stage", "fingerprint", "semantic", "run", "packages", "created", "generation", config_file.DIGEST}
        return self.config.keys() <= known and self.config.get(config_file.DIGEST) in (
            None,
            config_file.digest(self.config),
        )

    @classmethod
    def create(
        cls,
        url: str,
        stage: str,
        semantic: Mapping[str, Any],
        run: Mapping[str, Any],
        *,
        fresh: bool = False,
        share: bool = False,
        reads: Iterable[str] = (),
    ) -> Artifact:
        """Open ``url`` for writing under a lock: a new artifact, or an existing one of the same fingerprint.

        ``semantic``: settings covered by the fingerprint; ``run``: settings that are only recorded (paths, workers,
        engine).
        ``share``: write together with other processes that also set it; :attr:`claims` assigns shards to them.
        ``reads``: paths and URLs of all inputs; ``url`` must not equal, contain or lie inside any of them.
        Raises ArtifactMismatch, naming the keys, if the folder was made by another configuration, and BadInput if
        another process is writing, or if a folder to be shared is where two writers may overwrite each other.
        """
        refuse_overwriting(url, reads)
        folder = Folder(url)
        semantic = identity_of(json.loads(canonical({"stage": stage, **semantic})))
        config = {
            "stage": stage,
            "fingerprint": fingerprint(semantic),
            "semantic": semantic,
            "run": redacted_data(json.loads(canonical(run))),
            "packages": config_file.versions(),
        }
        if not folder.exists(CONFIG):
            strangers = [name for name in folder.names() if name != PRIVATE]
            if strangers:
                text = f"{url}: the folder holds other files ({strangers[0]}, …) and no artifact; choose an empty one"
                raise BadInput(text)
        folder.make()
        if share and not (folder.is_local or (folder.is_shared and folder.is_conditional)):
            text = f"{url}: --share needs a file system with locks, or a store with conditional creation (S3, GCS)"
            raise BadInput(f"{text}; give --out such a place, or let one run do all (on many machines: --runner ray)")
        artifact = cls(folder, config, shared=share)
        with threshold(folder) if share else nullcontext():
            artifact._lock = OutputLock(folder, share)
            try:
                artifact._settle(config, fresh, artifact._lock.alone)
                if share:
                    artifact.fence()
            except BaseException:
                artifact._lock.close()
                raise
        return artifact

    def _settle(self, config: dict[str, Any], fresh: bool, alone: bool) -> None:
        """Start the artifact, or resume the existing one; the lock is held. ``alone``: no other process uses it."""
        if fresh:
            self._erase()
            if not self.folder.is_local:
                config["generation"] = uuid.uuid4().hex[:16]
        if not self.folder.exists(CONFIG) and self._write(config, new=True):
            times.note_created(self.folder)
            return
        self.config, self._manifest = self._resumed(config), None
        self.manifest.finish()
        if alone:
            replacing.finish(self.folder)
            self._drop_journals()
            if self.shared:  # later, other processes may have added to it
                self.release_quarantine()

    def fence(self) -> Claims:
        """Enable claims: each worker claims its shards, so a late commit of a worker presumed dead is refused."""
        if self.claims is None:
            presence = None if self._lock is None else self._lock.presence
            self.claims = Claims(self.folder, presence, shares=self.shared)
        return self.claims

    def _resumed(self, config: dict[str, Any]) -> dict[str, Any]:
        old = Artifact.open(self.url).config
        if old["fingerprint"] != config["fingerprint"]:
            changed = "; ".join(differences(old["semantic"], config["semantic"])) or "schema_version"
            text = f"{self.url}: made by another configuration ({changed}); use another --out, or --fresh to start over"
            raise ArtifactMismatch(text)
        resumed = {**old, "run": {**old["run"], **config["run"]}}  # the number of shards may have grown
        if resumed != old:
            self._write(resumed)
        return resumed

    def _write(self, config: dict[str, Any], new: bool = False) -> bool:
        """Write ``config.json``; False if it was to be ``new``, and another run has written one meanwhile."""
        config[config_file.DIGEST] = config_file.digest(config)
        data = encodable(json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True)).encode()
        if new and self.folder.is_conditional:
            return self.folder.fs.create(data, self.folder.full(CONFIG))
        self.folder.write(CONFIG, data)
        return True

    def note(self, **facts: Any) -> None:
        """Add facts about the run to ``config.json``. Raises ArtifactMismatch if another run started over meanwhile."""
        if not self.folder.is_local:
            standing = Artifact.open(self.url)
            if (standing.fingerprint, standing.generation) != (self.fingerprint, self.generation):
                raise ArtifactMismatch(f"{self.url}: another run has started over here; nothing of this one counts")
        self.config["run"] = {**self.config["run"], **redacted_data(facts)}
        self._write(self.config)

    def _drop_journals(self) -> None:
        """Remove journals of committed shards, left by a crash between the commit and their deletion."""
        if not self.folder.private("journal").is_dir():
            return
        folder, committed = self.folder.private_folder("journal"), self.committed()
        for path in [*folder.glob("*.jsonl"), *folder.glob("*.new")]:  # the latter: never renamed to its final name
            if path.suffix == ".new" or path.stem in committed:
                path.unlink()

    def _erase(self) -> None:
        """Remove the output of earlier runs: files named by the manifest or by the configuration's ``extras``, and the
        private folder except for the locks."""
        extras, generation = config_file.left_by_earlier(self.folder, CONFIG)
        named = [name for record in manifest.read(self.folder, generation).values() for name in record.files]
        for name in [*named, *extras]:  # all names are validated before the first file is removed
            self.folder.remove(name)
        self.folder.remove(ATTEMPTS)  # before the entries that name them: a late run then finds nothing to copy
        for name in self.folder.names(PRIVATE):
            if name not in (LOCK, GUARD) and (self.folder.is_local or name != OWNERS):
                self.folder.remove(f"{PRIVATE}/{name}")
        for name in ("journal", replacing.REDO):
            clear(self.folder.private_to_write(name))

    def close(self) -> bool:
        """Release the lock and clean up, without a long wait; safe to call twice. Returns whether no other process was
        writing any more."""
        lock, last, self._lock = self._lock, False, None
        if lock is None:
            return False
        if self.claims is not None:
            self.claims.close()
            self.claims = None
        door = threshold(self.folder, _LEAVING) if self.shared else nullcontext()
        with closing(lock), suppress(LockHeld), door:
            if last := lock.clear_if_last():  # otherwise other processes are still working
                self._clean_up()
            lock.close()  # still under the guard: of two that leave at once, the second is the last
        return last

    def _clean_up(self) -> None:
        """Remove what the last run leaves in private folders."""
        with suppress(ArtifactMismatch):  # of a damaged manifest, which its readers report
            if self.shared:  # a process killed since we started may have left the journal of a committed shard
                self._drop_journals()
        for name in ("tmp", "journal", replacing.REDO):
            with suppress(OSError):  # not there, or not empty
                self.folder.private(name).rmdir()

    def attach(self) -> Artifact:
        """The same artifact for a worker process of the run that holds the lock, which need not read the manifest."""
        if self._retracted is None:
            self._retracted = {} if not self.folder.is_local else self.manifest.retracted()
        return Artifact(Folder(self.url), self.config, _retracted=self._retracted)

    def under(self, claim: Claim | None) -> Artifact:
        """The same artifact for a task: its commits need the claim, if there is one."""
        return self if claim is None else replace(self, _claim=claim)

    def committed(self) -> dict[str, ShardRecord]:
        """The committed shards by name. Raises ArtifactMismatch if one belongs to another configuration."""
        records = self.manifest.committed()
        for record in records.values():
            if record.fingerprint != self.fingerprint:
                text = f"{self.url}: shard {record.shard} was committed under another fingerprint; use --fresh"
                raise ArtifactMismatch(text)
        self._rows = {record.shard: record.count for record in records.values()}
        return records

    def begin(
        self,
        shard: str,
        schema: pa.Schema,
        *,
        tar: bool = False,
        claim: str | None = None,
        over: ShardRecord | None = None,
    ) -> ShardTransaction:
        """Start writing a shard; nothing is visible before its commit. ``claim``: the token of the worker's claim, if
        not that of :meth:`under`; ``over``: the committed version to replace, which stays until the commit."""
        return ShardTransaction(
            *(self.folder, self.fingerprint, shard, schema, tar, Claim(shard, claim) if claim else self._claim),
            *(self._replaced(shard, over), over, self.generation),
        )

    def begin_files(self, shard: str, over: ShardRecord | None = None) -> FileTransaction:
        """Start a shard of files written one by one (for an export), as :meth:`begin`."""
        versions = self._replaced(shard, over), over
        return FileTransaction(self.folder, self.fingerprint, shard, *versions, self.generation, self._claim)

    def _replaced(self, shard: str, over: ShardRecord | None) -> Sequence[str]:
        """sha256 of the versions that a new one of a shard replaces; a store's commit finds out for itself."""
        if over is not None:
            return over.versions
        if self._retracted is None and self.folder.is_local:
            self._retracted = self.manifest.retracted()
        return before.replaces if (before := (self._retracted or {}).get(shard)) is not None else ()

    def journal(self, shard: str) -> Journal:
        return Journal(self.folder.private_to_write(f"journal/{checked_name(shard)}.jsonl"), self.fingerprint)

    def reopen(self, record: ShardRecord, rows: Mapping[int, dict[str, Any]]) -> None:
        """Retract a committed shard to redo some of its rows; ``rows``: those to keep, by index.

        They are written to the journal first, so that no finished row is lost at any moment.
        """
        journal = self.journal(record.shard)
        for index, row in rows.items():
            journal.append(index, row)
        journal.close()
        self.retract(record)

    def retract(self, record: ShardRecord) -> None:
        """Retract a committed shard to redo all of its rows."""
        publishing.retract(self.folder, self.generation, record)
        self._retracted = None

    def read_rows(self, shard: str) -> list[dict[str, Any]]:
        """All rows of a committed shard, in order."""
        rows: list[dict[str, Any]] = self.table(shard).to_pylist()
        return rows

    def table(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A committed shard's rows, or some of their columns. Raises as :meth:`parquet`."""
        with self.parquet(shard) as file:
            return file.read(columns=columns, use_threads=False)

    def parquet(self, shard: str) -> pq.ParquetFile:
        """A committed shard's Parquet file, not yet read. Raises ArtifactMismatch for another row count, OSError."""
        name = f"{checked_name(shard)}.parquet"
        file = parquet_file(self.folder, name)
        if self._rows.get(shard) != file.metadata.num_rows:  # not known yet, or committed again since
            self._learn_rows(shard)
        return expecting(file, self._rows.get(shard, 0), f"{self.url}/{name}")

    def _learn_rows(self, shard: str) -> None:
        """Read the row count of a shard; in a store those of all, as one listing tells."""
        record = self.manifest.find(shard) if self.folder.is_local else self.committed().get(shard)
        self._rows[shard] = 0 if record is None else record.count

    def manifest_digest(self) -> str:
        """sha256 over the committed records without their times: readers with the same digest saw the same shards."""
        return manifest.digest_of(self.committed().values())

    def quarantine(self, shard: str, reason: str) -> None:
        """Record that a shard failed, and why; the next run tries it again."""
        quarantine.put(self.folder, shard, reason)

    def quarantined(self) -> dict[str, str]:
        """Quarantined shards with their errors."""
        return quarantine.read(self.folder)

    def is_quarantined(self, shard: str) -> bool:
        return quarantine.holds(self.folder, shard)

    def release_quarantine(self) -> None:
        self.folder.remove(quarantine.QUARANTINE)
