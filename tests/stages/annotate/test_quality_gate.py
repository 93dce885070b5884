"""The health gate, on captions that engines really wrote and on ones that only look alike."""

from __future__ import annotations

import re

import pytest

from capipe.manifests.status import Status
from capipe.models.engines.base import FinishReason, Thought
from capipe.stages.annotate.loops import find_loop
from capipe.stages.annotate.quality_gate import GateResult, QualityGateConfig, check_caption

GATE = QualityGateConfig()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", Status.EMPTY),
        ("  \n", Status.EMPTY),
        ("!" * 50, Status.DEGENERATE),
        ("A cat! ! ! ! ! ! ! ! ! ! ! ! ! !", Status.DEGENERATE),
        ("A red car. " + "The car is red and the road is wet. " * 6, Status.DEGENERATE),
        ("A red square and " + "a blue square and " * 4 + "a cat.", Status.DEGENERATE),
        ("Auf dem Tisch " + "liegen ein Messer und eine Gabel " * 4, Status.DEGENERATE),
        ("very " * 30, Status.DEGENERATE),
        ("aaaaaaaaaaaaaaaaaaaa", Status.DEGENERATE),
        ("I'm sorry, I can't help with that.", Status.REFUSED),
        ("As an AI language model I cannot see images.", Status.REFUSED),
        ("Sure, here is a detailed description: a dog.", Status.DEGENERATE),
    ],
)
def test_faults(text: str, status: Status) -> None:
    verdict = check_caption(text, "stop", GATE)
    assert verdict.status is status and verdict.reason


@pytest.mark.parametrize(
    "text",
    [
        "A small red circle in the top left.",
        'A sign that reads "I\'m sorry, we are closed" hangs on a door.',
        "Row, row, row your boat, says the banner.",
        "A very, very, very tall tower beside a very low house.",
        "Three cats: a red cat, a blue cat and a green cat. " * 2,
        "The price is $1,000,000.00 (!!!) on the poster...",
    ],
)
def test_healthy_captions_pass(text: str) -> None:
    assert check_caption(text, "stop", GATE).status is Status.OK


#: What pictures full of text make captioners write: each was once taken for a fault of theirs.
TEXT_RICH = {
    "table": "The image shows sales by region.\n\n| Region | Q1 | Q2 |\n|--------|----|----|\n| North | 10 | 12 |",
    "wide table": "A rota.\n\n|" + " --- |" * 32 + "\n|" + " 0 |" * 32 + "\n|" + " 0 |" * 31 + " 1 |",
    "blanks": 'A scanned form with the lines "Name: ______________" and "Date: __________".',
    "zeros": "A banknote that reads 100000000 in large red numerals.",
    "colour": "A swatch labelled #FFFFFFFFFF next to one labelled #00000000.",
    "telephone": "A poster with the phone number 1-800-00000000.",
    "leaders": 'A menu: "Soup ............ 4.50, Bread . . . . . . . . . . . . . . . 2.00".',
    "binary": "A screen of binary code that begins 0000000011111111.",
    "scream": 'A cartoon of a cat shouting "AAAAAAAAAAAH!".',
    "laughter": "一张表情包，上面写着“哈哈哈哈哈哈哈哈哈”。",
    "www": "网友评论：“wwwwwwwwwwww”。",
    "emoji": "A T-shirt with a row of emoji: 😀😃😄😁😆😅😂🤣😊😇🙂🙃.",
    "stars": "A review card with ★★★★★★★★★★ (ten stars).",
    "pawns": "A chessboard with eight pawns on the second rank: ♟♟♟♟♟♟♟♟.",
    "password": "A login screen with a password field showing ••••••••••.",
    "rule": "Title\n\n----------\n\nA photo of a red square.",
    "weekdays": "A calendar page: " + " ".join(["Mon Tue Wed Thu Fri Sat Sun"] * 4) + ".",
    "keyboard": 'Four rows, each of which reads "red blue green red blue green red blue green red blue green".',
    "ha": "Text on a page: ha ha ha ha ha ha ha ha ha.",
    "no": "A poem: no no no no no no no no more.",
    "sequence": "A slide shows a DNA sequence: " + "AT" * 16 + "GC" * 5 + "AAAAAAAATTTT and its complement.",
    "stack": "An error in a terminal:\n" + "  at com.example.factorial.Factorial.compute(Factorial.java:12)\n" * 7,
    "columns": "A terminal with a green prompt and white text, above it the first line of a hex dump: "
    + "00 00 00 00 00 00 00 00  " * 2
    + "|................|",
    "objects": "\n".join(f"- object {number}: a red square" for number in range(30)),
}


