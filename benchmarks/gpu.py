"""Measures Kilotron on one GPU: steps beside their goals, variants, the device's limits, the loss, the whole trainer.

    python -m benchmarks.gpu --parts ceilings shapes --output outputs/gpu_1
    python -m benchmarks.gpu --tables-from outputs/gpu_1/figures.jsonl --docs docs/benchmarks.md

Each figure comes from a process of its own, with a time limit; one that fails becomes a row that says so. Figures are
printed and appended to figures.jsonl in the output folder as soon as they are known, beside profiles and the traces of
errors; tables come last, and again from that file. `--tiny` tries everything out at a small size, on a CPU too.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_ceilings import measure_attention, measure_copy, measure_products
from benchmarks.gpu_parts import describe_machine, measure_generation, measure_loss
from benchmarks.gpu_report import line, read_figures, tables, write_into
from benchmarks.gpu_shapes import TRAINER_STEPS, Shape, shapes
from benchmarks.gpu_step import Row, StepCase, measure
from benchmarks.gpu_trainer import TrainerCase, measure_trainer
from benchmarks.gpu_variants import DEFAULT_VARIANTS, SLOW_TO_COMPILE, VARIANTS, telling_shapes

PARTS = ("ceilings", "shapes", "variants", "wrapping", "loss", "generation", "trainer")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Figure:
    """A call that a process of its own makes; it returns rows."""

    part: str
    title: str
    function: Callable[..., list[Row]]
    arguments: tuple[Any, ...]
    patience: float = 1.0
    """How many times the limit of a figure it may take."""


@dataclass
class Record:
    """Where figures go as soon as they are known."""

    folder: Path
    failures: int = 0

    @property
    def path(self) -> Path:
        """The file of all figures, an object a line."""
        return self.folder / "figures.jsonl"

    def add(self, row: Row, trace: str = "") -> None:
        """Prints a row and appends it to the file; an error's trace goes into a file beside it."""
        print(line(row), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if trace:
            with (self.folder / "errors.txt").open("a", encoding="utf-8") as file:
                file.write(f"{line(row)}\n{trace}\n")


def in_child(connection: Connection, function: Callable[..., list[Row]], arguments: tuple[Any, ...]) -> None:
    """Calls the function and sends its rows, or what it raised."""
    try:
        connection.send((function(*arguments), "", ""))
    except Exception as error:
        connection.send(([], describe(error), traceback.format_exc()))


def describe(error: Exception) -> str:
    """An error in a line; one of memory says so first, whatever it is wrapped in."""
    lines = str(error).strip().splitlines() or [""]
    told = next((each.strip() for each in lines if OUT_OF_MEMORY in each), lines[0])
    return f"{type(error).__name__}: {told[:200]}"


def apart(figure: Figure, seconds: float) -> tuple[list[Row], str, str]:
    """(rows, what went wrong, its trace) of a figure in a process of its own, which is killed after so many seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(sender, figure.function, figure.arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return [], f"not done after {seconds:.0f} s", ""
        answer: tuple[list[Row], str, str] = receiver.recv()
        process.join(10)
        return answer
    except EOFError:
        process.join(10)
        return [], f"the process died, exit code {process.exitcode}", ""
    finally:
        process.kill()
        process.join()
        receiver.close()


def take(record: Record, alternatives: Sequence[Figure], seconds: float) -> None:
    """Records the first of the alternatives for which the memory suffices."""
    for figure in alternatives:
        rows, failure, trace = apart(figure, figure.patience * seconds)
        for row in rows:
            record.add(row)
        if not failure:
            return
        record.add({"part": figure.part, "title": figure.title, "failed": failure}, trace)
        if OUT_OF_MEMORY not in failure:
            break
    record.failures += 1


@dataclass(frozen=True)
class Plan:
    """Which figures to take, from the words of the command line."""

    arguments: argparse.Namespace
    shapes: dict[str, Shape]
    output: Path

    def figures(self) -> Iterator[list[Figure]]:
        """The figures of all parts but the trainer, each with what to take where the memory does not suffice."""
        makers = {
            "ceilings": self._ceilings,
            "shapes": self._steps,
            "variants": self._variants,
            "wrapping": self._wrapping,
            "loss": self._loss,
            "generation": self._generation,
        }
        for part, maker in makers.items():
            if part in self.arguments.parts:
                yield from maker()

    def chosen(self, *default: str) -> list[Shape]:
        """The shapes that were asked for."""
        return [self.shapes[name] for name in self.arguments.shapes or default or self.shapes]

    def _ceilings(self) -> Iterator[list[Figure]]:
        tiny, chosen = self.arguments.tiny, self.chosen()
        square, size, enough = (64, 2**20, 1e-4) if tiny else (8192, 2**31, 0.02)
        yield [Figure("products", "products", measure_products, (chosen, square, enough))]
        yield [Figure("copy", "copy", measure_copy, (size, enough))]
        yield [Figure("attention", "attention", measure_attention, (chosen, enough))]

    def _steps(self) -> Iterator[list[Figure]]:
        """Those of compiled layers first, which tell most."""
        for mode in self.arguments.modes or ("compiled", "eager"):
            for peer in self.arguments.peers:
                for shape in self.chosen():
                    if mode not in (self.arguments.modes or shape.modes):
                        continue
                    for accumulate in self.arguments.accumulate or shape.accumulate:
                        yield self._step("shapes", shape, mode, accumulate, peer=peer)
                    for variant in shape.also if peer == "kilotron" else ():
                        yield self._step("shapes", shape, mode, variant=variant)

    def _variants(self) -> Iterator[list[Figure]]:
        names = self.arguments.variants or (["base", "all"] if self.arguments.tiny else DEFAULT_VARIANTS)
        for mode in self.arguments.modes or ("eager" if self.arguments.tiny else "compiled",):
            for name, telling in telling_shapes(names).items():
                for shape in self.chosen(*telling):
                    for accumulate in self.arguments.accumulate or (1,):
                        yield self._step("variants", shape, mode, accumulate, variant=name)

    def _wrapping(self) -> Iterator[list[Figure]]:
        """Unwrapped, the optimizer has half the bytes to move as well."""
        for shape in self.chosen("gpt2_small"):
            for mode in self.arguments.modes or ("eager" if self.arguments.tiny else "compiled",):
                for wrapped in (True, False):
                    yield self._step("wrapping", shape, mode, wrapped=wrapped)

    def _loss(self) -> Iterator[list[Figure]]:
        sizes = [(32_768, 768, 50_304), (8_192, 4_096, 128_256)]
        for tokens, hidden, vocabulary in [(64, 64, 512)] if self.arguments.tiny else sizes:
            for fused in (True, False):
                title = f"{'fused' if fused else 'plain'}, {tokens} tokens"
                yield [Figure("loss", title, measure_loss, (fused, tokens, hidden, vocabulary))]

    def _generation(self) -> Iterator[list[Figure]]:
        prompt, new_tokens = (8, 8) if self.arguments.tiny else (128, 128)
        for shape in self.chosen("gpt2_small"):
            yield [Figure("generation", shape.name, measure_generation, (shape, prompt, new_tokens))]

    def _step(
        self,
        part: str,
        shape: Shape,
        mode: str,
        accumulate: int = 1,
        *,
        peer: str = "kilotron",
        variant: str = "base",
        wrapped: bool = True,
    ) -> list[Figure]:
        """A step at the shape's number of rows, then at smaller ones; transformers has as many rows in all."""
        words = self.arguments
        config = shape.config if words.layers is None else replace(shape.config, num_layers=words.layers)
        candidates = shape.rows if words.rows is None else (words.rows,)
        if peer == "transformers":
            at_once = min(shape.peer_rows, candidates[0])
            accumulate, candidates = accumulate * candidates[0] // at_once, (at_once,)
        goal = shape.goal if (peer, mode, variant, wrapped) == ("kilotron", "compiled", "base", True) else None
        cases = [
            StepCase(
                part=part,
                shape=shape.name,
                config=config,
                seq_length=shape.seq_length,
                rows=rows,
                accumulate=accumulate,
                peer=peer,
                mode=mode,
                variant=variant,
                goal=goal,
                steps=words.steps,
                profiles=self.output,
                wrapped=wrapped,
            )
            for rows in candidates
        ]
        patience = 3.0 if variant in SLOW_TO_COMPILE and mode == "compiled" else 1.0
        return [Figure(part, case.title, measure, (case,), patience) for case in cases]


def take_trainer(record: Record, plan: Plan) -> None:
    """Records the runs of the whole trainer; what goes wrong is a row."""
    words = plan.arguments
    size = "tiny" if words.tiny else "full"
    rows = words.rows or plan.shapes["gpt2_50257"].rows[0]
    steps = words.trainer_steps or TRAINER_STEPS[size]
    try:
        # Checkpoints are large and of no use afterwards.
        with tempfile.TemporaryDirectory() as out_dir:
            case = TrainerCase(Path(out_dir), plan.output, steps, rows, words.tiny, 2 * words.figure_seconds)
            for row in measure_trainer(case):
                record.add(row)
    except Exception as error:
        record.add({"part": "trainer", "title": "pretrain_gpt.py", "failed": describe(error)}, traceback.format_exc())
        record.failures += 1


def parse() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("gpt2_small", "gpt2_50257", "llama_1b", "llama_8b_wide")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--shapes", nargs="+", choices=names, help="of which shapes; default: those of each part")
    parser.add_argument("--modes", nargs="+", choices=("compiled", "eager"), help="default: those of each shape")
    parser.add_argument("--peers", nargs="+", choices=("kilotron", "transformers"), default=["kilotron"])
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        help="default: the telling ones, each on the shape that tells most",
    )
    parser.add_argument("--rows", type=int, help="of a micro-batch, whatever the shape")
    parser.add_argument("--layers", type=int, help="of the model, whatever the shape")
    parser.add_argument("--accumulate", nargs="+", type=int, help="micro-batches a step; default: the shape's")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a figure (default: %(default)s)")
    parser.add_argument("--trainer-steps", type=int, help=f"of the trainer's part (default: {TRAINER_STEPS['full']})")
    parser.add_argument("--figure-seconds", type=float, default=120.0, help="limit of a figure (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small models and batches, to try the benchmark out")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/gpu"), help="a folder without figures (default: %(default)s)"
    )
    parser.add_argument("--tables-from", nargs="+", type=Path, metavar="FILE", help="measure nothing, show tables")
    parser.add_argument("--docs", type=Path, help="page to write these tables into, between its two markers")
    return parser.parse_args()


