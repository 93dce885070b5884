"""Which columns several sources give a selection, under which names, and which names are refused."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.expressions.parser import UnknownColumn
from capipe.manifests.schema import SCORE
from capipe.stages.filter.joined import (
    Offer,
    Source,
    assigned,
    joined_aliases,
    joined_row,
    joined_types,
    scored_columns,
)
from capipe.stages.filter.select import Rule, SelectConfig

ASKED = Offer("asked", "", {"ask_watermark": pa.float32(), "ask_collage": pa.float32()})
MINE = Offer("mine.parquet", "", {"stars": pa.int64(), "site": pa.string(), "nsfw": pa.bool_()})
CLIP = scored_columns({"scorers": {"clip": {}}, "safety": False})


def scores(label: str, *kinds: str, named: str = "", **semantic: Any) -> Offer:
    columns = scored_columns({"scorers": {kind: {} for kind in kinds}, **semantic})
    types = {name: SCORE.field(name).type for name in columns if name != "unsafe_labels"}
    return Offer(label, named, types, of_captions=not named)


def test_numbers_are_given_and_text_if_it_is_named() -> None:
    given = assigned([ASKED, MINE], set())
    assert given == [
        {"ask_watermark": "ask_watermark", "ask_collage": "ask_collage"},
        {"stars": "stars", "nsfw": "nsfw"},
    ]
    assert joined_types([ASKED, MINE], given) == {
        "ask_collage": "float",
        "ask_watermark": "float",
        "nsfw": "int8",
        "stars": "int64",
    }
    assert "site" in assigned([ASKED, MINE], {"site"})[1]


def test_scores_give_what_their_models_made() -> None:
    assert [name for name in SCORE.names if "_clip_" in name] == CLIP
    assert scored_columns({"scorers": {"itm": {}}, "safety": True})[-2:] == ["unsafe", "unsafe_labels"]
    assert set(scored_columns({})) > set(CLIP)  # an older configuration may have any
    itm = scores("more", "itm")
    (given,) = assigned([itm], set(), ("first", CLIP))
    assert given["re_itm_score"] == "re_itm_score" and joined_types([itm], [given]) == {}


@pytest.mark.parametrize(
    ("offers", "wanted", "said"),
    [
        ([ASKED, Offer("again", "", ASKED.columns)], "", "--scores again: its column 'ask_watermark' is in asked, too"),
        ([MINE, Offer("b", "", {"site": pa.string()})], "site", "--scores b: its column 'site' is in mine.parquet"),
        (
            [Offer("b", "", {"clip_score": pa.float64()})],
            "",
            "'clip_score' is capipe's own, too; write --scores NAME=b",
        ),
        ([Offer("b", "", {"language": pa.string()})], "language", "its column 'language' is capipe's own"),
        ([Offer("b", "", {"width": pa.int32()})], "", "its column 'width' is in --marks, too"),
        ([Offer("b", "b", {"x": pa.int32()}), Offer("c", "", {"b_x": pa.int8()})], "", "--scores c: its column 'b_x'"),
        ([scores("other", "clip")], "", "--scores other: its column 're_clip_score' is in first, too"),
        ([scores("a", "itm"), scores("b", "itm")], "", "--scores b: its column 're_itm_score' is in a, too"),
    ],
)
def test_a_name_has_one_meaning(offers: list[Offer], wanted: str, said: str) -> None:
    with pytest.raises(BadInput) as refused:
        assigned(offers, {wanted}, ("first", CLIP), {"width"})
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_text_that_no_condition_names_is_in_nobodys_way() -> None:
    offers = [MINE, Offer("b", "", {"site": pa.string(), "language": pa.string(), "z": pa.int8()})]
    assert assigned(offers, set())[1] == {"z": "z"}


def test_a_name_comes_before_columns() -> None:
    """Two CLIPs side by side, and the shorter names of their scores for the caption that is written."""
    big = scores("big", "clip", named="big")
    (given,) = assigned([big], set(), ("first", CLIP))
    types = joined_types([big], [given])
    assert given["big_re_clip_score"] == "re_clip_score" and types["big_org_clip_lowest"] == "int32"
    assert joined_aliases(types, "org")["big_clip_score"] == "big_org_clip_score"
    config = SelectConfig(keep="clip_score > 0.2 and big_clip_score - clip_score > 0.1", columns=types)
    used = [column.name for column in (Rule.of(config, "re").keep or pytest.fail()).columns]
    assert used == ["re_clip_score", "big_re_clip_score"]
    assert joined_aliases({"my_re_x", "x_org_y"}, "re") == {}


def test_conditions_name_joined_columns() -> None:
    columns = {"ask_watermark": "float", "stars": "int64", "site": "string"}
    config = SelectConfig(keep='ask_watermark < 0.2 and stars >= 3 and site != "x"', columns=columns)
    rule = Rule.of(config, "org")
    assert rule.columns == ["status", "org_length"] and rule.mark_columns == []
    assert rule.schema.names[-3:] == list(columns) and rule.schema.field("stars").type == pa.int64()
    with pytest.raises(UnknownColumn, match="no column 'star'; did you mean stars"):
        SelectConfig(keep="star > 3", columns=columns)
    with pytest.raises(BadInput, match="texts have no >"):
        SelectConfig(keep='site > "a"', columns=columns)
    with pytest.raises(BadInput, match="--by site: not a number"):
        SelectConfig(top=0.5, by="site", columns=columns)
    with pytest.raises(UnknownColumn, match="--by star: no column 'star'"):
        SelectConfig(top=0.5, by="star", columns=columns)
    with pytest.raises(BadInput, match="no type of a joined column is called 'list'"):
        SelectConfig(columns={"x": "list"})
    assert Rule.of(SelectConfig(top=0.5, by="stars", columns=columns), "re").precision(3).dtype == "float64"
    assert "columns" not in SelectConfig(keep="clip_score > 0.2").model_dump()  # older fingerprints stay


def test_a_row_has_all_columns() -> None:
    mine = Source("scores-1", "mine", {"stars": "stars", "m_x": "x"}, {})
    values = {"stars": True, "x": Decimal("0.5"), "y": 1}
    assert joined_row({"key": "a", "re_caption": "A."}, {"scores-1": values}, [mine]) == {
        "key": "a",
        "re_caption": "A.",
        "stars": 1,
        "m_x": 0.5,
    }
    assert joined_row({}, {"scores-1": {"stars": math.nan, "x": None}}, [mine]) == {"stars": None, "m_x": None}


def test_scores_of_another_caption_are_refused() -> None:
    source = Source("scores-1", "more", {"re_itm_score": "re_itm_score"}, {}, of_captions=True)
    row = {"key": "a", "re_caption": "One.", "org_caption": None, "re_itm_score": None}
    other = {"re_caption": None, "org_caption": "Two.", "re_itm_score": 0.5}
    assert joined_row(row, {"scores-1": other}, [source])["re_itm_score"] == 0.5
    with pytest.raises(ArtifactMismatch, match="--scores more: the scores of 'a' are of another re_caption"):
        joined_row(row, {"scores-1": {**other, "re_caption": "Two."}}, [source])