@pytest.mark.parametrize("text", TEXT_RICH.values(), ids=TEXT_RICH.keys())
def test_what_stands_in_a_picture_is_no_fault(text: str) -> None:
    assert check_caption(text, "stop", GATE) == GateResult(Status.OK)


@pytest.mark.parametrize(
    ("phrase", "times"),
    [
        ("图片中有一只红色的猫，", 60),
        ("红", 400),
        ("これは赤い四角です。", 60),
        ("สี่เหลี่ยมสีแดง", 60),
        ("A red square. ", 60),
        ("مربع أحمر. ", 60),
        (".", 500),
        ("🔴", 100),
        ("❤️", 60),
        ("| a | b |\n", 80),
        ("| 0 ", 400),
        ("0 ", 200),
        ("<td></td>", 60),
        ("{}[]", 60),
        ("\n.", 60),
    ],
)
def test_loops_in_every_script(phrase: str, times: int) -> None:
    for before in ("", "A red square on white, seen from above, with a small sign below it.\n"):
        verdict = check_caption(before + phrase * times, "stop", GATE)
        assert verdict.status is Status.DEGENERATE and verdict.reason


@pytest.mark.parametrize(
    "text",
    [
        "抱歉，我无法协助识别图片中的人物。",
        "很抱歉，我不能提供对这张图片的描述。",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Je ne peux pas vous aider à identifier cette personne.",
        "Lo siento, no puedo describir imágenes.",
        "I can't assist with that request.",
        "I’m unable to view or analyze images directly, but I can help if you describe it.",
        "It seems no image was provided. Please upload the image you would like me to describe.",
        "I'm sorry, I can't tell you what is written on the sign.",
        "申し訳ございませんが、画像を確認できません。",
        "ขออภัย ฉันไม่สามารถช่วยได้",
    ],
)
def test_refusals_in_every_language(text: str) -> None:
    assert check_caption(text, "stop", GATE).status is Status.REFUSED


@pytest.mark.parametrize(
    "text",
    [
        "Sorry, we are closed is printed on a sign in a shop window.",
        "I can't breathe is written on a protester's placard.",
        "I'm sorry is written in large red letters on a white card.",
        'A sign that reads "I cannot help you" hangs on a door.',
        "\"I'm sorry, I can't help you\" reads the note on the door.",
        "“Sorry, we are closed” – a card in a shop window.",
        "“抱歉，我们无法提供服务”的牌子挂在门上。",
        "「申し訳ございませんが、本日は営業できません」という貼り紙の写真です。",
        "Leider kann man den Text auf dem Schild nicht lesen; daneben steht ein Baum.",
        "It seems the photo was not taken in daylight: street lamps are lit.",
    ],
)
def test_apologies_in_the_picture_are_no_refusals(text: str) -> None:
    assert check_caption(text, "stop", GATE) == GateResult(Status.OK)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Certainly one of the oldest bridges in the town, it spans a river.", Status.OK),
        ("Of course Oxford University Press appears on the cover of the book.", Status.OK),
        ("Okay, Oklahoma is written on the road sign.", Status.OK),
        ("Okay, a red square on white.", Status.DEGENERATE),
        ("Certainly! Below is a detailed description.\n\nA red square.", Status.DEGENERATE),
        ("好的，以下是这张图片的详细描述：\n\n画面中央是一个红色的正方形。", Status.DEGENERATE),
    ],
)
def test_boilerplate_openers_are_told_from_captions_that_begin_alike(text: str, status: Status) -> None:
    assert check_caption(text, "stop", GATE).status is status


