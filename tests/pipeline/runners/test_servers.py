"""Commands that ask several servers, servers with limits, and readers without log-probabilities."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from capipe.models.engines.http.engine import PROBE_TOKENS
from capipe.models.images.decode import ImageLimits, plain_copy

from ...conftest import photo
from ...models.chat_server import Answer, Double, completion, serving
from ...models.engines.test_http_images import AS_THEY_ARE, ODD
from ..conftest import COMMAND, capipe, one_line, table
from ..training import steps

MakeTar = Callable[..., Path]
TEXT = "A brown dog lies on a lawn beside a fence."


def captions(n: int, body: dict[str, Any]) -> Answer:
    status, headers, content = completion(TEXT)
    time.sleep(0.02)
    return status, {**headers, "connection": "close"}, content  # so that a server that is closed is gone


@pytest.fixture
def shards(make_tar: MakeTar, tmp_path: Path) -> Path:
    """Two tars of 40 images."""
    for number in range(2):
        members = {f"{number:05}{i:04}.jpg": photo(40 * number + i, (64, 48)) for i in range(40)}
        make_tar(members, f"in/{number:05}.tar")
    return tmp_path / "in"


def annotate(shards: Path, out: Path, engine: str, *more: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    options = ("--shards", shards, "--out", out, "--engine", engine, "--model", "captioner", "--decode-workers", 1)
    return capipe("annotate", *options, *more, code=code)


def test_two_servers_share_the_images_and_the_run_does_not_depend_on_which(shards: Path, tmp_path: Path) -> None:
    one, other = Double(captions), Double(captions)
    with serving(one) as first, serving(other) as second:
        annotate(shards, tmp_path / "out", f"{first},{second}")
        asked = len(one.bodies), len(other.bodies)
        assert sum(asked) == 80 and min(asked) >= 15
        annotate(shards, tmp_path / "out", second)  # the same run by one of them: all is done
        assert (len(one.bodies), len(other.bodies)) == asked
    assert {row["status"] for row in table(tmp_path / "out")} == {"ok"}


def test_a_server_sees_pictures_as_they_are_listed(make_tar: MakeTar, tmp_path: Path) -> None:
    names = ("turned JPEG", "profile", "16-bit gray", "JPEG")
    pictures = {name: (ODD | AS_THEY_ARE)[name] for name in names}
    extensions = {name: "png" if data.startswith(b"\x89PNG") else "jpg" for name, data in pictures.items()}
    shards = make_tar({f"{n}.{extensions[name]}": pictures[name] for n, name in enumerate(names)}, "in/00000.tar")
    double = Double(captions)
    with serving(double) as url:
        annotate(shards, tmp_path / "out", url)
    found = [body["messages"][-1]["content"][0]["image_url"]["url"].partition(";base64,") for body in double.bodies]
    sent = {data: head for head, _, data in found}
    for name, data in pictures.items():
        expected = data if name == "JPEG" else plain_copy(data, ImageLimits())
        assert isinstance(expected, bytes)
        assert sent.pop(base64.b64encode(expected).decode()) == f"data:image/{'jpeg' if name == 'JPEG' else 'png'}"
    assert not sent and len(double.bodies) == 4
    assert {row["status"] for row in table(tmp_path / "out")} == {"ok"}


def test_a_server_that_dies_half_way_costs_no_row(shards: Path, tmp_path: Path) -> None:
    one, other = Double(captions), Double(captions)
    with serving(other) as second, ExitStack() as dying:
        first = dying.enter_context(serving(one))
        command = [*COMMAND, "annotate", "--shards", shards, "--out", tmp_path / "out", "--engine", f"{first},{second}"]
        command += ["--model", "captioner", "--decode-workers", "1", "--concurrency", "2"]
        process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while len(one.bodies) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        dying.close()
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert {row["status"] for row in table(tmp_path / "out")} == {"ok"} and len(table(tmp_path / "out")) == 80
    assert len(one.bodies) < 60 and len(re.findall(f"{first} is left out", stderr)) == 1, stderr


def test_one_of_two_that_is_down_at_the_start_is_one_warning(
    shards: Path, tmp_path: Path, unused_tcp_port: int
) -> None:
    nobody = f"http://127.0.0.1:{unused_tcp_port}"
    with serving(Double(captions)) as url:
        done = annotate(shards, tmp_path / "out", f"{nobody},{url}")
    assert len(re.findall("servers are down", done.stderr)) == 1 and nobody in done.stderr, done.stderr
    assert {row["status"] for row in table(tmp_path / "out")} == {"ok"}


def test_servers_that_cannot_be_meant_write_nothing(
    shards: Path, tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    one, other = (f"http://127.0.0.1:{unused_tcp_port_factory()}" for _ in range(2))
    elsewhere = Double(captions)
    elsewhere.model = "else"
    with serving(Double(captions)) as first, serving(elsewhere) as second:
        for engine, says in {
            f"{one},{other}": "none of the servers answers",
            f"{one},nine": "'nine' is no http:// or https:// URL",
            f"{first},{second}": f"{second}/v1/ does not serve 'captioner'; it serves else, other",
        }.items():
            assert says in one_line(annotate(shards, tmp_path / "out", engine, code=2))
    assert not (tmp_path / "out").exists()


def test_a_server_that_takes_four_at_once_costs_no_row(shards: Path, tmp_path: Path) -> None:
    lock, running, refused = threading.Lock(), [0], [0]

    def four(n: int, body: dict[str, Any]) -> Answer:
        with lock:
            if running[0] >= 4:
                refused[0] += 1
                return 429, {}, {"error": {"message": "too many"}}
            running[0] += 1
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return completion(TEXT)

    with serving(Double(four)) as url:
        annotate(shards, tmp_path / "out", url)
    assert {row["status"] for row in table(tmp_path / "out")} == {"ok"} and refused[0] > 0


# --- readers without log-probabilities -------------------------------------------------------------------------------


def letters(n: int, body: dict[str, Any]) -> Answer:
    """A reader that answers with a letter and tells nothing of its likelihood: the second option, whatever it is."""
    return completion("The answer is B.", "length" if body["max_tokens"] < 4 else "stop")


def test_a_reader_that_reports_no_log_probabilities_is_refused_at_the_first_answer(
    training_data: Path, tmp_path: Path
) -> None:
    held = ("--shards", training_data / "held/shards")
    with serving(Double(letters)) as url:
        options = ("--engine", url, "--screen-model", "captioner")
        done = capipe(
            "qa", *held, "--out", tmp_path / "qa", "--import", training_data / "held/set.jsonl", *options, code=2
        )
        assert "--reader-mode sampled" in one_line(done)
        assert not list((tmp_path / "qa/screened").glob("*.parquet"))


def test_sampled_letters_screen_behind_such_a_server(training_data: Path, tmp_path: Path) -> None:
    double = Double(letters)
    with serving(double) as url:
        options = ("--engine", url, "--screen-model", "captioner", "--screen", "caprl")
        capipe("qa", "--shards", training_data / "held/shards", "--out", tmp_path / "qa",
               "--import", training_data / "held/set.jsonl", *options)  # fmt: skip
    entries = [entry for row in table(tmp_path / "qa/screened") for entry in row["questions"]]
    assert entries and all(None not in entry["with_image"] for entry in entries)
    probes = [body for body in double.bodies if body["max_tokens"] == PROBE_TOKENS]  # whether the model thinks first
    assert len(probes) == 1
    assert {body["max_tokens"] for body in double.bodies} == {4, PROBE_TOKENS}
    assert not any(body["logprobs"] for body in double.bodies)


@pytest.mark.slow
def test_a_reward_by_sampled_letters_of_two_servers(recipe: Path, tmp_path: Path) -> None:
    one, other = Double(letters), Double(letters)
    with serving(one) as first, serving(other) as second:
        settings = yaml.safe_load(recipe.read_text())
        engine = f"{first},{second}"
        settings["rewards"][0] |= {"engine": engine, "reader": "captioner"}
        settings |= {"steps": 1, "save_every": 1, "preflight": False, "validation": None}
        recipe.write_text(json.dumps(settings))
        done = capipe("train", recipe, "--out", tmp_path / "refused", code=2)
        assert "mode: sampled" in one_line(done)
        settings["rewards"][0]["mode"] = "sampled"
        recipe.write_text(json.dumps(settings))
        capipe("train", recipe, "--out", tmp_path / "run")
    assert len(steps(tmp_path / "run")) == 1 and 0 <= steps(tmp_path / "run")[0]["reward/quiz"] <= 1
    assert min(len(one.bodies), len(other.bodies)) > 10
