"""Dataset card: README.md with a YAML header for the Hugging Face Hub and `datasets`, and text for people.

Captions, prompts and names are untrusted; they are escaped, so that they cannot inject markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ...manifests.schema import SCORE
from .card_statistics import Column, Statistics, Tally, bars, histogram
from .formats import writer_class
from .provenance import Step, public

_SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
_SIZES += ["10B<n<100B", "100B<n<1T"]
_LANGUAGE_SHARE = 0.01  # rarer languages are more likely errors of the detector
_LONGEST_EXAMPLE = 400  # characters
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")  # within a line; `plain` text never starts one


@dataclass(frozen=True)
class CardWords:
    """Author's information on a dataset. Not in any fingerprint: changing it rewrites only the card."""

    title: str
    license: str
    languages: tuple[str, ...] = ()
    creators: tuple[str, ...] = ()
    published: str | None = None  # date, YYYY-MM-DD


@dataclass(frozen=True)
class Contents:
    """Contents of the export. ``shards``: number of those with pairs; ``bytes``: total size of their source tars;
    ``images``: counts by extension in tars; ``notes``: sentences to read before use; ``columns``: features for
    `datasets`, where it would not find them out; ``appended``: facts on captions that were appended as columns;
    ``encoded_anew``: it may have images that were not stored so in the source."""

    format: str
    shards: int
    bytes: int
    images: Mapping[str, int]
    notes: Sequence[str] = ()
    columns: Sequence[Any] = ()
    appended: Sequence[Mapping[str, Any]] = ()
    encoded_anew: bool = False


def render(words: CardWords, contents: Contents, statistics: Statistics, steps: Sequence[Step]) -> str:
    """Render README.md. Raises ValueError if the Hub's own library cannot read its header back."""
    header = card_data(words, contents, statistics)
    parts = [
        f"# {plain(words.title)}",
        "\n\n".join([summary(contents, statistics, steps), *map(plain, contents.notes)]),
        "## Loading\n\n" + _loading(contents),
        "## Rows\n\n" + _rows(contents, statistics),
        "## Captions\n\n" + _captions(statistics),
        *(["## Further captions\n\n" + _appended(contents.appended)] if contents.appended else []),
        *(["## Scores\n\n" + _scores(statistics)] if any(_counted(c) for c in statistics.scores.values()) else []),
        "## Provenance\n\n" + _provenance(steps),
        "## Licence\n\n" + _licence(words),
        *(["## Citation\n\n" + fenced(citation(words), "bibtex")] if words.creators or words.published else []),
    ]
    card = DatasetCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    if card.data.to_dict() != header.to_dict():
        raise ValueError("the card's header reads back as another one")
    return str(card.content)


def card_data(words: CardWords, contents: Contents, statistics: Statistics) -> DatasetCardData:
    """YAML header: metadata for the Hub's search, and the data files for ``load_dataset(folder)``."""
    path = _data_files(contents)
    data = {"config_name": "default", "data_files": [{"split": "train", "path": path}]}
    common = statistics.languages.total() * _LANGUAGE_SHARE
    codes = [code for code, n in statistics.languages.most_common() if n >= common and re.fullmatch("[a-z]{2,3}", code)]
    return DatasetCardData(
        license=words.license,
        language=list(words.languages) or codes or None,
        pretty_name=words.title,
        task_categories=["image-to-text", "image-text-to-text"],
        size_categories=[size_category(statistics.pairs)],
        tags=["image-captioning", "capipe"],
        configs=[data] if path else None,
        dataset_info=_dataset_info(contents),
    )


def _data_files(contents: Contents) -> str | list[str]:
    """Files for `datasets`; for the folder format without the text files, which it would read as data."""
    if contents.format == "folder":
        return ["metadata.jsonl", *(f"images/**/*.{extension}" for extension in contents.images)]
    return writer_class(contents.format).data_files


def _dataset_info(contents: Contents) -> dict[str, Any] | None:
    """Features of a sample, where `datasets` needs to be told them."""
    columns = _tar_features(contents) if contents.format == "webdataset" else list(contents.columns)
    return {"config_name": "default", "features": columns} if columns else None


def _tar_features(contents: Contents) -> list[dict[str, str]]:
    """Explicit features of a sample: `datasets` would infer them from the first five, and fail on the first later row
    whose JSON has text where those had null."""
    names = [(extension, "image") for extension in contents.images]
    names += [("txt", "string"), ("json", "json"), ("__key__", "string"), ("__url__", "string")]
    return [{"name": name, "dtype": dtype} for name, dtype in names]


