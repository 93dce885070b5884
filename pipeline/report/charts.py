"""Charts as inline SVG: real text, the page's light and dark colours, descriptions for screen readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ...manifests.status import Status
from ..inspect.histograms import SERIES, Histogram

_WIDTH, _HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 30
_DOTS = 40  # most points of a line with markers
_POINTS = 400  # most points of a line


@dataclass(frozen=True)
class Line:
    """A named series of points (x, y), sorted by x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A share from 0 to 1 with its interval. ``emphasis``: 0 for a control."""

    name: str
    value: float
    low: float | None
    high: float | None
    emphasis: int = 1


def line_chart(title: str, lines: Sequence[Line], x_name: str) -> Markup:
    """Line chart over a common x axis. Lines differ by colour and by dashes."""
    points = [point for line in lines for point in line.points]
    if not points:
        return Markup("")
    xs = _scale([x for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    ys = _scale([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    body = _grid(xs, ys, x_name)
    for number, line in enumerate(lines):
        pixels = [(xs.at(x), ys.at(y)) for x, y in _thinned(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        body += Markup('<polyline class="line s{}" points="{}"/>').format(number % 5, path)
        if len(pixels) <= _DOTS:
            for x, y in pixels:
                body += Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2.5"/>').format(
                    number % 5, f"{x:.1f}", f"{y:.1f}"
                )
    summary = "; ".join(
        f"{line.name}: from {_short(line.points[0][1])} to {_short(line.points[-1][1])}" for line in lines
    )
    return _figure(title, summary, body, [line.name for line in lines] if len(lines) > 1 else [])


def interval_chart(title: str, bars: Sequence[Bar]) -> Markup:
    """Dot plot of shares with their intervals, one per row, on a scale from 0 to 100 %."""
    left, step = 210, 26
    height = _TOP + step * len(bars) + _BOTTOM
    xs = _Scale(0.0, 1.0, left, _WIDTH - 70, (0.0, 0.25, 0.5, 0.75, 1.0))
    body = Markup("")
    for tick in xs.ticks:
        x = f"{xs.at(tick):.1f}"
        body += Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x, _TOP, height - _BOTTOM)
        body += _label(xs.at(tick), height - 10, f"{100 * tick:.0f} %", "middle")
    for number, bar in enumerate(bars):
        y = _TOP + step * number + step / 2
        kind = "s0" if bar.emphasis else "quiet"
        body += _label(left - 12, y + 4, bar.name, "end")
        if bar.low is not None and bar.high is not None:
            ends = f"{xs.at(bar.low):.1f}", f"{xs.at(bar.high):.1f}"
            body += Markup('<line class="line {0}" x1="{1}" x2="{2}" y1="{3}" y2="{3}"/>').format(kind, *ends, y)
        body += Markup('<circle class="dot {}" cx="{}" cy="{}" r="5"/>').format(kind, f"{xs.at(bar.value):.1f}", y)
        body += _label(_WIDTH - 4, y + 4, f"{100 * bar.value:.1f} %", "end")
    summary = "; ".join(f"{bar.name} {100 * bar.value:.1f} %" for bar in bars)
    return _figure(title, summary, body, [], height)


def histogram_chart(histogram: Histogram) -> Markup:
    """Histogram of a score, new and original captions overlaid; thresholds dashed, in the colour of their series."""
    edges = [float(edge) for edge in histogram.edges]
    highest = max((int(counts.max()) for counts in histogram.counts.values()), default=0)
    if not highest:
        return Markup("")
    xs = _scale([edges[0], edges[-1]], _LEFT, _WIDTH - _RIGHT)
    ys = _scale([0, highest], _HEIGHT - _BOTTOM, _TOP)
    body = _grid(xs, ys, "")
    names = []
    for number, (key, counts) in enumerate(histogram.counts.items()):
        names.append(SERIES.get(key, histogram.name))
        base = ys.at(0)
        path = [f"M{xs.at(edges[0]):.1f},{base:.1f}"]
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            path.append(f"L{xs.at(low):.1f},{ys.at(int(count)):.1f}L{xs.at(high):.1f},{ys.at(int(count)):.1f}")
        path.append(f"L{xs.at(edges[-1]):.1f},{base:.1f}Z")
        body += Markup('<path class="area s{}" d="{}"/>').format(number, "".join(path))
    body += _thresholds(histogram, xs)
    rows = sum(int(counts.sum()) for counts in histogram.counts.values())
    summary = f"{rows} values from {_short(edges[0])} to {_short(edges[-1])}"
    for _, bound in histogram.bounds:
        summary += f"; threshold {_short(bound)}"
    return _figure(histogram.name, summary, body, names if len(names) > 1 else [])


def _thresholds(histogram: Histogram, xs: _Scale) -> Markup:
    """Threshold lines within the scale, each labelled with its value at a separate height."""
    body = Markup("")
    series = list(histogram.counts)
    for number, (key, bound) in enumerate(histogram.bounds):
        if histogram.edges[0] <= bound <= histogram.edges[-1]:
            x = xs.at(bound)
            body += Markup('<line class="bound s{0}" x1="{1}" x2="{1}" y1="{2}" y2="{3}"/>').format(
                series.index(key), f"{x:.1f}", _TOP, _HEIGHT - _BOTTOM
            )
            right = x > (xs.start + xs.end) / 2
            body += _label(
                x - 4 if right else x + 4, _TOP + 10 + 13 * number, _short(bound), "end" if right else "start"
            )
    return body


def status_bar(rows: Mapping[str, int]) -> Markup:
    """Rows by status as one stacked bar, hidden from screen readers: the page has the same figures in words."""
    total = sum(rows.values())
    body, x = Markup(""), 0.0
    for status, count in sorted(rows.items(), key=lambda item: item[0] != "ok"):
        width = 100 * count / total if total else 0.0
        kind = "ok" if status == "ok" else "lost" if Status(status).resolved else "unresolved"
        body += Markup('<rect class="{}" x="{}" width="{}" height="8"/>').format(kind, f"{x:.3f}", f"{width:.3f}")
        x += width
    svg = '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    return Markup(svg).format(body)


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """Linear map of values from ``low`` to ``high`` onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _scale(values: Sequence[float], start: float, end: float) -> _Scale:
    """Scale over all values, with round numbers at both ends."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 2, high + abs(high) / 2 + (high == 0)
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [number * step for number in range(first, last + 1)]
    return _Scale(ticks[0], ticks[-1], start, end, ticks)


def _grid(xs: _Scale, ys: _Scale, x_name: str) -> Markup:
    body = Markup("")
    for tick in ys.ticks:
        y = f"{ys.at(tick):.1f}"
        body += Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        body += _label(_LEFT - 6, ys.at(tick) + 4, _short(tick), "end")
    for tick in xs.ticks:
        body += _label(xs.at(tick), _HEIGHT - 12, _short(tick), "middle")
    return body + (_label(_WIDTH - _RIGHT, _HEIGHT - 1, x_name, "end") if x_name else "")


def _label(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(f"{x:.1f}", f"{y:.1f}", anchor, text)


def _figure(title: str, summary: str, body: Markup, names: Sequence[str], height: int = _HEIGHT) -> Markup:
    """The chart with its title, and a legend if it has several series."""
    keys = Markup("").join(
        Markup(
            '<span class="key"><svg viewBox="0 0 24 8" aria-hidden="true"><line class="line s{}" x1="0" x2="24" y1="4" '
            'y2="4"/></svg>{}</span>'
        ).format(number % 5, name)
        for number, name in enumerate(names)
    )
    return Markup(
        '<figure class="chart"><figcaption>{} {}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}'
        "</svg></figure>"
    ).format(title, keys, _WIDTH, height, escape(f"{title}. {summary}"), body)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`_POINTS` points, as means of neighbours."""
    size = -(-len(points) // _POINTS)
    if size <= 1:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
