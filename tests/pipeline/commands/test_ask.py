"""`capipe ask` as users run it: with the bundled teacher, and behind servers with and without log-probabilities."""

from __future__ import annotations

import hashlib
import math
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import USAGE
from capipe.manifests.shards import uid_of
from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.models.tiny.world.corpus import write_corpus
from capipe.pipeline.inspect.status import state
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.report.page import write_report
from capipe.stages.ask.questions import NAMED

from ...conftest import photo
from ...models.chat_server import Answer, Double, completion, serving
from ...stages.scored import foreign_shards, write_marks
from ..chains import chain_of, verdicts, written
from ..conftest import COMMAND, capipe, one_line, table
from ..killing import run_killed
from ..sharing import same_shards
from ..withdrawing import listed

STAR, TEXT = "star=Is there a star?", "text=Is there a text?"
SIZES = [5, 4]
TEACHER = ("--model", "tiny/teacher", "--engine", "transformers", "--gpus", "none", "--decode-workers", 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven held-out scenes and a broken file in two shards."""
    folder = tmp_path_factory.mktemp("ask")
    write_corpus(folder / "corpus", 7, "heldout", 43)
    (folder / "corpus" / "zz-broken.jpg").write_bytes(photo(1)[:200])
    capipe("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", 5)
    return folder / "shards"


@pytest.fixture(scope="module")
def answered(corpus: Path) -> Path:
    """The teacher's answers to all bundled questions and one more."""
    capipe("ask", "--shards", corpus, "--out", corpus.parent / "answers", "--ask", "all", "--ask", STAR, *TEACHER)
    return corpus.parent / "answers"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return foreign_shards(tmp_path / "shards", SIZES)


def words(shards: object, out: object, url: str, *more: object) -> list[object]:
    given = ["ask", "--shards", shards, "--out", out, "--engine", url, "--model", "captioner", "--concurrency", 4]
    return [*given, "--ask", STAR, "--ask", TEXT, *more]


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])


def letter(body: dict[str, Any], option: str) -> str:
    """The letter of an option, A where there is none: the question is whether the server answers at all."""
    line = next((line for line in text_of(body).splitlines() if line.endswith(f". {option}")), "A")
    return line[0]


def share(body: dict[str, Any]) -> float:
    """What the server believes: another probability for each image and question."""
    content = body["messages"][-1]["content"]
    image = "" if isinstance(content, str) else content[0]["image_url"]["url"]
    named = text_of(body).partition("\n\n")[2].partition("\n")[0]
    return 0.05 + 0.9 * hashlib.sha256(f"{image}{named}".encode()).digest()[0] / 255


def reporting(n: int, body: dict[str, Any]) -> Answer:
    """A server with log-probabilities."""
    yes, no = (letter(body, option) for option in ("Yes", "No"))
    chances = {yes: share(body), no: 1 - share(body)}
    tokens = [{"token": token, "logprob": math.log(chance)} for token, chance in chances.items()]
    first = {**max(tokens, key=lambda token: token["logprob"]), "top_logprobs": tokens}
    return completion(first["token"], logprobs={"content": [first]})


def silent(n: int, body: dict[str, Any]) -> Answer:
    """A server that reports none: a letter by its seed, as likely as it believes."""
    drawn = hashlib.sha256(str(body.get("seed")).encode()).digest()[0] / 255
    return completion(f"{letter(body, 'Yes' if drawn < share(body) else 'No')}.")


def asked(double: Double) -> int:
    """Requests about images."""
    return sum(not isinstance(body["messages"][-1]["content"], str) for body in double.bodies)


# --- the bundled teacher ---------------------------------------------------------------------------------------------


def test_a_column_a_question_and_a_row_for_every_row(corpus: Path, answered: Path) -> None:
    rows, columns = table(answered), [f"ask_{name}" for name in sorted([*NAMED, "star"])]
    assert [row["key"] for row in rows] == [row["key"] for row in table(corpus)]
    assert [row["status"] for row in rows] == ["ok"] * 7 + ["corrupt"]
    schema = pq.read_schema(answered / "00000.parquet")
    assert schema.names == ["key", "uid", "status", "error", *columns, *(field.name for field in USAGE)]
    assert {str(schema.field(name).type) for name in columns} == {"float"}
    scored = [name for row in rows[:7] for name in columns if row[name] is not None]
    assert len(scored) > 30 and scored.count("ask_blurred") == 7
    for row in rows[:7]:
        assert all(0 < row[name] < 1 if row[name] is not None else name[4:] in row["error"] for name in columns)
    assert all(rows[7][name] is None for name in columns)
    assert verify(str(answered)).faults == [] and state(str(answered)).complete
    config = Artifact.open(str(answered)).config
    assert config["semantic"]["ask"]["questions"] == {**NAMED, "star": "Is there a star?"}
    assert config["run"]["model"] == "tiny/teacher"


