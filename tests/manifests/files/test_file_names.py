"""Keys that become names of files: names that every system takes, that give the key back, and that no two share."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from capipe.manifests.files.names import MAX_FILE, checked_name, file_name, same_file

KEYS = [
    "CON",
    "con.x",
    "Con ",
    "COM1",
    "lpt¹",
    "CONIN$",
    "x:y",
    "trail ",
    "dot.",
    ".h",
    "..",
    ".",
    "%41",
    "100%2F",
    "a/b",
]
KEYS += ["x\n", "a\\b", 'q:"*?<>|', " ", "nul.tar.gz", "aUx", "\x7f", "a\u2028b", "../../x", "%"]
WINDOWS = re.compile(r'[\x00-\x1f<>:"/\\\\|?*]|^[ .]|[ .]\Z|^(?i:con|prn|aux|nul|com\d|lpt[\d¹²³]|conin\$) *(\.|\Z)')


@pytest.mark.parametrize("key", KEYS, ids=ascii)
def test_a_key_becomes_a_name_that_every_system_takes_and_that_gives_it_back(key: str) -> None:
    first = file_name(key)
    assert unquote(first) == key
    for name in (first, file_name(key, {same_file(first)})):
        assert not WINDOWS.search(name) and checked_name(name) == name


@pytest.mark.parametrize(
    "key", ["000000017", "two words", "日本 ü", "a%zz", "CONX", "com10", "~x", "-a", "a.b.c", "IMG_1"]
)
def test_a_key_that_harms_no_system_is_its_own_name(key: str) -> None:
    assert file_name(key) == key


def test_keys_never_share_a_file(tmp_path: Path) -> None:
    pool = [
        "a",
        "A",
        "%",
        "4",
        "1",
        "%41",
        "k",
        "\u212a",
        "é",
        "e\u0301",
        "É",
        ".",
        " ",
        "/",
        ":",
        "~",
        "x" * 300,
        "con",
    ]
    keys = [*dict.fromkeys(a + b + c for a in pool for b in pool for c in ["", "A", "a", "%2e"])]
    taken: set[str] = set()
    for key in keys:
        name = file_name(key, taken)
        assert same_file(name) not in taken and len(name.encode()) <= MAX_FILE and not WINDOWS.search(name)
        assert unquote(name) == key or len(key) > 50
        taken.add(same_file(name))
    assert len(taken) == len(keys) > 1000
