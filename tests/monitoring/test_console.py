"""The console: exact lines, whatever the numbers, and a bar that lines stand above of."""

import io
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.console import Console
from monitoring.metrics import EvaluationMetrics, StepMetrics
from parallel.config import ParallelConfig
from runtime.messages import clock, humanise
from settings.config import ModelConfig, RunConfig, TrainConfig

STEP = StepMetrics(
    step=120,
    consumed_samples=2880,
    consumed_tokens=737280,
    loss=4.2134,
    lr=5.9e-4,
    grad_norm=0.8312,
    tokens_per_second=12345.0,
    tokens_per_second_per_gpu=6172.5,
    step_ms=84.2,
    data_ms=0.5,
    mfu=0.4123,
    memory_gb=31.02,
)


def printed(*metrics: StepMetrics) -> list[str]:
    stream = io.StringIO()
    console = Console(500, interactive=False, stream=stream)
    for one in metrics:
        console.step(one)
    console.close()
    return stream.getvalue().splitlines()


def test_step_line_is_the_contracts():
    assert printed(STEP) == [
        "step 120/500 | loss 4.213 | lr 5.9e-04 | grad 0.83 | 12.3k tok/s | mfu 41.2% | mem 31.0 GB | 84 ms | eta 0:32"
    ]


def test_unknown_mfu_and_what_is_not_finite_are_said():
    (line,) = printed(replace(STEP, mfu=None, loss=float("nan"), grad_norm=float("inf")))
    assert "| loss nan |" in line
    assert "| grad inf |" in line
    assert "| mfu n/a |" in line


def test_one_slow_step_hardly_moves_the_eta():
    lines = printed(*(replace(STEP, step=step, step_ms=60_000 if step == 1 else 100) for step in range(1, 6)))
    assert lines[-1].endswith("| eta 0:50")


def test_evaluation_line_is_the_contracts():
    stream = io.StringIO()
    console = Console(500, interactive=False, stream=stream)
    console.evaluation(EvaluationMetrics(step=120, loss=4.1))
    console.evaluation(EvaluationMetrics(step=120, loss=20.0))
    console.evaluation(EvaluationMetrics(step=120, loss=1e5))
    assert stream.getvalue().splitlines() == [
        "step 120/500 | validation loss 4.100 | perplexity 60.3",
        "step 120/500 | validation loss 20.000 | perplexity 4.9e+08",
        "step 120/500 | validation loss 100000.000 | perplexity inf",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.5, "0.50"),
        (1, "1.00"),
        (84.2, "84.2"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (1.2e6, "1.20M"),
        (124_439_808, "124M"),
        (8_030_261_248, "8.03B"),
        (1.5e13, "15.0T"),
        (1.5e16, "15000T"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_humanise(value: float, text: str):
    assert humanise(value) == text


@given(st.floats(min_value=1, max_value=9.9e14))
def test_humanise_says_the_number_to_three_digits(value: float):
    text = humanise(value)
    factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1])
    number = float(text[:-1]) * factor if factor else float(text)
    assert number == pytest.approx(value, rel=0.0051)
    assert len(text.rstrip("kMBT").replace(".", "")) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (32.2, "0:32"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_start_says_model_batch_layout_and_directory_in_at_most_five_lines():
    stream = io.StringIO()
    config = RunConfig(
        name="first",
        model=ModelConfig(vocab_size=3072, max_position_embeddings=256),
        parallel=ParallelConfig(dp_replicate=2, dp_shard=3),
        train=TrainConfig(steps=300, global_batch_size=24, micro_batch_size=2, precision="bf16"),
    )
    Console(300, interactive=False, stream=stream).start(config, 124_439_808, "cuda")
    text = stream.getvalue()
    assert len(text.splitlines()) <= 5
    for said in (
        "124M parameters",
        "vocabulary 3,072",
        "24 samples x 256 = 6,144 tokens a step",
        "1.84M in 300 steps",
        "6 ranks, dp_replicate=2 dp_shard=3",
        "bf16 on cuda",
        "2 x 2 samples a rank",
        "outputs/first",
    ):
        assert said in text


def test_start_says_how_a_pipeline_is_divided():
    stream = io.StringIO()
    config = RunConfig(
        model=ModelConfig(num_layers=5, vocab_size=99),
        parallel=ParallelConfig(pp=2, tp=2, dp_shard=1, pp_schedule="gpipe", layers_per_stage=[3, 2]),
        train=TrainConfig(micro_batch_size=1),
    )
    Console(300, interactive=False, stream=stream).start(config, 1000, "cpu")
    assert "ranks  4 ranks, pp=2 ([3, 2] layers, gpipe) tp=2, fp32 on cpu;" in stream.getvalue()


def test_a_growing_batch_is_said_and_the_eta_knows_of_it():
    stream = io.StringIO()
    config = RunConfig(
        model=ModelConfig(vocab_size=99, max_position_embeddings=100),
        parallel=ParallelConfig(dp_shard=2),
        train=TrainConfig(steps=10, batch_schedule="0:4 1.2k:8"),
    )
    console = Console(10, interactive=False, stream=stream)
    console.start(config, 1000, "cpu")
    for step, consumed, step_ms in ((2, 8, 4000), (5, 28, 8000)):
        console.step(replace(STEP, step=step, consumed_samples=consumed, step_ms=step_ms))
    lines = stream.getvalue().splitlines()
    assert lines[1] == "batch  4 or 8 samples x 100 = 400 or 800 tokens a step (0:4 1.2k:8), 6.80k in 10 steps"
    assert "a step is 1 or 2 x 2 samples a rank" in lines[2]
    # a second a sample: 4 + 7 * 8 samples are left, then 5 * 8
    assert lines[-2].endswith("eta 1:00")
    assert lines[-1].endswith("eta 0:40")


def test_the_bar_moves_below_whole_lines_and_goes_away():
    stream = io.StringIO()
    console = Console(500, interactive=True, stream=stream)
    console.step(STEP)
    console.note("[bold]wide " + "x" * 300)
    console.progress(130)
    console.close()
    console.note("after")
    text = stream.getvalue()
    assert "130/500" in text
    assert "[bold]wide " + "x" * 300 in text
    assert printed(STEP)[0] in text
    assert text.endswith("after\n")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


def test_neither_torch_nor_rich_nor_matplotlib_nor_wandb_is_imported_before_it_is_needed():
    program = (
        "import sys, monitoring.run_directory, monitoring.metrics, monitoring.console, monitoring.plot\n"
        "import monitoring.trackers, monitoring.trackers\n"
        "monitoring.console.Console(1, interactive=False).note('hello')\n"
        "sys.exit(' '.join({'torch', 'numpy', 'rich', 'matplotlib', 'wandb', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "hello\n", "\n")