def test_the_same_questions_again_do_nothing_and_others_are_refused(corpus: Path, answered: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in answered.rglob("*.parquet")}
    command = ("ask", "--shards", corpus, "--out", answered, *TEACHER)
    capipe(*command, "--ask", STAR, "--ask", "all")
    refused = one_line(capipe(*command, "--ask", "star=Is there a red star?", "--ask", "all", code=2))
    assert "ask.questions.star: " in refused
    assert "ask.orders: 2 -> 1" in one_line(
        capipe(*command, "--ask", STAR, "--ask", "all", "--presentations", 1, code=2)
    )
    assert before == {path: path.stat().st_mtime_ns for path in answered.rglob("*.parquet")}


def test_answers_are_in_the_report(corpus: Path, answered: Path) -> None:
    text = Path(write_report(corpus.parent, corpus.parent / "report.html")).read_text(encoding="utf-8")
    assert "yes-or-no questions answered" in text
    rows = table(answered)
    columns = {name for row in rows for name, value in row.items() if name.startswith("ask_") and value is not None}
    assert text.count("<figcaption>ask_") == len(columns) > 5 and "<figcaption>ask_watermark" in text
    (value,) = {row["ask_blurred"] for row in rows if row["key"] == "000000"}
    assert f"ask_blurred {value:.3f}" in text


@pytest.mark.slow
def test_vllm_gives_the_same_probabilities(corpus: Path, answered: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    options = ("--model", "tiny/teacher", "--engine", "vllm", "--gpus", "none", "--decode-workers", 1)
    capipe("ask", "--shards", corpus, "--out", tmp_path / "out", "--ask", "all", "--ask", STAR, *options)
    compared = 0
    for one, other in zip(table(tmp_path / "out"), table(answered), strict=True):
        assert one.keys() == other.keys() and one["status"] == other["status"]
        names = [name for name in one if name.startswith("ask_") and None not in (one[name], other[name])]
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-3)
        compared += len(names)
    assert compared > 30


@pytest.mark.slow
def test_kills_change_no_byte(corpus: Path, answered: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "ask", "--shards", corpus, "--out", tmp_path / "out", "--ask", "all", "--ask", STAR, *TEACHER]
    run_killed(command, tmp_path / "out", 2, 3, seed=4, within=1.0)
    same_shards(tmp_path / "out", answered)


