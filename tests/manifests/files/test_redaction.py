"""What is kept of texts with secrets in them."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from capipe.manifests.files import redaction
from capipe.manifests.files.redaction import (
    identity_of,
    note,
    printed,
    redacted,
    redacted_data,
    without_known,
    without_secrets,
)

KEY = "sk-4f9a/77+c0ffee=="


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_noted", set())
    monkeypatch.setenv("CAPIPE_API_KEY", f" {KEY}\n")
    yield


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("http://user:pass@host/v1 answers", "http://user:***@host/v1 answers"),
        ("http://a:8000,http://u:p%40q:r@b/v1", "http://a:8000,http://u:***@b/v1"),
        ("https://token@host/v1", "https://***@host/v1"),
        ("sftp://user@host/data", "sftp://user@host/data"),
        ("s3://AKIA:abc@bucket/x.tar", "s3://AKIA:***@bucket/x.tar"),
        ("https://h/a.tar?X-Amz-Signature=af3&X-Amz-Date=1", "https://h/a.tar?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/a?page=1&access_token=e30.x", "https://h/a?page=1&access_token=***"),
        (f"said: Bearer {KEY}.", "said: Bearer ***."),
        (f'{{"authorization": "Bearer {KEY}"}}', '{"authorization": "Bearer ***"}'),
        ("key sk-4f9a%2F77%2Bc0ffee%3D%3D and sk-4f9a%2f77%2bc0ffee%3d%3d", "key *** and ***"),
        (base64.b64encode(KEY.encode()).decode(), "***"),
        ("write me at a@b.org, or see http://host/x@y", "write me at a@b.org, or see http://host/x@y"),
        ("the monkey=3 of a?monkey=4", "the monkey=3 of a?monkey=4"),
    ],
)
def test_a_message_keeps_all_but_the_secret(text: str, kept: str) -> None:
    assert redacted(text) == kept


def test_a_noted_password_is_hidden_in_every_form() -> None:
    note(["--engine", "http://me:p%40ss%3Aw0rd@host/v1"])
    basic = base64.b64encode(b"me:p@ss:w0rd").decode()
    for form in ("p%40ss%3Aw0rd", "p@ss:w0rd", "p%40ss%3aw0rd", basic):
        assert redacted(f"the server got <{form}>, it says") == "the server got <***>, it says"


def test_a_short_password_is_hidden_as_a_word_and_no_part_of_one() -> None:
    note(["http://me:test@host/v1"])
    assert redacted("test of the latest: test") == "*** of the latest: ***"
    # Settings are read again, where a folder's name may have it; there it stands in URLs alone.
    assert redacted_data({"shards": "/data/test", "engine": ["http://me:test@host/v1"]}) == {
        "shards": "/data/test",
        "engine": ["http://me:***@host/v1"],
    }
    assert without_known(f"A test, {KEY}.") == "A test, ***."


def test_the_viewers_own_link_is_shown() -> None:
    link = "http://127.0.0.1:8000/?token=0123456789abcdef"
    assert printed(link) == link and redacted(link) == "http://127.0.0.1:8000/?token=***"


def test_an_identity_has_no_secret_and_else_stays() -> None:
    plain = {"engine": "http://host:8000/v1", "prompt": "Is http://a:b@c a URL?", "n": [1, None, "s3://bucket/k"]}
    assert identity_of(plain) == plain
    assert identity_of("http://u:p@host:8000/v1") == "http://host:8000/v1"
    signed = "https://h/{00..09}.tar?X-Amz-Signature="
    assert without_secrets(f"{signed}1") == without_secrets(f"{signed}2") != without_secrets("https://h/x.tar")


def test_long_texts_take_no_time() -> None:
    for text in (
        "a.b." * 1_000_000,
        "http://" * 500_000,
        "&" * 400_000,
        "x@" * 2_000_000,
        "http://" + "u:" * 2_000_000,
    ):
        assert redacted(text)


def test_a_stream_hides_what_a_traceback_shows() -> None:
    code = (
        "import os, sys; from capipe.manifests.files.redaction import redact_output; redact_output(); "
        "print('out', sys.argv[1], os.environ['HF_TOKEN']); raise ValueError('PASSWORD and ' + sys.argv[1])"
    )
    given = [sys.executable, "-c", code, "http://me:PASSWORD@host/v1"]
    token = "hf_0123456789abcdef"
    done = subprocess.run(given, capture_output=True, text=True, env={**os.environ, "HF_TOKEN": token})
    assert done.stdout == "out http://me:***@host/v1 ***\n"
    assert "ValueError: *** and http://me:***@host/v1" in done.stderr and "PASSWORD@" not in done.stderr


def test_a_stream_that_is_no_file_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    redaction.redact_output()
    assert sys.stdout is mine


def test_a_stream_that_a_program_has_put_in_the_place_of_its_own_stays_open() -> None:
    code = (
        "import io, os, sys; from capipe.manifests.files.redaction import redact_output\n"
        "sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(1), 'wb', 0), write_through=True)\n"
        "redact_output(); print('still open')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "still open\n"
