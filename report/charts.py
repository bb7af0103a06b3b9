"""Small charts as SVG text: lines with bands, stacked shares, a heat map, bars, points with a curve.

Each function returns one <svg> 360 units wide, which a page shows at about that many pixels, so that its text can be
read on a phone. Colours are classes (c0, c1, ...) of the page's style sheet, which knows light and dark; `stand_alone`
makes a file of a chart, which brings its own. Every text that comes in is escaped. Leaves out what is drawn and why
(report/figures.py, miniature/tables.py). Needs the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from statistics import fmean

WIDTH, HEIGHT = 360, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34
POINTS = 200
"""Most points of a line: of more, as many means of neighbours are drawn."""
COLOURS = 6


@dataclass
class Series:
    """A line: (x, y) in the order of x; a value that is not finite is a gap. With a band: (x, low, high)."""

    name: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass
class Frame:
    """The axes of a chart: the data's range and how it is put on paper."""

    svg: list[str]
    x: Callable[[float], float]
    y: Callable[[float], float]
    domain: str
    """For the page's script: x and y at the plot's borders, and whether y is logarithmic."""


def number(value: float) -> str:
    """Short, for an axis or a legend.

    >>> [number(value) for value in (0, 0.25, 1234567, 1.5e-13, 20000, 0.1 + 0.2)]
    ['0', '0.25', '1.23M', '1.5e-13', '20k', '0.3']
    """
    if not math.isfinite(value):
        return "not finite"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e15 and (size > 1e3 or abs(value) >= 1e4):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def thin(points: list[tuple], most: int = POINTS) -> list[tuple]:
    """At most `most` points: means of equally many neighbours, so that nothing is left out; gaps are not averaged.

    >>> thin([(1, 2.0), (2, 4.0), (3, 6.0), (4, float("nan"))], 2)
    [(1.5, 3.0), (3.0, 6.0)]
    """
    size = -(-len(points) // most)
    if size <= 1:
        return points
    parts = [points[begin : begin + size] for begin in range(0, len(points), size)]
    finite = [[point for point in part if all(map(math.isfinite, point))] or part[:1] for part in parts]
    return [tuple(map(fmean, zip(*part, strict=True))) for part in finite]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high.

    >>> ticks(0, 1), ticks(0, 100), ticks(0.31, 0.42, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [0.35, 0.4])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    width = next(w * power for w in (1, 2, 5, 10) if w * power >= (high - low) / most * 0.999)
    first = math.ceil(low / width - 1e-9)
    return [float(f"{n * width:.12g}") for n in range(first, math.floor(high / width + 1e-9) + 1)]


def limits(values: list[float], fixed: tuple | None = None, log: bool = False) -> tuple[float, float]:
    """The range of an axis: a little more than the finite values, never empty, or the fixed one."""
    if fixed:
        return fixed
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low or 1e-3)), 10.0 ** math.ceil(math.log10(high))
        return (low, high) if low < high else (low, low * 10)
    if low >= 0 and low < 0.6 * high:
        low = 0.0  # near enough to show where nothing would be
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - room), high + room


