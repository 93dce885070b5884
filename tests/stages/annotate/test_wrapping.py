"""What captions must not come in, and sound captions that only look like it."""

from __future__ import annotations

import pytest

from capipe.stages.annotate.wrapping import find_wrapper


@pytest.mark.parametrize(
    "text",
    [
        "A red square.<|im_end|>",
        "<|im_start|>assistant\nA red square.",
        "<|object_ref_start|>the square<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
        "A red square.<｜end▁of▁sentence｜>",
        "A red square.<end_of_turn>",
        "[INST] Describe. [/INST] A red square.",
        "A red square.</s>",
        "<s> A red square.",
        "A red square. </think> It is red.",
        "<answer>A red square.</answer>",
        "<box>(10,20),(30,40)</box> a red square",
        '<tool_call>{"name":"zoom","arguments":{}}</tool_call>',
        "\\boxed{A red square}",
        "assistant\n\nA red square.",
        "### Assistant: A red square.",
    ],
)
def test_chat_markup_is_no_caption(text: str) -> None:
    for wanted in (False, True):
        assert (find_wrapper(text, wanted) or "").startswith("chat markup")


@pytest.mark.parametrize(
    "text",
    [
        '{"caption": "A red square."}',
        ' {"caption":"A red square."}\n',
        '```json\n{"caption": "A red square."}\n```',
        '```\n["a red square", "a cross"]\n```',
        '[{"caption": "A red square."}]',
        '{"caption": "A red squ',
        "{'caption': 'A red square.'}",
        "{}",
    ],
)
def test_json_is_a_wrapper_unless_it_was_asked_for(text: str) -> None:
    assert find_wrapper(text) == "JSON around the caption"
    assert find_wrapper(text, json_wanted=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "A red square.",
        "[A red square] is drawn on a card.",
        'A screen shows the text {"id": 1} in green letters.',
        "A sign says <think> in capital letters.",
        "1 < 2 and 3 > 2 are written on a board; a | b | c below.",
        "<3 is written on a cake.",
        "An assistant: a woman in white hands over a scalpel.",
        "```\nprint(1)\n``` is shown on a slide.",
        "A web page with <s>19</s> 9 euros.",
        "| a | b |\n|---|---|\n| 1 | 2 |",
    ],
)
def test_sound_captions_are_in_no_wrapper(text: str) -> None:
    assert find_wrapper(text) is None