def size_category(count: int) -> str:
    """The Hub's size category for a number of samples."""
    for power, name in enumerate(_SIZES, 3):
        if count < 10**power:
            return name
    return "n>1T"


def plain(text: str) -> str:
    """``text`` escaped for Markdown: one line, no markup, no HTML."""
    flat = " ".join(text.split())
    return _SPECIAL.sub(r"\\\1", html.escape(flat, quote=False))


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence does not occur in ``text``."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(contents: Contents, statistics: Statistics, steps: Sequence[Step]) -> str:
    """What the export is, in some sentences."""
    unit, name = (1e9, "GB") if contents.bytes >= 1e9 else (1e6, "MB")
    text = f"{statistics.pairs:,} pairs of image and caption in {contents.shards:,} shards"
    text += f" ({contents.bytes / unit:,.2f} {name} as tars), made with capipe."
    text += " Image bytes are those that were collected, never re-encoded"
    configs = [step.config["semantic"] for step in steps if step.config is not None]
    anew = contents.encoded_anew or any(map(_encodes_anew, configs))
    return text + (", but for those whose JSON names an `original_format`." if anew else ".")


def _encodes_anew(semantic: Mapping[str, Any]) -> bool:
    """True of a stage that may have encoded images anew; ``convert`` is an option that `ingest` had."""
    exported = semantic.get("export")
    options = (semantic, exported) if isinstance(exported, Mapping) else (semantic,)
    return semantic.get("convert") is True or any(each.get("transcode") is not None for each in options)


def _loading(contents: Contents) -> str:
    text = writer_class(contents.format).loading or f"Written in the format {plain(contents.format)}."
    return text.replace("{images}", ";".join(contents.images))


def _rows(contents: Contents, statistics: Statistics) -> str:
    total = statistics.statuses.total()
    rows = [(f"`{status}`", f"{n:,}", f"{n / total:.1%}") for status, n in statistics.statuses.most_common()]
    text = (
        "Only `ok` rows are pairs. Every row that went in, with its scores and the reason if it was left out, is in the"
    )
    text += " `*.parquet` files beside this card (`pyarrow.parquet.read_table`)."
    return f"{text}\n\n" + table(["status", "rows", "share"], rows)


def _captions(statistics: Statistics) -> str:
    words = statistics.words
    parts = []
    if words.count:
        q = [f"{words.quantile(share):.0f}" for share in (0.05, 0.5, 0.95, 1.0)]
        parts.append(
            table(["words", "mean", "5 %", "median", "95 %", "longest"], [["caption", f"{words.mean:.1f}", *q]])
        )
        parts.append(_bars("words", Column(words, Tally(words.width)), _words))
    if statistics.without_caption:
        parts.append(f"{statistics.without_caption:,} pairs have an empty caption.")
    if statistics.languages:
        common = statistics.languages.most_common(10)
        parts.append(table(["language", "captions"], [(f"`{plain(code)}`", f"{n:,}") for code, n in common]))
    examples = [(plain(key), plain(_cut(caption))) for key, caption in statistics.examples]
    if examples:
        parts.append("| key | caption |\n| --- | --- |\n" + "\n".join(f"| {key} | {text} |" for key, text in examples))
    return "\n\n".join(parts)


def _appended(sets: Sequence[Mapping[str, Any]]) -> str:
    """Columns of captions that were appended, with their models and prompts."""
    rows = [
        (f"`{re.sub('[^A-Za-z0-9_]', '', column)}`", plain(str(entry["model"])), f"`{entry['fingerprint']}`")
        for entry in sets
        for column, _ in entry["columns"]
    ]
    parts = [table(["column", "model", "fingerprint of its captions"], rows)]
    for entry in sets:
        for name, text in entry["prompts"]:
            parts.append(f"Prompt {plain(name)} of {plain(str(entry['name']))}:\n\n" + fenced(text, "text"))
    return "\n\n".join(parts)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_EXAMPLE else text[:_LONGEST_EXAMPLE] + " …"


def _counted(column: Column) -> int:
    return column.kept.count + column.others.count


