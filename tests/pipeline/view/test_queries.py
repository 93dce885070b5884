"""The viewer's answers: rows, search, filters, thresholds, images; artifacts that are written or damaged meanwhile."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capipe.manifests.artifact import Artifact
from capipe.manifests.shards import RowReader, expand

fastapi = pytest.importorskip("fastapi", reason="the viewer needs capipe[view]")
from fastapi.testclient import TestClient  # noqa: E402

from capipe.pipeline.view import library as library_module  # noqa: E402
from capipe.pipeline.view.app import STATIC  # noqa: E402
from capipe.pipeline.view.library import Library, id_of  # noqa: E402
from capipe.pipeline.view.queries import Finder, Query  # noqa: E402

from ...stages.scored import clip  # noqa: E402
from ..conftest import table  # noqa: E402
from ..looking import words, write_captions, write_chain, write_images  # noqa: E402
from ..viewing import all_rows, client_of, get  # noqa: E402

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> {} \u202e'
SIZES = [8, 8, 5]
ROWS = sum(SIZES)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain(tmp_path_factory.mktemp("view"), SIZES, lambda index: f"{words(index)} {EVIL}")


@pytest.fixture(scope="module")
def client(chain: Path) -> Iterator[TestClient]:
    with client_of(chain) as made:
        yield made


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_every_artifact_with_its_counts(client: TestClient, chain: Path) -> None:
    found = get(client, "catalog")
    names = [each["name"] for each in found["artifacts"]]
    assert names[0] == "shards" and {"captions", "other", "eval/graded", "filtered/shards"} <= set(names)
    assert found["artifacts"][0]["rows"] == {"ok": ROWS - 3, "corrupt": 3} and found["damaged"] == {}
    assert found["start"] in {id_of("captions"), id_of("other")}  # captions are shown first
    assert str(chain) not in json.dumps(found)


def test_pages_are_the_rows_in_order_forwards_and_backwards(client: TestClient, chain: Path) -> None:
    a = id_of("captions")
    rows = all_rows(client, a=a)
    expected = table(chain / "captions")
    assert [row["key"] for row in rows] == [row["key"] for row in expected]
    assert [row["values"]["caption_plain"] for row in rows[:7]] == [r["captions"][0]["text"] for r in expected[:7]]
    back: list[dict[str, Any]] = []
    at: dict[str, Any] = {}
    while True:
        page = get(client, "rows", a=a, limit=4, back=True, **at)
        back = page["rows"] + back
        if page["before"] is None:
            break
        at = {"shard": page["before"][0], "row": page["before"][1]}
    assert back == rows


def test_columns_of_other_artifacts_stand_beside_their_rows(client: TestClient) -> None:
    columns = {each["name"]: each["artifact"] for each in get(client, "columns", a=id_of("captions"))["columns"]}
    assert columns["re_clip_score"] == "filtered/scores" and columns["other_caption_plain"] == "other"
    right = {artifact: name for name, artifact in columns.items() if name.endswith("right_plain")}
    before, after = right["eval/graded"], right["eval-trained/graded"]
    names = ["caption_plain", "other_caption_plain", "re_clip_score", before, after]
    rows = all_rows(client, a=id_of("captions"), columns=names)
    for index, row in enumerate(rows):
        if row["status"] != "ok":
            assert row["values"]["caption_plain"] is None
            continue
        values = row["values"]
        assert values["other_caption_plain"] == values["caption_plain"].replace("red", "crimson")
        assert values["re_clip_score"] == pytest.approx(clip(index), abs=1e-6)
        assert values[before] == (index % 2) / 2
        assert values[after] == (1 - (index % 4 == 0) / 2)


def test_search_finds_what_a_plain_look_at_every_row_finds(client: TestClient, chain: Path) -> None:
    for text in ("STAR", "number 1", "it has other", "0000012"):
        expected = {
            mine["key"]
            for mine, theirs in zip(table(chain / "captions"), table(chain / "other"), strict=True)
            for row in (mine, theirs)
            if any(text.lower() in (c["text"] or "").lower() for c in row["captions"]) or text in row["key"]
        }
        found = [row["key"] for row in all_rows(client, a=id_of("captions"), search=text)]
        assert sorted(found) == sorted(expected) and expected, text
        assert get(client, "count", a=id_of("captions"), search=text)["matched"] == len(expected)


def test_filters_are_those_of_capipe_filter(client: TestClient, chain: Path) -> None:
    kept = [row["source_key"] for row in table(chain / "filtered/shards") if row["status"] == "ok"]
    asked = {"a": id_of("captions"), "filter": "clip_score > 0.4"}
    assert [row["key"] for row in all_rows(client, **asked)] == kept
    told = get(client, "count", **asked)
    assert told == {"matched": len(kept), "scanned": ROWS, "total": ROWS, "done": True, "faults": []}
    both = {**asked, "filter": 'clip_score > 0.4 and status == "ok" and width == 48'}
    assert get(client, "count", **both)["matched"] == len(kept)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clip_scor > 1", "did you mean"),
        ("clip_score >", "ends too early"),
        ('clip_score > "a"', "cannot be compared"),
        ("__import__('os').system('x')", "nothing can be called"),
        ("(" * 60 + "clip_score > 1", "deep"),
        ("clip_score > 1 \n or", "ends too early"),
    ],
)
def test_a_filter_that_is_none_is_told_in_one_line(client: TestClient, text: str, said: str) -> None:
    for path in ("rows", "count"):
        error = get(client, path, 400, a=id_of("captions"), filter=text)["error"]
        assert said in error and "\n" not in error and len(error) <= 300
        assert not error.startswith("--keep")


def test_a_threshold_counts_as_the_filter_does(client: TestClient) -> None:
    a = id_of("captions")
    scores = np.array([row["values"]["x"] for row in _scores(client)], np.float32)
    for value in (0.1, 0.4, float(scores[3]), 0.99):
        for at_least in (True, False):
            asked = {"a": a, "column": "re_clip_score", "value": value, "at_least": at_least}
            found = get(client, "threshold", **asked)
            held = np.float32(value)
            assert found["kept"] == int(((scores >= held) if at_least else (scores <= held)).sum())
            assert found["kept"] == get(client, "count", a=a, filter=found["keep"])["matched"]
            assert found["missing"] == 3 and found["rows"] == ROWS and found["done"]
            stay = sorted(scores[scores >= held]) if at_least else sorted(scores[scores <= held], reverse=True)
            assert [row["value"] for row in found["stay"]] == pytest.approx(stay[:5])
            assert all(row["key"] for row in found["stay"] + found["go"])


def _scores(client: TestClient) -> list[dict[str, Any]]:
    rows = all_rows(client, a=id_of("filtered/scores"), columns=["re_clip_score"])
    return [{"values": {"x": row["values"]["re_clip_score"]}} for row in rows if row["status"] == "ok"]


def test_a_histogram_counts_every_value_of_the_rows_asked_for(client: TestClient) -> None:
    asked = {"a": id_of("captions"), "column": "re_clip_score", "search": "red"}
    found = get(client, "histogram", **asked)
    assert sum(found["counts"]) == found["values"] > 0
    assert found["values"] + found["missing"] == get(client, "count", a=asked["a"], search="red")["matched"]
    assert get(client, "histogram", 400, a=asked["a"], column="caption_plain")["error"].endswith("no column of numbers")
    assert get(client, "threshold", 400, a=asked["a"], column="re_clip_score", value="much")["error"].startswith(
        "value"
    )


def test_all_of_a_row(client: TestClient, chain: Path) -> None:
    parts = get(client, "row", a=id_of("captions"), shard="00001", row=2)["parts"]
    assert next(iter(parts)) == "captions" and {"shards", "eval/graded", "filtered/scores"} <= set(parts)
    assert len({part["uid"] for part in parts.values()}) == 1
    assert parts["captions"] == table(chain / "captions")[10]
    assert get(client, "row", 404, a=id_of("captions"), shard="00001", row=8)["error"] == "shard 00001 has 8 rows"


def test_pictures_are_those_of_the_rows_also_of_those_filtered_out(client: TestClient, chain: Path) -> None:
    images = {row.key: row.image for shard in expand(str(chain / "shards")) for row in RowReader(shard)}
    for name in ("shards", "captions", "filtered/shards"):
        for row in all_rows(client, a=id_of(name)):
            asked = {"a": id_of(name), "shard": row["shard"], "row": row["row"]}
            full = client.get("/api/image", params={**asked, "size": "full"})
            data = images[row["key"]]
            if data is None:
                assert full.status_code == 404
                continue
            assert full.content == data and full.headers["content-type"] == "image/jpeg"
            small = client.get("/api/image", params=asked)
            assert Image.open(io.BytesIO(small.content)).size == (48, 32)


def test_captions_come_as_data_never_as_a_page(client: TestClient, chain: Path) -> None:
    response = client.get("/api/rows", params={"a": id_of("captions")})
    assert EVIL in response.json()["rows"][0]["values"]["caption_plain"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe" not in policy and "default-src 'none'" in policy
    page = client.get("/").text
    assert "<script>" not in page and not re.search(r"""\son\w+\s*=|\sstyle\s*=""", page)
    scripts = "".join(path.read_text() for path in STATIC.glob("*.js"))
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert sink not in scripts


# --- artifacts that change, or are damaged ---------------------------------------------------------------------------


def test_an_artifact_being_written_shows_what_is_committed_and_a_refresh_shows_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "_LOOK", 0.0)
    monkeypatch.setattr(library_module, "_SHARE", 0.0)
    write_images(tmp_path / "shards", [4, 4, 4])
    write_captions(tmp_path / "shards", tmp_path / "captions", only=1)
    (tmp_path / "captions/00001.parquet").write_bytes(b"half a file")  # renamed into place, not committed yet
    with client_of(tmp_path) as client:
        a = id_of("captions")
        assert get(client, "count", a=a)["matched"] == 4
        assert [row["shard"] for row in all_rows(client, a=a)] == ["00000"] * 4
        get(client, "rows", 404, a=a, shard="00001")
        write_captions(tmp_path / "shards", tmp_path / "captions")
        assert get(client, "count", a=a)["matched"] == 12
        assert len(all_rows(client, a=a)) == 12 and get(client, "count", a=a, search="number 9")["matched"] == 1


def test_a_damaged_shard_costs_its_rows_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", [4, 4, 4])
    write_captions(tmp_path / "shards", tmp_path / "captions")
    (tmp_path / "captions/00001.parquet").write_bytes(b"PAR1 nonsense PAR1")
    (tmp_path / "shards/00002.tar").write_bytes(b"\0" * 4096)
    (tmp_path / "broken/_capipe").mkdir(parents=True)
    (tmp_path / "broken/_capipe/config.json").write_text("{}")
    with client_of(tmp_path) as client:
        a = id_of("captions")
        assert list(get(client, "catalog")["damaged"]) == ["broken"]
        page = get(client, "rows", a=a, search="number")
        assert [row["shard"] for row in page["rows"]] == ["00000"] * 3 + ["00002"] * 3
        assert len(page["faults"]) == 1 and page["faults"][0].startswith("00001.parquet cannot be read")
        assert get(client, "row", 400, a=a, shard="00001", row=0)["error"].startswith("00001.parquet cannot be read")
        assert client.get("/api/image", params={"a": a, "shard": "00002", "row": 0}).status_code == 404
        assert get(client, "rows", a=id_of("shards"), shard="00001", limit=1)["rows"][0]["status"] == "ok"


def test_rows_of_other_images_are_never_put_beside(tmp_path: Path) -> None:
    """A sidecar that claims the same tar but holds other uids: its values are not shown."""
    write_images(tmp_path / "shards", [4])
    write_captions(tmp_path / "shards", tmp_path / "captions")
    rows = table(tmp_path / "captions")
    record = Artifact.open(str(tmp_path / "captions")).committed()["00000"]
    from capipe.manifests.schema import ANNOTATE

    other = Artifact.create(str(tmp_path / "other"), "annotate", {"x": 1}, {})
    with other.begin("00000", ANNOTATE) as made:
        for row in rows:
            made.write({**row, "uid": "f" * 32})
        made.commit(rows_in=4, input_info=dict(record.input))
    other.close()
    with client_of(tmp_path) as client:
        found = get(client, "rows", a=id_of("captions"), columns=["other_caption_plain", "caption_plain"])["rows"][0]
        assert found["values"]["other_caption_plain"] is None and found["values"]["caption_plain"]
        assert "other" not in get(client, "row", a=id_of("captions"), shard="00000", row=0)["parts"]


def test_a_request_stops_in_time_and_the_next_goes_on(chain: Path) -> None:
    library, finder = Library(chain), Finder()
    found = library.table(id_of("captions"))
    query = Query(search="number 20")
    first = finder.page(found, query, None, 5, budget=-1.0)
    assert first.stopped and first.rows == [] and first.after == ("00001", 0)
    assert not finder.count(found, query, budget=-1.0)["done"]
    rows, after = [], first.after
    while after is not None:
        page = finder.page(found, query, after, 5, budget=-1.0)
        rows, after = rows + page.rows, page.after
    assert rows == finder.page(found, query, None, 5).rows
    spread, seen, done = finder.spread(found, "re_clip_score", Query(), budget=-1.0)
    assert not done and seen == 8 and len(spread.values) == 7
