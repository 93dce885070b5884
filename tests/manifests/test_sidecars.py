"""What a sample carries beside its image: the same bytes for the same content."""

from __future__ import annotations

import json

from capipe.manifests.fingerprint import canonical
from capipe.manifests.sidecars import encode_meta


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