def _scores(statistics: Statistics) -> str:
    used = {name: column for name, column in statistics.scores.items() if _counted(column)}
    rows = []
    for name, column in used.items():
        tally = column.kept
        figures = (
            [f"{tally.mean:.3f}", *(f"{tally.quantile(s):.2f}" for s in (0.05, 0.5, 0.95))]
            if tally.count
            else ["-"] * 4
        )
        rows.append([f"`{name}`", f"{tally.count:,}", *figures, f"{column.others.count:,}"])
    head = ["kept pairs", "scored", "mean", "5 %", "median", "95 %", "others scored"]
    plain = {name for name in SCORE.names if not name.endswith(("_score", "unsafe"))}  # others of the same captions
    drawn = {name: column for name, column in used.items() if name not in plain}
    shown = [_bars(f"`{name}`", column, _span(column)) for name, column in drawn.items()]
    return "\n\n".join([table(head, rows), *shown])


def _span(column: Column) -> Callable[[float, float], str]:
    """How the steps of its histogram are written."""
    return "{:.2f} to {:.2f}".format if column.kept.width < 1 else "{:,.0f} to {:,.0f}".format


def _words(low: float, high: float) -> str:
    return f"{low:.0f}" if high - low == 1 else f"{low:.0f} to {high - 1:.0f}"


def _bars(name: str, column: Column, span: Callable[[float, float], str]) -> str:
    """A histogram as a table; rows that were not kept have their own column, if there are any."""
    rows = histogram(column)
    drawn = bars([kept for _, _, kept, _ in rows])
    others = any(other for *_, other in rows)
    lines = []
    for (low, high, kept, other), bar in zip(rows, drawn, strict=True):
        lines.append([span(low, high), f"{kept:,}", *([f"{other:,}"] if others else []), bar])
    head = [name, "kept", *(["others"] if others else []), "kept pairs"]
    text = table(head, lines).split("\n")
    text[1] = text[1].removesuffix("---: |") + "--- |"  # bars grow to the right
    return "\n".join(text)


def _provenance(steps: Sequence[Step]) -> str:
    text = "From first to last. A fingerprint is a hash of everything that decides a stage's result."
    return "\n\n".join([text, *(part for number, step in enumerate(steps, 1) for part in _step(number, step))])


def _step(number: int, step: Step) -> Iterator[str]:
    yield f"### {number}. {plain(step.stage)}: {plain(step.name)}"
    if step.config is None:
        known = f" Its fingerprint was `{step.fingerprint}`." if step.fingerprint else ""
        yield f"{plain(step.note or '')}{known}"
        return
    run, semantic = step.config["run"], step.config["semantic"]
    facts = [("model", run.get("model")), ("engine", run.get("engine"))]
    lines = [f"- {name}: {plain(str(public(value)))}" for name, value in facts if value]
    packages = ", ".join(f"{name} {version}" for name, version in step.config.get("packages", {}).items())
    yield "\n".join([f"- fingerprint: `{step.fingerprint}`", *lines, f"- packages: {plain(packages)}"])
    for title, prompt in _prompts(semantic):
        yield f"{title} {plain(str(prompt.get('name', '')))}:\n\n" + fenced(str(prompt["text"]), "text")
    yield fenced(json.dumps(public(semantic), indent=1, ensure_ascii=False), "json")


def _prompts(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All prompts in a configuration, at any depth, with a title: objects with a text in a list of one of two names."""
    titles = {"prompts": "Prompt", "fallbacks": "Fallback prompt"}
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name in titles and isinstance(item, list):
                yield from ((titles[name], p) for p in item if isinstance(p, Mapping) and "text" in p)
            else:
                yield from _prompts(item)


def citation(words: CardWords) -> str:
    """BibTeX entry of the dataset."""
    key = re.sub(r"[^a-z0-9]+", "-", words.title.lower()).strip("-") or "dataset"
    entries = {
        "title": words.title,
        "author": " and ".join(words.creators),
        "year": (words.published or "")[:4],
        "note": "made with capipe",
    }
    lines = [f"  {name} = {{{_unbraced(value)}}}" for name, value in entries.items() if value]
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"


def _unbraced(text: str) -> str:
    return " ".join(re.sub(r"[{}\\\\]", " ", text).split())


def _licence(words: CardWords) -> str:
    if words.license == "other":
        return "Not stated by whoever made this export (`other`). Images are their owners'; ask before you publish."
    return f"`{words.license}`, as stated by whoever made this export."