@pytest.mark.slow
def test_two_processes_share_the_work(corpus: Path, answered: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "ask", "--shards", corpus, "--out", tmp_path / "out", "--ask", "all", "--ask", STAR, *TEACHER]
    both = [subprocess.Popen([*map(str, command), "--share"], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    same_shards(tmp_path / "out", answered)


@pytest.mark.slow
def test_actors_of_a_cluster_write_the_same_bytes(corpus: Path, answered: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    ray = ("--runner", "ray", "--ray-address", "local", "--ray-workers", 2)
    command = ("ask", "--shards", corpus, "--out", tmp_path / "out", "--ask", "all", "--ask", STAR, *TEACHER)
    capipe(*command, *ray)
    same_shards(tmp_path / "out", answered)


# --- servers ---------------------------------------------------------------------------------------------------------


def test_probabilities_of_a_server_that_reports_them(shards: Path, tmp_path: Path) -> None:
    double = Double(reporting)
    with serving(double) as url:
        capipe(*words(shards, tmp_path / "out", url, "--trace", tmp_path / "trace"))
    rows = table(tmp_path / "out")
    assert asked(double) == 4 * len(rows)
    assert all(0.05 <= row[name] <= 0.95 for row in rows for name in ("ask_star", "ask_text"))
    assert len({row["ask_star"] for row in rows}) > 6
    told = {share(body) for body in double.bodies if asked_about(body, "star")}
    assert sorted(told) == pytest.approx(sorted({row["ask_star"] for row in rows}), abs=1e-6)
    assert (tmp_path / "trace").exists()


def asked_about(body: dict[str, Any], word: str) -> bool:
    return f"Is there a {word}?" in text_of(body)


def test_a_server_without_log_probabilities_is_refused_before_an_image_is_asked_about(
    shards: Path, tmp_path: Path
) -> None:
    double = Double(silent)
    with serving(double) as url:
        done = capipe(*words(shards, tmp_path / "out", url), code=2)
    assert "--reader-mode sampled" in one_line(done) and asked(double) == 0
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_sampled_answers_of_such_a_server_are_replayed(shards: Path, tmp_path: Path) -> None:
    double = Double(silent)
    sampled = ("--reader-mode", "sampled", "--samples", 6, "--seed", 7)
    with serving(double) as url:
        for out in ("one", "two"):
            capipe(*words(shards, tmp_path / out, url, *sampled))
        assert asked(double) == 2 * sum(SIZES) * 2 * 2 * 6
        capipe(*words(shards, tmp_path / "other", url, *sampled[:-1], 8))
    same_shards(tmp_path / "two", tmp_path / "one")
    rows, others = table(tmp_path / "one"), table(tmp_path / "other")
    assert all(0 < row[name] < 1 for row in rows for name in ("ask_star", "ask_text"))
    assert [row["ask_star"] for row in rows] != [row["ask_star"] for row in others]
    told = [share(body) for body in double.bodies if asked_about(body, "star")]
    assert sum(row["ask_star"] for row in rows) / len(rows) == pytest.approx(sum(told) / len(told), abs=0.2)


def test_failed_requests_are_asked_again_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    failing = True

    def some(n: int, body: dict[str, Any]) -> Answer:
        if failing and asked_about(body, "text") and share(body) < 0.5:
            return 400, {}, {"error": {"message": "this image is not to the server's taste"}}
        return reporting(n, body)

    double = Double(some)
    with serving(double) as url:
        command = words(shards, tmp_path / "out", url)
        capipe(*command, code=1)
        first = table(tmp_path / "out")
        failed = [row for row in first if row["status"] == "engine_error"]
        assert 0 < len(failed) < len(first)
        for row in failed:
            assert row["error"].startswith("text: ") and row["ask_text"] is None and row["ask_star"] is not None
        failing, before = False, asked(double)
        capipe(*command, "--retry")
        assert asked(double) - before == 4 * len(failed)
    rows = table(tmp_path / "out")
    assert [row for row in rows if row in first] == [row for row in first if row["status"] == "ok"]
    assert {row["status"] for row in rows} == {"ok"} and verify(str(tmp_path / "out")).faults == []


def test_questions_without_an_answer_are_told_at_the_end(shards: Path, tmp_path: Path) -> None:
    def some(n: int, body: dict[str, Any]) -> Answer:
        if not asked_about(body, "text"):
            return reporting(n, body)
        refusal = {"message": {"role": "assistant", "content": None, "refusal": "I read no texts"}}
        return 200, {}, {"choices": [{**refusal, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}}

    with serving(Double(some)) as url:
        done = capipe(*words(shards, tmp_path / "out", url))
    assert (
        "warning: ask_text has no value in 9 of 9 ok rows (the first: text: refused by the model: I read no texts)"
        in (" ".join(done.stderr.split()))
    )
    rows = table(tmp_path / "out")
    assert {row["status"] for row in rows} == {"ok"} and {row["ask_text"] for row in rows} == {None}
    assert all("I read no texts" in row["error"] for row in rows)


def test_marked_rows_are_not_asked_about_and_listed_ones_are_withdrawn(shards: Path, tmp_path: Path) -> None:
    write_marks(shards, tmp_path / "marks", lambda index, row: {} if index % 3 else {"status": "duplicate"})
    double, out = Double(reporting), tmp_path / "out"
    gone = uid_of(photo(1, fmt="PNG"))
    with serving(double) as url:
        command = words(shards, out, url, "--marks", tmp_path / "marks")
        assert "marks: 6 of 9 rows are left to do (3 duplicate)" in capipe(*command).stderr
        assert asked(double) == 6 * 4
        before = table(out)
        done = capipe(*command, "--drop", listed(tmp_path / "uids.txt", [gone]))
        assert "withdrawn: 1 rows" in done.stderr and asked(double) == 6 * 4
    assert Counter(row["status"] for row in before) == {"ok": 6, "duplicate": 3}
    for old, new in zip(before, table(out), strict=True):
        if old["uid"] != gone:
            assert new == old
        else:
            assert new["status"] == "withdrawn" and new["ask_star"] is new["ask_text"] is None
    assert prove_absent(str(out), UidSet.of([gone])).faults == [] and verify(str(out)).faults == []


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ask", "watermarks"), "--ask 'watermarks': no such question"),
        (("--ask", "Is there a watermark?"), "a name is up to 40 letters"),
        (("--ask", STAR, "--ask", "Star=Is it?"), "--ask Star: differs from star in case alone"),
        (("--ask", STAR, "--presentations", 3), "--presentations 3: yes and no have 2 orders"),
        (("--ask", STAR, "--samples", 4), "--samples 4: only means something with --reader-mode sampled"),
        (("--ask", STAR, "--reader-mode", "choose", "--temperature", 0.5), "--temperature 0.5: only means something"),
        (("--ask", STAR, "--reader-mode", "sampled", "--samples", 0), "--samples: "),
        (("--ask", STAR, "--reader-mode", "sampled", "--temperature", 0), "--temperature: "),
        (("--ask", STAR, "--reader-mode", "sampled", "--temperature", "inf"), "temperature must be 0"),
        (("--ask", STAR, "--model", "tiny/reader", "--engine", "transformers"), "reads text only"),
        (("--ask", STAR, "--marks", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path, arguments: tuple[object, ...], says: str
) -> None:
    model = () if "--model" in arguments else TEACHER
    done = capipe("ask", "--shards", corpus, "--out", tmp_path / "out", *model, *arguments, code=2)
    assert says in one_line(done) and not (tmp_path / "out").exists()


# --- chains ----------------------------------------------------------------------------------------------------------


def chain(shards: Path, url: str, ask: list[str]) -> dict[str, Any]:
    config = {"model": "captioner", "engine": url, "concurrency": 4, "ask": ask}
    stage = {"stage": "ask", "inputs": {"shards": {"path": str(shards)}}, "config": config}
    return {"answers": stage}


def test_a_chain_asks_and_its_order_of_questions_decides_nothing(shards: Path, tmp_path: Path) -> None:
    double, out = Double(reporting), tmp_path / "out"
    with serving(double) as url:
        recipe = written(tmp_path, chain(shards, url, ["watermark", STAR]))
        planned = capipe("run", recipe, "--out", out, "--dry-run").stdout
        assert "answers: ask, to do" in planned and f"--ask watermark --ask '{STAR}'" in planned and not out.exists()
        capipe("run", recipe, "--out", out)
        other = chain_of(tmp_path, stages=chain(shards, url, [STAR, "watermark"]))
        assert verdicts(other, out) == {"answers": "done"}
        reworded = chain_of(tmp_path, stages=chain(shards, url, ["star=Is there a big star?", "watermark"]))
        assert verdicts(reworded, out) == {"answers": "changed"}
    assert {"ask_star", "ask_watermark"} < table(out / "answers")[0].keys()
    assert asked(double) == 4 * sum(SIZES)


def test_answers_are_what_a_selection_takes_for_scores(tmp_path: Path) -> None:
    stages = chain(tmp_path, "http://127.0.0.1:9", ["watermark"])
    final = {"stage": "filter", "inputs": {"shards": {"path": str(tmp_path)}, "scores": "answers"}}
    made = chain_of(tmp_path, stages={**stages, "final": {**final, "config": {"keep": "ask_watermark < 0.2"}}})
    assert made.stage("answers").product("scores") == "answers"


@pytest.mark.parametrize(
    ("ask", "says"),
    [(["watermarks"], "no such question"), (["all", "watermark"], "is given twice"), ([], "no question is given")],
)
def test_a_chain_with_a_bad_question_is_refused_before_it_starts(
    shards: Path, tmp_path: Path, ask: list[str], says: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stages": chain(shards, "http://127.0.0.1:9", ask)}))
    done = capipe("run", recipe, "--out", tmp_path / "out", code=2)
    assert says in one_line(done) and not (tmp_path / "out").exists()
