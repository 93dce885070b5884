"""The sources that ``--scores`` names: artifacts and tables of the user's own, opened, and their columns chosen."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from ....errors import BadInput
from ....manifests.artifact import Artifact
from ....manifests.joining.columns import joined_columns
from ....manifests.joining.table import ParquetTable, open_table
from ....manifests.schema import BASE, SCORE, USAGE
from ....stages.filter.joined import Offer, Source, assigned, joined_types, scored_columns, scorer_of
from ....stages.filter.select import MARK_TYPES, STAGE
from .columns import SCORES

SCORE_STAGE = "score"
_NAMED = re.compile(r"([A-Za-z_]\w*)=(.+)", re.ASCII | re.DOTALL)
_IDENTITY = frozenset(field.name for field in (*BASE, *USAGE))  # what a row is, and what it cost


@dataclass(frozen=True)
class Joined:
    """A source beside the main scores: an artifact with a row for each row, and the columns to take from it."""

    source: Source
    artifact: Artifact


@dataclass(frozen=True)
class Opened:
    """A source as given: ``name`` by the user or "", ``place`` of an artifact or a table; ``columns``: what it has."""

    name: str
    place: str
    origin: Artifact | ParquetTable
    columns: Mapping[str, pa.DataType] = field(repr=False)

    @property
    def scores(self) -> Artifact | None:
        """It, if it is an artifact of scores of captions."""
        return self.origin if isinstance(self.origin, Artifact) and self.origin.stage == SCORE_STAGE else None

    @property
    def captions(self) -> str | None:
        """Fingerprint of the new captions that its columns are about; None without any."""
        found = self.origin.config["semantic"].get("captions") if isinstance(self.origin, Artifact) else None
        return found if isinstance(found, str) else None

    def offer(self) -> Offer:
        return Offer(self.place, self.name, self.columns, of_captions=self.scores is not None and not self.name)


@dataclass(frozen=True)
class Sources:
    """All of ``--scores``. ``main``: the first scores of captions without a name, None without any; ``others``."""

    main: Opened | None
    others: tuple[Opened, ...]

    @property
    def scorers(self) -> dict[str, str]:
        """Models whose scores of captions there are under the scores' own names, with the place of each."""
        opened = [one for one in (self.main, *self.others) if one is not None and one.offer().of_captions]
        return {scorer_of(column): one.place for one in opened for column in one.columns}

    def without_main(self) -> Sources:
        """The same where this run makes the main scores: those given give columns alone."""
        return self if self.main is None else Sources(None, (self.main, *self.others))


@dataclass(frozen=True)
class Chosen:
    """The columns of ``others`` (of each, by name in the selection), and the types of those that scores lack."""

    others: tuple[Opened, ...]
    columns: tuple[Mapping[str, str], ...]
    types: Mapping[str, str]


def open_sources(given: Sequence[str]) -> Sources:
    """Open what ``--scores`` names: ``PLACE`` or ``NAME=PLACE`` each. Raises CapipeError if one cannot be used."""
    opened = [_open(text) for text in given]
    names = [one.name for one in opened if one.name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"--scores {twice}=…: is given twice; each name is of one source")
    main = next((one for one in opened if one.scores is not None and not one.name), None)
    return Sources(main, tuple(one for one in opened if one is not main))


def _open(given: str) -> Opened:
    match = _NAMED.fullmatch(given)
    name, place = (match[1], match[2]) if match is not None else ("", given)
    place = place.rstrip("/") or place
    if not Artifact.exists(place):
        table = open_table(place)
        return Opened(name, place, table, table.columns)
    artifact = Artifact.open(place)
    if artifact.stage == STAGE:
        raise BadInput(
            f"--scores {place}: a selection; give the scores that it was made of, or leave rows out by --marks"
        )
    return Opened(name, place, artifact, _columns(artifact))


def _columns(artifact: Artifact) -> dict[str, pa.DataType]:
    """Columns of an artifact that can be joined. Raises BadInput if there are none, or no shards."""
    if artifact.stage == SCORE_STAGE:
        return {name: SCORE.field(name).type for name in joined_names(artifact)}
    shard = next(iter(artifact.committed()), None)
    if shard is None:
        raise BadInput(f"--scores {artifact.url}: no shard is committed there yet; finish its run")
    with artifact.parquet(shard) as parquet:
        columns = joined_columns(parquet.schema_arrow, _IDENTITY)
    if not columns:
        text = f"--scores {artifact.url}: an artifact of stage {artifact.stage!r}, without a column of numbers or text"
        raise BadInput(f"{text}; leave it out")
    return columns


def joined_names(scores: Artifact) -> list[str]:
    """Columns that an artifact of scores gives beside other scores: those of its models, but no list."""
    names = scored_columns(scores.config["semantic"])
    return [name for name in names if not pa.types.is_list(SCORE.field(name).type)]


def choose(sources: Sources, mentioned: Collection[str], main: tuple[str, Iterable[str]], marked: bool) -> Chosen:
    """The columns that a selection takes from all sources but the main one.

    ``mentioned``: names in its conditions. ``main``: place and scored columns of the main scores; ``marked``: there are
    marks. Raises BadInput for a name with two meanings.
    """
    offers = [one.offer() for one in sources.others]
    columns = assigned(offers, mentioned, main, MARK_TYPES if marked else ())
    for one, given in zip(sources.others, columns, strict=True):
        if not given:
            text = f"--scores {one.place}: has columns of text alone, and no condition names one"
            raise BadInput(f"{text}; name one in --keep, or leave it out")
    return Chosen(sources.others, tuple(columns), joined_types(offers, columns))


def refuse_other_captions(captions: str | None, sources: Sources) -> None:
    """Raise BadInput if an unnamed source is about other new captions than ``captions``, by their fingerprints."""
    for one in sources.others:
        if not one.name and one.captions not in (None, captions):
            text = f"--scores {one.place}: of other new captions than are to be written"
            raise BadInput(f"{text}; give --captions the same, or give this source a name: NAME={one.place}")


def joined(chosen: Chosen, artifacts: Sequence[Artifact]) -> list[Joined]:
    """The chosen columns of ``artifacts``, those of the sources in their order; a table's is what it was joined to.

    Sources without a name are numbered by fingerprint, so that the order of the options decides nothing.
    """
    unnamed = [artifact.fingerprint for one, artifact in zip(chosen.others, artifacts, strict=True) if not one.name]
    numbers = {fingerprint: number for number, fingerprint in enumerate(sorted(unnamed), start=1)}
    found = []
    for one, columns, artifact in zip(chosen.others, chosen.columns, artifacts, strict=True):
        name = f"{SCORES}-{one.name or numbers[artifact.fingerprint]}"
        types = {column: _type(one, column) for column in columns.values()}
        found.append(Joined(Source(name, one.place, columns, types, one.offer().of_captions), artifact))
    return found


def _type(one: Opened, column: str) -> pa.DataType:
    """The type of a column in the source's files, those of a joined table."""
    from ....manifests.joining.columns import joined_type

    kind = one.columns[column]
    return kind if isinstance(one.origin, Artifact) else joined_type(kind)
