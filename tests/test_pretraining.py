"""Whole runs of pretrain_gpt.py: every layout feeds and computes the same, and a run goes on where it stopped."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import pretrain_gpt
from data.batches import BatchReader
from data.indexed_dataset import IndexedDatasetWriter
from monitoring.run_directory import RunDirectory
from monitoring.throughput import PEAK_TERAFLOPS
from runtime.errors import ConfigError, CorruptDataError, NonFiniteError, PeerError, RunDirectoryError, StorageError
from settings.compose import compose
from settings.resolve import resolve
from tools.describe import describe
from verification.local_ranks import run_ranks

SMALL = ["model=tiny", "model.num_layers=3", "data=sample", "data.seq_length=48", "train.global_batch_size=8",
         "log.sample_ids=true", "optimizer.lr=1e-2"]  # fmt: skip


@pytest.fixture(scope="session")
def out_dir(runs_folder):
    """One place for all runs, so that the sample corpus is prepared once."""
    return runs_folder("runs")


def one_rank(rank, world_size, words):
    return pretrain_gpt.main(words, os.environ)


def what_one_rank_prints(rank, world_size, words):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        one_rank(rank, world_size, words)
    return printed.getvalue()


def train(out_dir, name, ranks, *words):
    """Run pretrain_gpt.py's main on `ranks` processes; returns its exit code, the same on all."""
    codes = run_ranks(ranks, one_rank, [*SMALL, f"out_dir={out_dir}", f"name={name}", *words], initialize=False)
    assert len(set(codes)) == 1
    return codes[0]


def command_line(*command):
    """A command as a user types it in the checkout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(pretrain_gpt.__file__).parent
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)


def lines(out_dir, name, file):
    """The lines of a run's file by step; of a step logged twice the last counts."""
    records = [json.loads(line) for line in (out_dir / name / file).read_text().splitlines()]
    return {record["step"]: record for record in records if "eval_loss" not in record}


def numbers(out_dir, name):
    return [[record["loss"], record["grad_norm"]] for record in lines(out_dir, name, "metrics.jsonl").values()]


def samples(out_dir, name):
    return {step: (r["samples"], r["crc"]) for step, r in lines(out_dir, name, "samples.jsonl").items()}


def status(out_dir, name):
    return json.loads((out_dir / name / "status.json").read_text())


