"""`kilotron layouts`: lists what the checks allow, all of it and nothing else."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning.layouts import find_layouts
from planning.memory import state_bytes
from runtime.errors import ConfigError
from settings.compose import compose
from settings.resolve import resolve
from settings.summary import summary
from tools.cli import main

BASE = compose(["train.global_batch_size=24"])


def sizes(config):
    layout = config.parallel
    return layout.tp, layout.dp_replicate, layout.dp_shard


@given(
    world=st.integers(1, 48),
    batch=st.sampled_from([8, 24, 144]),
    heads=st.sampled_from([4, 6, 12]),
    groups=st.sampled_from([1, 2, None]),
    length=st.sampled_from([96, 90]),
    sequence=st.sampled_from([None, False, True]),
)
def test_every_listed_layout_is_legal_and_every_other_is_not(world, batch, heads, groups, length, sequence):
    config = replace(
        BASE,
        world_size=world,
        model=replace(BASE.model, num_attention_heads=heads, num_query_groups=groups),
        data=replace(BASE.data, seq_length=length),
        train=replace(BASE.train, global_batch_size=batch),
        parallel=replace(BASE.parallel, sequence=sequence),
    )

    def with_layout(triple, sequence):
        names = ("tp", "dp_replicate", "dp_shard")
        layout = replace(config.parallel, sequence=sequence, **dict(zip(names, triple, strict=True)))
        return replace(config, parallel=layout)

    try:
        legal = find_layouts(config).legal
    except ConfigError:  # the same is wrong with every layout
        legal = []
    for found in legal:
        assert resolve(with_layout(sizes(found), found.parallel.sequence), {}) == found
        assert sequence in (None, found.parallel.sequence)
    listed = [sizes(found) for found in legal]
    assert listed == sorted(set(listed))
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    for tp in divisors:
        for dp_replicate in (size for size in divisors if world % (tp * size) == 0):
            triple = tp, dp_replicate, world // (tp * dp_replicate)
            for choice in [None, False] if sequence is None else [sequence]:
                if triple not in listed:
                    with pytest.raises(ConfigError):
                        resolve(with_layout(triple, choice), {})


def listed(capsys, *words):
    assert main(["layouts", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines if line.split()[0].isdecimal() and "legal" not in line], lines


def test_the_table_shows_each_layout_and_what_excludes_the_rest(capsys):
    rows, lines = listed(capsys, "world_size=64", "model=llama3_8b")
    assert lines[0] == "9 legal layouts of 64 ranks for 8,030,261,248 parameters, 8 samples a step"
    assert len(rows) == 9
    assert rows[0] == ["8", "true", "1", "8", "1", "1", "2.01"]
    assert rows[-1] == ["32", "true", "2", "1", "4", "1", "8.18"]
    assert any(line.startswith("not tp=1, dp=64: train.global_batch_size=8 is not divisible by 64") for line in lines)
    assert any(line.startswith("not tp=64, dp=1: parallel.tp=64 does not divide model.num_att") for line in lines)
    assert any("parallel.pp=N lists those with pipelines" in line for line in lines)
    assert any(line.endswith("gathers with parallel.zero=3: the weights of the layer at hand") for line in lines)
    _, lines = listed(capsys, "world_size=8", "parallel.pp=2", "parallel.tp=2")
    assert not any("parallel.pp=N" in line for line in lines)
    assert any("gathers with parallel.zero=1: a rank's whole weights" in line for line in lines)


def test_sizes_that_are_given_are_kept(capsys):
    rows, _ = listed(capsys, "world_size=8", "parallel.dp_replicate=2", "parallel.dp_shard=-1")
    assert [row[:4] for row in rows] == [["1", "-", "2", "4"], ["2", "true", "2", "2"], ["4", "true", "2", "1"]]
    rows, lines = listed(capsys, "world_size=4", "parallel.tp=4", "parallel.dp_shard=1")
    assert [row[:4] for row in rows] == [["4", "true", "1", "1"]]
    assert lines[0].startswith("1 legal layout of 4 ranks")


def test_sequence_parallelism_is_off_where_only_that_is_legal(capsys):
    words = ["world_size=4", "data.seq_length=90"]
    rows, _ = listed(capsys, *words)
    assert [row[1] for row in rows if row[0] != "1"] == ["true", "true", "false"]
    rows, lines = listed(capsys, *words, "parallel.sequence=true")
    assert {row[0] for row in rows} == {"1", "2"}
    assert any("not tp=4, dp=1: parallel.tp=4 does not divide data.seq_length=90" in line for line in lines)


def test_state_is_sixteen_bytes_a_parameter_over_all_that_share_it():
    config = resolve(compose(["model=llama3_8b", "world_size=8", "parallel.dp_replicate=2"]), {})
    assert state_bytes(config) == 16 * 8_030_261_248 // 4
    double = resolve(compose(["train.precision=fp64"]), {})
    assert state_bytes(double) == 32 * double.model.parameter_count()
    shared = resolve(compose(["model=llama3_8b", "world_size=8", "parallel.tp=4", "parallel.dp_shard=2"]), {})
    norms = 65 * 4096
    assert state_bytes(shared) == 16 * ((8_030_261_248 - norms) // 4 + norms) // 2


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["model=tiny"], ["the number of ranks is missing; say world_size=N"]),
        (["world_size=0"], ["error: world_size=0: must be at least 1\n"]),
        (["world_size=4", "parallel.tp=3"], ["tp must divide 4: 1, 2, 4"]),
        (["world_size=4", "parallel.tp=0"], ["parallel.tp=0: must be at least 1"]),
        (["world_size=5", "parallel.dp_shard=4"], ["dp_shard must be 5 or -1"]),
        (["world_size=4", "parallel.cp=2"], ["error: parallel.cp=2 is not available"]),
        (["world_size=4", "tp=2"], ["did you mean parallel.tp=2?"]),
        (
            ["world_size=3", "model=llama3_8b"],
            [
                "no layout of 3 ranks is legal\n",
                "tp=1, dp=3: train.global_batch_size=8 is not divisible by 3",
                "tp=3, dp=1: parallel.tp=3 does not divide model.num_attention_heads=32",
            ],
        ),
        (["world_size=2", "data.path=nowhere"], ["no prepared data at nowhere", "give model.vocab_size"]),
    ],
)
def test_where_nothing_is_legal_it_says_why_and_exits_78(words, fragments, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["layouts", *words]) == 78
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments), said


def test_a_growing_batch_and_muon_are_said(capsys):
    _, lines = listed(capsys, "world_size=2", "train.batch_schedule=0:8 1M:16", "train.micro_batch_size=2")
    assert lines[0].endswith("parameters, 8 or 16 samples a step")
    assert [line.split()[5] for line in lines[2:5]] == ["2/4", "2/4", "4/8"]
    _, lines = listed(capsys, "world_size=1", "optimizer=muon")
    assert "the moments of Muon and AdamW in float32;" in lines[-1]


def test_what_is_wrong_whatever_the_layout_is_said_once(capsys):
    assert main(["layouts", "world_size=8", "schedule.min_lr=1", "parallel.cp=2"]) == 78
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: parallel.cp=2 is not available")
    assert [line.strip().partition("=")[0] for line in said[1:]] == ["schedule.min_lr"]


def test_a_given_vocabulary_makes_up_for_missing_data(capsys):
    rows, lines = listed(capsys, "world_size=2", "model=gpt2_small", "data.path=nowhere")
    assert len(rows) == 3
    assert lines[-1].startswith("the data is not looked at, and model.vocab_size taken as it stands: no prepared data")


def test_ranks_that_a_launcher_started_are_taken(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    _, lines = listed(capsys, "train.global_batch_size=3")
    assert lines[0].startswith("3 legal layouts of 3 ranks")


def test_it_imports_neither_torch_nor_numpy():
    code = (
        "import sys, tools.cli; tools.cli.main(['layouts', 'world_size=4']);"
        "print([name for name in ('torch', 'numpy', 'tiktoken', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6 legal layouts")
    assert done.stdout.endswith("\n[]\n")


def test_a_check_of_one_layout_names_its_tensor_parallel_ranks():
    words = ["world_size=12", "parallel.tp=2", "parallel.dp_replicate=2", "train.global_batch_size=24"]
    said = summary(resolve(compose(words), {}))
    assert "dp_replicate 2 * dp_shard 3 * tp 2 = 12 ranks, with sequence parallelism\n" in said
    assert "24 samples a step: 6 groups of 2 ranks * micro-batch 4 * 1 accumulated" in said
    said = summary(resolve(compose([*words, "parallel.sequence=false"]), {}))
    assert "= 12 ranks, without sequence parallelism\n" in said
    said = summary(resolve(compose(["world_size=4", "parallel.pp=4"]), {}))
    assert "stages      [3, 3, 3, 3] layers, 1f1b\n" in said
    assert " 1 group of 4 ranks * micro-batch 2 * 4 accumulated" in said
    said = summary(resolve(compose(["parallel.pp_schedule=zbv"]), {}))
    assert "stages      1: parallel.pp_schedule=zbv counts from parallel.pp=2 on\n" in said
