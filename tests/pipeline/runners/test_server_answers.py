"""Whole commands against a server that answers in the ways that servers in the field do."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ...conftest import photo, tar_bytes
from ...models.chat_server import Answer, Double, completion, serving
from ..conftest import capipe, one_line, table

CAPTION = "A red square on a white ground."
FILTERED = {"error": {"message": "The prompt triggered the content management policy.", "code": "content_filter"}}


def message(finish_reason: str | None = "stop", usage: Any = None, **fields: Any) -> Answer:
    choice = {"message": {"role": "assistant", **fields}, "finish_reason": finish_reason}
    return 200, {}, {"choices": [choice], "usage": usage}


#: A case's answer, then the caption's status and text, and a part of the reason.
CASES: dict[str, tuple[Answer, str, str | None, str]] = {
    "think": (message(content=f"<think>\nLook.\n</think>\n\n{CAPTION}"), "ok", CAPTION, ""),
    "think_begun": (message(content=f"Look.\n</think>\n\n{CAPTION}"), "ok", CAPTION, ""),
    "think_empty": (message(content=f"<think></think>{CAPTION}"), "ok", CAPTION, ""),
    "think_unended": (message(content="<think>\nLook at it."), "degenerate", "", "reasoning did not end"),
    "think_inside": (
        message(content=f"{CAPTION} <think>Yes.</think>"),
        "degenerate",
        f"{CAPTION} <think>Yes.</think>",
        "chat markup '</think>'",
    ),
    "reasoning": (message(content=CAPTION, reasoning_content="Look."), "ok", CAPTION, ""),
    "reasoning_null": (
        message("length", content=None, reasoning_content="Look"),
        "truncated",
        "",
        "reasoning did not end; allow more by --max-tokens",
    ),
    "null_at_the_limit": (message("length", content=None), "truncated", "", "--max-tokens"),
    "content_filter": (message("content_filter", content=None), "refused", None, "content_filter"),
    "filter400": ((400, {}, FILTERED), "refused", FILTERED["error"]["message"], "content management policy"),
    "refusal_field": (message(content=None, refusal="I will not."), "refused", "I will not.", "I will not."),
    "im_end": (message(content=f"{CAPTION}<|im_end|>"), "degenerate", f"{CAPTION}<|im_end|>", "<|im_end|>"),
    "json": (message(content='{"caption": "A"}'), "degenerate", '{"caption": "A"}', "JSON around the caption"),
    "parts": (message(content=[{"type": "text", "text": "A red"}, {"text": " dot."}]), "ok", "A red dot.", ""),
    "finish_null": (message(None, content=CAPTION), "ok", CAPTION, ""),
    "finish_eos": (message("eos_token", content=CAPTION), "ok", CAPTION, ""),
    "finish_tool": (message("tool_calls", content=CAPTION), "ok", CAPTION, ""),
    "usage_null": (message(content=CAPTION, usage={"completion_tokens": None}), "ok", CAPTION, ""),
    "usage": (message(content=CAPTION, usage={"completion_tokens": 9}), "ok", CAPTION, ""),
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Callable[[list[str]], dict[str, str]]:
    """Writes an image for each name into one shard; names by the images' digests."""

    def make(names: list[str]) -> dict[str, str]:
        pictures = {name: photo(number) for number, name in enumerate(names)}
        (tmp_path / "in").mkdir()
        (tmp_path / "in/00000.tar").write_bytes(tar_bytes({f"{name}.jpg": data for name, data in pictures.items()}))
        return {hashlib.sha256(data).hexdigest(): name for name, data in pictures.items()}

    return make


def asked_about(body: dict[str, Any]) -> str:
    """The digest of the image in a request."""
    url: str = body["messages"][-1]["content"][0]["image_url"]["url"]
    return hashlib.sha256(base64.b64decode(url.partition(",")[2])).hexdigest()


