"""The job over texts: a stop, what grew since, and what is said of texts that were not all compared."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, DEDUP
from capipe.manifests.shards import uid_of
from capipe.pipeline.jobs.texts.mark import mark, plan_texts, read, warning
from capipe.stages.dedup.texts import leaders
from capipe.stages.dedup.texts.marks import TextConfig

pytest.importorskip("rensa", reason="the extra 'dedup' is not installed")

WORDS = "an old man in a grey coat feeds brown pigeons on the steps of a church at noon in winter light"


def write(folder: Path, shards: int, rows: int = 6, own: int = 4) -> None:
    """Marks and captions of images that nothing opens. Captions begin alike and have ``own`` other characters."""
    (folder / "shards").mkdir(exist_ok=True)
    marks = Artifact.create(str(folder / "marks"), "dedup", {}, {})
    captions = Artifact.create(str(folder / "captions"), "annotate", {}, {})
    for number in range(shards):
        name = f"{number:05}"
        if name in marks.committed():
            continue
        (folder / f"shards/{name}.tar").write_bytes(b"\0" * 1024)
        with marks.begin(name, DEDUP) as one, captions.begin(name, ANNOTATE) as other:
            for index in range(number * rows, (number + 1) * rows):
                base = {"key": f"{index:06}", "uid": uid_of(b"%d" % index), "status": "ok"}
                text = f"{WORDS} {base['uid'][:own]}"
                one.write(base)
                other.write({**base, "captions": [{"name": "a", "text": text, "status": "ok"}]})
            for out in (one, other):
                out.commit(rows_in=rows, input_info={"digest": name})
    marks.close()
    captions.close()


def run(folder: Path, stop: threading.Event | None = None) -> Artifact:
    plan = plan_texts(
        *(str(folder / "shards"), str(folder / "out"), TextConfig()),
        captions=str(folder / "captions"),
        marks=str(folder / "marks"),
        workers=0,
    )
    assert plan.marks is not None
    texts, _ = read(plan, lambda event: None, threading.Event())
    try:
        marked, result = mark(plan, texts, plan.marks, lambda event: None, stop or threading.Event())
    finally:
        texts.close()
    marked.close()
    assert result.interrupted == (stop is not None)
    return marked


def groups(marked: Artifact) -> list[str]:
    return [group for shard in marked.committed() for group in marked.table(shard, ["text_group"])[0].to_pylist()]


def test_a_stop_leaves_nothing_half_done_and_the_next_run_ends_it(tmp_path: Path) -> None:
    write(tmp_path, 2)
    stop = threading.Event()
    stop.set()
    assert run(tmp_path, stop).committed() == {}
    marked = run(tmp_path)
    assert [*marked.committed()] == ["00000", "00001"] and len({*groups(marked)}) < 12


def test_shards_that_were_added_mark_all_again(tmp_path: Path) -> None:
    write(tmp_path, 2)
    before = run(tmp_path).committed()
    write(tmp_path, 3)
    after = run(tmp_path).committed()
    assert [*after] == ["00000", "00001", "00002"]
    assert all(after[name].input["grouped"] != before[name].input["grouped"] for name in before)
    assert len({record.input["grouped"] for record in after.values()}) == 1
    (tmp_path / "shards/00002.tar").unlink()
    with pytest.raises(ArtifactMismatch, match="holds marks of shard 00002"):
        run(tmp_path)


def test_it_is_said_of_how_many_texts_not_all_were_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4, rows=20, own=16)
    assert warning(run(tmp_path)) is None
    monkeypatch.setattr(leaders, "PER_BAND", 1)
    (tmp_path / "out").rename(tmp_path / "before")
    marked = run(tmp_path)
    crowded = marked.config["run"]["texts_crowded"]
    said = warning(marked)
    assert crowded > 0 and said is not None and said.startswith(f"{crowded} texts agree in part with more than")