def frame(xs: tuple, ys: tuple, x_name: str, log: bool = False, marks: list | None = None) -> Frame:
    """Axes with grid lines. xs, ys: ranges. marks: (y, text) in place of round numbers."""
    (x0, x1), (y0, y1) = xs, ys
    bend = (lambda value: math.log10(value)) if log else (lambda value: value)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def put_x(value: float) -> float:
        return LEFT + wide * ((value - x0) / (x1 - x0) if x1 > x0 else 0.5)

    def put_y(value: float) -> float:
        return TOP + high * (1 - (bend(value) - bend(y0)) / (bend(y1) - bend(y0)))

    if marks is None and log:
        decades = range(round(math.log10(y0)), round(math.log10(y1)) + 1)
        marks = [(10.0**n, f"1e{n}") for n in decades[:: -(-len(decades) // 5)]]
    svg = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>']
    for value, text in marks if marks is not None else [(tick, number(tick)) for tick in ticks(y0, y1, 4)]:
        at = put_y(value)
        svg.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        svg.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for tick in [tick for tick in ticks(x0, x1) if x_name != "step" or tick.is_integer()] if x1 > x0 else [x0]:
        at = f"{min(put_x(tick), WIDTH - 14):.1f}"
        svg.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{number(tick)}</text>')
    svg.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    return Frame(svg, put_x, put_y, f"{x0:g} {x1:g} {y0:g} {y1:g} {int(log)}")


def drawing(axes: Frame, label: str, kind: str = "") -> str:
    """The <svg> of what was put on the axes."""
    attributes = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" data-domain="{axes.domain}"'
    return f'<svg class="{kind}" {attributes}>{"".join(axes.svg)}</svg>'


def path(points: list[tuple[float, float]]) -> str:
    """The d of a path through points on paper; a point that is not finite breaks the line."""
    parts, pen = [], "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            parts.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def line_chart(series: list[Series], label: str, fixed: tuple | None = None, log: bool = False) -> str:
    """Lines over steps, each with a band if it has one; a line of few points shows them as dots."""
    xs = [x for one in series for x, _ in one.points]
    series = [Series(one.name, thin(one.points), thin(one.band)) for one in series]
    values = [y for one in series for _, y in one.points] + [y for one in series for _, *band in one.band for y in band]
    axes = frame((min(xs), max(xs)), limits(values, fixed, log), "step", log)

    def put(x: float, y: float) -> tuple[float, float]:
        return axes.x(x), axes.y(y) if math.isfinite(y) and (y > 0 or not log) else math.nan

    for at, one in enumerate(series):
        band = [(x, low, high) for x, low, high in one.band if math.isfinite(low + high) and (low > 0 or not log)]
        if len(band) > 1:
            outline = [put(x, high) for x, _, high in band] + [put(x, low) for x, low, _ in reversed(band)]
            axes.svg.append(f'<path class="band c{at % COLOURS}" d="{path(outline)}Z"/>')
    for at, one in enumerate(series):
        points = [put(*point) for point in one.points]
        colour = f"c{at % COLOURS}"
        axes.svg.append(f'<path class="line {colour}" data-name="{escape(one.name)}" d="{path(points)}"/>')
        around = [(math.nan, math.nan), *points, (math.nan, math.nan)]
        for before, point, after in zip(around, points, around[2:], strict=False):
            lonely = not math.isfinite(before[1]) and not math.isfinite(after[1])
            if math.isfinite(point[1]) and (lonely or len(points) <= 30):
                axes.svg.append(f'<circle class="dot {colour}" r="2.4" cx="{point[0]:.1f}" cy="{point[1]:.1f}"/>')
    return drawing(axes, label, "hover")


def stacked_chart(parts: list[Series], label: str, first_colour: int = 0) -> str:
    """Shares of a whole over steps, on top of each other from 0 to 1. All parts have the same steps."""
    axes = frame((parts[0].points[0][0], parts[0].points[-1][0]), (0.0, 1.0), "step")
    parts = [Series(one.name, thin(one.points, 100)) for one in parts]
    xs = [x for x, _ in parts[0].points]
    xs = [axes.x(x) for x in xs] if len(xs) > 1 else [LEFT, WIDTH - RIGHT]
    below = [0.0] * len(xs)
    for at, one in enumerate(parts):
        heights = [y for _, y in one.points] * (1 if len(one.points) > 1 else 2)
        above = [low + (y if math.isfinite(y) else 0.0) for low, y in zip(below, heights, strict=True)]
        outline = list(zip(xs, map(axes.y, above), strict=True))
        outline += reversed(list(zip(xs, map(axes.y, below), strict=True)))
        colour = f"c{(first_colour + at) % COLOURS}"
        axes.svg.append(f'<path class="area {colour}" d="{path(outline)}Z"><title>{escape(one.name)}</title></path>')
        below = above
    return drawing(axes, label)


def heat_chart(columns: list[tuple[float, list[float]]], label: str, colour: int = 0) -> str:
    """(step, counts) from left to right: cell n of a column is as strong as its share of the column is large."""
    size = -(-len(columns) // 60)
    merged = []
    for begin in range(0, len(columns), size):
        part = columns[begin : begin + size]
        merged.append((part[0][0], part[-1][0], [sum(cells) for cells in zip(*(c for _, c in part), strict=True)]))
    rows = len(merged[0][2])
    marks = [(n, f"{n} of {rows - 1}") for n in range(0, rows, max(1, (rows - 1) // 4))]
    axes = frame((merged[0][0] - 0.5, merged[-1][1] + 0.5), (-0.5, rows - 0.5), "step", marks=marks)
    for first, last, counts in merged:
        left, right = axes.x(first - 0.5), axes.x(last + 0.5)
        for n, count in enumerate(counts):
            if count and sum(counts):
                share = count / sum(counts)
                axes.svg.append(
                    f'<rect class="cell c{colour}" x="{left:.1f}" width="{right - left + 0.3:.1f}" '
                    f'y="{axes.y(n + 0.5):.1f}" height="{axes.y(n - 0.5) - axes.y(n + 0.5):.1f}" '
                    f'fill-opacity="{share**0.6:.2f}"><title>steps {first:g} to {last:g}: {number(share)} of the masks '
                    f"had {n} right</title></rect>"
                )
    return drawing(axes, label)


def bar_chart(names: list[str], series: list[Series], label: str, x_name: str) -> str:
    """Groups of bars: one group per name, in it one bar per series, whose points are (group number, value)."""
    top = limits([y for one in series for _, y in one.points])[1]
    axes = frame((-0.5, len(names) - 0.5), (0.0, top), x_name)
    axes.svg = [line for line in axes.svg if 'text-anchor="middle"' not in line]  # names in place of numbers
    slot = (WIDTH - LEFT - RIGHT) / len(names)
    for n, name in enumerate(names):
        x, y = axes.x(n), HEIGHT - BOTTOM + 14
        axes.svg.append(f'<text class="bars" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(name)}</text>')
    thick = slot * 0.8 / len(series)
    for at, one in enumerate(series):
        for n, value in one.points:
            x, y = axes.x(n) - slot * 0.4 + at * thick, axes.y(value)
            axes.svg.append(
                f'<rect class="bar c{at % COLOURS}" x="{x:.1f}" y="{y:.1f}" width="{thick:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(one.name)}: {number(value)}</title></rect>'
            )
    return drawing(axes, label)


def point_chart(series: list[Series], curves: list[Series], label: str, x_name: str) -> str:
    """Points, the later the stronger, and dashed curves; both axes from 0 to 1."""
    axes = frame((0.0, 1.0), (0.0, 1.0), x_name)
    for at, one in enumerate(series):
        points = [point for point in one.points if all(map(math.isfinite, point))]
        points = points[:: -(-len(points) // 300) or 1]
        for n, (x, y) in enumerate(points):
            strong = 0.2 + 0.7 * (n + 1) / len(points)
            place = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"'
            axes.svg.append(f'<circle class="dot c{at % COLOURS}" r="2.6" {place} fill-opacity="{strong:.2f}"/>')
    for one in curves:
        line = path([(axes.x(x), axes.y(y)) for x, y in one.points])
        axes.svg.append(f'<path class="curve" d="{line}"><title>{escape(one.name)}</title></path>')
    return drawing(axes, label)


# -------------------------------------------------------------------------------------------- a chart as a file alone

LIGHT = ("#ffffff", "#1d1d1f", "#62626a", "#dcdce0", "#2563c9 #c2570c #178048 #7c3fc4 #b81f63 #0d7480".split())
DARK = ("#16161a", "#ececee", "#a0a0a8", "#38383e", "#6ea8ff #ffa14f #5ccf8b #c79bff #ff85b6 #58cfdd".split())
HEAD, ROW, LETTER = 46, 15, 6.4  # units: room for two lines of title; a line of the legend; a letter of it, generously


def stand_alone(svg: str, title: str, about: str, names: list[str]) -> str:
    """A chart of this file -> the text of an .svg file, with title, a line on how to read it, and the names in order of
    colour. It brings its own background: a page may be light where the reader's system is dark."""
    rows, left = [[]], float(WIDTH)
    for colour, name in enumerate(names):
        wide = 22 + LETTER * len(name)
        if wide > left:
            rows.append([])
            left = float(WIDTH)
        rows[-1].append((10 + WIDTH - left, colour, name))
        left -= wide
    top = HEAD + ROW * max(2, len(rows))  # so that two files beside each other are level
    legend = "".join(
        f'<rect class="dot c{colour}" x="{x:.0f}" y="{HEAD + ROW * row - 8}" width="9" height="9" rx="2"/>'
        f'<text class="strong" x="{x + 13:.0f}" y="{HEAD + ROW * row}">{escape(name)}</text>'
        for row, items in enumerate(rows)
        for x, colour, name in items
    )
    style = style_rules(LIGHT) + f"@media (prefers-color-scheme: dark) {{{style_rules(DARK)}}}"
    chart = svg.replace("<svg ", f'<svg x="4" y="{top - 6}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 10} {top + HEIGHT}" width="{2 * WIDTH}">'
        f'<style>{style}</style><rect class="page" width="100%" height="100%" rx="6"/>'
        f'<text class="title" x="10" y="17">{escape(title)}</text><text x="10" y="31">{escape(about)}</text>'
        f"{legend}{chart}</svg>\n"
    )


def style_rules(theme: tuple) -> str:
    """Plain rules, no variables: some programs that draw SVG know none."""
    page, ink, faint, rule, colours = theme
    own = "".join(
        f".line.c{n}{{stroke:{colour}}}.dot.c{n},.band.c{n},.area.c{n},.bar.c{n},.cell.c{n}{{fill:{colour}}}"
        for n, colour in enumerate(colours)
    )
    return (
        f".page{{fill:{page}}}text{{font:11px system-ui,sans-serif;fill:{faint}}}.strong{{fill:{ink}}}"
        f".title{{font-size:13px;font-weight:600;fill:{ink}}}.name{{font-style:italic}}.axis{{stroke:{faint}}}"
        f".rule{{stroke:{rule};stroke-width:.7}}.line{{fill:none;stroke-width:1.6}}.band{{opacity:.2}}{own}"
    )