def test_each_answer_has_its_status_and_none_is_asked_for_again(
    tmp_path: Path, images: Callable[[list[str]], dict[str, str]]
) -> None:
    names = images(list(CASES))
    double = Double(lambda n, body: CASES[names[asked_about(body)]][0], owner="somebody")
    with serving(double) as url:
        command = ["annotate", "--shards", tmp_path / "in", "--out", tmp_path / "out", "--engine", url]
        capipe(*command, "--model", "captioner", "--max-attempts", 1)
        sent = len(double.bodies)
        capipe(*command, "--model", "captioner", "--max-attempts", 1, "--retry")
        assert len(double.bodies) == sent == len(CASES)
    rows = {row["key"]: row for row in table(tmp_path / "out")}
    for name, (_, status, text, reason) in CASES.items():
        (caption,) = rows[name]["captions"]
        found = (rows[name]["status"], caption["status"], caption["text"])
        assert found == (status, status, text), name
        assert reason in (rows[name]["error"] or ""), name
        assert caption["n_tokens"] == {"usage": 9}.get(name), name


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, {}, {"error": {"message": "no such key"}}), "HTTP 401: no such key"),
        ((429, {}, {"error": {"message": "You exceeded it", "code": "insufficient_quota"}}), "HTTP 429"),
        ((400, {}, {"error": {"message": "The model does not support images"}}), "HTTP 400: The model does not"),
        ((400, {}, {"error": {"message": "Unsupported value: 'temperature' does not support 0.0"}}), "--temperature 1"),
    ],
)
def test_what_every_request_is_refused_for_ends_the_run_early(
    tmp_path: Path, images: Callable[[list[str]], dict[str, str]], answer: Answer, says: str
) -> None:
    images([f"{number:03}" for number in range(120)])
    double = Double(lambda n, body: answer, owner="somebody")
    with serving(double) as url:
        command = ["annotate", "--shards", tmp_path / "in", "--out", tmp_path / "out", "--engine", url]
        line = one_line(capipe(*command, "--model", "captioner", "--concurrency", 4, code=3))
    assert says in line and "run the same command to have them done" in line
    assert 50 <= len(double.bodies) <= 60 and not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.slow
def test_a_server_that_loads_for_a_while_is_waited_for(
    tmp_path: Path, images: Callable[[list[str]], dict[str, str]]
) -> None:
    """Longer than all attempts take together (some 6 s): what is busy is waited for by the clock."""
    images(["a", "b", "c"])
    double = Double(lambda n, body: (503, {}, {"error": "loading"}), owner="somebody")

    def loading(n: int, body: dict[str, Any]) -> Answer:
        since = double.times[-1] - double.times[0]
        return completion(CAPTION) if since > 10 else (503, {}, {"error": "loading"})

    double.answers = loading
    with serving(double) as url:
        command = ["annotate", "--shards", tmp_path / "in", "--out", tmp_path / "out", "--engine", url]
        capipe(*command, "--model", "captioner")
    assert [row["status"] for row in table(tmp_path / "out")] == ["ok"] * 3


# --- letters ---------------------------------------------------------------------------------------------------------


def lettered(body: dict[str, Any], blank: str, letter: str | None = None) -> Answer:
    """A screener's first token: the letter of "red" where it sees the image, else of "Cannot tell", else of "blue"."""
    if not body["logprobs"]:
        return completion("Yes")  # whether it thinks first
    content = body["messages"][-1]["content"]
    seen = not isinstance(content, str)
    text = content[-1]["text"] if seen else content
    options = ["red"] if seen else ["Cannot tell", "blue"]
    letters = {line[3:]: line[0] for line in text.splitlines() if line[1:3] == ". "}
    known = next(letters[option] for option in options if option in letters)
    token = f"{blank}{letter or known}"
    top = [{"token": token, "logprob": -0.1}, {"token": f"{blank}Well", "logprob": -3.0}]
    step = {"token": token, "logprob": -0.1, "top_logprobs": top[: body["top_logprobs"]]}
    return completion(token, "length", {"content": [step]})


def screened(url: str, folder: Path, out: str, code: int) -> list[dict[str, Any]]:
    questions = folder / "set.jsonl"
    asked = {"image": "a.jpg", "question": "What color?", "options": ["red", "blue"], "answer": "red"}
    questions.write_text(json.dumps(asked) + "\n")
    command = ["qa", "--shards", folder / "in", "--out", folder / out, "--import", questions]
    capipe(*command, "--screen-model", "captioner", "--screen-engine", url, code=code)
    return [{**entry, "row": row["status"]} for row in table(folder / out / "screened") for entry in row["questions"]]


def test_letters_after_a_blank_are_letters_and_other_words_are_no_answer(
    tmp_path: Path, images: Callable[[list[str]], dict[str, str]]
) -> None:
    """Behind a server that reports five alternatives at most."""
    images(["a"])
    too_many = {"error": {"message": "Invalid value for 'top_logprobs': must be less than or equal to 5."}}

    def answers(n: int, body: dict[str, Any]) -> Answer:
        return (400, {}, too_many) if body.get("top_logprobs", 0) > 5 else lettered(body, " ")

    with serving(Double(answers, owner="somebody")) as url:
        (entry,) = screened(url, tmp_path, "letters", 0)
    assert (entry["status"], entry["row"], entry["with_image"], entry["without_image"]) == (
        "ok", "ok", [0, 0, 0], [2, 2, 2],
    )  # fmt: skip
    assert entry["guessed"] == [1, 1]
    with serving(Double(lambda n, body: lettered(body, " ", "The"), owner="somebody")) as url:
        (entry,) = screened(url, tmp_path, "words", 1)
    assert (entry["status"], entry["row"], entry["image_accuracy"]) == ("unscored", "engine_error", None)
    assert "no option named in 3 of 3 presentations with the image, but 'The'" in entry["error"]
