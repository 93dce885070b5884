"""The captions and columns that a user can name: which artifacts have them, and what is read of each shard for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from ...errors import BadInput
from ..expressions.parser import kind_of, parse, unknown_column
from ..joining.companion import SELECTION
from ..schema import BASE, CAPTION, INGEST, USAGE
from .mix import CaptionSource, checked_mix
from .rows import Query, uids_before
from .sources import SHARDS, Table

RE, ORG, CHOSEN = "re", "org", "caption"
_TEXTS = {"re_caption": RE, "org_caption": ORG, "caption": CHOSEN, "text": ORG}  # columns of texts, by name of captions
_LISTS = "captions"
_BASE = {field.name for field in BASE}
#: Columns of images that stages copy: wherever they are, they are the same.
_FACTS = {field.name for field in INGEST} - _BASE
_COSTS = {field.name for field in USAGE}  # of the run that made a row, not of its image


def query(
    tables: Sequence[Table], where: str | None, mix: Mapping[str, float] | None, columns: Sequence[str] | None
) -> tuple[Query, dict[str, float]]:
    """What to read, and the weights of captions. Raises BadInput for what no table has, or what two of them have."""
    known = caption_sources(tables)
    weights = checked_mix(_usual_mix(tables, known) if mix is None else mix, known)
    found = _Columns(tables, _text(tables, weights))
    expression = None if where is None else parse(where, found.types, found.aliases, "where")
    shown = found.numbers() if columns is None else {name: found.named("columns", name) for name in columns}
    wanted = [*([] if expression is None else [column.name for column in expression.columns]), *shown.values()]
    places = {name: found.place(name) for name in wanted}
    types = {name: found.types[column] for name, column in shown.items()}
    before = next((uids_before(table.schema) for table in tables if table.name == SHARDS), [])
    return Query(expression, places, {name: known[name] for name in weights}, shown, types, before), weights


def caption_sources(tables: Sequence[Table]) -> dict[str, CaptionSource]:
    """Where captions are, by the names that a mix may have; of a name in several tables, the first one's.

    Of an artifact of `annotate`: its prompts, by their names, and `re`, the first ok caption of each image; with a
    label, `LABEL/prompt` and `LABEL`. Of texts: `re` and `org` of scores, `caption` of a selection, `org` of shards.
    """
    found: dict[str, CaptionSource] = {}
    for table in tables:
        if table.label is not None:
            prefix = f"{table.label}/" if table.label else ""
            found.setdefault(table.label or RE, CaptionSource(table.name, _LISTS, ""))
            for prompt in _prompts(table):
                found.setdefault(prefix + prompt, CaptionSource(table.name, _LISTS, prompt))
        for column, name in _TEXTS.items():
            position = table.schema.get_field_index(column)
            if position >= 0 and pa.types.is_string(table.schema.field(position).type):
                found.setdefault(name, CaptionSource(table.name, column))
    return found


def _prompts(table: Table) -> list[str]:
    """Names of the captions of an artifact of `annotate`. Raises BadInput if it is another one."""
    artifact, position = table.artifact, table.schema.get_field_index(_LISTS)
    if artifact.stage != "annotate" or position < 0 or table.schema.field(position).type != pa.list_(CAPTION):
        raise BadInput(f"captions={artifact.url}: an artifact of stage {artifact.stage!r}; give one of `annotate`")
    samples = artifact.setting("semantic", "annotate", kind=dict).get("samples", 1)
    names = [name for name, _ in artifact.prompts()]
    return names if samples == 1 else [f"{name}#{number}" for name in names for number in range(samples)]


def _usual_mix(tables: Sequence[Table], known: Mapping[str, CaptionSource]) -> dict[str, float]:
    """The captions if no mix is given: new ones, else those that a selection chose, else original ones."""
    labels = [table.label for table in tables if table.label is not None]
    if len(labels) > 1:
        raise BadInput(f"captions: several artifacts ({', '.join(labels)}); say by mix= with which weights")
    usual = [labels[0] or RE] if labels else [name for name in (CHOSEN, RE, ORG) if name in known][:1]
    if not usual:
        raise BadInput("there are no captions in these shards; give captions= or scores=")
    return {usual[0]: 1.0}


def _text(tables: Sequence[Table], mix: Mapping[str, float]) -> str:
    """The captions, new or original, that unprefixed names of scores are of."""
    selection = next((each for each in tables if each.name == SHARDS and each.artifact.stage == SELECTION), None)
    chosen = selection.artifact.config["semantic"].get("text") if selection is not None else None
    return ORG if set(mix) == {ORG} or (set(mix) == {CHOSEN} and chosen == ORG) else RE


class _Columns:
    """The columns of all tables by name. ``aliases``: further names, as `clip_score` for `re_clip_score`."""

    def __init__(self, tables: Sequence[Table], text: str) -> None:
        self.types: dict[str, pa.DataType] = {}
        self._tables: dict[str, list[Table]] = {}
        # Facts of an image are taken from its own listing; of other columns, only those in one table may be used.
        for table in sorted(tables, key=lambda table: table.name != SHARDS):
            for field in table.schema:
                self.types.setdefault(field.name, field.type)
                self._tables.setdefault(field.name, []).append(table)
        prefix = f"{text}_"
        own = [name for name in self.types if name.startswith(prefix)]
        self.aliases = {name.removeprefix(prefix): name for name in own if name.removeprefix(prefix) not in self.types}

    def named(self, option: str, name: str) -> str:
        """The column that a name means. Raises BadInput if there is none."""
        column = self.aliases.get(name, name)
        if column not in self.types:
            raise BadInput(f"{option}: {unknown_column(name, [*self.aliases, *self.types])}")
        return column

    def place(self, name: str) -> str:
        """The table of a column. Raises BadInput if several have one of this name that may differ."""
        tables = self._tables[name]
        if len(tables) > 1 and name not in _BASE | _FACTS:
            urls = " and ".join(table.artifact.url for table in tables)
            raise BadInput(f"{name}: {urls} both have this column; leave one of them out, or name other columns")
        return tables[0].name

    def numbers(self) -> dict[str, str]:
        """The scores of an image: numbers of all tables but facts of the image and what a row cost, by name."""
        names = [name for name, kind in self.types.items() if kind_of(kind) == "number"]
        return {name: name for name in names if name not in _BASE | _FACTS | _COSTS}
