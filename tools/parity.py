"""`kilotron parity`: whether a configuration's layout computes what one process does, scaled down to this machine."""

import argparse
from collections.abc import Sequence

from runtime.errors import ConfigError
from settings.compose import compose
from settings.keys import each_setting, show
from settings.resolve import resolve
from verification.scale_down import scale_down, without_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron parity`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for pretrain_gpt.py, and world_size=N: model=llama3_8b parallel.tp=2 world_size=4",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints how far the layout is from one process; returns 0 where they are equal, else 1. Raises ConfigError."""
    config = compose(arguments.overrides)
    resolved = resolve(without_data(config), {})
    if resolved.world_size == 1:
        raise ConfigError(
            "world_size=1: one process is what layouts are compared with; say which layout, such as "
            "world_size=4 parallel.tp=2"
        )
    small = scale_down(resolved)

    # Only now, so that a configuration is refused before torch takes its seconds to load.
    from verification.parity import describe_layout, verify

    before = {key: value for key, _, value in each_setting(resolved)}
    before |= {"model.vocab_size": config.model.vocab_size, "data.seq_length": resolved.seq_length}
    print("scaled down, for the CPU and in float64:")
    for key, _, value in each_setting(small):
        if value != before[key]:
            print(f"  {key:30} {show(before[key])} -> {show(value)}")
    print(flush=True)
    found = verify(small)
    header = ["layout", "loss", "worst gradient", "of", "gradient norm", "worst weight", "verdict"]
    figures = [f"{value:.1e}" for value in (found.loss, found.gradient, found.gradient_norm, found.weight)]
    row = [describe_layout(small), *figures[:2], found.gradient_name, *figures[2:], found.verdict]
    print(table([header, row]))
    return 0 if found.equal else 1


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns; the last column, which may be long, is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, [*widths[:-1], 0])) for row in rows)
