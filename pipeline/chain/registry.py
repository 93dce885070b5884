"""What a chain knows of each command: what it reads from other stages, what it leaves, and what decides which of it.

The options themselves are the command's own (:mod:`.options`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..commands import annotate, dedup, embed, eval, export, filter, ingest, qa, train
from .options import Option, options_of


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Options that change how fast rows come, where, or what is told meanwhile, and never the rows. Engines are apart: see
#: :func:`.identity.meaning`.
SPEED = _keys(
    "workers concurrency gpus gpu-memory decode-workers timeout trace max-model-len link "
    "runner ray-address ray-workers share tensor-parallel"
)
ENGINES = _keys("engine screen-engine reader-engine")
MODELS = _keys("model screen-model reader clip itm cosine language-model")

ANYTHING = ("pictures", "shards", "final")  # what ingest takes
CHECKPOINT = "model"


@dataclass(frozen=True)
class OutputFolder:
    """A piece of a stage's folder that stays as long as what it was made of does.

    ``folder``: below the stage's own, empty for all of it; None for files that every run writes anew. It depends on the
    options and inputs ``only``, or on all but those ``without``.
    """

    folder: str | None
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return "files" if self.folder is None else self.folder or "all"

    def depends_on(self, key: str) -> bool:
        return key not in self.without if self.only is None else key in self.only


@dataclass(frozen=True)
class Command:
    """``roles``: inputs by option, with the kinds of product each takes. ``products``: kind -> folder below --out.

    ``rows``: the role whose rows it goes over.
    """

    name: str
    function: Callable[..., Any]
    roles: Mapping[str, tuple[str, ...]]
    products: Mapping[str, str]
    parts: tuple[OutputFolder, ...] = (OutputFolder(""),)
    rows: str = "shards"

    @property
    def options(self) -> Mapping[str, Option]:
        return options_of(self.function)


_TABLE = (
    Command("render", ingest.render, {}, {"pictures": ""}, rows=""),
    Command("ingest", ingest.ingest, {"sources": ANYTHING}, {"shards": ""}, rows="sources"),
    Command("embed", embed.embed, {"shards": ("shards",)}, {"embeddings": ""}),
    Command(
        "dedup",
        dedup.dedup,
        {"shards": ("shards",), "against": ANYTHING, "embeddings": ("embeddings",)},
        {"marks": "marked"},
        (OutputFolder("hashes", _keys("shards")), OutputFolder("against", _keys("against")), OutputFolder("marked")),
    ),
    Command(
        "qa",
        qa.qa,
        {"shards": ("shards",), "import": (), "model": (CHECKPOINT,), "screen-model": (CHECKPOINT,)},
        {"questions": ""},
        (
            OutputFolder(
                "written",
                without=_keys(
                    "screen screen-model screen-engine screen-arg with-image without-image presentations reader-mode"
                ),
            ),
            OutputFolder("screened"),
        ),
    ),
    Command(
        "train",
        train.train,
        {
            "shards": ("shards",),
            "questions": ("questions",),
            "validation-shards": ("shards",),
            "validation-questions": ("questions",),
            "model": (CHECKPOINT,),
        },
        {CHECKPOINT: ""},  # the last checkpoint below it
    ),
    Command(
        "annotate",
        annotate.annotate,
        {"shards": ("shards",), "model": (CHECKPOINT,)},
        {"captions": "", "shards": ""},
    ),
    Command(
        "filter",
        filter.filter_,
        {"shards": ("shards",), "captions": ("captions",), "scores": ("scores",), "marks": ("marks",)},
        {"shards": "shards", "scores": "scores"},
        (OutputFolder("scores", without=_keys("keep top by text shard-size marks")), OutputFolder("shards")),
    ),
    Command(
        "export",
        export.export,
        {"artifact": ("shards",)},
        {"final": ""},
        (OutputFolder("", without=_keys("title license language")), OutputFolder(None)),
        rows="artifact",
    ),
    Command(
        "eval",
        eval.evaluate,
        {"shards": ("shards",), "questions": ("questions",), "captions": ("captions",), "model": (CHECKPOINT,)},
        {"evaluation": ""},
        (
            OutputFolder(
                "captions",
                without=_keys(
                    "questions reader reader-engine reader-arg reader-mode presentations generic controls clip cosine "
                    "language-model captions"
                ),
            ),
            OutputFolder("graded", without=_keys("clip cosine language-model")),
            OutputFolder(None),
        ),
    ),
)
COMMANDS: Mapping[str, Command] = {command.name: command for command in _TABLE}


def artifacts_of(command: Command, config: Mapping[str, Any], roles: frozenset[str]) -> list[str]:
    """Folders below the stage's own that will hold artifacts, the main one last; ``roles``: the inputs it has."""
    match command.name:
        case "render" | "train":
            return []
        case "dedup":
            return ["hashes", *(["against"] if "against" in roles else []), "marked"]
        case "qa":
            return ["written", *(["screened"] if config.get("screen") != "none" else [])]
        case "filter":
            return [*(["scores"] if "scores" not in roles else []), "shards"]
        case "eval":
            return [*(["captions"] if "captions" not in roles else []), "graded"]
        case _:
            return [""]
