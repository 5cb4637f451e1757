"""Charts as inline SVG, drawn from numbers: nothing is loaded, and colours are the page's CSS variables: labels' and style.css's.

Text is given as it is and escaped here. Legends stand beside the drawing, never on it.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from distseg.pictures import LABEL_COLOURS

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 30, 40  # around the plot
NEUTRAL = -1  # colour of what is no label
HEAT_STEPS = 7
CHARACTER = 7.2  # width of one in the charts' type, about
NAMES_SPOKEN = 12

Point = tuple[float, float]
Style = Literal["solid", "faint", "dashed", "dotted"]
Entry = tuple[str, int, Style, bool]
"""of a legend: name, colour, style, with markers"""


@dataclass(frozen=True)
class Axis:
    """A range of values and its name."""

    label: str
    low: float
    high: float
    log: bool = False

    @staticmethod
    def around(label: str, values: Iterable[float], *, log: bool = False, from_zero: bool = False) -> "Axis":
        """Holds all the values that are finite (above 0 if `log`), with room on either side."""
        kept = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(kept), max(kept)) if kept else (1.0, 2.0)
        if log:
            return Axis(label, low / 1.3, high * 1.3, log=True)
        low = min(0.0, low) if from_zero else low
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return Axis(label, low if from_zero else low - room, high + room)

    @property
    def ticks(self) -> list[float]:
        """Round values: about five, or 1, 2, 5 x 10^n where there are some."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = self.high / self.low < 100
            ticks = [factor * 10.0**n for n in exponents for factor in ((1, 2, 5) if fine else (1,))]
            inside = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(inside) > 2:
                return inside
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]

    def share(self, value: float) -> float:
        """Where a value lies between low (0) and high (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[Point]
    """NaN breaks the line"""
    colour: int = 0
    """of the palette, from 0 (label 1's); it repeats. NEUTRAL: none of a label"""
    style: Style = "solid"
    markers: bool = False
    strong: bool = False


@dataclass(frozen=True)
class Dot:
    name: str
    """told when it is pointed at"""
    x: float
    y: float
    group: str
    """of one colour, named in the legend"""
    interval: tuple[float, float] | None = None
    label: str = ""
    """written beside it where there is room"""


@dataclass(frozen=True)
class Mark:
    """A vertical line at a value of x."""

    x: float
    label: str


def line_chart(
    title: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    note: str = "",
    legend: Sequence[tuple[str, int]] | None = None,
) -> Markup:
    """Lines over x, each with its place in the legend.

    Args:
        title: over the chart.
        x, y: the axes; what lies outside is left out.
        lines: drawn in this order, later ones on top.
        marks: values of x that matter.
        note: a sentence under the chart.
        legend: names and colours of groups of lines; None: each line is named.
    """
    drawn = [_marks(marks, x), *(_line(line, x, y) for line in lines)]
    named: list[Entry] = [(line.name, line.colour, line.style, line.markers) for line in lines]
    if legend is not None:
        named = [(name, colour, "solid", False) for name, colour in legend]
    spoken = f"{y.label} against {x.label}: {', '.join(line.name for line in lines[:NAMES_SPOKEN])}"
    return _figure(title, _svg(title, spoken, [_axes(x, y), *drawn]), _legend(named), note)


def scatter(
    title: str,
    x: Axis,
    y: Axis,
    dots: Sequence[Dot],
    groups: Sequence[str],
    note: str = "",
    colours: Mapping[str, int] | None = None,
) -> Markup:
    """Dots with their intervals, a colour a group; labels that would lie on another are left out.

    Args:
        title: over the chart.
        x, y: the axes.
        dots: later ones on top.
        groups: all there are, in the legend's order.
        note: a sentence under the chart.
        colours: of the groups; None: in their order.
    """
    colours = colours or {group: index for index, group in enumerate(groups)}
    shown = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y) and (dot.x > 0 or not x.log)]
    drawn = [_dot(dot, colours[dot.group], x, y) for dot in shown]
    legend: list[Entry] = [(group, colours[group], "solid", True) for group in groups]
    svg = _svg(title, f"{y.label} against {x.label}, {len(shown)} points", [_axes(x, y), *drawn, _labels(shown, x, y)])
    return _figure(title, svg, _legend(legend, only_markers=True), note)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    best: Collection[tuple[str, str]] = (),
    note: str = "",
) -> Markup:
    """A coloured cell a pair with its figure inside; NaN or a missing pair is a dash, the best are framed."""
    left, top, tall = max((len(row) for row in rows), default=0) * CHARACTER + 12, 28, 30
    wide = max(72.0, max((len(column) for column in columns), default=0) * CHARACTER + 12)
    width, height = left + wide * len(columns) + 4, top + tall * len(rows) + 4
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    parts = [_text(left + wide * (i + 0.5), top - 10, column, "middle") for i, column in enumerate(columns)]
    for j, row in enumerate(rows):
        parts.append(_text(left - 8, top + tall * (j + 0.5) + 4, row, "end"))
        for i, column in enumerate(columns):
            box = (left + wide * i, top + tall * j, wide, tall)
            value = values.get((row, column), math.nan)
            parts.append(_cell(f"{row}, {column}", box, value, (low, high), (row, column) in best))
    svg = _svg(title, f"{len(rows)} rows, {len(columns)} columns, from {low:.3f} to {high:.3f}", parts, width, height)
    return _figure(title, svg, _heat_legend(low, high) if finite else Markup(""), note, "heat")


