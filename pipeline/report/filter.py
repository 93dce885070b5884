"""The report of a selection: one HTML file that needs nothing else, with what was kept beside what was not.

All that comes from data or models is escaped; the page has no script and may load nothing. The same selection gives
the same page: samples are those with the smallest uids, which are hashes, so another threshold shows the same images.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from PIL import Image

from ...manifests.artifact import Artifact
from ...manifests.files.compressed import plain
from ...manifests.files.storage import PRIVATE
from ...manifests.samples import read_samples
from ...manifests.shards import InputShard
from ...manifests.status import Status
from ...models.images.decode import ImageLimits, decode_rgb
from ...models.images.formats import ImageProblem
from ...models.images.grid import ImageGrid
from ...models.scorers.sentences import split_sentences
from ...stages.filter.expression import shown_value
from ...stages.filter.select import Rule
from ..inspect.histograms import SERIES, draw, histograms

REPORT = f"{PRIVATE}/report.html"
SAMPLES = 12  # of the kept, and of the filtered
_LONGEST = 1200  # characters of a caption
_THUMBNAIL = ImageGrid(factor=4, min_pixels=64 * 64, max_pixels=224 * 224)
_SCORES = [f"{scorer}_score{part}" for scorer in ("clip", "itm") for part in ("", "_mean", "_min")]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}td.n{text-align:right}
.pictures img{width:380px;max-width:100%}.sides{display:grid;grid-template-columns:1fr 1fr;gap:1.5rem}
article{border-top:1px solid #ddd;padding:.8rem 0;display:flex;gap:1rem}article img{max-width:160px;height:auto}
article div{min-width:0;overflow-wrap:anywhere}p{margin:.2rem 0}.id,.scores{color:#666;font-size:12px}
.reason{color:#a33}.lowest{color:#75510a;font-size:12px}"""


@dataclass(frozen=True)
class ExampleRow:
    """A row of the final shards and its picture as JPEG, if it could be read."""

    row: Mapping[str, Any]
    thumbnail: bytes | None


def write_filter_report(artifact: Artifact, rule: Rule, shards: Sequence[InputShard]) -> str:
    """Write the report of a complete selection from ``shards``; returns where it is."""
    rows = {status: sorted(_sampled(artifact, status), key=_uid) for status in (Status.OK, Status.FILTERED)}
    thumbnails = _thumbnails(shards, [row for each in rows.values() for row in each])
    sides = {status: [ExampleRow(row, thumbnails.get(_place(row))) for row in each] for status, each in rows.items()}
    artifact.folder.write(REPORT, _page(artifact, rule, sides).encode())
    return f"{artifact.url}/{REPORT}"


# --- samples ---------------------------------------------------------------------------------------------------------


def _sampled(artifact: Artifact, status: Status) -> list[dict[str, Any]]:
    """The rows of a status with the smallest uids, one for each uid. Keeps a few rows a shard in memory."""
    found: dict[str, tuple[str, int]] = {}
    for shard in artifact.committed():
        table = artifact.table(shard, ["uid", "status"])
        uids = table.column("uid").combine_chunks()
        own = uids.filter(pc.equal(table.column("status"), str(status)).combine_chunks()).drop_null().unique()
        for uid in own.take(pc.array_sort_indices(own)[:SAMPLES]).to_pylist():
            if uid not in found:
                same = pc.and_(pc.equal(uids, uid), pc.equal(table.column("status").combine_chunks(), str(status)))
                found[uid] = (shard, pc.index(same, True).as_py())
        found = dict(sorted(found.items())[:SAMPLES])
    return [row for shard in artifact.committed() for row in _rows(artifact, shard, found.values())]


