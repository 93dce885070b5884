"""The viewer's routes: its page, JSON and images."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError

from ...errors import BadInput, CapipeError
from ...manifests.expressions.parser import kind_of
from ...manifests.sidecars import jsonable
from .library import Library
from .queries import Finder, Page
from .queries import Query as Asked
from .table import Table, Unknown, Unreadable

STATIC = Path(__file__).parent / "static"
_FILES = {"": ("index.html", "text/html"), "app.js": ("app.js", "text/javascript")}
_FILES |= {
    name: (name, "text/javascript")
    for name in ("state.js", "dom.js", "rows.js", "threshold.js", "compare.js", "detail.js")
}
_FILES |= {"style.css": ("style.css", "text/css"), "icon.svg": ("icon.svg", "image/svg+xml")}
_TEXTS = 3  # to show in a row, including joined artifacts'
_LISTED = 6  # texts and numbers shown in a row by default
_NUMBERS = tuple(map(re.compile, ("re_.*_score", "re_.*_score_min", "org_.*_score", "(.*_)?right_.*")))
_MOST_COLUMNS = 24
_MOST_SHARDS = 2000  # offered to jump to; any other's name may be typed

Id = Annotated[str, Query(alias="a", max_length=40)]
Shard = Annotated[str, Query(max_length=1000)]
Text = Annotated[str, Query(max_length=2000)]
Number = Annotated[int, Query(ge=0)]


def create_app(library: Library) -> FastAPI:
    """The app over a library; access control is in :class:`~.guard.Guard`."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    finder = Finder()

    @app.exception_handler(CapipeError)
    def _refused(_: Request, error: CapipeError) -> Response:
        return answer({"error": str(error)}, 404 if isinstance(error, Unknown) else 400)

    @app.exception_handler(RequestValidationError)
    def _wrong(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer({"error": f"{first['loc'][-1]}: {first['msg']}"}, 400)

    @app.exception_handler(OSError)
    def _unreadable(_: Request, error: OSError) -> Response:
        return answer({"error": f"cannot be read: {error.strerror or type(error).__name__}"}, 500)

    @app.get("/api/catalog")
    def catalog() -> Response:
        return answer(library.catalog())

    @app.get("/api/columns")
    def columns(a: Id) -> Response:
        return answer(_columns(library.table(a)))

    @app.get("/api/rows")
    def rows(
        a: Id,
        filter: Text = "",
        search: Text = "",
        shard: Annotated[str | None, Query(max_length=1000)] = None,
        row: Number = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 24,
        back: bool = False,
        columns: Annotated[list[str] | None, Query(max_length=_MOST_COLUMNS)] = None,
    ) -> Response:
        table = library.table(a)
        start = None if shard is None else (shard, row)
        page = finder.page(table, Asked(filter, search), start, limit, back)
        listed = _listed(table, page, columns or default_columns(table))
        listed["faults"] += library.refusals(table, (shard for shard, _ in page.rows))
        return answer(listed)

    @app.get("/api/count")
    def count(a: Id, filter: Text = "", search: Text = "") -> Response:
        return answer(finder.count(library.table(a), Asked(filter, search)))

    @app.get("/api/row")
    def row(a: Id, shard: Shard, row: Number) -> Response:
        return answer({"parts": library.table(a).whole(shard, row)})

    @app.get("/api/histogram")
    def histogram(a: Id, column: Text, filter: Text = "", search: Text = "") -> Response:
        return answer(finder.histogram(library.table(a), column, Asked(filter, search)))

    @app.get("/api/threshold")
    def threshold(
        a: Id, column: Text, value: float, at_least: bool = True, filter: Text = "", search: Text = ""
    ) -> Response:
        table = library.table(a)
        result = finder.threshold(table, column, Asked(filter, search), value, at_least)
        names = list(dict.fromkeys([*default_columns(table), column]))
        for side in ("stay", "go"):
            places = [(item["shard"], item["row"]) for item in result[side]]
            shown = _rows(table, places, names)
            result[side] = [{**item, **more} for item, more in zip(result[side], shown, strict=True)]
        return answer(result)

    @app.get("/api/image")
    def image(
        a: Id, shard: Shard, row: Number, size: Annotated[str, Query(pattern="small|full")] = "small"
    ) -> Response:
        data, kind = library.image(a, shard, row, size == "small")
        return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})

    @app.get("/")
    @app.get("/{name}")
    def page(name: str = "") -> Response:
        if name not in _FILES:
            raise Unknown("there is no such page")
        file, kind = _FILES[name]
        return Response((STATIC / file).read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})

    return app


def answer(value: Any, code: int = 200) -> Response:
    """JSON without caching, with null for NaN."""
    body = json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return Response(body, code, media_type="application/json", headers={"cache-control": "no-store"})


def default_columns(table: Table) -> list[str]:
    """Default columns of a row: captions, the artifact's own first, and the most informative scores."""
    prose: list[str] = []
    numbers: list[str] = []
    for name, column in table.columns.items():
        if column.flat.prose and not name.endswith("questions_text"):
            if column.artifact == table.name or len(prose) < _TEXTS:
                prose.append(name)
        elif _rank(name) < len(_NUMBERS) and not name.endswith("_mean"):
            numbers.append(name)
    return [*prose[:_LISTED], *sorted(numbers, key=_rank)[:_LISTED]]


def _rank(name: str) -> int:
    """Rank of a numeric column as a caption score, best first; ``len(_NUMBERS)`` for others."""
    return next((rank for rank, part in enumerate(_NUMBERS) if part.fullmatch(name)), len(_NUMBERS))


def _kind(type_: Any) -> str:
    return str(kind_of(type_))


def _columns(table: Table) -> dict[str, Any]:
    listed = [
        {"name": name, "artifact": column.artifact, "kind": _kind(column.flat.type), "prose": column.flat.prose}
        for name, column in table.columns.items()
    ]
    shards = [{"name": shard, "rows": table.counts[shard]} for shard in table.shards[:_MOST_SHARDS]]
    return {"name": table.name, "columns": listed, "shown": default_columns(table), "shards": shards}


def _listed(table: Table, page: Page, columns: Sequence[str]) -> dict[str, Any]:
    unknown = next((name for name in columns if name not in table.columns), None)
    if unknown is not None:
        raise BadInput(f"no column {unknown[:80]!r} here")
    return {
        "rows": _rows(table, page.rows, columns),
        "columns": list(columns),
        "before": page.before,
        "after": page.after,
        "stopped": page.stopped,
        "faults": list(page.faults),
        "total": table.rows,
    }


def _rows(table: Table, places: Sequence[tuple[str, int]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a list: their names, and the requested columns."""
    names = list(dict.fromkeys(["key", "uid", "status", "error", *columns]))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for shard in dict.fromkeys(shard for shard, _ in places):
        wanted = [row for other, row in places if other == shard]
        try:
            read = table.read(shard, names).take(wanted).to_pylist()
        except Unreadable:
            read = [{"key": "?", "status": "unreadable"} for _ in wanted]
        for row, values in zip(wanted, read, strict=True):
            own = {name: values.get(name) for name in ("key", "uid", "status", "error")}
            rows[shard, row] = {
                "shard": shard,
                "row": row,
                **own,
                "values": {name: values.get(name) for name in columns},
            }
    return [rows[key] for key in places]
