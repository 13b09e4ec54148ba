"""What train.compile comes to: by device, compiler and schedule, the same on all ranks, and remembered by the run."""

import contextlib
import io
import json
import os
import re
from dataclasses import replace

import pytest

import pretrain_gpt
import training.compilation
from parallel.config import ParallelConfig
from runtime.errors import ConfigError
from settings.checks.pipeline import compile_refusal
from settings.compose import compose
from settings.config import RunConfig, TrainConfig
from settings.resolve import resolve
from training.compilation import CompileDecision, decide, decide_compilation
from verification.local_ranks import run_ranks

TRITON = "Python package triton"
SCHEDULE = "parallel.pp_schedule=zb: a compiled layer cannot put off the gradients of its weights"


@pytest.mark.parametrize(
    ("wanted", "device", "missing", "refusal", "layers", "reason"),
    [
        (None, "cuda", [None, None], None, True, "train.compile=null, and every rank has CUDA and a compiler"),
        (None, "cuda", [None, None, TRITON], None, False, f"rank 2 lacks the {TRITON}"),
        (None, "cuda", [None, None], SCHEDULE, False, SCHEDULE),
        (None, "cuda", [TRITON], SCHEDULE, False, SCHEDULE),
        (None, "cpu", [None], None, False, "train.compile=null compiles them on CUDA alone"),
        (None, "cpu", [None, None], SCHEDULE, False, "train.compile=null compiles them on CUDA alone"),
        (False, "cuda", [None, None], None, False, "train.compile=false"),
        (False, "cuda", [TRITON, TRITON], SCHEDULE, False, "train.compile=false"),
        (True, "cuda", [None, None], None, True, "train.compile=true"),
        (True, "cpu", [None], None, True, "train.compile=true"),
    ],
)
def test_the_decision_and_its_reason(wanted, device, missing, refusal, layers, reason):
    decision = decide(wanted, device, missing, refusal)
    assert decision == CompileDecision(layers, reason)
    assert str(decision) == f"layers are {'' if layers else 'not '}compiled: {reason}"


@pytest.mark.parametrize(
    ("missing", "where"), [([TRITON], "here"), ([TRITON] * 2, "here"), ([None, TRITON], "on rank 1")]
)
def test_compiling_that_was_asked_for_is_refused_where_a_rank_cannot(missing, where):
    with pytest.raises(ConfigError, match=f"^train.compile=true: torch.compile needs the {TRITON}, .* not {where}; "):
        decide(True, "cuda", missing, None)


@pytest.mark.parametrize(("schedule", "refused"), [("zb", True), ("zbv", True), ("dualpipev", True), ("1f1b", False)])
def test_schedules_that_split_the_backward_pass_refuse_compiled_layers(schedule, refused):
    assert (compile_refusal(ParallelConfig(pp=2, pp_schedule=schedule)) is not None) == refused
    assert compile_refusal(ParallelConfig(pp=1, pp_schedule=schedule)) is None


def test_null_is_legal_with_every_schedule_and_stays_null():
    words = ["parallel.pp=2", "parallel.pp_schedule=zb", "world_size=2"]
    assert resolve(compose(words), {}).train.compile is None
    for value, expected in (("null", None), ("true", True), ("false", False)):
        assert compose([f"train.compile={value}"]).train.compile is expected


def decision_of_a_rank(rank, world_size, wanted):
    """The decision where rank 1 lacks a compiler, or the error."""
    training.compilation.missing_compiler = lambda _: TRITON if rank == 1 else None
    config = replace(RunConfig(), train=TrainConfig(compile=wanted))
    try:
        return decide_compilation(config, "cuda")
    except ConfigError as error:
        return str(error)


def test_one_rank_without_a_compiler_decides_for_all():
    decisions = run_ranks(3, decision_of_a_rank, None)
    assert decisions == [CompileDecision(False, f"rank 1 lacks the {TRITON}")] * 3
    assert run_ranks(3, decision_of_a_rank, False) == [CompileDecision(False, "train.compile=false")] * 3
    (refused,) = set(run_ranks(3, decision_of_a_rank, True))
    assert refused.startswith("train.compile=true: ")
    assert "not on rank 1" in refused


def a_start(rank, world_size, words, forget):
    """What a start prints. Nothing is really compiled; `forget` saves checkpoints like a version that did not say."""
    from training.trainer import Trainer

    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if forget:
        state = Trainer._state
        Trainer._state = lambda self: {k: v for k, v in state(self).items() if k != "compiled_layers"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert pretrain_gpt.main(words, os.environ) in (0, 75)
    return printed.getvalue()


@pytest.fixture
def start(runs_folder):
    """A start of a run that takes one step: what it prints, what environment.json says, and what config.yaml does."""
    out_dir = runs_folder("compiling")
    small = ["model=tiny", "model.num_layers=1", "data=sample", "data.tokenizer=bytes", "data.seq_length=16",
             "train.global_batch_size=2", "train.steps=9", "train.exit_after=1", f"out_dir={out_dir}"]  # fmt: skip

    def start(*words, forget=False):
        (printed,) = run_ranks(1, a_start, [*small, *words], forget, initialize=False)
        environment = json.loads((out_dir / "run" / "environment.json").read_text())
        assert environment.keys() > {"attempt", "command", "compile"}
        (config,) = re.findall("compile: (.*)", (out_dir / "run" / "config.yaml").read_text())
        return printed, environment["compile"], config

    return start


def test_the_run_remembers_and_a_resume_that_changes_it_says_so(start):
    on_a_cpu = {"layers": False, "reason": "train.compile=null compiles them on CUDA alone"}
    for _ in range(2):
        printed, decision, config = start()
        assert (decision, config) == (on_a_cpu, "null")
        assert "compile" not in printed, "on a CPU there is nothing to say, and nothing changes"
    printed, decision, config = start("train.compile=true")
    assert (decision, config) == ({"layers": True, "reason": "train.compile=true"}, "true")
    assert "up to step 2 layers were not compiled, from here on they are (train.compile=true): numbers" in printed
    assert "train.compile=false keeps to what was" in printed
    printed, decision, _ = start()
    assert decision == on_a_cpu
    assert "up to step 3 layers were compiled, from here on they are not (train.compile=null compiles" in printed


def test_of_an_older_checkpoint_its_configuration_says_what_was(start):
    start("train.compile=false", forget=True)
    printed, *_ = start(forget=True)
    assert "train.compile: was false, now null" in printed
    assert "layers were" not in printed, "and nothing changes on a CPU"
    start("train.compile=true", forget=True)
    printed, *_ = start()
    assert "up to step 3 layers were compiled, from here on they are not" in printed