def _rows(artifact: Artifact, shard: str, wanted: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """The rows wanted of a shard."""
    indices = [index for other, index in wanted if other == shard]
    if not indices:
        return []
    rows: list[dict[str, Any]] = artifact.table(shard).take(indices).to_pylist()
    return rows


def _uid(row: Mapping[str, Any]) -> str:
    return str(row["uid"])


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["source_shard"], row["source_key"]


def _thumbnails(shards: Sequence[InputShard], rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], bytes]:
    """Small JPEGs by shard and key, from the input shards: final ones have no rejected images."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        wanted[row["source_shard"]].add(row["source_key"])
    found = {}
    for shard in shards:
        for key, data in _images(shard, wanted.get(shard.name, set())):
            if (small := _thumbnail(data)) is not None:
                found[shard.name, key] = small
    return found


def _images(shard: InputShard, keys: set[str]) -> Iterator[tuple[str, bytes]]:
    """The named images of a shard: headers are read up to the last of them, and these images."""
    if not keys:
        return
    with plain(shard.open()) as stream:
        places = {}
        for sample in read_samples(stream, read_data=False):
            image = sample.image()
            if sample.key in keys and image is not None:
                places[sample.key] = image
                if len(places) == len(keys):
                    break
        for key, image in places.items():
            stream.seek(image.offset)
            yield key, stream.read(image.size)


def _thumbnail(data: bytes) -> bytes | None:
    pixels = decode_rgb(data, _THUMBNAIL, ImageLimits(min_side=1))
    if isinstance(pixels, ImageProblem):
        return None
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=80)
    return out.getvalue()


# --- the page --------------------------------------------------------------------------------------------------------


def _page(artifact: Artifact, rule: Rule, sides: Mapping[Status, Sequence[ExampleRow]]) -> str:
    run = artifact.config["run"]
    facts = {
        "conditions": rule.config.shown,
        "threshold": f"{rule.config.by} >= {rule.threshold_text}" if rule.by else None,
        "captions written": SERIES[rule.text],
        "kept": f"{run['kept']:,} of {run['candidates']:,} candidates",
        "scores": f"{run['scores']} ({artifact.config['semantic']['scores'][:12]})",
        "fingerprint": artifact.fingerprint[:12],
    }
    statuses, reasons = _counts(artifact)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>capipe filter</title>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style><h1>What was kept</h1>",
        _table((name, value) for name, value in facts.items() if value is not None),
        "<h2>Rows by status</h2>",
        _table((status, f"{count:,}") for status, count in sorted(statuses.items())),
    ]
    if reasons:
        parts += ["<h2>Filtered by</h2>", _table((text, f"{count:,}") for text, count in reasons.most_common(20))]
    parts += [
        "<h2>Scores</h2><p>Of all rows that have them. Dashed: what they are held against.</p>",
        _pictures(artifact, rule),
    ]
    parts += ["<h2>Samples</h2><div class=sides>", *map(_side, sides, sides.values()), "</div></html>"]
    return "\n".join(parts) + "\n"


def _counts(artifact: Artifact) -> tuple[Counter[str], Counter[str]]:
    """Rows by status, and filtered ones by the condition that they failed."""
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for record in artifact.committed().values():
        statuses.update(record.rows)
        table = artifact.table(record.shard, ["status", "error"])
        errors = table.filter(pc.equal(table.column("status"), str(Status.FILTERED))).column("error")
        reasons.update((error or "").partition(": ")[0] for error in errors.to_pylist())
    return statuses, reasons


def _pictures(artifact: Artifact, rule: Rule) -> str:
    used = [column.name for column in (rule.keep.columns if rule.keep else ()) if column.kind == "number"]
    used += [rule.by] if rule.by else []
    names = [*_SCORES, *(re.sub("^(re|org)_", "", name) for name in used), "unsafe"]
    shown = histograms(artifact, list(dict.fromkeys(names)), rule.bounds())
    images = (f'<img alt="{_text(each.name)}" src="{_data("svg+xml", draw(each))}">' for each in shown)
    return f"<div class=pictures>{''.join(images)}</div>"


def _side(status: Status, samples: Sequence[ExampleRow]) -> str:
    title = "Kept" if status is Status.OK else "Filtered"
    body = "\n".join(map(_article, samples)) or "<p>none</p>"
    return f"<section><h2>{title}</h2>\n{body}</section>"


def _article(sample: ExampleRow) -> str:
    row = sample.row
    picture = f'<img alt="" src="{_data("jpeg", sample.thumbnail)}">' if sample.thumbnail else "<p>no picture</p>"
    error = f"<p class=reason>{_text(row['error'])}</p>" if row["error"] else ""
    captions = "".join(_caption(row, prefix) for prefix in SERIES)
    where = _text(f"{row['source_shard']}/{row['source_key']}, uid {row['uid']}")
    return f"<article>{picture}<div><p class=id>{where}</p>{error}{captions}</div></article>"


def _caption(row: Mapping[str, Any], prefix: str) -> str:
    """One caption of a row with its scores and its lowest sentences; nothing where there is none."""
    caption = row[f"{prefix}_caption"]
    if caption is None:
        return ""
    scores = {name: row[f"{prefix}_{name}"] for name in _SCORES}
    scored = ", ".join(f"{name} {shown_value(score)}" for name, score in scores.items() if score is not None)
    shown = caption if len(caption) <= _LONGEST else caption[: _LONGEST - 1] + "…"
    lines = [f"<p><b>{SERIES[prefix]}</b> {_text(shown)}</p>", f"<p class=scores>{_text(scored)}</p>"]
    for scorer in ("clip", "itm"):
        lowest = row[f"{prefix}_{scorer}_lowest"]
        if lowest is not None:
            said = _sentence(caption, lowest, row[f"{prefix}_sentences"])
            lines.append(f"<p class=lowest>lowest by {scorer}: {_text(said)}</p>")
    return "".join(lines)


def _sentence(caption: str, index: int, count: int | None) -> str:
    """A sentence of a caption by its index; only its number where ``count`` says that it was cut otherwise."""
    sentences = split_sentences(caption)
    if len(sentences) != count or not 0 <= index < len(sentences):
        return f"sentence {index + 1} of {count if count is not None else 'an unknown number'}"
    return f"“{sentences[index][:_LONGEST]}”"


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><td>{_text(a)}</td><td>{_text(b)}</td></tr>' for a, b in rows)}</table>"


def _text(value: Any) -> str:
    """Text that is text, whatever is in it."""
    return html.escape(_CONTROL.sub(" ", str(value)))


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
