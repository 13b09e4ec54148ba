"""Composing: precedence, presets, every file of conf/, what is filled in, sweeps, and what gets imported."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from core.config import ModelConfig
from runtime.errors import ConfigError
from settings import keys
from settings.command_line import CommandLine, read_command_line
from settings.compose import compose, compose_sweep, to_yaml
from settings.config import RunConfig
from settings.keys import CONF, presets
from settings.resolve import resolve
from settings.summary import summary

EVERY_PRESET = [(group, name) for group, names in presets().items() for name in names]


def parameters(model: ModelConfig) -> int:
    """Counts from the architecture alone, without building anything."""
    attention = (model.num_attention_heads + 2 * model.query_groups) * model.head_size
    norm = model.hidden_size * (2 if model.normalization == "layernorm" else 1)
    matrices = model.hidden_size * (attention + model.num_attention_heads * model.head_size)
    matrices += model.hidden_size * model.ffn_size * (3 if model.activation == "swiglu" else 2)
    biases = attention + model.hidden_size + model.ffn_size + model.hidden_size if model.bias else 0
    embedding = model.vocabulary * model.hidden_size * (1 if model.tie_embeddings else 2)
    positions = model.max_position_embeddings * model.hidden_size if model.position_embedding == "learned" else 0
    return model.num_layers * (matrices + biases + 2 * norm) + norm + embedding + positions


@pytest.mark.parametrize(("preset", "count"), [("gpt2_small", 124_439_808), ("llama3_8b", 8_030_261_248)])
def test_published_presets_have_their_published_size(preset, count):
    assert parameters(compose([f"model={preset}"]).model) == count


def test_tiny_divides_in_every_dimension():
    model = compose(["model=tiny"]).model
    sizes = [model.num_layers, model.hidden_size, model.num_attention_heads, model.query_groups]
    assert all(size % 12 == 0 for size in [*sizes, model.ffn_size, model.head_size])


@pytest.mark.parametrize(("group", "name"), EVERY_PRESET)
def test_every_preset_resolves(group, name):
    more = ["data.corpus=sample"] if (group, name) == ("data", "files") else []
    composed = compose([f"{group}={name}", *more, "train.global_batch_size=48"])
    for world in (1, 2, 3, 4, 8, 16):
        config = resolve(composed, {"WORLD_SIZE": str(world)})
        assert (config.parallel.dp_shard, config.accumulation_steps) == (world, 1)
        assert config.model.vocabulary >= config.data.corpus_vocab_size


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_file_says_what_it_is_for(file):
    assert any(line.startswith("# ") and "@package" not in line for line in file.read_text().splitlines()[:2])


def test_the_command_line_wins_over_the_experiment_over_groups_over_defaults(tmp_path, monkeypatch):
    copy_conf(tmp_path, monkeypatch)
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# mine\ndefaults:\n  - override /model: gpt2_small\n"
        "name: mine\nmodel:\n  num_layers: 3\ntrain:\n  steps: 33\n"
    )
    config = compose(["experiment=mine"])
    assert (config.name, config.train.steps, config.train.eval_steps) == ("mine", 33, 8)
    assert (config.model.hidden_size, config.model.num_layers) == (768, 3)
    typed = compose(["train.steps=7", "model=llama3_8b", "experiment=mine", "name=other", "schedule=wsd"])
    assert (typed.name, typed.train.steps, typed.schedule.name) == ("other", 7, "wsd")
    assert (typed.model.hidden_size, typed.model.num_layers) == (4096, 3)
    assert compose([]).name == "run"


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("num_layer: 3\n", ["model.num_layer", "did you mean model.num_layers", "conf/model/mine.yaml"]),
        ("num_layers: ten\n", ["model.num_layers", "ten", "conf/model/mine.yaml", "an integer"]),
        ("num_layers: [\n", ["mine.yaml", "line 2"]),
        ("num_layers: ${train.stepz}\n", ["model.num_layers", "train.stepz", "not found"]),
        ("defaults:\n  - /data: sampel\n", ["data/sampel", "files"]),
    ],
)
def test_a_broken_preset_is_named(tmp_path, monkeypatch, text, fragments):
    copy_conf(tmp_path, monkeypatch)
    (tmp_path / "model" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(["model=mine"])
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def copy_conf(folder, monkeypatch):
    for file in CONF.rglob("*.yaml"):
        target = folder / file.relative_to(CONF)
        target.parent.mkdir(exist_ok=True)
        target.write_text(file.read_text())
    monkeypatch.setattr(keys, "CONF", folder)
    monkeypatch.setattr("settings.compose.CONF", folder)


def test_the_configuration_is_frozen_and_every_type_is_its_own():
    config = compose(["data.split=[90,10,0]", "+train.steps=3", "++train.eval_steps=2", "checkpoint.resume=12"])
    with pytest.raises(FrozenInstanceError):
        config.model.num_layers = 3
    assert config.data.split == [90.0, 10.0, 0.0]
    assert (config.train.steps, config.train.eval_steps, config.checkpoint.resume) == (3, 2, "12")


def test_yaml_says_everything_and_composing_leaves_it_unresolved():
    config = compose(["optimizer.lr='${schedule.min_lr}'", "schedule.min_lr=1e-4"])
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(config))) == asdict(config)
    assert config.optimizer.lr == 1e-4
    assert config.parallel.dp_shard == -1
    assert config.model.vocab_size is None


def test_resolving_fills_in_what_is_derived():
    config = resolve(compose(["parallel.dp_replicate=2", "train.global_batch_size=24"]), {"WORLD_SIZE": "6"})
    assert (config.world_size, config.parallel.dp_shard, config.parallel.dp) == (6, 3, 6)
    assert (config.model.vocab_size, config.train.micro_batch_size, config.schedule.steps) == (1536, 4, 100)
    assert resolve(config, {"WORLD_SIZE": "6"}) == config
    assert resolve(compose([]), {}).world_size == 1


def test_a_batch_schedule_gives_the_batch_and_micro_batches_that_fit_all_its_sizes():
    words = ["train.batch_schedule=0:24 1.5k:36 2M:24", "world_size=2", "data.seq_length=100"]
    config = resolve(compose(words), {})
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (24, 6)
    assert (config.accumulated, config.accumulation_steps) == ([2, 3], 2)
    assert resolve(config, {}) == config
    said = summary(config)
    assert "24 or 36 samples a step (0:24 1.5k:36 2M:24): 2 ranks * micro-batch 6 * 2 or 3 accumulated\n" in said
    assert "2,400 or 3,600 a step, 100 a sample\n" in said
    assert resolve(compose([*words, "train.micro_batch_size=3"]), {}).accumulated == [4, 6]


def test_a_larger_vocabulary_than_the_tokenizers_is_kept():
    assert resolve(compose(["data.tokenizer=bytes", "model.vocab_size=512"]), {}).model.vocab_size == 512
    assert resolve(compose(["data.tokenizer=bytes"]), {}).model.vocab_size == 257


@given(
    replicate=st.integers(1, 12),
    shard=st.integers(1, 12),
    micro=st.integers(1, 12),
    accumulation=st.integers(1, 12),
    given_shard=st.booleans(),
)
def test_legal_batches_and_layouts_resolve(replicate, shard, micro, accumulation, given_shard):
    config = RunConfig(
        world_size=replicate * shard,
        data=BASE.data,
        parallel=type(BASE.parallel)(dp_replicate=replicate, dp_shard=shard if given_shard else -1),
        train=type(BASE.train)(global_batch_size=replicate * shard * micro * accumulation, micro_batch_size=micro),
    )
    resolved = resolve(config, {})
    assert resolved.parallel.dp_shard == shard
    assert resolved.accumulation_steps == accumulation


BASE = compose([])


def test_a_sweep_lists_every_combination_under_a_name_of_its_own():
    runs = compose_sweep(["train.steps=5", "data.path=a/b,c", "schedule=choice(wsd,cosine)"])
    configs = [compose(run) for run in runs]
    assert [(c.data.path, c.schedule.name) for c in configs] == [
        (path, name) for path in ("a/b", "c") for name in ("wsd", "cosine")
    ]
    assert len({c.name for c in configs}) == 4
    assert all(c.train.steps == 5 for c in configs)
    assert configs[0].name == "run-data.path=a_b-schedule=wsd"


def test_a_sweep_keeps_names_given_by_hand_or_by_experiments():
    assert [compose(run).name for run in compose_sweep(["name=a,b"])] == ["a", "b"]
    assert [compose(run).name for run in compose_sweep(["name=mine", "seed=range(1,3)"])] == [
        "mine-seed=1",
        "mine-seed=2",
    ]
    assert next(compose(run).name for run in compose_sweep(["experiment=pretrain", "seed=1,2"])) == "pretrain-seed=1"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["optimizer.lr=interval(0,1)"], "cannot be swept over"),
        (["optimizer.lr=a,2"], "optimizer.lr=a: expected a number"),
        (["optimizer.lrr=1,2"], "did you mean optimizer.lr=1"),
    ],
)
def test_a_wrong_sweep_is_refused(overrides, fragment):
    with pytest.raises(ConfigError, match="lr") as caught:
        compose_sweep(overrides)
    assert fragment in str(caught.value)


def test_options_are_told_from_overrides():
    assert read_command_line(["a=1", "--cfg", "job", "-m"]) == CommandLine(["a=1"], show_config=True, sweep=True)
    assert read_command_line(["-c", "job"]) == read_command_line(["--cfg=job"]) == CommandLine([], show_config=True)
    assert read_command_line(["-h"]) == read_command_line(["--help"]) == CommandLine([], show_help=True)
    assert read_command_line(["--multirun", "--tp", "4"]) == CommandLine(["--tp", "4"], sweep=True)


@pytest.mark.parametrize("words", [["--cfg", "hydra"], ["--cfg"], ["-c", "all"]])
def test_only_the_job_can_be_shown(words):
    with pytest.raises(ConfigError, match="only `--cfg job`"):
        read_command_line(words)


def test_composing_and_checking_import_neither_torch_nor_numpy():
    code = (
        "import sys, settings.help_page; from settings.compose import compose; from settings.resolve import resolve;"
        "resolve(compose(['experiment=pretrain']), {}); settings.help_page.help_page();"
        "print([name for name in ('torch', 'numpy', 'tiktoken', 'tokenizers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent, env=os.environ)
    assert done.stdout == "[]\n", done.stderr
