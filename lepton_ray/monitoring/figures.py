"""The charts of a run report as inline SVG: small, without scripts, in the colours of the page's light or dark theme.

matplotlib draws with marker colours that become the page's CSS variables, so one drawing serves both themes. It is
imported on first use: nothing that trains or serves pays for it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "text": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "accent": "#040404",
    "second": "#050505",
    "data_wait": "#060606",
    "forward": "#070707",
    "backward": "#080808",
    "optimizer": "#090909",
    "checkpoint": "#0a0a0a",
    "collective": "#0b0b0b",
}
"""CSS variable -> the colour that stands for it in the drawing."""

PARTS = ("forward", "backward", "collective", "optimizer", "data_wait", "checkpoint")
MAX_POINTS = 400
"""Points of a line; longer histories are averaged over equal stretches."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": COLOURS["text"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

History = Mapping[str, Sequence[float]]


def loss_chart(history: History, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Training loss over steps with the held-out loss, on a logarithmic axis; "" without any."""
    training = _known(history.get("step", ()), history.get("loss", ()))
    held_out = [series for name, series in _metrics(evaluations).items() if _is_loss(name)]
    if not training and not held_out:
        return ""

    def draw(axes: Axes) -> None:
        if training:
            steps, values = _thinned(training)
            axes.plot(steps, values, color=COLOURS["accent"], label="training")
        for series in held_out[:1]:
            steps, values = _thinned(series)
            axes.plot(steps, values, color=COLOURS["second"], marker="o", markersize=3.5, label="held out")
        seen = [value for series in (training, *held_out[:1]) for _, value in series]
        if min(seen) > 0 and max(seen) / min(seen) > 8:
            _log_scale(axes)
        axes.legend(loc="upper right", ncols=2)
        axes.set_xlabel("step")

    return _svg("loss", draw)


def evaluation_chart(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The held-out metrics that are no losses (accuracy and the like), by step; "" without any."""
    shown = {name: series for name, series in _metrics(evaluations).items() if not _is_loss(name)}
    if not shown:
        return ""

    def draw(axes: Axes) -> None:
        for (name, series), colour in zip(list(shown.items())[:3], ("accent", "second", "checkpoint"), strict=False):
            steps, values = _thinned(series)
            axes.plot(steps, values, color=COLOURS[colour], marker="o", markersize=3.5, label=name)
        values = [value for series in shown.values() for _, value in series]
        if min(values) >= 0 and max(values) <= 1:
            axes.yaxis.set_major_formatter(_percent)
        axes.legend(loc="lower right", ncols=3)
        axes.set_xlabel("step")

    return _svg("evaluation", draw)


def throughput_chart(history: History) -> str:
    """Samples per second over steps; "" without any."""
    speed = _known(history.get("step", ()), history.get("samples_per_second", ()))
    if not speed:
        return ""

    def draw(axes: Axes) -> None:
        steps, values = _thinned(speed)
        axes.plot(steps, values, color=COLOURS["accent"])
        axes.fill_between(steps, values, color=COLOURS["accent"], alpha=0.14, linewidth=0)
        axes.set_ylim(0, max(values) * 1.12 or 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("step")

    return _svg("throughput", draw)


def parts_chart(history: History) -> str:
    """What a step's time is made of, stacked, over steps; "" without any.

    The wait for the gradient exchange, a share of `backward`, stands beside what is left of that.
    """
    steps = history.get("step", ())
    columns = {name: [0.0 if math.isnan(value) else value for value in history.get(name, ())] for name in PARTS}
    if len(columns["backward"]) == len(columns["collective"]):
        shares = zip(columns["backward"], columns["collective"], strict=True)
        columns["backward"] = [max(0.0, whole - waited) for whole, waited in shares]
    columns = {name: values for name, values in columns.items() if any(values) and len(values) == len(steps)}
    if not columns:
        return ""

    def draw(axes: Axes) -> None:
        thin = {name: _thinned(list(zip(steps, values, strict=True))) for name, values in columns.items()}
        at = next(iter(thin.values()))[0]
        heights = [[1000 * value for value in values] for _, values in thin.values()]
        axes.stackplot(
            at,
            *heights,
            colors=[COLOURS[name] for name in thin],
            labels=[name.replace("_", " ") for name in thin],
            linewidth=0,
        )
        axes.set_ylim(0, max(map(sum, zip(*heights, strict=True))) * 1.25 or 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} ms")
        axes.legend(loc="upper left", ncols=6, columnspacing=0.8, handlelength=0.9, handletextpad=0.4, borderpad=0)
        axes.set_xlabel("step")

    return _svg("parts", draw)


def _known(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in zip(steps, values, strict=False) if math.isfinite(value)]


def _thinned(series: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over stretches so that at most MAX_POINTS are left."""
    stretch = -(-len(series) // MAX_POINTS)
    groups = [series[at : at + stretch] for at in range(0, len(series), stretch)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [step for step, _ in means], [value for _, value in means]


def _metrics(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for each in evaluations:
        for name, value in each["metrics"].items():
            if math.isfinite(value):
                found.setdefault(str(name)[:40], []).append((each["step"], value))
    return found


def _is_loss(name: str) -> bool:
    return "loss" in name.lower() or "entropy" in name.lower() or "error" in name.lower()


def _percent(value: float, _: object) -> str:
    return f"{100 * value:.4g}%"


def _log_scale(axes: Axes) -> None:
    """A logarithmic axis that is labelled with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    """One chart as an SVG element; its ids begin with `name`, so that several stand in one page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context():
        for key, value in {**_STYLE, "svg.hashsalt": name}.items():
            mpl.rcParams[key] = value  # type: ignore[index]  # its stubs list every key as a literal
        figure = Figure(figsize=(6.2, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
        return _inline(name, figure)


def _inline(name: str, figure: Figure) -> str:
    """The figure's SVG without prologue, fixed size, foreign ids and colours of its own."""
    sink = io.StringIO()
    figure.savefig(
        sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', text))
    text = re.sub(
        r' id="([\w.-]+)"', lambda found: f' id="{name}-{found.group(1)}"' if found.group(1) in used else "", text
    )
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own font
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # a hundredth of a point is finer than any screen
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable.replace('_', '-')})")
    return re.sub(r"\n\s*", "\n", text).strip()
