"""A run that is interrupted and continued is the run that was not: Muon, a growing batch and WSD at once."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import pretrain_gpt
from checkpoint.manifest import Manifest, TensorEntry
from data.config import DataConfig
from runtime.errors import ConfigError, StorageError
from settings.config import RunConfig
from training.resume import check_same_run
from verification.local_ranks import run_ranks

# 32 tokens a sample: steps 1 to 3 take 4 samples and step 4, the first at or after 300 tokens, 8.
WORDS = ["model=tiny", "model.num_layers=2", "data=sample", "data.tokenizer=bytes", "data.seq_length=32",
         "optimizer=muon", "optimizer.lr=1e-2", "optimizer.groups=['*norm*:lr_scale=0.5,weight_decay=0.1']",
         "schedule=wsd", "schedule.warmup_steps=1", "schedule.decay_steps=3", "train.steps=6",
         "train.batch_schedule=0:4 300:8", "train.precision=fp64", "log.sample_ids=true"]  # fmt: skip
SIZES = [4, 4, 4, 8, 8, 8]


def one_rank(rank, world_size, words):
    return pretrain_gpt.main(words, os.environ)


@pytest.fixture(scope="module")
def out_dir(runs_folder):
    return runs_folder("runs")


def train(out_dir, name, ranks, *words):
    return run_ranks(ranks, one_rank, [*WORDS, f"out_dir={out_dir}", f"name={name}", *words], initialize=False)[0]


def what_one_rank_prints(rank, world_size, words):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        one_rank(rank, world_size, words)
    return printed.getvalue()


def printed(out_dir, name, *words):
    words = [*WORDS, f"out_dir={out_dir}", f"name={name}", *words]
    return run_ranks(1, what_one_rank_prints, words, initialize=False)[0]


def checkpoints(out_dir, name):
    return sorted(path.name for path in (out_dir / name / "checkpoints").iterdir())


def metrics(out_dir, name, *keys):
    lines = [json.loads(line) for line in (out_dir / name / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    return [[line[key] for key in keys] for _, line in sorted(by_step.items())]


def samples(out_dir, name):
    lines = [json.loads(line) for line in (out_dir / name / "samples.jsonl").read_text().splitlines()]
    return [(line["step"], line["samples"], line["crc"]) for line in lines]


def tensors(out_dir, name):
    found = {}
    for file in sorted((out_dir / name / "checkpoints" / "step_00000006").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {(file.name, key): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


NUMBERS = ("step", "loss", "grad_norm", "lr", "consumed_samples", "consumed_tokens")


@pytest.fixture(scope="module")
def one_process(out_dir):
    assert train(out_dir, "whole", 1) == 0
    return metrics(out_dir, "whole", *NUMBERS)


def test_samples_are_consumed_in_order_and_as_the_schedule_says(out_dir, one_process):
    assert [numbers[4] for numbers in one_process] == np.cumsum(SIZES).tolist()
    assert [numbers[5] for numbers in one_process] == (32 * np.cumsum(SIZES)).tolist()
    fed = samples(out_dir, "whole")
    assert [len(ids) for _, ids, _ in fed] == SIZES
    flat = [tuple(sample) for _, ids, _ in fed for sample in ids]
    one_batch = ["train.batch_schedule=null", "train.global_batch_size=36", "train.exit_after=1"]
    assert train(out_dir, "constant", 1, *one_batch) == 75
    assert flat == [tuple(sample) for sample in samples(out_dir, "constant")[0][1]]


LAYOUTS = {
    "shards": ["parallel.dp_shard=2", "train.micro_batch_size=1"],
    # Both copies of the tied embedding lie on rank 0.
    "v": ["model.num_layers=4", "parallel.pp=2", "parallel.pp_schedule=zbv", "train.micro_batch_size=1"],
}


@pytest.mark.parametrize(("layout", "stop"), [("shards", 3), ("v", 2)])
def test_interrupted_and_continued_equals_uninterrupted_bit_for_bit(out_dir, one_process, layout, stop):
    words = LAYOUTS[layout]
    assert train(out_dir, layout, 2, *words) == 0
    name = f"{layout}_stopped"
    assert train(out_dir, name, 2, *words, f"train.exit_after={stop}") == 75
    assert train(out_dir, name, 2, *words) == 0
    assert metrics(out_dir, name, *NUMBERS) == metrics(out_dir, layout, *NUMBERS)
    assert samples(out_dir, name) == samples(out_dir, layout) == samples(out_dir, "whole")
    expected, found = tensors(out_dir, layout), tensors(out_dir, name)
    assert any("optimizer.momentum_buffer." in key for _, key in expected)
    assert any("optimizer.exp_avg_sq." in key for _, key in expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    if layout == "shards":
        np.testing.assert_allclose(metrics(out_dir, name, *NUMBERS), one_process, rtol=1e-10)


def test_other_layouts_continue_as_one_process_would(out_dir, one_process):
    assert train(out_dir, "changed", 2, "parallel.dp_shard=2", "train.exit_after=2") == 75
    pipeline = ["parallel.pp=2", "parallel.tp=2", "parallel.pp_schedule=zb", "train.exit_after=2"]
    assert train(out_dir, "changed", 4, *pipeline) == 75
    assert train(out_dir, "changed", 4, "parallel.tp=2", "parallel.dp_replicate=2") == 0
    np.testing.assert_allclose(metrics(out_dir, "changed", *NUMBERS), one_process, rtol=1e-10)
    assert samples(out_dir, "changed") == samples(out_dir, "whole")


def one_rank_in_bad_memory(rank, world_size, words):
    """What is allocated and not filled holds NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return one_rank(rank, world_size, words)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.tp=2"]),
        pytest.param(4, ["parallel.tp=2", "parallel.dp_shard=2"], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=1"], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.dp_shard=4"], marks=pytest.mark.slow),
    ],
    ids=["tp", "tp-shards", "tp-stages", "shards"],
)
def test_what_memory_happened_to_hold_reaches_nothing(out_dir, one_process, request, ranks, layout):
    """257 tokens leave padding on ranks that share the rows of the vocabulary, and shards leave some on others."""
    name = f"bad_memory_{request.node.callspec.id}"
    words = [*WORDS, f"out_dir={out_dir}", f"name={name}"]
    assert run_ranks(1, one_rank, [*words, "train.exit_after=3"], initialize=False) == [75]
    assert set(run_ranks(ranks, one_rank_in_bad_memory, [*words, *layout], initialize=False)) == {0}
    np.testing.assert_allclose(metrics(out_dir, name, *NUMBERS), one_process, rtol=1e-10)


