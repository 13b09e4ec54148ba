"""What goes wrong, where: every later loss and sample is that of an uninterrupted run, or an error says why not."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import KILLED, LAYOUTS, Job, assert_equal, rank_processes

PHASES = [(rank, f"checkpoint.{phase}") for phase in ("stage", "write", "fsync") for rank in (0, 1)]
PHASES += [(0, f"checkpoint.{phase}") for phase in ("manifest", "rename", "prune")]
PHASES += [(1, "data"), (0, "forward"), (1, "backward"), (1, "grad_sync"), (0, "optimizer"), (0, "log")]
IN_PIPELINES = [(1, "checkpoint.stage"), (1, "checkpoint.write"), (0, "checkpoint.rename"), (1, "backward")]


@pytest.fixture(scope="session")
def out_dir(runs_folder):
    return runs_folder("faults")


@pytest.fixture(scope="session")
def uninterrupted(out_dir):
    """layout -> the run that all others of the layout are compared with"""
    jobs = {layout: Job(out_dir, f"uninterrupted-{layout}", layout) for layout in LAYOUTS}
    for job in jobs.values():
        assert job.start_quickly().code == 0
    return jobs


@pytest.fixture
def job(out_dir):
    """layout -> a run of it"""
    made = []

    def make(layout="dp"):
        made.append(Job(out_dir, "interrupted", layout))
        return made[-1]

    yield make
    for job in made:
        shutil.rmtree(job.path, ignore_errors=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("layout", "rank", "phase"),
    [("dp", *phase) for phase in PHASES] + [("pp", *phase) for phase in IN_PIPELINES],
)
def test_a_rank_is_killed(job, uninterrupted, layout, rank, phase):
    job = job(layout)
    assert job.start(f"rank={rank},step=4,phase={phase},action=kill").code == 1
    assert job.start().code == 0
    assert_equal(job, uninterrupted[layout])


@pytest.mark.parametrize(("rank", "phase"), [(1, "checkpoint.write"), (0, "checkpoint.rename"), (1, "backward")])
def test_a_rank_is_killed_and_started_quickly(job, uninterrupted, rank, phase):
    job = job()
    assert job.start_quickly(f"rank={rank},step=4,phase={phase},action=kill").code in (KILLED, 76)
    assert job.start_quickly().code == 0
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
@pytest.mark.parametrize("phase", ["checkpoint.write", "checkpoint.rename"])
def test_a_rank_is_killed_while_training_waits_for_its_save(job, uninterrupted, phase):
    job = job()
    assert job.start(f"rank=0,step=4,phase={phase},action=kill", "checkpoint.asynchronous=false").code == 1
    assert job.start().code == 0
    assert_equal(job, uninterrupted["dp"])


def truncate(step: Path) -> None:
    with (step / "rank_00001.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def flip_a_bit(step: Path) -> None:
    file = step / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def delete(step: Path) -> None:
    (step / "rank_00001.safetensors").unlink()


def swap_shards(step: Path) -> None:
    first, second, aside = (step / name for name in ("rank_00000.safetensors", "rank_00001.safetensors", "aside"))
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def empty_the_manifest(step: Path) -> None:
    (step / "manifest.json").write_bytes(b"")


def lose_the_manifest(step: Path) -> None:
    (step / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [truncate, swap_shards]
    + [
        pytest.param(damage, marks=pytest.mark.faults)
        for damage in (flip_a_bit, delete, empty_the_manifest, lose_the_manifest)
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(job, uninterrupted, damage):
    job = job()
    assert job.start_quickly("", "train.exit_after=5").code == 75
    damage(job.path / "checkpoints" / "step_00000005")
    assert job.start_quickly().code == 0
    assert "step_00000005.corrupt" in job.checkpoints()
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
def test_damaged_checkpoints_alone_end_the_run_and_stay_where_they_are(job):
    job = job()
    assert job.start_quickly("", "train.exit_after=4").code == 75
    before = job.checkpoints()
    for step in (job.path / "checkpoints").glob("step_*"):
        flip_a_bit(step)
    for _ in range(2):
        end = job.start_quickly()
        assert end.code == 74
        assert "no valid checkpoint" in end.said
        assert job.checkpoints() == before
    for step in (job.path / "checkpoints").glob("step_*"):
        flip_a_bit(step)
    assert job.start_quickly().code == 0, "and go on once they are whole again"


@pytest.mark.parametrize(
    ("rank", "phase", "action"),
    [
        (1, "checkpoint.write", "enospc"),
        *(
            pytest.param(*where, marks=pytest.mark.faults)
            for where in (
                (0, "checkpoint.write", "enospc"),
                (1, "checkpoint.fsync", "eio"),
                (0, "checkpoint.manifest", "enospc"),
                (0, "checkpoint.rename", "eio"),
            )
        ),
    ],
)
def test_a_save_that_fails_leaves_nothing_and_training_goes_on(job, uninterrupted, rank, phase, action):
    job = job()
    assert job.start_quickly(f"rank={rank},step=4,phase={phase},action={action}").code == 0
    assert job.checkpoints() == ["latest", "step_00000006", "step_00000008"]
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_that_may_not_fail_stops_the_run(job, uninterrupted, asynchronous):
    job, words = job(), ("checkpoint.max_failures=0", f"checkpoint.asynchronous={asynchronous}")
    assert job.start_quickly("rank=1,step=4,phase=checkpoint.write,action=enospc", *words).code == 75
    assert "failed" in job.status()["reason"]
    assert job.start_quickly().code == 0
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
def test_a_last_save_that_fails_is_an_error_and_the_one_before_stands(job, uninterrupted):
    job = job()
    end = job.start_quickly("rank=1,step=8,phase=checkpoint.write,action=enospc")
    assert end.code == 74
    assert "No space left" in end.said
    assert job.checkpoints() == ["latest", "step_00000004", "step_00000006"]
    assert job.start_quickly().code == 0
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
@pytest.mark.parametrize(("rank", "phase"), [(1, "checkpoint.write"), (0, "checkpoint.manifest"), (1, "optimizer")])
def test_an_unexpected_error_ends_the_run_and_loses_nothing(job, uninterrupted, rank, phase):
    job = job()
    assert job.start(f"rank={rank},step=4,phase={phase},action=raise").code == 1
    assert job.status()["state"] == "failed"
    assert job.start().code == 0
    assert_equal(job, uninterrupted["dp"])


def test_a_slow_file_system_holds_nobody_up(job, uninterrupted):
    job = job()
    assert job.start_quickly("rank=1,step=4,phase=checkpoint.write,action=sleep,seconds=1.5").code == 0
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.parametrize("phase", ["backward", pytest.param("optimizer", marks=pytest.mark.faults)])
def test_numbers_that_are_not_finite_end_the_run_before_they_reach_a_weight(job, uninterrupted, phase):
    job = job()
    end = job.start_quickly(f"rank=1,step=5,phase={phase},action=nan")
    assert end.code == 70
    assert "step 5" in end.said
    assert job.start_quickly().code == 0
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
@pytest.mark.parametrize(("layout", "phase"), [("dp", "checkpoint.write"), ("pp", "checkpoint.fsync"), ("pp", "data")])
def test_a_rank_that_hangs_is_named_in_time(job, uninterrupted, layout, phase):
    job = job(layout)
    end = job.start(f"rank=1,step=4,phase={phase},action=hang", "parallel.timeout_minutes=0.1")
    assert end.code == 1
    assert "rank 1 does not answer" in end.said
    assert job.start().code == 0
    assert_equal(job, uninterrupted[layout])


@pytest.mark.faults
def test_a_second_job_in_the_same_directory_is_turned_away(job, uninterrupted):
    job = job()
    first = job.torchrun("rank=1,step=4,phase=data,action=sleep,seconds=20")
    deadline = time.monotonic() + 60
    while len(rank_processes(job)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    second = job.start()
    assert second.code == 1
    assert "in use by" in second.said
    assert first.wait(timeout=120) == 0
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
@pytest.mark.parametrize("delay", [0.0, 0.5, 1.5, 3.0])
def test_the_power_fails(job, uninterrupted, delay):
    """All processes at once, torchrun too, `delay` seconds after the ranks began."""
    job = job()
    launcher = job.torchrun()
    while len(rank_processes(job)) < 2 and launcher.poll() is None:
        time.sleep(0.05)
    time.sleep(delay)
    for process in [launcher.pid, *rank_processes(job).values()]:
        job.signal(process, signal.SIGKILL)
    launcher.communicate()
    assert job.start().code == 0
    assert_equal(job, uninterrupted["dp"])


@pytest.mark.faults
@pytest.mark.parametrize("words", [[], ["checkpoint.resume=4"]])
def test_a_run_that_has_gone_back_takes_up_no_course_that_it_left(job, uninterrupted, words):
    job = job()
    assert job.start_quickly("", "checkpoint.keep=4").code == 0
    # Before its first save, so that nothing newer than step 4 is left to go on from.
    assert job.start_quickly("rank=1,step=5,phase=backward,action=kill", "checkpoint.resume=4").code in (KILLED, 76)
    assert {"step_00000006.left", "step_00000008.left"} <= set(job.checkpoints())
    assert job.start_quickly("", *words).code == 0
    assert_equal(job, uninterrupted["dp"])
    taken = [json.loads(line)["step"] for line in (job.path / "samples.jsonl").read_text().splitlines()]
    assert taken == [*range(1, 9), *range(5, 9)]
