"""Columns of several sources in one selection: which there are, under which names, and how they join the scores' rows.

One artifact of scores gives the captions and the statuses; it is the main one. Other sources are sidecars of the same
rows, and give columns alone: answers of `capipe ask`, scores by other models, tables of the user's own. A value that
belongs to an image counts for each of its captions. A source with a name has it before each of its columns
(``NAME_column``); a column that two sources have, or that is capipe's own, is refused without one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import ArtifactMismatch, BadInput
from ...manifests.joining.columns import is_text, joined_type
from ...manifests.schema import SCORE, SELECT

STAGE = "join"  # of the artifact that a table of the user's own becomes
PREFIXES = ("re", "org")
_DESCRIBED = ("caption", "length", "sentences", "repetition", "language")  # columns of a caption that no model gives
_OF_CAPTION = re.compile(r"(?P<named>(?:\w+_)?)(?:re|org)_(?P<rest>\w+)")
#: Unprefixed names in expressions, of the caption that is written: ``clip_score`` for ``re_clip_score`` or ``org_…``.
SHARED = tuple(name.removeprefix("re_") for name in SCORE.names if name.startswith("re_"))
#: Names that a selection's columns have, conditions use, or readers of its tables and tars give a meaning to.
_OWN = frozenset((*SELECT.names, *SHARED, "image", "images", "json", "url", "text", "captions", "questions", "format"))


@dataclass(frozen=True)
class Source:
    """A source as selection reads it; picklable.

    ``name``: of its sidecar. ``label``: for messages. ``columns``: names in the selection, each with that in its files.
    ``types``: those in its files, by the name there. ``of_captions``: scores of the captions that the main scores have.
    """

    name: str
    label: str
    columns: Mapping[str, str]
    types: Mapping[str, pa.DataType]
    of_captions: bool = False

    @property
    def schema(self) -> pa.Schema:
        """The columns of its files that are read."""
        return pa.schema([(name, self.types[name]) for name in self.columns.values()])


@dataclass(frozen=True)
class Offer:
    """What a source could give: ``columns`` of its files with their types. ``named``: the user's name for it, or "".

    ``label``: as the user gave it. ``of_captions``: unnamed scores of captions; their columns are the scores' own.
    """

    label: str
    named: str
    columns: Mapping[str, pa.DataType]
    of_captions: bool = False

    def names(self) -> dict[str, str]:
        """Names in the selection, each with that in its files."""
        return {f"{self.named}_{name}" if self.named else name: name for name in self.columns}


def scored_columns(semantic: Mapping[str, Any]) -> list[str]:
    """Columns of scores that an artifact of this configuration has values of, without those that need no model.

    All of them if the configuration does not name its models.
    """
    scorers = semantic.get("scorers")
    names = [
        name for name in SCORE.names if name.startswith(("re_", "org_")) and name.partition("_")[2] not in _DESCRIBED
    ]
    unsafe = [name for name in SCORE.names if name.startswith("unsafe")]
    if not isinstance(scorers, Mapping):
        return [*names, *unsafe]
    made = [name for name in names if (kind := name.split("_")[1]) in scorers or semantic.get(kind) is not None]
    return made + (unsafe if semantic.get("safety") else [])


def scorer_of(column: str) -> str:
    """The model that a column of scores is of, as its option is called."""
    return "safety" if column.startswith("unsafe") else column.split("_")[1]


def assigned(
    offers: Sequence[Offer],
    wanted: Collection[str],
    main: tuple[str, Iterable[str]] = ("", ()),
    marked: Iterable[str] = (),
) -> list[dict[str, str]]:
    """For each offer the columns that it gives, by name in the selection, each with the name in its files.

    Numbers and truth values are all given, text only if it is ``wanted``. ``main``: label and scored columns of the
    main scores; ``marked``: columns of the marks. Raises BadInput for a name with two meanings.
    """
    scored = dict.fromkeys(main[1], main[0])
    own = {**dict.fromkeys(_OWN, ""), **dict.fromkeys(marked, "--marks")}
    holders: dict[str, str] = {}
    given = []
    for offer in offers:
        columns = {}
        for name, column in offer.names().items():
            text = is_text(offer.columns[column])
            if text and name not in wanted:
                continue
            other = scored.get(name) if offer.of_captions else holders.get(name, own.get(name))
            if other is not None:
                raise _clash(offer, name, other)
            (scored if offer.of_captions else holders)[name] = offer.label
            columns[name] = column
        given.append(columns)
    return given


def _clash(offer: Offer, name: str, other: str) -> BadInput:
    whose = f"in {other}" if other else "capipe's own"
    text = f"--scores {offer.label}: its column {name!r} is {whose}, too"
    named = f"{offer.named}2" if offer.named else "NAME"
    return BadInput(f"{text}; write --scores {named}={offer.label}, and {named}_{name} in conditions")


def joined_types(offers: Sequence[Offer], given: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Arrow's names of the types of all columns given beside the scores' own, by name in the selection, sorted."""
    types = {
        name: str(joined_type(offer.columns[column]))
        for offer, columns in zip(offers, given, strict=True)
        if not offer.of_captions
        for name, column in columns.items()
    }
    return dict(sorted(types.items()))


def joined_aliases(columns: Collection[str], text: str) -> dict[str, str]:
    """Unprefixed names of joined scores of captions: ``big_clip_score`` for ``big_re_clip_score`` or ``…_org_…``.

    Only of scores that there are of both captions. ``text``: the caption that is written.
    """
    found = {}
    for name in columns:
        match = _OF_CAPTION.fullmatch(name)
        if match is None:
            continue
        both = {prefix: f"{match['named']}{prefix}_{match['rest']}" for prefix in PREFIXES}
        short = f"{match['named']}{match['rest']}"
        if {*both.values()} <= {*columns} and short not in columns:
            found[short] = both[text]
    return found


def joined_row(
    row: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]], sources: Sequence[Source]
) -> dict[str, Any]:
    """A row of the main scores with the columns of the other sources.

    Raises ArtifactMismatch if a source's scores are of other captions.
    """
    joined = dict(row)
    for source in sources:
        other = beside[source.name]
        if source.of_captions:
            _check_captions(row, other, source)
        joined |= {name: _value(other[column]) for name, column in source.columns.items()}
    return joined


def _value(value: Any) -> Any:
    """A value of a file as the selection has it: NaN is null, a truth value or a decimal a number."""
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, (float, np.floating, Decimal)):
        return value
    number = float(value)
    return None if math.isnan(number) else number


def _check_captions(row: Mapping[str, Any], other: Mapping[str, Any], source: Source) -> None:
    for prefix in PREFIXES:
        ours, theirs = (side.get(f"{prefix}_caption") for side in (row, other))
        if ours is not None and theirs is not None and ours != theirs:
            text = f"--scores {source.label}: the scores of {row['key']!r} are of another {prefix}_caption"
            raise ArtifactMismatch(f"{text}; score these captions again, or give the scores a name: NAME=…")
