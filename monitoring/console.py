"""What a person watching a run sees: a summary at the start, a line per logged step, a progress bar on a terminal."""

import statistics
import sys
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO, cast

from data.batch_schedule import parse_batch_schedule
from monitoring.metrics import EvaluationMetrics, StepMetrics
from runtime.messages import either
from runtime.streams import LenientStream
from settings.config import RunConfig
from settings.summary import describe_stages

if TYPE_CHECKING:
    from rich.progress import Progress
from runtime.messages import clock, humanise


class Console:
    """Prints a run. For rank 0 only. Close it whatever happens (`contextlib.closing`): the bar hides the cursor.

    A line that cannot be printed is left out, and the run goes on: its reader has left (`| head`), the disk that the
    output goes to is full, or the stream is closed.
    """

    def __init__(self, total_steps: int, interactive: bool, stream: TextIO | None = None) -> None:
        """`interactive` keeps a progress bar below the lines; `stream` is standard output where None."""
        self._total = total_steps
        self._stream = LenientStream(sys.stdout if stream is None else stream)
        self._recent_sample_ms: deque[float] = deque(maxlen=20)
        self._batches = parse_batch_schedule("0:1", 1)
        self._bar: Progress | None = _start_bar(total_steps, self._stream) if interactive else None

    def start(self, config: RunConfig, parameters: int, device: str) -> None:
        """Prints what is about to be trained. `config` is resolved; `device` is a kind or name, as a person says it."""
        model, parallel = config.model, config.parallel
        self._batches = config.batches
        batches = self._batches.sizes
        by_tokens = f" ({config.train.batch_schedule})" if config.train.batch_schedule else ""
        all_tokens = self._batches.consumed_after(self._total) * config.seq_length
        sizes = {name: getattr(parallel, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
        details = {"pp": f" ({describe_stages(config)})"} if parallel.pp > 1 else {}
        axes = " ".join(f"{name}={size}{details.get(name, '')}" for name, size in sizes.items() if size > 1)
        world = parallel.pp * parallel.dp * parallel.cp * parallel.tp
        ranks = f"{world} ranks, {axes}" if world > 1 else "1 process"
        self.note(
            f"model  {humanise(parameters)} parameters, {model.num_layers} layers, {model.hidden_size} wide, "
            f"{model.num_attention_heads} heads, vocabulary {model.vocabulary:,}"
        )
        self.note(
            f"batch  {either(batches)} samples x {config.seq_length:,} = "
            f"{either(size * config.seq_length for size in batches)} tokens a step{by_tokens}, "
            f"{humanise(all_tokens)} in {self._total:,} steps"
        )
        self.note(
            f"ranks  {ranks}, {config.train.precision} on {device}; a step is {either(config.accumulated)} x "
            f"{config.micro_batch_size} samples a rank"
        )
        self.note(f"files  {config.run_dir}")

    def traffic(self, moved: Mapping[tuple[str, str], int]) -> None:
        """Prints the bytes that a step moves, by (ranks, collective)."""
        parts = [f"{ranks} {kind} {humanise(count)}B" for (ranks, kind), count in sorted(moved.items())]
        self.note(f"moves  {', '.join(parts)} a step")

    def step(self, metrics: StepMetrics) -> None:
        """Prints a logged step; its eta is the median of recent steps and leaves out evaluations and checkpoints."""
        consumed = metrics.consumed_samples
        self._recent_sample_ms.append(metrics.step_ms / self._batches.size_at(max(0, consumed - 1)))
        remaining = self._batches.consumed_after(self._total - metrics.step, consumed) - consumed
        eta = remaining * statistics.median(self._recent_sample_ms) / 1000
        mfu = "n/a" if metrics.mfu is None else f"{metrics.mfu:.1%}"
        self.note(
            f"step {metrics.step}/{self._total} | loss {metrics.loss:.3f} | lr {metrics.lr:.1e} "
            f"| grad {metrics.grad_norm:.2f} | {humanise(metrics.tokens_per_second)} tok/s | mfu {mfu} "
            f"| mem {metrics.memory_gb:.1f} GB | {metrics.step_ms:.0f} ms | eta {clock(eta)}"
        )
        self.progress(metrics.step)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Prints an evaluation."""
        shape = ".1f" if metrics.perplexity < 1e6 else ".1e"
        self.note(
            f"step {metrics.step}/{self._total} | validation loss {metrics.loss:.3f} "
            f"| perplexity {metrics.perplexity:{shape}}"
        )

    def note(self, text: str) -> None:
        """Prints a line."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def progress(self, step: int) -> None:
        """Moves the bar to a step, for steps that no line is printed for."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _start_bar(total_steps: int, stream: LenientStream) -> "Progress":
    # rich takes a tenth of a second to import: only a terminal pays for it.
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    bar = Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Terminal(file=cast(TextIO, stream), force_terminal=True),
        transient=True,
        expand=True,
    )
    bar.add_task("training", total=total_steps)
    bar.start()
    return bar
