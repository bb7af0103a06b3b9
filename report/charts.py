"""Small charts as SVG text: lines with bands, stacked shares, a heat map, points with a curve.

Each function returns one <svg>, 360 units wide. Colours are the classes c0 to c5 of the page's style sheet;
`stand_alone` turns a chart into a file with its own style. All text is escaped. Needs the standard library only.
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


@dataclass
class Axes:
    """The ranges of both axes, and the SVG elements between them. x and y: the position of a value in the SVG."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_name: str = "step"
    log: bool = False
    svg: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return PLOT_LEFT + (PLOT_RIGHT - PLOT_LEFT) * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan  # cannot be drawn
        low, high = self.y_range
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return PLOT_BOTTOM - (PLOT_BOTTOM - PLOT_TOP) * share

    def draw(self, label: str, kind: str = "", y_marks: list | None = None) -> str:
        """The <svg>. y_marks: (value, text) in place of round numbers."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        if y_marks is None and self.log:
            decades = range(round(math.log10(y0)), round(math.log10(y1)) + 1)
            y_marks = [(10.0**n, f"1e{n}") for n in decades[:: -(-len(decades) // 5)]]
        wide = f'x1="{PLOT_LEFT}" x2="{PLOT_RIGHT}"'
        grid = f'<line class="axis" {wide} y1="{PLOT_BOTTOM}" y2="{PLOT_BOTTOM}"/>'
        for value, text in y_marks or [(value, number(value)) for value in ticks(y0, y1, 4)]:
            y = self.y(value)
            grid += f'<line class="rule" {wide} y1="{y:.1f}" y2="{y:.1f}"/>'
            grid += f'<text x="{PLOT_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for value in [x for x in ticks(x0, x1) if self.x_name != "step" or x.is_integer()] if x1 > x0 else [x0]:
            x = min(self.x(value), WIDTH - 14)
            grid += f'<text x="{x:.1f}" y="{PLOT_BOTTOM + 14}" text-anchor="middle">{number(value)}</text>'
        grid += f'<text class="name" x="{PLOT_RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{self.x_name}</text>'
        domain = f"{x0:g} {x1:g} {y0:g} {y1:g} {int(self.log)}"  # the page's script shows values under the pointer
        attributes = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" data-domain="{domain}"'
        return f'<svg class="{kind}" {attributes}>{grid}{"".join(self.svg)}</svg>'


def number(value: float) -> str:
    """Short text for an axis or a legend: 0.25, 1.23M, 20k, 1.5e-13."""
    if not math.isfinite(value):
        return "not finite"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e15 and (size > 1e3 or abs(value) >= 1e4):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


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


def line_chart(series: list[Series], label: str, fixed: tuple | None = None, log: bool = False) -> str:
    """Lines over steps with their bands. fixed: the range of y; by default a little wider than the finite values."""
    steps = [x for line in series for x, _ in line.points]
    series = [Series(line.name, thin(line.points), thin(line.band)) for line in series]
    values = [y for line in series for point in line.points + line.band for y in point[1:]]
    values = [y for y in values if math.isfinite(y) and (y > 0 or not log)] or [0.0, 1.0]
    low, high = min(values), max(values)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low or 1e-3)), 10.0 ** math.ceil(math.log10(high))
        high = max(high, low * 10)
    else:
        low = 0.0 if 0 <= low < 0.6 * high else low  # close enough to zero to show it
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if low == 0 else low - margin), high + margin
    axes, lines = Axes((min(steps), max(steps)), fixed or (low, high), log=log), []
    for colour, line in enumerate(series):
        band = [(axes.x(x), axes.y(low), axes.y(high)) for x, low, high in line.band]
        band = [place for place in band if all(map(math.isfinite, place))]
        if len(band) > 1:
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            axes.svg.append(f'<path class="band c{colour % COLOURS}" d="{path_data(edge)}Z"/>')
        points = path_data([(axes.x(x), axes.y(y)) for x, y in line.points])
        lines.append(f'<path class="line c{colour % COLOURS}" data-name="{escape(line.name)}" d="{points}"/>')
    axes.svg += lines  # above all bands
    return axes.draw(label, "hover")


def stacked_chart(shares: list[Series], label: str) -> str:
    """Shares of a whole, stacked from 0 to 1. All series have the same steps."""
    axes = Axes((shares[0].points[0][0], shares[0].points[-1][0]), (0.0, 1.0))
    shares = [Series(share.name, thin(share.points, 100)) for share in shares]
    alone = len(shares[0].points) == 1  # a single step fills the whole width
    xs = [PLOT_LEFT, PLOT_RIGHT] if alone else [axes.x(x) for x, _ in shares[0].points]
    below = [0.0] * len(xs)
    for colour, share in enumerate(shares):
        heights = [y if math.isfinite(y) else 0.0 for _, y in share.points] * (2 if alone else 1)
        above = [low + y for low, y in zip(below, heights, strict=True)]
        edge = [*zip(xs, map(axes.y, above), strict=True)] + [*zip(xs, map(axes.y, below), strict=True)][::-1]
        area = f'<path class="area c{colour % COLOURS}" d="{path_data(edge)}Z">'
        axes.svg.append(f"{area}<title>{escape(share.name)}</title></path>")
        below = above
    return axes.draw(label)


def heat_chart(columns: list[tuple[float, list[int]]], label: str, colour: int) -> str:
    """columns: (step, counts). Cell n shows how large a share of its column count n is."""
    columns = thin([(step, *counts) for step, counts in columns], 60)
    rows, end = len(columns[0]) - 1, columns[-1][0] + 0.5
    axes = Axes((columns[0][0] - 0.5, end), (-0.5, rows - 0.5))
    ends = [step - 0.5 for step, *_ in columns[1:]] + [end]
    for (step, *counts), right in zip(columns, map(axes.x, ends), strict=True):
        left = axes.x(step - 0.5)
        for n, count in enumerate(counts):
            share, top = count / (sum(counts) or 1), axes.y(n + 0.5)
            place = f'x="{left:.1f}" width="{right - left + 0.3:.1f}" y="{top:.1f}"'
            shape = f'{place} height="{axes.y(n - 0.5) - top:.1f}" fill-opacity="{share**0.6:.2f}"'
            title = f"<title>step {step:g}: {number(share)} of the masks had {n} right</title>"
            axes.svg += [f'<rect class="cell c{colour}" {shape}>{title}</rect>'] if count else []
    y_marks = [(n, f"{n} of {rows - 1}") for n in range(0, rows, max(1, (rows - 1) // 4))]
    return axes.draw(label, y_marks=y_marks)


def point_chart(series: list[Series], curves: list[Series], label: str, x_name: str) -> str:
    """Points, later ones stronger, and dashed curves; both axes from 0 to 1."""
    axes = Axes((0.0, 1.0), (0.0, 1.0), x_name)
    for colour, dots in enumerate(series):
        points = [point for point in dots.points if all(map(math.isfinite, point))]
        points = points[:: -(-len(points) // 300) or 1]
        for n, (x, y) in enumerate(points):
            place = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" fill-opacity="{0.2 + 0.7 * (n + 1) / len(points):.2f}"'
            axes.svg.append(f'<circle class="dot c{colour % COLOURS}" r="2.6" {place}/>')
    for curve in curves:
        line = path_data([(axes.x(x), axes.y(y)) for x, y in curve.points])
        axes.svg.append(f'<path class="curve" d="{line}"><title>{escape(curve.name)}</title></path>')
    return axes.draw(label)


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
