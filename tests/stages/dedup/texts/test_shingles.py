"""What of a text is compared, in any script, and how alike two texts are."""

from __future__ import annotations

import sys
import time

import pytest

from capipe.stages.dedup.texts.shingles import MOST_CHARACTERS, jaccard, normalized, shingles


def near(one: str, other: str) -> float:
    return jaccard(shingles(normalized(one)), shingles(normalized(other)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A dog.", "a  dog"),
        ("A dog\n\tsleeps!", "a dog sleeps"),
        ("ﬁne ＡＢＣ", "fine abc"),
        ("Cafe\u0301 on a street", "café on a street"),
        ("a\0dog\x1b", "a dog"),
        ("\u202ea dog", "a dog"),
        ("a dog\ud800", "a dog"),  # a lone surrogate
        ("“a dog”—asleep", "a dog asleep"),
        ("STRASSE", "straße"),
        ("一只猫。", "一只猫"),
    ],
)
def test_these_are_the_same_text(one: str, other: str) -> None:
    assert normalized(one) == normalized(other) != ""


@pytest.mark.parametrize("text", ["", " ", "\n\t\r ", "\0\0", "\u200b\u200b", "\ud800"])
def test_these_have_nothing_to_compare(text: str) -> None:
    assert normalized(text) == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("...", "???"),
        ("😀", "🚗"),
        ("a", "b"),
        ("5 dogs", "6 dogs"),
        ("कि", "की"),  # vowel signs are marks, not letters
        ("猫 cat", "猫 dog"),
    ],
)
def test_these_differ(one: str, other: str) -> None:
    assert "" != normalized(one) != normalized(other) != ""
    assert near(one, other) < 0.8


def test_a_word_of_twenty_is_near_in_every_script() -> None:
    latin = "an old man in a grey coat feeds brown pigeons on the steps of a church at noon in winter light"
    assert near(latin, latin.replace("brown", "white")) > 0.8
    chinese = "一位穿着灰色外套的老人冬天中午在教堂的台阶上喂几只棕色的鸽子旁边还有一个小孩在看着"
    assert near(chinese, chinese.replace("棕", "白")) > 0.8
    thai = "ชายชราสวมเสื้อโค้ตสีเทากำลังให้อาหารนกพิราบสีน้ำตาลบนขั้นบันไดหน้าโบสถ์ตอนเที่ยงในฤดูหนาวที่มีแสงแดด"
    assert near(thai, thai.replace("น้ำตาล", "ขาว")) > 0.6
    korean = "회색 외투를 입은 노인이 겨울 한낮에 교회 계단에서 갈색 비둘기들에게 먹이를 주고 있고 아이가 옆에서 본다"
    assert near(korean, korean.replace("갈", "흰")) > 0.8


def test_texts_of_the_same_words_in_another_order_are_not_the_same() -> None:
    assert near("a red circle and a blue square", "a blue circle and a red square") < 0.8


def test_shingles_of_short_and_mixed_texts() -> None:
    assert shingles("dog") == {"dog"} and shingles("dogs!") == {"dogs!"} and shingles("abcdef") == {"abcde", "bcdef"}
    assert shingles("一只猫") == {"一只", "只猫"} and shingles("猫") == {"猫"}
    assert shingles("一只 cat") == {"一只", "cat"}


def test_a_huge_text_is_compared_by_its_beginning() -> None:
    began = time.process_time()
    huge = "word and another thing " * 1_000_000
    text = normalized(huge)
    assert len(text) <= MOST_CHARACTERS and text == normalized(huge + "an end of its own")
    ligature = "\ufdfa"  # eighteen characters in NFKC
    assert len(normalized(ligature * MOST_CHARACTERS)) <= MOST_CHARACTERS
    assert len(shingles(text)) <= MOST_CHARACTERS and sys.getsizeof(text) < 100_000
    assert time.process_time() - began < 30, "grows with the whole text"


def test_jaccard_is_that_of_sets() -> None:
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert jaccard(frozenset("a"), frozenset("b")) == 0.0 and jaccard(frozenset("ab"), frozenset("ab")) == 1.0
