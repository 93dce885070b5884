"""Filter expressions: what they keep, what nulls do, and that nothing but an expression gets through."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from capipe.errors import BadInput
from capipe.manifests.expressions.parser import parse

TABLE = pa.table(
    {
        "clip": pa.array([0.1, 0.28, 0.3, None, float("nan"), 0.9], pa.float32()),
        "itm": pa.array([0.9, 0.2, None, 0.8, 0.7, 0.1], pa.float32()),
        "length": pa.array([0, 10, 20, 30, None, 50], pa.int32()),
        "language": pa.array(["en", "de", "fr", None, "en", 'a "b"']),
        "labels": pa.array([["x"], [], None, None, ["y"], []], pa.list_(pa.string())),
    }
)
TYPES = {field.name: field.type for field in TABLE.schema}


def kept(text: str) -> list[int]:
    return np.flatnonzero(parse(text, TYPES, {"score": "clip"}).mask(TABLE)).tolist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("clip > 0.28", [2, 5]),  # the column's float32 of 0.28 is not above 0.28
        ("clip >= 0.28", [1, 2, 5]),
        ("clip == 0.28", [1]),
        ("0.28 < clip", [2, 5]),
        ("score > 0.28", [2, 5]),
        ("clip != 0.28", [0, 2, 5]),
        ("clip > 0.28 and itm > 0.05", [5]),
        ("clip > 0.28 or itm > 0.5", [0, 2, 3, 4, 5]),
        ("clip > 0.2 or itm > 0.5 and length > 25", [1, 2, 3, 5]),  # `and` binds closer
        ("(clip > 0.2 or itm > 0.5) and length > 25", [3, 5]),
        ("not clip > 0.28", [0, 1]),  # no score, no NaN: not even under `not`
        ("not (clip > 0.28 or itm > 0.85)", [1]),
        ("not (clip > 0.28 and itm > 0.85)", [0, 1, 3, 4, 5]),  # known to be false by one of them
        ("clip is null", [3, 4]),
        ("clip is not null", [0, 1, 2, 5]),
        ("labels is null", [2, 3]),
        ("language in (\"en\", 'de')", [0, 1, 4]),
        ('language not in ("en", "de")', [2, 5]),
        ('language == "en"', [0, 4]),
        ('language != "en"', [1, 2, 5]),
        (r'language == "a \"b\""', [5]),
        ("length in (10, 20.0, -5)", [1, 2]),
        ("clip in (0.28, 0.9)", [1, 5]),
        ("length / 10 - 1 >= 2", [3, 5]),
        ("1 / length < 0.06", [2, 3, 5]),  # a division by zero is null
        ("not 1 / length < 0.06", [1]),
        ("length * 2 - 10 * 2 == 0", [1]),
        ("-length < -25", [3, 5]),
        ("- -length > 25", [3, 5]),
        ("clip + itm > 0.9", [0, 5]),
        ("clip > itm", [1, 5]),
        ("clip > 1e39", []),
        ("clip < 1e39", [0, 1, 2, 5]),
        ("length > 2.5E1 AND NOT itm IS NULL", [3, 5]),
        (" \n clip\t>\n0.28 ", [2, 5]),
        ("clip>.28", [2, 5]),
    ],
)
def test_rows_kept(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clap > 0.2", r"no column 'clap'; did you mean clip\?"),
        ("zzz > 0.2", r"no column 'zzz'; known: score, clip, itm, length, language, labels$"),
        ('__import__("os").system("true") > 0', r"__import__\(…\) is a call, and nothing can be called here"),
        ("len(language) > 3", r"len\(…\) is a call"),
        ("language.upper == 3", r"'\.' at character 9"),
        ("clip[0] > 1", r"'\[' at character 5"),
        ("lambda: 1", r"no column 'lambda'"),
        ("clip > 0.2; itm > 1", r"';' at character 11"),
        ("clip = 0.2", "'=' at character 6: write =="),
        ("clip <> 0.2", "write !="),
        ("clip > 0.2 && itm > 1", "write and"),
        ("clip > 0.2 || itm > 1", "write or"),
        ("! clip > 0.2", "write not"),
        ("0.1 < clip < 0.5", "cannot be chained; write a < b and b < c"),
        ('clip > "0.2"', "clip is a number and '0.2' is a text"),
        ("language > clip", "language is a text and clip is a number"),
        ('language > "en"', "texts have no >"),
        ("language + 1 > 2", "language is a text; [+] takes numbers"),
        ("labels == 1", "labels is a list; it can only be asked for null"),
        ('language in ("en", 1)', "language cannot be 1"),
        ("language in (clip)", "only numbers or only texts"),
        ('language in "en"', r"followed by a list"),
        ('language in ("en"', r"ends with \)"),
        ("language in ()", r"'\)' at character 14"),
        ("clip is 3", "followed by null or not null"),
        ("clip not 3", "followed by `in`"),
        ("(clip > 1) is null", "only a value can be null"),
        ("(clip > 1) > 1", r"\(clip > 1\) is a condition, not a value"),
        ("(clip > 1) + 1 > 1", r"\(clip > 1\) is a condition, not a value"),
        ("clip", "clip is no condition"),
        ("not clip", "clip is no condition"),
        ("clip > 1 and itm", "itm is no condition"),
        ("0.5", "0.5 is no condition"),
        ("1 < 2", "without a column"),
        ('"a" in ("a")', "without a column"),
        ("1 is null", "without a column"),
        ("clip > 1 / 0", "1 / 0 is no number"),
        ("clip > 1e999", "1e999 is too large"),
        ("clip >", "ends too early"),
        ("", "ends too early"),
        ("(clip > 1", r"ends too early; a \) is missing"),
        ("clip > 1)", r"'\)' at character 9"),
        ("clip > 0.28abc", "'abc' at character 12"),
        ('language == "en', "a text ends with the quote it began with"),
        ("(" * 60 + "clip > 1" + ")" * 60, "nested more than 50 deep"),
        ("not " * 60 + "clip > 1", "nested more than 50 deep"),
        ("clip > " + "-" * 60 + "1", "nested more than 50 deep"),
    ],
)
def test_what_is_no_expression_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        parse(text, TYPES, {"score": "clip"})
    assert str(refused.value).startswith("--keep ") and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_reasons_name_the_first_failing_term_and_its_values() -> None:
    expression = parse(
        '(score > 0.28  and\n itm > 0.5) and (length < 15 or language == "en")', TYPES, {"score": "clip"}
    )
    failed = expression.failures(TABLE).tolist()
    assert failed == [0, 0, 1, 0, 0, 1]
    rows = TABLE.to_pylist()
    assert expression.reason(0, rows[0]) == "score > 0.28: score is 0.1"
    assert expression.reason(0, rows[3]) == expression.reason(0, rows[4]) == "score > 0.28: score is missing"
    assert expression.reason(1, rows[2]) == "itm > 0.5: itm is missing"
    assert expression.reason(2, rows[2]) == "length < 15 or language == \"en\": length is 20, language is 'fr'"
    assert parse("clip > itm * 2", TYPES).reason(0, rows[0]) == "clip > itm * 2: clip is 0.1, itm is 0.9"
    assert [column.name for column in expression.columns] == ["clip", "itm", "length", "language"]


def test_bounds_for_pictures() -> None:
    expression = parse("score > 0.25 and (0.5 <= itm or clip > itm) and length in (1, 2)", TYPES, {"score": "clip"})
    assert expression.bounds() == [("clip", 0.25), ("itm", 0.5)]


def test_no_rows() -> None:
    assert parse("clip > 0.2 and not language == 'en'", TYPES).mask(TABLE.slice(0, 0)).tolist() == []


def test_many_terms_are_no_problem() -> None:
    assert kept(" and ".join(["clip > 0.28"] * 3000)) == [2, 5]
    assert kept(" + ".join(["length"] * 3000) + " > 60000") == [3, 5]
    assert kept("0" + " - length * 1" * 3000 + " < -60000") == [3, 5]
    assert kept("1 + " * 3000 + "length > 3020") == [3, 5]
    assert kept(" / ".join(["length"] * 3000) + " >= 0") == [1, 2, 3, 5]  # 0 / 0 is null
    assert (
        parse(" + ".join(["clip", "itm"] * 400) + " > 1", TYPES)
        .reason(0, {"clip": 0.5, "itm": 0.25})
        .endswith(" > 1: clip is 0.5, itm is 0.25")
    )


@pytest.mark.parametrize(
    ("before", "core", "after", "times"),
    [
        ("(", "clip > 0", ")", 50),
        ("not (clip > 1 or ", "clip > 0", " and clip > 0)", 25),
        ("-(-(", "clip", ") + 1)", 12),
        ("(1 - 2 * (", "clip", ")) / 3", 25),
    ],
)
def test_depth_is_bounded_in_all_mixtures(before: str, core: str, after: str, times: int) -> None:
    """As deep as is allowed works; ever so deep is refused in one line."""

    def text(times: int) -> str:
        return before * times + core + after * times + ("" if ">" in core else " > 0")

    assert len(parse(text(times), TYPES).mask(TABLE)) == len(TABLE)
    for more in (times + 1, 20_000):
        with pytest.raises(BadInput, match="nested more than 50 deep; write it flatter") as refused:
            parse(text(more), TYPES)
        assert len(str(refused.value)) < 300