def checkpoint_tensors(out_dir, name, step):
    """Every chunk of a checkpoint by name and file, as bytes."""
    tensors = {}
    for file in sorted((out_dir / name / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {(file.name, key): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="session")
def reference(out_dir):
    """One process, the whole batch at once."""
    assert train(out_dir, "reference", 1, "train.precision=fp64", "train.steps=5") == 0
    return numbers(out_dir, "reference"), samples(out_dir, "reference")


REPLICAS = (2, ["parallel.dp_replicate=2", "train.micro_batch_size=1", "parallel.zero=1"])
SHARDS = (2, ["parallel.zero=2", "train.micro_batch_size=2", "data.num_workers=3"])
HYBRID = (4, ["parallel.dp_replicate=2", "parallel.dp_shard=2", "train.micro_batch_size=1", "parallel.zero=1"])
TENSOR = (4, ["parallel.tp=2", "parallel.dp_shard=2", "train.micro_batch_size=2"])
PIPELINE = (4, ["parallel.pp=2", "parallel.pp_schedule=zb", "parallel.dp_shard=2", "train.micro_batch_size=1"])
FOR_PARITY = [
    (1, ["train.micro_batch_size=4", "data.num_workers=0"]),
    (4, ["parallel.dp_shard=4", "train.micro_batch_size=1"]),
    (4, ["parallel.tp=2", "parallel.dp_shard=2", "parallel.sequence=false", "train.recompute=full"]),
    (4, ["parallel.tp=4", "parallel.sequence=false"]),
    (4, ["parallel.tp=2", "parallel.dp_replicate=2"]),
]
"""Tried by `make parity` alone: they are like those that `make test` tries."""
LAYOUTS = [
    (1, ["train.micro_batch_size=1"]),
    (2, ["parallel.dp_shard=2", "train.micro_batch_size=2"]),
    REPLICAS,
    SHARDS,
    HYBRID,
    TENSOR,
    PIPELINE,
    (3, ["parallel.pp=3"]),
    *FOR_PARITY,
]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [pytest.param(*layout, marks=[pytest.mark.slow] if layout in FOR_PARITY else []) for layout in LAYOUTS],
    ids=lambda value: str(value),
)
def test_every_layout_feeds_the_same_samples_and_logs_the_same_numbers(out_dir, reference, ranks, words):
    name = f"layout{LAYOUTS.index((ranks, words))}"
    assert train(out_dir, name, ranks, "train.precision=fp64", "train.steps=5", *words) == 0
    np.testing.assert_allclose(numbers(out_dir, name), reference[0], rtol=1e-10)
    assert samples(out_dir, name) == reference[1]


def evaluations(out_dir, name):
    records = [json.loads(line) for line in (out_dir / name / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def test_evaluations_are_equal_in_every_layout_and_leave_training_alone(out_dir, reference):
    words = ["train.precision=fp64", "train.steps=5", "train.eval_interval=2", "train.eval_steps=2"]
    found = []
    for ranks, layout in [(1, []), SHARDS, TENSOR, (PIPELINE[0], [*PIPELINE[1], "train.timeline_step=3"])]:
        name = f"evaluated{len(found)}"
        assert train(out_dir, name, ranks, *words, *layout) == 0
        np.testing.assert_allclose(numbers(out_dir, name), reference[0], rtol=1e-10)
        found.append(evaluations(out_dir, name))
    assert (out_dir / name / "logs" / "timeline_step_3.png").read_bytes().startswith(b"\x89PNG")
    assert len(found[0]) == 3
    assert found[0][2] < found[0][1] < found[0][0]
    assert abs(found[0][2] - reference[0][-1][0]) < 0.5, "near the training loss, in nats a token"
    np.testing.assert_allclose(found, [found[0]] * len(found), rtol=1e-10)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "words"),
    [(1, []), pytest.param(*HYBRID, marks=pytest.mark.slow), TENSOR],
    ids=lambda value: str(value),
)
def test_other_precisions_stay_close(out_dir, reference, ranks, words, precision):
    name = f"{precision}-layout{LAYOUTS.index((ranks, words)) if words else ''}"
    assert train(out_dir, name, ranks, f"train.precision={precision}", "train.steps=5", *words) == 0
    tolerance = {"fp32": 1e-4, "bf16": 2e-2}[precision]
    found, exact = np.array(numbers(out_dir, name)), np.array(reference[0])
    np.testing.assert_allclose(found[:, 0], exact[:, 0], rtol=tolerance)
    np.testing.assert_allclose(found[0], exact[0], rtol=tolerance)  # later gradients also carry where weights went
    assert samples(out_dir, name) == reference[1]


@pytest.mark.slow
def test_bf16_strays_no_further_than_other_micro_batches_do(out_dir):
    """Over 50 steps the loss of a layout differs from one process' by at most three times as much as those of
    micro-batch sizes 1, 2 and 4 in one process differ from each other."""

    def losses(name, ranks, *words):
        assert train(out_dir, name, ranks, "train.precision=bf16", "train.steps=50", *words) == 0
        return np.array(numbers(out_dir, name))[:, 0]

    one, two, four = (losses(f"micro-{size}", 1, f"train.micro_batch_size={size}") for size in (1, 2, 4))
    noise = max(np.abs(a - b).max() for a, b in ((one, two), (one, four), (two, four)))
    assert len(one) == 50
    assert noise > 0
    for layout in (["parallel.tp=2", "parallel.dp_shard=2"], ["parallel.tp=4", "parallel.sequence=false"]):
        found = losses(f"bf16-{len(layout[1])}", 4, "train.micro_batch_size=4", *layout)
        assert np.abs(found - four).max() <= 3 * noise


@pytest.mark.parametrize("precision", ["fp64", pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_five_and_five_steps_equal_ten_bit_for_bit(out_dir, precision):
    words = [f"train.precision={precision}", "train.steps=10", "train.micro_batch_size=2", "checkpoint.interval=4",
             f"train.initial_loss_scale={2**24}", "train.loss_scale_window=2"]  # fmt: skip
    if precision == "fp16":  # slow on a CPU
        words += ["model.num_layers=1", "model.hidden_size=48", "data.seq_length=12", "train.global_batch_size=4"]
    whole, halves = f"whole-{precision}", f"halves-{precision}"
    assert train(out_dir, whole, 2, *words) == 0
    assert train(out_dir, halves, 2, *words, "train.exit_after=5") == 75
    assert status(out_dir, halves) | {"reason": ""} == {
        "state": "preempted",
        "step": 5,
        "reason": "",
        "attempt": 0,
        "saved_step": 5,
    }
    assert train(out_dir, halves, 2, *words) == 0
    assert status(out_dir, halves)["state"] == "completed"
    assert numbers(out_dir, halves) == numbers(out_dir, whole)
    assert samples(out_dir, halves) == samples(out_dir, whole)
    assert {record["attempt"] for record in lines(out_dir, halves, "metrics.jsonl").values()} == {0, 1}
    expected = checkpoint_tensors(out_dir, whole, 10)
    found = checkpoint_tensors(out_dir, halves, 10)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    scales = [record["loss_scale"] for record in lines(out_dir, halves, "metrics.jsonl").values()]
    skipped = [norm is None for _, norm in numbers(out_dir, halves)]
    if precision == "fp16":
        assert skipped[0]
        assert scales[1] == scales[0] / 2 == 2**23
        assert any(after == 2 * before for before, after in itertools.pairwise(scales))
    else:
        assert not any(scales)
        assert not any(skipped)


def test_a_run_may_change_its_precision_where_it_is_taken_up_again(out_dir):
    words = ["model.num_layers=1", "model.hidden_size=48", "data.seq_length=12", "train.global_batch_size=4"]
    for step, precision in enumerate(["fp32", "fp16", "fp32", "fp16"], start=1):
        assert train(out_dir, "changing", 1, *words, f"train.precision={precision}", f"train.steps={step}") == 0
    records = lines(out_dir, "changing", "metrics.jsonl").values()
    assert [record["loss_scale"] for record in records] == [None, 2**16, None, 2**16]
    assert all(record["loss"] < 8 for record in records)


def test_compiling_is_refused_where_there_is_no_compiler_and_announced_where_there_is(out_dir, monkeypatch):
    words = ["train.compile=true", "train.steps=2"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"torch.compile needs the compiler no-such-compiler, which is not here"):
        train(out_dir, "not-compiled", 1, *words)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # what is said is tested here, not the compiler
    words = [*SMALL, f"out_dir={out_dir}", "name=compiled", *words]
    told, silence = run_ranks(2, what_one_rank_prints, words, initialize=False)
    assert told.count("step 1 takes longer: it compiles layers") == told.count("compiled in ") == 1
    assert silence == ""


def test_float16_that_overflows_at_any_loss_scale_ends_with_70(out_dir):
    words = ["train.precision=fp16", "train.initial_loss_scale=4", "model.init_std=1e9", "train.steps=9"]
    with pytest.raises(NonFiniteError, match=r"even at a loss scale of 1, try train.precision=bf16; step 3: "):
        train(out_dir, "overflowing", 1, *words)
    assert status(out_dir, "overflowing")["step"] == 3


@pytest.mark.slow
def test_a_run_continues_in_any_layout_and_batch_as_one_process_would(out_dir):
    words = ["train.precision=fp64", "train.steps=6"]
    assert train(out_dir, "one", 1, *words) == 0
    assert train(out_dir, "many", 4, *words, "parallel.dp_replicate=2", "train.exit_after=2") == 75
    assert train(out_dir, "many", 2, *words, "parallel.zero=1", "train.micro_batch_size=1", "train.exit_after=2") == 75
    assert train(out_dir, "many", 1, *words) == 0
    np.testing.assert_allclose(numbers(out_dir, "many"), numbers(out_dir, "one"), rtol=1e-10)
    assert samples(out_dir, "many") == samples(out_dir, "one")


@pytest.mark.slow
def test_a_checkpoint_of_tensor_parallel_ranks_resumes_anywhere(out_dir):
    """With a vocabulary that the ranks do not divide, whose padding is in no file."""
    words = ["train.precision=fp64", "train.steps=4", "model.vocab_size=1539", "model.dropout=0.1"]
    assert train(out_dir, "alone", 1, *words) == 0
    both = ["parallel.tp=2", "parallel.dp_shard=2", "train.exit_after=2"]
    assert train(out_dir, "shared", 4, *words, *both) == 75
    saved = json.loads((out_dir / "shared" / "checkpoints" / "step_00000002" / "manifest.json").read_text())
    assert saved["tensors"]["model.embedding.word.weight"]["shape"] == [1539, 144]
    for index, (ranks, layout) in enumerate([(1, []), (4, ["parallel.tp=4"]), (4, ["parallel.dp_shard=4"])]):
        name = f"shared-{index}"
        shutil.copytree(out_dir / "shared", out_dir / name)
        assert train(out_dir, name, ranks, *words, *layout) == 0
        np.testing.assert_allclose(numbers(out_dir, name), numbers(out_dir, "alone"), rtol=1e-10)


def test_more_steps_continue_a_completed_run_and_the_same_again_does_nothing(out_dir):
    words = ["schedule=constant", "train.precision=fp64"]
    assert train(out_dir, "longer", 1, *words, "train.steps=2") == 0
    before = (out_dir / "longer" / "metrics.jsonl").read_text()
    (out_dir / "longer" / "STOP").touch()
    assert train(out_dir, "longer", 2, *words, "train.steps=2") == 0
    assert not (out_dir / "longer" / "STOP").exists(), "or it would stop whoever raises train.steps"
    assert (out_dir / "longer" / "metrics.jsonl").read_text() == before
    assert train(out_dir, "longer", 2, *words, "train.steps=4") == 0
    assert list(lines(out_dir, "longer", "metrics.jsonl")) == [1, 2, 3, 4]
    assert train(out_dir, "straight", 1, *words, "train.steps=4") == 0
    np.testing.assert_allclose(numbers(out_dir, "longer"), numbers(out_dir, "straight"), rtol=1e-10)


def test_another_model_data_or_seed_in_the_run_directory_is_refused_with_the_difference(out_dir):
    assert train(out_dir, "owned", 1, "train.steps=1") == 0
    for word, difference in [
        ("model.num_layers=2", "model.num_layers: was 3, now 2"),
        ("data.seq_length=24", "data.seq_length: was 48, now 24"),
        ("seed=1", "seed: was 1234, now 1"),
    ]:
        with pytest.raises(ConfigError, match=difference):
            train(out_dir, "owned", 2, "train.steps=2", word)
    with pytest.raises(ConfigError, match="name=owned-2"):
        train(out_dir, "owned", 1, "train.steps=2", "checkpoint.resume=never")
    assert list(lines(out_dir, "owned", "metrics.jsonl")) == [1]


def test_weights_of_another_run_can_be_a_start(out_dir):
    words = ["train.precision=fp64", "schedule=constant"]
    assert train(out_dir, "source", 2, *words, "train.steps=6") == 0
    load = out_dir / "source" / "checkpoints" / "step_00000006"
    assert train(out_dir, "loaded", 1, *words, "train.steps=1", "seed=99", f"checkpoint.load={load}") == 0
    assert train(out_dir, "fresh", 1, *words, "train.steps=1", "seed=99") == 0
    assert numbers(out_dir, "loaded")[0][0] < numbers(out_dir, "fresh")[0][0] - 0.5
    assert lines(out_dir, "loaded", "metrics.jsonl")[1]["consumed_samples"] == 8


def test_weights_that_an_update_made_not_finite_are_not_saved(out_dir):
    """The loss of the step is finite, and so is its gradient: only the weights show it."""
    words = ["checkpoint.interval=1", "checkpoint.keep=9"]
    assert train(out_dir, "overflow", 1, *words, "train.exit_after=1") == 75
    beyond = ["optimizer.lr=1e38", "optimizer.weight_decay=1e3", "train.steps=3"]
    said = r"step 2: its update made weights of .*weight not finite, .*; the newest checkpoint is of step 1; try"
    with pytest.raises(NonFiniteError, match=said):
        train(out_dir, "overflow", 2, *words, *beyond, "parallel.dp_shard=2")
    assert [path.name for path in (out_dir / "overflow" / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert status(out_dir, "overflow")["saved_step"] == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_diverges_ends_with_70_and_names_step_rank_and_samples(out_dir, ranks):
    name = f"diverged{ranks}"
    words = ["optimizer.lr=1e38", "optimizer.clip_grad=0", "schedule=constant"]
    with pytest.raises(NonFiniteError, match=r"step 2: .*rank 0, samples \[dataset, epoch, window\] \[\[0, 0, \d+\]"):
        train(out_dir, name, ranks, *words, "train.steps=9")
    # The host looks at step 2 while step 3 is under way.
    failed = {"state": "failed", "step": 2, "reason": "", "attempt": 0, "saved_step": 0}
    assert status(out_dir, name) | {"reason": ""} == failed
    assert not (out_dir / name / "checkpoints").exists()


def spoil(out_dir, name):
    """Data for a vocabulary of 257 with one token beyond it; returns the samples that hold it."""
    tokens = np.random.default_rng(0).integers(0, 200, 4801)
    with IndexedDatasetWriter(out_dir / name, 257) as writer:
        writer.add_document(tokens)
    raw = np.memmap(out_dir / f"{name}.bin", dtype=np.uint16, mode="r+")
    raw[48 * 40 + 5] = 60_000
    raw.flush()


def test_what_goes_wrong_on_one_rank_alone_is_said_by_that_rank(out_dir):
    spoil(out_dir, "spoiled")
    words = [f"data.path={out_dir}/spoiled", "data.tokenizer=bytes", "data.split=[1,0,0]", "train.steps=50"]
    with pytest.raises((CorruptDataError, PeerError)):
        train(out_dir, "spoiled-run", 2, *words, "train.global_batch_size=2")
    failed = status(out_dir, "spoiled-run")
    assert failed["state"] == "failed"
    assert "60000" in failed["reason"]


def test_two_jobs_cannot_own_one_run_directory(out_dir):
    directory = RunDirectory(out_dir / "contested")
    directory.own()
    with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()} .*name=contested-2"):
        train(out_dir, "contested", 2, "train.steps=1")
    directory.ownership.release()
    assert train(out_dir, "contested", 2, "train.steps=1") == 0


def test_a_start_over_is_never_silent(out_dir):
    words = ["train.steps=4", "checkpoint.interval=2", "train.precision=fp64"]
    assert train(out_dir, "over", 1, *words, "train.exit_after=2") == 75
    steps = out_dir / "over" / "checkpoints"
    shutil.rmtree(steps / "step_00000002")
    for _ in range(2):
        with pytest.raises(StorageError, match="are gone"):
            train(out_dir, "over", 1, *words)
        shutil.rmtree(steps, ignore_errors=True)  # as where a disk is not mounted
    # Who never saved has nothing to lose.
    json_status = status(out_dir, "over")
    (out_dir / "over" / "status.json").write_text(json.dumps(json_status | {"saved_step": 0}))
    again = command_line(sys.executable, "pretrain_gpt.py", *SMALL, *words, f"out_dir={out_dir}", "name=over")
    assert again.returncode == 0
    assert "holds no checkpoint: starting from step 0 again" in again.stdout
    shutil.rmtree(steps)
    assert train(out_dir, "over", 1, *words) == 0, "it is complete, whatever became of its checkpoints"
    with pytest.raises(StorageError, match="are gone"):
        train(out_dir, "over", 1, *words, "train.steps=5")


def test_data_may_move_as_long_as_it_is_the_same(out_dir):
    for name in ("here", "there"):
        with IndexedDatasetWriter(out_dir / name, 257) as writer:
            writer.add_document(np.random.default_rng(0).integers(0, 200, 2_000_000))
    words = ["data.tokenizer=bytes", "data.split=[1,0,0]"]
    assert train(out_dir, "moved", 1, *words, f"data.path={out_dir}/here", "train.steps=1") == 0
    assert train(out_dir, "moved", 1, *words, f"data.path={out_dir}/there", "train.steps=2") == 0
    raw = np.memmap(out_dir / "there.bin", dtype=np.uint16, mode="r+")
    before = (out_dir / "there.bin").stat()
    raw[1_000_000] ^= 1
    raw.flush()
    os.utime(out_dir / "there.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"there\.bin holds other tokens than when step 2 was saved"):
        train(out_dir, "moved", 2, *words, f"data.path={out_dir}/there", "train.steps=3")


def one_rank_whose_data_is_cut(rank, world_size, words):
    read, path = BatchReader.read, next(word for word in words if word.startswith("data.path="))[10:]

    def cut_and_read(reader, consumed_samples):
        if consumed_samples:
            os.truncate(f"{path}.bin", 10)
        return read(reader, consumed_samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchReader, "read", cut_and_read)
        return one_rank(rank, world_size, words)


def test_data_that_is_cut_while_a_run_reads_it_ends_the_run_with_its_name(out_dir):
    with IndexedDatasetWriter(out_dir / "cut", 257) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 200, 4801))
    words = [*SMALL, f"out_dir={out_dir}", "name=cut-run", f"data.path={out_dir}/cut", "data.tokenizer=bytes"]
    words += ["data.split=[1,0,0]", "train.steps=50"]
    with pytest.raises(CorruptDataError, match=r"cut\.bin ends at byte \d+, but had 9602 bytes") as caught:
        run_ranks(1, one_rank_whose_data_is_cut, words, initialize=False)
    assert caught.value.exit_code == 65
    failed = status(out_dir, "cut-run")
    assert failed["state"] == "failed"
    assert "cut.bin ends at byte" in failed["reason"]


@pytest.mark.parametrize(
    ("ranks", "signal_name"), [pytest.param(1, "SIGTERM", marks=pytest.mark.faults), (1, "SIGINT"), (2, "SIGTERM")]
)
def test_a_run_that_is_told_to_stop_saves_first(out_dir, ranks, signal_name):
    name = f"stopped-{ranks}-{signal_name}"
    words = [*SMALL, f"out_dir={out_dir}", f"name={name}", "train.steps=100000", "log.sample_ids=false"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher = [sys.executable] if ranks == 1 else torchrun
    root = Path(pretrain_gpt.__file__).parent
    run = subprocess.Popen([*launcher, "pretrain_gpt.py", *words], cwd=root, stdout=subprocess.PIPE, text=True)
    assert any("step 2/" in line for line in run.stdout)
    run.send_signal(signal.Signals[signal_name])
    printed, _ = run.communicate(timeout=60)
    found = status(out_dir, name)
    assert (found["state"], found["reason"]) == ("preempted", signal_name)
    assert (out_dir / name / "checkpoints" / f"step_{found['step']:08d}" / "manifest.json").exists()
    assert "start again to continue" in printed
    assert ranks > 1 or run.returncode == 75


@pytest.mark.slow
def test_a_run_is_seen_in_tensorboard_and_in_a_profile(out_dir):
    words = ["train.steps=4", "train.eval_interval=2", "checkpoint.interval=2", "log.tensorboard=true"]
    words += ["train.profile=1-3", "train.gc_interval=2"]
    assert train(out_dir, "seen", 2, *words, "train.exit_after=2") == 75
    profiles = out_dir / "seen" / "logs" / "profile"
    assert {path.name.partition(".")[0] for path in profiles.iterdir()} == {"steps_1-2"}
    assert train(out_dir, "seen", 2, *words) == 0
    assert {path.name.partition(".")[0] for path in profiles.iterdir()} == {"steps_1-2", "steps_3-3"}
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    points = accumulator.EventAccumulator(str(out_dir / "seen" / "tensorboard")).Reload()
    logged = [record["loss"] for record in lines(out_dir, "seen", "metrics.jsonl").values()]
    assert [point.step for point in points.Scalars("loss")] == [1, 2, 3, 4]
    np.testing.assert_allclose([point.value for point in points.Scalars("loss")], logged, rtol=1e-6)
    assert [point.step for point in points.Scalars("eval_loss")] == [2, 4]
    assert train(out_dir, "unseen", 2, "train.steps=4", "train.eval_interval=2") == 0
    assert numbers(out_dir, "unseen") == numbers(out_dir, "seen")
    assert not (out_dir / "unseen" / "tensorboard").exists()
    speeds = [
        (r["tokens_per_second"], r["tokens_per_second_per_gpu"])
        for r in lines(out_dir, "seen", "metrics.jsonl").values()
    ]
    assert all(total == 2 * one for total, one in speeds)


def one_rank_that_hangs(rank, world_size, words):
    if rank == 1:
        BatchReader.read = lambda *_: time.sleep(100)
    return pretrain_gpt.main(words, os.environ)


@pytest.mark.faults
def test_a_rank_that_does_not_answer_ends_the_run_after_the_time_out(out_dir):
    words = [*SMALL, f"out_dir={out_dir}", "name=waiting", "train.steps=2", "data.tokenizer=bytes"]
    words += ["parallel.startup_minutes=0.1"]
    with pytest.raises(PeerError, match="rank 1 does not answer: step 1, reading data"):
        run_ranks(2, one_rank_that_hangs, words, initialize=False, timeout=60)
    assert status(out_dir, "waiting")["state"] == "failed"


def test_what_a_time_out_left_is_said_at_the_next_start(out_dir, capsys):
    assert train(out_dir, "hung", 1, "train.steps=2", "train.exit_after=1") == 75
    state = out_dir / "hung" / "status.json"
    state.write_text(state.read_text().replace("preempted", "running"))
    for rank in range(2):
        (out_dir / "hung" / "logs" / f"nccl_trace_rank_{rank}").touch()
    again = command_line(sys.executable, "pretrain_gpt.py", *SMALL, "train.steps=2", f"out_dir={out_dir}", "name=hung")
    assert again.returncode == 0
    assert (
        f"2 ranks left what they had communicated before a time-out, for `torchfrtrace {out_dir}/hung/logs"
        in again.stdout
    )


def test_torchrun_and_the_command_line_end_to_end(out_dir):
    """What no test above goes through: torchrun itself, stdout of rank 0 alone, and exit codes of the process."""
    words = [*SMALL, f"out_dir={out_dir}", "train.steps=4", "train.eval_interval=2", "name=torchrun"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    call = command_line
    preempted = call(*torchrun, "pretrain_gpt.py", *words, "train.exit_after=2")
    assert preempted.returncode == 0, preempted.stderr
    assert status(out_dir, "torchrun")["state"] == "preempted"
    completed = call(sys.executable, "pretrain_gpt.py", *words)
    assert completed.returncode == 0, completed.stderr
    assert "resumed from" in completed.stdout
    printed = preempted.stdout + completed.stdout
    assert [printed.count(f"step {step}/4 | loss") for step in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert printed.count("| validation loss") == 2
    for promised in ("ln(vocabulary)", "unigram entropy", str(out_dir / "torchrun" / "loss.png")):
        assert promised in completed.stdout
    assert (out_dir / "torchrun" / "loss.png").stat().st_size > 10_000
    refused = call(*torchrun, "pretrain_gpt.py", *words, "model.num_layers=4")
    assert refused.returncode == 1
    assert refused.stderr.count("model.num_layers: was 3, now 4") == 1
    generated = call(sys.executable, "-m", "tools.cli", "generate", str(out_dir / "torchrun"), "--prompt", "Return")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("Return")
    assert len(generated.stdout) > 50


def rank_with_a_peak(rank, world_size, words):
    PEAK_TERAFLOPS["cpu"] = {"fp32": 0.5}
    return pretrain_gpt.main(words, os.environ)


def test_model_flops_utilization_is_of_the_peak_of_all_ranks(out_dir):
    words = [*SMALL, f"out_dir={out_dir}", "train.steps=2"]
    assert run_ranks(2, rank_with_a_peak, [*words, "name=peak"], initialize=False) == [0, 0]
    cost = describe(resolve(compose(words), {}))["flops_per_token"]
    for record in lines(out_dir, "peak", "metrics.jsonl").values():
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * cost / (2 * 0.5e12))