def colour_class(colour: int) -> str:
    """The CSS class of a colour; see `Line.colour`."""
    return "neutral" if colour == NEUTRAL else f"c{colour % len(LABEL_COLOURS)}"


def interval_strip(mean: float, interval: Sequence[float] | None) -> Markup:
    """A value of [0, 1] and its interval on a line; for the eye only, as the numbers stand beside it."""
    band = ""
    if interval is not None:
        low, high = (min(max(end, 0.0), 1.0) * 100 for end in interval)
        band = f'<rect class="band" x="{low:.1f}" y="3" width="{max(high - low, 0.6):.1f}" height="6" rx="2"/>'
    return Markup(
        '<svg class="strip" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" x="0" y="5" width="100" height="2" rx="1"/>{band}'
        f'<rect class="mean" x="{min(max(mean * 100 - 0.5, 0), 99):.1f}" y="0" width="1" height="12"/></svg>'
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.share(value)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.share(value)


def _svg(title: str, spoken: str, parts: Iterable[str], width: float = WIDTH, height: float = HEIGHT) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" style="--wide:{width:.0f}px" role="img" '
        f'aria-label="{escape(title)}: {escape(spoken)}">{"".join(parts)}</svg>'
    )


def _figure(title: str, svg: Markup, legend: Markup, note: str, kind: str = "") -> Markup:
    told = Markup('<p class="note">{}</p>').format(note) if note else Markup("")
    # A heat map keeps its size and scrolls where there is little room, for keys too.
    scrolls = Markup(' tabindex="0" role="region" aria-label="{}"').format(title) if kind == "heat" else Markup("")
    drawn = Markup('<div class="drawing"{}>{}</div>').format(scrolls, svg)
    caption = Markup("<figcaption>{}</figcaption>").format(title)
    return Markup('<figure class="{}">{}{}{}{}</figure>').format(f"plot {kind}".strip(), caption, legend, drawn, told)


def _legend(entries: Sequence[Entry], *, only_markers: bool = False) -> Markup:
    """Names beside their lines or dots; a line that is alone needs none."""
    items = []
    for name, colour, style, markers in entries if len(entries) > 1 else ():
        line = "" if only_markers else _cased(f"line {style}", "M1 6H27")
        dot = '<circle class="dot" cx="14" cy="6" r="3.5"/>' if markers else ""
        swatch = f'<svg viewBox="0 0 28 12" class="{colour_class(colour)}" aria-hidden="true">{line}{dot}</svg>'
        items.append(Markup("<li>{}{}</li>").format(Markup(swatch), name))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items)) if items else Markup("")


def _heat_legend(low: float, high: float) -> Markup:
    steps = "".join(f'<i class="h{step}"></i>' for step in range(HEAT_STEPS))
    return Markup('<p class="legend ramp" aria-hidden="true">{} {} {}</p>').format(
        f"{low:.3f}", Markup(f"<span>{steps}</span>"), f"{high:.3f}"
    )


def _axes(x: Axis, y: Axis) -> str:
    parts = []
    for tick in y.ticks:
        at = _y(y, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 7, at + 4, _tick(tick), "end"))
    for tick in x.ticks:
        at = _x(x, tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 17, _tick(tick), "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 5, x.label, "end"))
    parts.append(_text(0, 12, y.label, "start"))
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:,.6g}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_kind}>{escape(text)}</text>'


