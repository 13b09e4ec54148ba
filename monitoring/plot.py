"""Pictures: the loss curve of a run, and what pipeline ranks do when."""

import io
import itertools
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from monitoring.metrics import Curves
from parallel.schedule_timeline import WORDS, Span
from runtime.files import write_atomically
from runtime.messages import humanise

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ACTION_COLOURS = {"F": "#2a6fbb", "B": "#d1495b", "I": "#d1495b", "W": "#3f9b6b"}
BLUE, RED, INK, GREY, RULE = "#2a6fbb", "#d1495b", "#22272e", "#6b7480", "#e4e7eb"
PALER = 0.72


def plot_loss(run_dir: Path, curves: Curves, references: Mapping[str, float] | None = None) -> Path | None:
    """Draws training and validation loss by step, and each reference as a labelled horizontal line.

    Returns the picture's path, None where nothing was logged yet. Raises StorageError where it cannot be written.
    """
    training, validation = curves.training.finite(), curves.validation.finite()
    if not training.steps and not validation.steps:
        return None
    # matplotlib takes half a second to import: only who draws pays for it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
    axes = figure.add_subplot()
    shown = [*(references or {}).values(), *validation.values]
    if training.steps:
        reach = len(training.values) // 60
        averages = smooth(training.values, reach)
        shown += [min(averages), max(averages)]
        axes.plot(training.steps, training.values, color=BLUE, linewidth=0.8, alpha=0.3)
        marker = "o" if len(averages) == 1 else ""
        label = f"training loss{' (smoothed)' if reach else ''} {averages[-1]:.3f}"
        axes.plot(training.steps, averages, color=BLUE, linewidth=1.8, marker=marker, label=label)
    if validation.steps:
        label = f"validation loss {validation.values[-1]:.3f}"
        axes.plot(validation.steps, validation.values, "o-", color=RED, markersize=4.5, linewidth=1.2, label=label)
    _decorate(axes, run_dir.name, curves)
    edge = axes.get_yaxis_transform()  # x as a share of the width, y as a loss
    for label, value in (references or {}).items():
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
        axes.annotate(
            f"{label} {value:.2f}", (1, value), (-4, 4), edge, "offset points", ha="right", color=GREY, size=8.5
        )
    # A spike of the raw curve may leave the picture; the rest keeps its scale.
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + 1.5 * margin)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path = run_dir / "loss.png"
    write_atomically(path, picture.getvalue())
    return path


def draw_timeline(spans: Sequence[Span], ranks: int, title: str, unit: str) -> bytes:
    """A picture, as PNG, of who does what when: a row a rank, micro-batches as numbers, later stages paler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.2 + 0.5 * ranks), dpi=120, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    end = max(span.end for span in spans)
    for rank, (kind, stage, number), start, stop in spans:
        alpha = 1.0 if stage < ranks else PALER
        axes.barh(
            rank, stop - start, 0.9, start, color=ACTION_COLOURS[kind], alpha=alpha, edgecolor="white", linewidth=0.4
        )
        if stop - start > 0.008 * end:
            axes.annotate(f"{number}", ((start + stop) / 2, rank), ha="center", va="center", color="white", size=7)
    for kind, words in WORDS.items():
        if any(span.action.kind == kind for span in spans):
            axes.barh(0, 0, color=ACTION_COLOURS[kind], label=words)
    if any(span.action.stage >= ranks for span in spans):
        axes.barh(0, 0, color=GREY, alpha=PALER, label="paler: a rank's other stages")
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel(unit, color=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=GREY, length=0, labelsize=8)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.0 + 0.6 / ranks), ncols=5, frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def smooth(values: Sequence[float], reach: int) -> "array[float]":
    """Mean over up to `reach` neighbours on either side: as many before as after, so a steep start is not dragged."""
    sums, averages = array("d", itertools.accumulate(values, initial=0.0)), array("d")
    for position in range(len(values)):
        side = min(reach, position)
        first, last = position - side, min(position + side, len(values) - 1)
        averages.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return averages


def _decorate(axes: "Axes", name: str, curves: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max([*curves.training.steps[-1:], *curves.validation.steps[-1:]])
    tokens = curves.tokens.finite().values[-1:]
    size = f"step {last:,}" + "".join(f", {humanise(count)} tokens" for count in tokens)
    axes.set_title(name, loc="left", color=INK, fontsize=13, fontweight="bold", pad=34, parse_math=False)
    axes.set_title(size, loc="right", color=GREY, fontsize=9.5, pad=34)
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel("loss (nats per token)", color=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, length=0, labelsize=9)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.legend(
        frameon=False, labelcolor=INK, fontsize=9.5, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3
    )
