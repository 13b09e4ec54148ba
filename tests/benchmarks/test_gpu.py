"""The GPU benchmark outlives figures that fail, keeps what it found, and makes its tables from a file."""

import json
import os
import time

import pytest

from benchmarks.gpu import Figure, Record, apart, take
from benchmarks.gpu_ceilings import products_of
from benchmarks.gpu_profile import busy_and_idle
from benchmarks.gpu_report import BEGIN, END, compared_with_base, line, read_figures, tables, write_into
from benchmarks.gpu_shapes import shapes

COPY = {"part": "copy", "title": "1 MiB", "terabytes": 2.5}


def works():
    return [COPY]


def runs_out_of_memory():
    raise RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")


def fails():
    raise ValueError("no such kernel")


def dies():
    os._exit(3)


def hangs():
    time.sleep(60)


def figure(function):
    return Figure("copy", function.__name__, function, ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fails, "ValueError: no such kernel"),
        (dies, "the process died, exit code 3"),
        (runs_out_of_memory, "RuntimeError: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_what_goes_wrong_in_a_figure_is_said(function, said):
    rows, failure, trace = apart(figure(function), 60)
    assert (rows, failure) == ([], said)
    assert (function.__name__ in trace) == (function is not dies)


@pytest.mark.slow
def test_a_figure_that_takes_too_long_is_ended():
    begin = time.monotonic()
    assert apart(figure(hangs), 1.0) == ([], "not done after 1 s", "")
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_the_next_batch_is_taken_only_where_the_memory_did_not_suffice(tmp_path):
    record = Record(tmp_path)
    take(record, [figure(runs_out_of_memory), figure(works), figure(fails)], 60)
    assert record.failures == 0
    take(record, [figure(fails), figure(works)], 60)
    assert record.failures == 1
    first, second, third = read_figures([record.path])
    assert "out of memory" in first["failed"]
    assert second == COPY
    assert third["failed"] == "ValueError: no such kernel"
    assert "Traceback" in (tmp_path / "errors.txt").read_text()


def test_tables_are_made_of_what_a_kill_left_and_stand_between_the_markers_of_a_page(tmp_path):
    figures, page = tmp_path / "figures.jsonl", tmp_path / "page.md"
    failed = {"part": "loss", "title": "plain", "failed": "OutOfMemoryError: all of it"}
    figures.write_text("".join(json.dumps(row) + "\n" for row in (COPY, failed)) + '{"part": "cop')
    written = tables(read_figures([figures]))
    assert "| 1 MiB | 2.50 |" in written
    assert "- loss: plain: OutOfMemoryError: all of it" in written
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_into(page, written)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert text.count("| 1 MiB |") == 1
    assert "old" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="gpu:begin"):
        write_into(page, written)


def test_variants_are_compared_with_the_base_of_the_same_shape():
    common = {"part": "variants", "title": "", "mode": "eager", "batch": "1 x 4 x 32"}
    speeds = [("a", "base", 100.0), ("b", "base", 10.0), ("a", "other", 110.0), ("b", "other", 9.0)]
    rows = [
        {**common, "shape": shape, "variant": name, "tokens_per_second": speed, "loss": 1.0}
        for shape, name, speed in speeds
    ]
    found = compared_with_base([*rows, {**common, "shape": "a", "variant": "third", "failed": "so"}])
    assert [row.get("compared") for row in found] == pytest.approx([0.0, 0.0, 0.1, -0.1, None])
    assert "compared +10.0%" in line(found[2])


def test_the_device_is_busy_while_any_kernel_runs():
    assert busy_and_idle([(0.0, 2.0), (1.0, 3.0), (1.5, 1.75), (4.0, 5.0)]) == pytest.approx((4.0, 0.2))
    assert busy_and_idle([]) == (0.0, 1.0)


def test_the_products_of_a_shape_are_those_that_its_flops_count():
    for shape in shapes(tiny=False).values():
        config, names = shape.config, products_of(shape.config, 1024)
        by_name = {name: size for size, name in names.items()}
        rows, hidden, vocabulary = by_name["head"]
        assert (hidden, vocabulary) == (config.hidden_size, config.vocabulary)
        assert rows == 1024
        assert by_name["down"] == (1024, config.ffn_size, config.hidden_size)
        width = (config.num_attention_heads + 2 * config.query_groups) * config.head_size
        assert by_name["query, key and value at once"] == (1024, config.hidden_size, width)
