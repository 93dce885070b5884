"""What is kept and why, how shards are grouped and named: the pure part of selecting."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from capipe.errors import BadInput
from capipe.manifests.schema import SCORE, SELECT
from capipe.manifests.shards import Row, uid_of
from capipe.manifests.status import Status
from capipe.stages.filter.select import (
    Rule,
    SelectConfig,
    decide,
    final_keys,
    final_row,
    group,
    members,
    selection_status,
    top_threshold,
    uid_list,
)

from ...conftest import photo


def scored(**columns: list[Any]) -> pa.Table:
    """Rows of scores: ok ones with a caption, unless ``columns`` say otherwise."""
    count = len(next(iter(columns.values())))
    usual = {"key": [f"{i:03d}" for i in range(count)], "status": ["ok"] * count}
    usual |= {"re_caption": ["A caption."] * count, "re_length": [2] * count}
    given = usual | columns
    return pa.table([pa.array(given.get(f.name, [None] * count), f.type) for f in SCORE], schema=SCORE)


def selected(config: SelectConfig, table: pa.Table, marks: list[str] | None = None) -> list[tuple[str, str | None]]:
    """Statuses and errors of all rows, the two ways of deciding held against each other."""
    rule = Rule.of(config, "re")
    found = decide(table, marks, rule)
    if found.by is not None:
        threshold = top_threshold(found.by[found.eligible], config.top or 1.0)
        rule = Rule.of(config, "re", str(np.float32(threshold)))
    beside = [None] * len(table) if marks is None else [{"status": mark, "error": f"is {mark}"} for mark in marks]
    rows = zip(table.to_pylist(), beside, found.failed.tolist(), strict=True)
    verdicts = [selection_status(row, mark, rule, failed) for row, mark, failed in rows]
    assert [status == Status.OK for status, _ in verdicts] == found.kept(rule).tolist()
    return verdicts


def test_a_condition_keeps_rejects_and_says_why() -> None:
    table = scored(
        re_clip_score=[0.3, 0.213, None, 0.28, float("nan"), 0.4],
        re_itm_score=[0.9, 0.9, 0.9, 0.9, 0.9, 0.1],
        error=[None, "json is unreadable: left out", None, None, None, None],
    )
    config = SelectConfig(keep="clip_score > 0.28 and itm_score > 0.5")
    assert selected(config, table) == [
        ("ok", None),
        ("filtered", "clip_score > 0.28: clip_score is 0.213; json is unreadable: left out"),
        ("filtered", "clip_score > 0.28: clip_score is missing"),
        ("filtered", "clip_score > 0.28: clip_score is 0.28"),
        ("filtered", "clip_score > 0.28: clip_score is missing"),
        ("filtered", "itm_score > 0.5: itm_score is 0.1"),
    ]


def test_rows_that_were_lost_before_keep_their_fate() -> None:
    table = scored(
        status=["ok", "refused", "ok", "ok", "ok", "corrupt"],
        error=[None, "said sorry", None, None, None, "truncated"],
        re_length=[2, 2, None, 0, 2, None],
        re_clip_score=[0.9] * 6,
    )
    marks = ["ok", "ok", "ok", "ok", "duplicate", "duplicate"]
    missing = "re_caption is missing: there is nothing to write"
    assert selected(SelectConfig(keep="clip_score > 0.5"), table, marks) == [
        ("ok", None),
        ("refused", "said sorry"),
        ("filtered", missing),
        ("filtered", missing),
        ("duplicate", "is duplicate"),
        ("corrupt", "truncated"),
    ]


def test_top_ranks_what_keep_leaves() -> None:
    """Five of seven pass `keep`, four of these have a score: half of them are two."""
    table = scored(
        re_clip_score=[0.1, 0.99, 0.2, None, 0.3, 0.4, 0.98],
        re_language=["en", "de", "en", "en", "en", "en", "fr"],
    )
    assert selected(SelectConfig(keep='language == "en"', top=0.5), table) == [
        ("filtered", "clip_score >= 0.3 (top 0.5): clip_score is 0.1"),
        ("filtered", "language == \"en\": language is 'de'"),
        ("filtered", "clip_score >= 0.3 (top 0.5): clip_score is 0.2"),
        ("filtered", "clip_score >= 0.3 (top 0.5): clip_score is missing"),
        ("ok", None),
        ("ok", None),
        ("filtered", "language == \"en\": language is 'fr'"),
    ]
    assert [
        status for status, _ in selected(SelectConfig(top=0.3, by="re_sentences"), scored(re_sentences=[3, 1, 2]))
    ] == [
        "ok",
        "filtered",
        "filtered",
    ]


def test_top_keeps_all_ties_with_its_threshold() -> None:
    kept = [s for s, _ in selected(SelectConfig(top=0.2), scored(re_clip_score=[0.5] * 10))]
    assert kept == ["ok"] * 10
    kept = [s for s, _ in selected(SelectConfig(top=0.2), scored(re_clip_score=[0.5] * 9 + [0.7]))]
    assert kept == ["ok"] * 10  # two of ten: the second best is 0.5
    kept = [s for s, _ in selected(SelectConfig(top=0.1), scored(re_clip_score=[0.5] * 9 + [0.7]))]
    assert kept == ["filtered"] * 9 + ["ok"]


@pytest.mark.parametrize("count", [1, 7, 100, 1001])
@pytest.mark.parametrize("top", [0.07, 0.3, 0.999, 1.0])
def test_the_threshold_is_the_one_that_sorting_finds(count: int, top: float) -> None:
    scores = np.random.default_rng(count).normal(size=count).astype(np.float32)
    threshold = top_threshold(scores, top)
    wanted = -(-round(top * 1000) * count // 1000)  # rounded up, exactly
    assert (scores >= np.float32(threshold)).sum() == wanted
    assert threshold in scores.astype(np.float64)
    rule = Rule.of(SelectConfig(top=top), "re", str(np.float32(threshold)))
    assert rule.threshold == threshold  # the record of it is exact


@pytest.mark.parametrize(
    ("kept", "size", "runs"),
    [
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([5, 6, 5], 10, [[0], [1], [2]]),
        ([25, 5, 5, 5], 10, [[0], [1, 2], [3]]),
        ([0, 0, 5, 0, 5, 0, 1, 0], 10, [[0, 1, 2, 3, 4, 5], [6, 7]]),  # nothing kept costs no room
        ([25, 0, 0], 10, [[0, 1, 2]]),  # and makes no empty shard
        ([0, 25], 10, [[0, 1]]),
        ([], 10, []),
    ],
)
def test_groups_are_whole_input_shards_in_order(kept: list[int], size: int, runs: list[list[int]]) -> None:
    assert [list(run) for run in group(kept, size)] == runs


def test_keys_change_only_where_they_clash() -> None:
    assert final_keys(["00000", "00001"], [["a", "b"], ["c"]]) == [["a", "b"], ["c"]]
    assert final_keys(["x.1", "y"], [["a", "b"], ["a"]]) == [["x_1_a", "x_1_b"], ["y_a"]]
    assert final_keys(["p", "p_q"], [["q_r", "r"], ["r"]]) == [["00000_p_q_r", "00000_p_r"], ["00001_p_q_r"]]


def test_a_sample_has_the_bytes_the_caption_and_all_that_is_known() -> None:
    data = photo(1, fmt="PNG")
    table = scored(
        uid=[uid_of(data)], re_clip_score=[0.213], org_caption=["alt"], unsafe=[float("nan")], unsafe_labels=[[]]
    )
    row = table.to_pylist()[0]
    final = final_row(row, "ok", None, "k", "00007", "re")
    assert set(final) == set(SELECT.names)
    assert (final["caption"], final["source_shard"], final["source_key"]) == ("A caption.", "00007", "000")
    source = Row(0, "000", uid_of(data), Status.OK, None, data, "jpeg", "alt", {"n": 1, "re_caption": "older"})
    sample = members(source, final)
    assert sample is not None and list(sample) == ["png", "txt", "json"]  # named by content
    assert sample["png"] == data and sample["txt"] == b"A caption."
    assert json.loads(sample["json"]) == {
        "original_re_caption": "older",
        "n": 1,
        "re_caption": "A caption.",
        "uid": uid_of(data),
        "re_length": 2,
        "re_clip_score": 0.213,
        "org_caption": "alt",
    }
    rejected = final_row(row, "filtered", "no", "k", "00007", "re")
    assert rejected["caption"] is None and rejected["re_clip_score"] is not None
    assert members(source, rejected) is None


def test_the_uid_list_is_datacomps() -> None:
    uids = ["ff" * 16, "00" * 15 + "01", "ff" * 16, "0123456789abcdef" + "fedcba9876543210"]
    found = uid_list(uids)
    assert found.dtype == np.dtype("u8,u8")
    expected = sorted({(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids})
    assert [tuple(each) for each in found.tolist()] == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": "clip_scor > 0.2"}, "no column 'clip_scor'; did you mean clip_score"),
        ({"keep": '__import__("os").remove("x") == 1'}, "is a call"),
        ({"keep": "language > 3"}, "language is a text and 3 is a number"),
        ({"top": 0.3, "by": "clip"}, "--by clip: no column 'clip'"),
        ({"top": 0.3, "by": "language"}, "--by language: not a number"),
        ({"top": 0.3, "by": "len(x)"}, "no column"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        SelectConfig(**options)


def test_unprefixed_names_mean_the_caption_that_is_written() -> None:
    for text in ("re", "org"):
        rule = Rule.of(SelectConfig(keep="clip_score > 0.5 and re_length > 1", top=0.5), text)  # type: ignore[arg-type]
        assert rule.columns == ["status", f"{text}_length", f"{text}_clip_score", "re_length"][: 3 + (text == "org")]
        assert rule.by == f"{text}_clip_score"
    named = Rule.of(SelectConfig(keep="sentences < 9 and caption != 'x' and repetition < 0.5 and unsafe < 0.5"), "org")
    assert named.columns[2:] == ["org_sentences", "org_caption", "org_repetition", "unsafe"]