def test_thresholds_decide() -> None:
    sentence = "The dog is looking at the camera. " * 5
    assert check_caption(sentence, "stop", GATE).status is Status.DEGENERATE
    assert check_caption(sentence, "stop", QualityGateConfig(loop_repeats=6)).status is Status.OK
    shout = "A banner that says g" + "o" * 50 + "al, held up by people in a crowd at a football match at night"
    assert check_caption(shout, "stop", GATE).status is Status.DEGENERATE
    assert check_caption(shout, "stop", QualityGateConfig(longest_run=60)).status is Status.OK
    poor = " ".join(f"red blue {['green', 'gray', 'black'][n * n % 3]} {n % 7}" for n in range(40))
    assert check_caption(poor, "stop", QualityGateConfig(loop_repeats=99)).status is Status.DEGENERATE
    assert check_caption(poor, "stop", QualityGateConfig(loop_repeats=99, distinct_words=0.05)).status is Status.OK


def test_a_cut_caption_is_truncated_unless_wanted() -> None:
    assert check_caption("A dog on", "length", GATE).status is Status.TRUNCATED
    assert check_caption("A dog on", "length", QualityGateConfig(keep_truncated=True)).status is Status.OK


@pytest.mark.parametrize(
    ("thought", "finish", "status", "reason"),
    [
        (Thought("A dog, it", False), "length", Status.TRUNCATED, "reasoning did not end; allow more by --max-tokens"),
        (Thought("A dog, it", False), "stop", Status.DEGENERATE, "reasoning did not end"),
        (Thought("A dog.", True), "length", Status.TRUNCATED, "reasoning .* took all tokens .* --max-tokens"),
        (None, "length", Status.TRUNCATED, "reasoning .* took all tokens .* --max-tokens"),
        (Thought("A dog.", True), "stop", Status.EMPTY, "wrote nothing after its thought"),
        (None, "stop", Status.EMPTY, "the model wrote nothing"),
    ],
)
def test_a_thought_is_no_caption(thought: Thought | None, finish: FinishReason, status: Status, reason: str) -> None:
    verdict = check_caption("", finish, QualityGateConfig(keep_truncated=True), thought)
    assert verdict.status is status and re.search(reason, verdict.reason or "")
    assert check_caption("A dog on a lawn.", "stop", GATE, thought).status is Status.OK


def test_loops_are_found_at_any_phrase_length_and_place() -> None:
    for length in (3, 7, 25, 90):
        phrase = " ".join(f"w{i}" for i in range(length))
        assert find_loop(f"before {phrase} {phrase} {phrase} after", 4) is None
        found = find_loop(f"before {phrase} {phrase} {phrase} {phrase} after", 4)
        assert found is not None and sorted(found.split()) == sorted(phrase.split())


@pytest.mark.parametrize(
    ("phrase", "copies"),
    [("海面上波光粼粼", 4), ("とても", 8), ("มีต้นไม้ใหญ่อยู่ด้านหน้าวัด", 4), ("ມີຄົນ", 8), ("<tr><td></td></tr>", 8)],
)
def test_loops_without_spaces(phrase: str, copies: int) -> None:
    before = "<table><tr><td>Total</td><td>7</td></tr>" if phrase.startswith("<") else "照片。"
    assert find_loop(before + phrase * (copies - 1), 4) is None
    found = find_loop(before + phrase * copies, 4)
    assert found is not None and sorted(found) == sorted(phrase)
