"""Line charts as SVG text, 360 units wide.

Colours are the classes c0 to c5 of the page's style sheet; `stand_alone` turns a chart into a file with its own style.
All text is escaped. Needs the standard library only.
"""

import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean

WIDTH, HEIGHT = 360, 196
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 46, 350, 8, 162  # assets/report.html has the same numbers
COLOURS = 6


@dataclass
class Series:
    """A named line of (x, y) in the order of x, with an optional band of (x, low, high). A non-finite y is a gap."""

    name: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]] = field(default_factory=list)


def number(value: float) -> str:
    """Short text for a finite number on an axis or in a legend: 0.25, 1.23M, 20k, 1.5e-13."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def thin(points: list[tuple], most: int = 200) -> list[tuple]:
    """At most `most` points, each the mean of equally many neighbours. Non-finite points do not enter a mean."""
    size = max(1, -(-len(points) // most))
    chunks = [points[begin : begin + size] for begin in range(0, len(points), size)]
    finite = [[point for point in chunk if all(map(math.isfinite, point))] or chunk[:1] for chunk in chunks]
    return [tuple(map(fmean, zip(*chunk, strict=True))) for chunk in finite]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high: 0.35 and 0.4 for (0.31, 0.42)."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    width = next(w * power for w in (1, 2, 5, 10) if w * power >= (high - low) / most * 0.999)
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [float(f"{n * width:.12g}") for n in range(first, last + 1)]


def path_data(points: list[tuple[float, float]]) -> str:
    """The d attribute of a path; a non-finite point breaks the line. h0 with a round cap shows a lone point."""
    commands, pen = "", "M"
    for x, y in points:
        finite = math.isfinite(x + y)
        commands += f"{pen}{x:.1f} {y:.1f}{'h0' if pen == 'M' else ''}" if finite else ""
        pen = "L" if finite else "M"
    return commands


def y_range(values: list[float], log: bool) -> tuple[float, float]:
    """Lowest and highest y of an axis: a little wider than the finite values; whole powers of ten if log."""
    values = [y for y in values if math.isfinite(y) and (y > 0 or not log)] or [1e-3, 1.0]
    low, high = min(values), max(values)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return low, max(high, low * 10)
    low = 0.0 if 0 <= low < 0.6 * high else low  # close enough to zero to show it
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if low == 0 else low - margin), high + margin


def line_chart(series: list[Series], label: str, fixed: tuple | None = None, log: bool = False) -> str:
    """An <svg> of lines over steps with their bands. fixed: the range of y, else by the values; log: logarithmic y."""
    series = [Series(line.name, thin(line.points), thin(line.band)) for line in series]
    steps = [x for line in series for x, _ in line.points]
    x0, x1 = min(steps), max(steps)
    y0, y1 = fixed or y_range([y for line in series for p in line.points + line.band for y in p[1:]], log)
    scale = math.log10 if log else float

    def place_x(step: float) -> float:
        return PLOT_LEFT + (PLOT_RIGHT - PLOT_LEFT) * ((step - x0) / (x1 - x0) if x1 > x0 else 0.5)

    def place_y(value: float) -> float:
        if not math.isfinite(value) or (log and value <= 0):
            return math.nan  # cannot be drawn
        return PLOT_BOTTOM - (PLOT_BOTTOM - PLOT_TOP) * ((scale(value) - scale(y0)) / (scale(y1) - scale(y0)))

    wide = f'x1="{PLOT_LEFT}" x2="{PLOT_RIGHT}"'
    svg = f'<line class="axis" {wide} y1="{PLOT_BOTTOM}" y2="{PLOT_BOTTOM}"/>'
    marks = ticks(y0, y1, 4)
    if log:
        decades = range(round(scale(y0)), round(scale(y1)) + 1)
        marks = [10.0**n for n in decades[:: -(-len(decades) // 5)]]  # at most five
    for value in marks:
        y = place_y(value)
        svg += f'<line class="rule" {wide} y1="{y:.1f}" y2="{y:.1f}"/>'
        svg += f'<text x="{PLOT_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for step in [x for x in ticks(x0, x1) if x.is_integer()] if x1 > x0 else [x0]:
        x = min(place_x(step), WIDTH - 14)
        svg += f'<text x="{x:.1f}" y="{PLOT_BOTTOM + 14}" text-anchor="middle">{number(step)}</text>'
    svg += f'<text class="name" x="{PLOT_RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>'
    lines = ""
    for colour, line in enumerate(series):
        points = path_data([(place_x(x), place_y(y)) for x, y in line.points])
        lines += f'<path class="line c{colour % COLOURS}" data-name="{escape(line.name)}" d="{points}"/>'
        band = [(place_x(x), place_y(low), place_y(high)) for x, low, high in line.band]
        band = [place for place in band if all(map(math.isfinite, place))]
        if len(band) > 1:
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            svg += f'<path class="band c{colour % COLOURS}" d="{path_data(edge)}Z"/>'
    domain = f"{x0:g} {x1:g} {y0:g} {y1:g} {int(log)}"  # the page's script shows values under the pointer
    attributes = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" data-domain="{domain}"'
    return f'<svg class="hover" {attributes}>{svg}{lines}</svg>'  # lines above all bands


def stand_alone(svg: str, title: str, about: str, names: list[str]) -> str:
    """The text of an .svg file: a chart with its title, a line of explanation, a legend, and a background."""
    legend, left, y = "", 10.0, 46
    for colour, name in enumerate(names):
        wide = 22 + 6.4 * len(name)  # 6.4 units a letter are enough for this font
        if left > 10 and left + wide > WIDTH + 10:
            left, y = 10.0, y + 15
        legend += f'<rect class="dot c{colour}" x="{left:.0f}" y="{y - 8}" width="9" height="9" rx="2"/>'
        legend += f'<text class="strong" x="{left + 13:.0f}" y="{y}">{escape(name)}</text>'
        left += wide
    top = max(76, y + 15)  # at least two rows of names, so that charts side by side are level
    style = (Path(__file__).parent.parent / "assets" / "chart.css").read_text(encoding="utf-8")
    chart = svg.replace("<svg ", f'<svg x="4" y="{top - 6}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 10} {top + HEIGHT}" width="{2 * WIDTH}">'
        f'<style>{style}</style><rect class="page" width="100%" height="100%" rx="6"/>'
        f'<text class="title" x="10" y="17">{escape(title)}</text><text x="10" y="31">{escape(about)}</text>'
        f"{legend}{chart}</svg>\n"
    )