CHAIN = [
    (2, ["parallel.dp_shard=2"]),
    (2, ["parallel.pp=2", "parallel.pp_schedule=zbv"]),
    (4, ["parallel.pp=4", "parallel.pp_schedule=zb"]),
    (2, ["parallel.tp=2"]),
    (4, ["parallel.pp=2", "parallel.tp=2", "parallel.pp_schedule=interleaved"]),
    (4, ["parallel.pp=2", "parallel.dp_shard=2", "parallel.zero=3"]),
    (1, []),
    (2, ["parallel.pp=2", "parallel.pp_schedule=dualpipev"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_run_that_changes_its_layout_at_every_step_is_the_run_of_one_process(out_dir, tied):
    words = ["model.num_layers=4", f"model.tie_embeddings={tied}", "train.micro_batch_size=1", "train.steps=8"]
    assert train(out_dir, f"alone_{tied}", 1, *words) == 0
    for index, (ranks, layout) in enumerate(CHAIN):
        code = train(out_dir, f"chain_{tied}", ranks, *words, *layout, "train.exit_after=1")
        assert code == (75 if index < len(CHAIN) - 1 else 0)
    found = metrics(out_dir, f"chain_{tied}", *NUMBERS)
    np.testing.assert_allclose(found, metrics(out_dir, f"alone_{tied}", *NUMBERS), rtol=1e-10)
    assert samples(out_dir, f"chain_{tied}") == samples(out_dir, f"alone_{tied}")


def test_another_optimizer_cannot_continue_a_run(out_dir, one_process):
    with pytest.raises(ConfigError, match=r"optimizer.name: was muon, now adamw"):
        train(out_dir, "whole", 1, "optimizer=adamw", "train.steps=7")


def test_another_optimizer_begins_without_state_where_it_is_asked_for(out_dir):
    words = ["train.steps=4", "optimizer=adamw", "checkpoint.interval=1"]
    assert train(out_dir, "changes", 1, *words, "train.exit_after=2") == 75
    words = [*words, "optimizer=muon", "checkpoint.drop_moments=true"]
    assert train(out_dir, "changes", 2, *words, "train.exit_after=1") == 75
    # The second start finds Muon's own state, and keeps it.
    assert train(out_dir, "changes", 1, *words) == 0
    assert [step for step, *_ in metrics(out_dir, "changes", "step")] == [1, 2, 3, 4]
    with safe_open(next((out_dir / "changes" / "checkpoints" / "step_00000004").glob("*.safetensors")), "pt") as file:
        steps = {key: int(file.get_tensor(key)) for key in file.keys() if ".step." in key}  # noqa: SIM118
    assert set(steps.values()) == {2}


def test_settings_that_changed_since_the_checkpoint_are_named(out_dir):
    assert train(out_dir, "settings", 1, "train.exit_after=1") == 75
    changed = ["optimizer.beta2=0.99", "optimizer.groups=['*:lr_scale=0']", "train.batch_schedule=0:8"]
    lines = printed(out_dir, "settings", *changed, "train.exit_after=1").splitlines()
    begin = lines.index("settings that were others when step 1 was saved:")
    said = [line for line in lines[begin + 1 :] if line.startswith("  ")]
    assert said == [
        "  optimizer.groups: was ['*norm*:lr_scale=0.5,weight_decay=0.1'], now ['*:lr_scale=0']",
        "  optimizer.beta2: was 0.95, now 0.99",
        "  train.micro_batch_size: was 4, now 8",
        "  train.global_batch_size: was 4, now 8",
        "  train.batch_schedule: was 0:4 300:8, now 0:8",
    ]


def test_a_pattern_without_a_parameter_is_refused_by_all_ranks(out_dir):
    with pytest.raises(ConfigError, match=r"\*.mpl.\* matches no parameter; names are like embedding.word.weight"):
        train(out_dir, "no_such_parameter", 2, "optimizer.groups=['*.mpl.*:lr_scale=2']")


def test_a_run_goes_back_once_however_often_it_is_started_so(out_dir, one_process):
    words = ["checkpoint.interval=2", "checkpoint.keep=4"]
    assert train(out_dir, "back", 1, *words) == 0
    back = [*words, "checkpoint.resume=2"]
    assert train(out_dir, "back", 2, *back, "train.exit_after=1") == 75
    left = ["step_00000004.left", "step_00000006.left"]
    assert checkpoints(out_dir, "back") == ["gone_back_to", "latest", "step_00000002", "step_00000003", *left]
    again = printed(out_dir, "back", *back, "checkpoint.keep=1", "train.exit_after=2")
    assert "has gone back to that step before; to go back once more, remove" in again
    assert "step_00000003" in again
    assert checkpoints(out_dir, "back") == ["gone_back_to", "latest", "step_00000004.left", "step_00000005", left[1]]
    # The step that it went back to is gone by now, which is no reason to refuse the command.
    assert train(out_dir, "back", 1, *back) == 0
    np.testing.assert_allclose(metrics(out_dir, "back", *NUMBERS), one_process, rtol=1e-10)
    assert "completed at step 6" in printed(out_dir, "back", *back)
    (out_dir / "back" / "checkpoints" / "gone_back_to").unlink()
    with pytest.raises(StorageError, match=r"no checkpoint of step 2 in .*; steps there: 6, 5"):
        train(out_dir, "back", 2, *back)


def test_a_start_that_is_refused_leaves_no_directory(out_dir):
    with pytest.raises(StorageError, match=r"no checkpoint of step 3 in .*nowhere/checkpoints; nor of any other step"):
        train(out_dir, "nowhere", 2, "checkpoint.resume=3")
    assert not (out_dir / "nowhere").exists()


def test_a_checkpoint_that_knows_less_of_its_data_is_compared_by_what_it_knows():
    config = RunConfig(data=DataConfig(path="/x/y"))
    tensors = {"optimizer.step": TensorEntry("F32", (), ())}
    now = {"documents": 3, "tokens": 9, "content": "c", "bin": "b", "idx": "i"}

    def check(**saved):
        state = {"consumed_samples": 8, "data": saved}
        check_same_run(Path("step"), Manifest(7, state, {}, tensors), config, config, now)

    check(documents=3, tokens=9, content="c")
    check(**now)
    for saved, lines in [
        ({"documents": 3, "content": "d"}, ["data content: was d, now c"]),
        (now | {"bin": "a", "content": "d"}, ["/x/y.bin holds other tokens than when step 7 was saved"]),
        (now | {"bin": "a"}, ["/x/y.bin holds other tokens than when step 7 was saved"]),
        (
            now | {"idx": "h", "documents": 4},
            ["/x/y.idx holds other documents than when step 7 was saved", "data documents: was 4, now 3"],
        ),
    ]:
        with pytest.raises(ConfigError, match="is of another run") as caught:
            check(**saved)
        assert str(caught.value).splitlines()[1:] == [f"  {line}" for line in lines]


@pytest.mark.faults
def test_a_completed_run_whose_last_checkpoint_is_damaged_says_so(out_dir):
    assert train(out_dir, "ended", 1, "checkpoint.interval=4") == 0
    file = out_dir / "ended" / "checkpoints" / "step_00000006" / "rank_00000.safetensors"
    file.unlink()
    with pytest.raises(StorageError, match=r"completed at step 6, but .* is missing; .* checkpoint.resume=4"):
        train(out_dir, "ended", 2)
    assert train(out_dir, "ended", 2, "checkpoint.resume=4") == 0
    assert "step_00000006.left" in checkpoints(out_dir, "ended")
    said = printed(out_dir, "ended", "checkpoint.resume=4")
    assert "completed at step 6" in said
    assert "has gone back to that step before" in said
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "completed at step 6" in printed(out_dir, "ended"), "lengths alone are compared"
    with pytest.raises(StorageError, match=r"resume=4, after you removed .*gone_back_to"):
        train(out_dir, "ended", 2, "checkpoint.verify=full")
    (out_dir / "ended" / "checkpoints" / "gone_back_to").unlink()
    assert train(out_dir, "ended", 2, "checkpoint.resume=4") == 0


def test_a_step_that_cannot_be_taken_up_is_named_with_what_can(out_dir):
    assert train(out_dir, "steps", 1, "checkpoint.interval=2", "checkpoint.keep=4") == 0
    steps = out_dir / "steps" / "checkpoints"
    (steps / "step_00000004" / "manifest.json").write_text("")
    with pytest.raises(StorageError, match=r"the checkpoint of step 4 is damaged: .*; other steps there: 6, 2; "):
        train(out_dir, "steps", 1, "checkpoint.resume=4")
    (steps / "step_00000004").rename(steps / "step_00000004.left")
    with pytest.raises(StorageError, match=r"4.left is of a course that was left: rename it to step_00000004"):
        train(out_dir, "steps", 1, "checkpoint.resume=4")


@pytest.mark.faults
def test_a_run_goes_back_across_a_change_of_its_optimizer(out_dir):
    words = ["train.steps=4", "optimizer=adamw", "checkpoint.interval=1", "checkpoint.keep=4"]
    assert train(out_dir, "across", 1, *words, "train.exit_after=2") == 75
    assert train(out_dir, "across", 1, *words, "optimizer=muon", "checkpoint.drop_moments=true") == 0
    assert train(out_dir, "across", 1, *words, "checkpoint.resume=1") == 0


@pytest.mark.faults
def test_a_run_that_goes_on_needs_no_weights_to_start_from(out_dir):
    assert train(out_dir, "source", 1, "train.exit_after=1") == 75
    load = f"checkpoint.load={out_dir / 'source' / 'checkpoints' / 'step_00000001'}"
    assert train(out_dir, "loaded", 1, load, "train.exit_after=1") == 75
    shutil.rmtree(out_dir / "source")
    assert train(out_dir, "loaded", 1, load, "train.exit_after=1") == 75
    shutil.rmtree(out_dir / "loaded" / "checkpoints")
    with pytest.raises(ConfigError, match="there is no such directory"):
        train(out_dir, "loaded", 1, load)


@pytest.mark.faults
def test_weights_that_are_asked_for_in_vain_are_named(out_dir):
    assert train(out_dir, "donor", 1, "train.exit_after=1") == 75
    assert train(out_dir, "goes_on", 1, "train.exit_after=1") == 75
    load = f"checkpoint.load={out_dir / 'donor' / 'checkpoints' / 'step_00000001'}"
    again = printed(out_dir, "goes_on", load, "train.exit_after=1", "checkpoint.verify=sizes")
    assert "is not taken, as the run goes on from its own checkpoint" in again
    assert "of whose files only the sizes were compared" in again
    (out_dir / "donor" / "checkpoints" / "step_00000001" / "manifest.json").write_text("{}")
    with pytest.raises(StorageError, match=r"checkpoint.load=.* is damaged: .* there is no other beside it"):
        train(out_dir, "from_damage", 2, load)