def _marks(marks: Sequence[Mark], x: Axis) -> str:
    parts = []
    for mark in marks:
        if x.low <= mark.x <= x.high:
            at = _x(x, mark.x)
            parts.append(f'<path class="mark" d="M{at:.1f} {TOP - 3}V{HEIGHT - BOTTOM}"/>')
            half = len(mark.label) * CHARACTER / 2
            middle = min(max(at, LEFT + half), WIDTH - 2 - half)
            parts.append(_text(middle, TOP - 8, mark.label, "middle", "marked"))
    return "".join(parts)


def _line(line: Line, x: Axis, y: Axis) -> str:
    path, pen = [], "M"
    inside = []
    for at, value in line.points:
        if not math.isfinite(value) or not y.low <= value <= y.high or not x.low <= at <= x.high:
            pen = "M"
            continue
        path.append(f"{pen}{_x(x, at):.1f} {_y(y, value):.1f}")
        pen = "L"
        inside.append((at, value))
    dots = "".join(
        f'<circle class="dot" cx="{_x(x, at):.1f}" cy="{_y(y, value):.1f}" r="3"><title>'
        f"{escape(line.name)}: {value:.4g} at {_tick(at)}</title></circle>"
        for at, value in (inside if line.markers or len(inside) == 1 else ())
    )
    drawn = _cased(f"line {line.style}{' strong' if line.strong else ''}", "".join(path))
    return f'<g class="{colour_class(line.colour)}"><title>{escape(line.name)}</title>{drawn}{dots}</g>'


def _cased(kind: str, path: str) -> str:
    """A line on a wider one: a label's colour may be as bright as a white page, or as dark as a black one."""
    return f'<path class="{kind} casing" d="{path}"/><path class="{kind}" d="{path}"/>'


def _dot(dot: Dot, colour: int, x: Axis, y: Axis) -> str:
    at, up = _x(x, dot.x), _y(y, dot.y)
    whisker = ""
    if dot.interval is not None:
        low, high = (_y(y, min(max(end, y.low), y.high)) for end in dot.interval)
        whisker = f'<path class="whisker" d="M{at:.1f} {low:.1f}V{high:.1f}"/>'
    told = f"{dot.name}: {dot.y:.4g} at {_tick(dot.x)}"
    return (
        f'<g class="{colour_class(colour)}">{whisker}<circle class="dot" cx="{at:.1f}" cy="{up:.1f}" r="4">'
        f"<title>{escape(told)}</title></circle></g>"
    )


def _labels(dots: Sequence[Dot], x: Axis, y: Axis) -> str:
    """Beside, above or below their dots, later dots first; one that would cover a label or dot is left out."""
    taken, whiskers = [], []
    for dot in dots:
        at, up, low, high = _x(x, dot.x), *(_y(y, value) for value in (dot.y, *(dot.interval or (dot.y, dot.y))))
        taken.append((at - 5, up - 5, at + 5, up + 5))
        whiskers.append((at - 1, high, at + 1, low))
    parts = []
    for dot in (dot for dot in reversed(dots) if dot.label):
        at, up, half = _x(x, dot.x), _y(y, dot.y), len(dot.label) * CHARACTER / 2
        places = [(at + 8 + half, up), (at - 8 - half, up), (at, up - 14), (at, up + 14)]
        boxes = [(middle - half, level - 6, middle + half, level + 6) for middle, level in places]
        inside = [box for box in boxes if box[0] >= LEFT and box[2] <= WIDTH and box[1] > TOP / 2]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        clear = [box for box in free if not any(_overlap(box, whisker) for whisker in whiskers)]
        if free:
            box = (clear or free)[0]
            taken.append(box)
            parts.append(_text((box[0] + box[2]) / 2, box[3] - 2, dot.label, "middle", "marked"))
    return "".join(parts)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _cell(
    name: str, box: tuple[float, float, float, float], value: float, span: tuple[float, float], framed: bool
) -> str:
    left, top, wide, tall = box
    known = math.isfinite(value)
    share = (value - span[0]) / (span[1] - span[0]) if known and span[1] > span[0] else 0.5
    kind = f"h{min(int(share * HEAT_STEPS), HEAT_STEPS - 1)}" if known else "unknown"
    text = f"{value:.3f}" if known else "–"
    frame = ' class="framed"' if framed else ""
    return (
        f'<g class="cell {kind}"><title>{escape(name)}: {text}</title>'
        f'<rect x="{left + 1.5:.1f}" y="{top + 1.5:.1f}" width="{wide - 3:.1f}" height="{tall - 3:.1f}" rx="4"{frame}/>'
        f"{_text(left + wide / 2, top + tall / 2 + 4, text, 'middle')}</g>"
    )
