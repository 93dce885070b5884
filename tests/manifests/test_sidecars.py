"""What a sample carries beside its image: the same bytes for the same content."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from capipe.manifests.files.bounded_json import MAX_NESTING, is_deeper
from capipe.manifests.files.tar import TarWriter
from capipe.manifests.fingerprint import canonical
from capipe.manifests.shards import RowReader, expand
from capipe.manifests.sidecars import (
    MAX_BYTES,
    MAX_OWN_BYTES,
    decode_meta,
    encode_meta,
    read_sidecars,
)
from capipe.manifests.status import Status


def test_a_row_read_back_from_the_journal_gives_the_same_bytes() -> None:
    captions = [{"name": "plain", "text": "A dog.", "n_tokens": 3, "status": "ok"}]
    ours = {"uid": "1", "text": None, "captions": captions}
    back = json.loads(canonical(ours))
    assert list(back) != list(ours) and list(back["captions"][0]) != list(captions[0])
    meta = {"url": "x", "captions": 1, "uid": "7"}
    assert encode_meta(meta, ours) == encode_meta(dict(reversed(meta.items())), back)
    assert json.loads(encode_meta(meta, ours)) == {**ours, "url": "x", "original_captions": 1, "original_uid": "7"}


def test_integers_that_readers_stop_at_are_text() -> None:
    fits = {"a": [2**64 - 1, -(2**63)], "b": True}
    assert json.loads(encode_meta(fits, {})) == fits
    assert json.loads(encode_meta({"a": {"b": [2**64, -(2**63) - 1]}}, {})) == {
        "a": {"b": [str(2**64), str(-(2**63) - 1)]}
    }


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize("depth", [1, MAX_NESTING, MAX_NESTING + 1, 400, 700, 990, 5000, 100_000])
def test_what_is_nested_deep_is_left_out_with_a_note_wherever_it_is_read(depth: int) -> None:
    def within(frames: int) -> None:
        if frames:
            return within(frames - 1)
        notes: list[str] = []
        meta = decode_meta(nested(depth), notes)
        assert notes == ([] if depth <= MAX_NESTING else ["json is nested too deeply: left out"])
        if meta is not None:
            assert decode_meta(encode_meta(meta, {}), []) == meta

    within(0)
    within(500)  # as deep as an engine's callbacks may call


def test_depth_is_that_of_lists_and_objects() -> None:
    value: object = []
    for _ in range(MAX_NESTING - 1):
        value = [1, value, {}]
    assert not is_deeper(value) and is_deeper([value]) and is_deeper({"x": value}) and not is_deeper(None)


def test_a_sidecar_over_the_limit_costs_no_image_and_no_time(tmp_path: Path) -> None:
    big = b'{"a": [' + b"1," * 30_000_000 + b"1]}"
    with (tmp_path / "a.tar").open("wb") as file:
        tar = TarWriter(file)
        for key, text, meta in [
            ("a", b"A dog.", big),
            ("b", b"x" * (MAX_BYTES + 1), b'{"url": "u"}'),
            ("c", b"c", b"{}"),
        ]:
            tar.add(f"{key}.jpg", key.encode())
            tar.add(f"{key}.txt", text)
            tar.add(f"{key}.json", meta)
        tar.finish()
    started = time.monotonic()
    rows = list(RowReader(*expand(str(tmp_path / "a.tar"))))
    assert time.monotonic() - started < 5
    assert [row.status for row in rows] == [Status.OK] * 3 and [row.image for row in rows] == [b"a", b"b", b"c"]
    assert rows[0].text == "A dog." and rows[0].meta is None and rows[1].text is None and rows[1].meta == {"url": "u"}
    assert rows[0].error == f"json of {len(big)} bytes, over the limit of {MAX_BYTES}: left out"
    assert rows[1].error == f"text of {MAX_BYTES + 1} bytes, over the limit of {MAX_BYTES}: left out"
    assert rows[2].error is None


def test_the_limit_is_met_to_the_byte_and_wider_for_our_own() -> None:
    meta = b'{"a": "' + b"x" * (MAX_BYTES - 9) + b'"}'
    notes: list[str] = []
    assert read_sidecars(b"x" * MAX_BYTES, meta, notes)[1] is not None and not notes
    assert read_sidecars(b"x", meta + b" ", notes) == ("x", None) and len(notes) == 1
    assert decode_meta(meta + b" ", []) is not None and decode_meta(b" " * (MAX_OWN_BYTES + 1), []) is None