def main() -> int:
    """Takes the figures that are asked for; returns 1 where one failed."""
    arguments = parse()
    if arguments.tables_from:
        written = tables(read_figures(arguments.tables_from))
        print(written)
        if arguments.docs is not None:
            write_into(arguments.docs, written)
        return 0
    if not arguments.tiny and not torch.cuda.is_available():
        print("no CUDA device here: --tiny tries the benchmark out on a CPU", file=sys.stderr)
        return 1
    record, plan = Record(arguments.output), Plan(arguments, shapes(tiny=arguments.tiny), arguments.output)
    if record.path.exists():
        print(f"{record.path} is there already: choose another --output, or remove it", file=sys.stderr)
        return 1
    # Whoever ends this process wants the device back: figures in progress end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    arguments.output.mkdir(parents=True, exist_ok=True)
    # Without the folder, which is of one machine.
    words = [word for word in sys.argv[1:] if word not in ("--output", str(arguments.output))]
    command = shlex.join(["python", "-m", "benchmarks.gpu", *words])
    take(record, [Figure("machine", "machine", describe_machine, (command,))], arguments.figure_seconds)
    if "trainer" in arguments.parts:
        take_trainer(record, plan)
    for alternatives in plan.figures():
        take(record, alternatives, arguments.figure_seconds)
    written = tables(read_figures([record.path]))
    (arguments.output / "tables.md").write_text(written, encoding="utf-8")
    print(f"\n{written}")
    return 1 if record.failures else 0


if __name__ == "__main__":
    sys.exit(main())
