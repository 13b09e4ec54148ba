"""What the GPU benchmark found, as lines while it runs and as tables of markdown from the file of its figures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_step import Row

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
STEP = (
    "shape peer mode variant layers batch median_ms:.1f mean_ms:.1f tokens_per_second:,.0f mfu:.1% goal:.0% goal_met "
    "allocated_gb:.1f reserved_gb:.1f busy_ms:.1f idle:.1% clock_mhz:.0f watts:.0f attention"
)
PARTS = {
    "machine": (
        "Machine",
        "device torch cuda cudnn nccl triton driver transformers python highest_clock_mhz power_limit_watts command",
    ),
    "shapes": ("Training steps, bf16, one device", STEP),
    "variants": (
        "Variants, their tokens a second compared with `base` in the same call",
        "shape mode variant batch median_ms:.1f compared:+.1% mfu:.1% allocated_gb:.1f busy_ms:.1f idle:.1% attention",
    ),
    "wrapping": ("Weights that FSDP casts from float32, and weights that are bfloat16 themselves", f"wrapped {STEP}"),
    "products": (
        "Matrix products alone, bfloat16, TFLOP/s",
        "title rows:,d inputs:,d outputs:,d forward:.0f input_gradient:.0f weight_gradient:.0f",
    ),
    "copy": ("Copy on the device, TB/s, counting what is read and what is written", "title terabytes:.2f"),
    "attention": (
        "Causal attention alone, bfloat16, TFLOP/s of the scores that are seen, 2.5 times as many backward",
        "title kernel forward_ms:.2f forward:.0f both_ms:.2f both:.0f note",
    ),
    "loss": ("The loss beside hidden states and weight", "title loss extra_gb:.2f milliseconds:.1f"),
    "generation": ("Generation with the key/value cache, a token", "title first_ms:.2f second_ms:.2f"),
    "trainer": (
        "`pretrain_gpt.py`, gpt2_small, bf16, compiled",
        "title rows steps tokens_per_second:,.0f mfu:.1% stalls_ms seconds_to_first_log:.1f seconds:.1f "
        "loss_difference:.2%",
    ),
}
"""The title of each part's table, and its columns: what a row says under that name, and how a number is written."""


def write(row: Row, column: str) -> str:
    """What a row says of a column; n/a where it is not known."""
    name, _, form = column.partition(":")
    value = row.get(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "n/a" if value is None else format(value, form).replace("|", "/")


def line(row: Row) -> str:
    """A figure in one line, for whoever watches, with what is known of it."""
    if "failed" in row:
        return f"{row['part']}: {row['title']}: failed: {row['failed']}"
    columns = [column for column in PARTS[row["part"]][1].split() if column not in ("title", "shape", "peer", "mode")]
    told = {column.partition(":")[0].replace("_", " "): write(row, column) for column in columns}
    return f"{row['part']}: {row['title']}: " + ", ".join(
        f"{name} {value}" for name, value in told.items() if value != "n/a"
    )


def read_figures(paths: Sequence[Path]) -> list[Row]:
    """The rows of files that benchmarks wrote; a line that was torn by a kill is passed over."""
    rows = []
    for path in paths:
        for each in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(each))
            except ValueError:
                continue
    return rows


def tables(rows: Sequence[Row]) -> str:
    """Markdown of all parts that rows are there of, and a list of what failed."""
    return "\n".join(_sections(compared_with_base(rows)))


def compared_with_base(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of variants with their speed compared with that of the base of the same shape, mode and batch."""
    bases: dict[tuple[object, ...], float] = {}
    found = []
    for row in rows:
        if row["part"] == "variants" and "failed" not in row:
            kind = tuple(row[key] for key in ("shape", "mode", "batch"))
            if row["variant"] == "base":
                bases[kind] = row["tokens_per_second"]
            if kind in bases:
                row = row | {"compared": row["tokens_per_second"] / bases[kind] - 1}
        found.append(row)
    return found


def _sections(rows: Sequence[Row]) -> Iterator[str]:
    for part, (title, names) in PARTS.items():
        found = [row for row in rows if row["part"] == part and "failed" not in row]
        if not found:
            continue
        columns = names.split()
        yield f"**{title}**\n"
        yield f"| {' | '.join(column.partition(':')[0].replace('_', ' ') for column in columns)} |"
        yield "|" + "---|" * len(columns)
        yield from (f"| {' | '.join(write(row, column) for column in columns)} |" for row in found)
        yield ""
    failed = [row for row in rows if "failed" in row]
    if failed:
        yield "**Failed**\n"
        yield from (f"- {row['part']}: {row['title']}: {row['failed']}" for row in failed)
        yield ""


def write_into(page: Path, written: str) -> None:
    """Puts tables between the two markers of a page. Raises ValueError where it lacks them."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END} for the tables to stand between")
    page.write_text(f"{before}{BEGIN}\n\n{written.strip()}\n\n{END}{after}", encoding="utf-8")
