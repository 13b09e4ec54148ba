"""Bad configurations: one table of what is typed and what the message must say."""

import dataclasses
import inspect
import pkgutil
import re
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from settings import checks
from settings.checks.batch import check_batch, check_batch_epochs
from settings.checks.files import check_name
from settings.checks.layout import check_world
from settings.checks.model import check_positions, check_vocabulary
from settings.checks.rules import RELATIONS, check_relations
from settings.checks.training import check_deterministic, check_profile
from settings.checks.values import NOT_AVAILABLE, check_choices, check_ranges
from settings.compose import compose
from settings.config import RunConfig
from settings.keys import describe_type, each_setting, setting_types
from settings.resolve import resolve

GPT2 = "model=gpt2_small"

BAD = [
    # unknown keys and presets
    ("model.num_layer=3", "unknown key model.num_layer=3", "did you mean model.num_layers=3?"),
    ("model.num_head=5", "did you mean model.num_attention_heads=5?"),
    ("model.query_groups=2", "did you mean model.num_query_groups=2?"),
    ("tp=2", "did you mean parallel.tp=2?"),
    ("lr=1e-3", "did you mean optimizer.lr=1e-3?"),
    ("steps=5", "train.steps=5", "schedule.steps=5"),
    ("train.lr=1", "did you mean optimizer.lr=1?"),
    ("batchsize=3", "unknown key batchsize"),
    ("qqq=3", "unknown key qqq", "--help"),
    ("hydra.verbose=true", "unknown key hydra.verbose"),
    ("+modle=tiny", "did you mean model=tiny?"),
    ("model=lama3_8b", "no such preset", "did you mean llama3_8b?", "known: gpt2_large, gpt2_medium, gpt2_small"),
    ("model=null", "model=None: no such preset", "tiny"),
    ("model={num_layers: 3}", "no such preset"),
    ("experiment=pretain", "did you mean pretrain?"),
    ("data=corpus.bin", "no such preset", "data.path=corpus.bin"),
    ("parallel=4", "parallel has no presets", "parallel.tp=VALUE"),
    ("parallel/tp=4", "unknown key parallel/tp"),
    # how settings are written
    ("--tp 4", "unknown option --tp;", "did you mean parallel.tp=4?"),
    ("--parallel.tp=4", "unknown option --parallel.tp=4", "did you mean parallel.tp=4?"),
    ("--micro-batch-size 4", "did you mean train.micro_batch_size=4?"),
    ("--wandb --seed 1", "log.wandb=VALUE", "did you mean seed=1?"),
    ("--frobnicate", "unknown option --frobnicate", "key=value"),
    ("train.steps", "settings are written key=value", "such as train.steps=VALUE"),
    ("~train.steps", "cannot be removed"),
    ("~experiment", "cannot be removed"),
    ("model@other=tiny", "packages (@)", "write model=tiny"),
    ("data.path=~/text", "the value cannot be read", "quote it: \"data.path='~/text'\""),
    ("train.steps=1,2", "several values", "add -m"),
    ("data.split=98,1,1", "write data.split=[98,1,1]"),
    # types
    ("train.steps=ten", "train.steps=ten: expected an integer"),
    ("train.steps=1e3", "expected an integer; try train.steps=1000"),
    ("train.steps=null", "train.steps=null: expected an integer"),
    ("model.head_dim=x", "expected an integer or null"),
    ("optimizer.lr=high", "expected a number"),
    ("model.bias=maybe", "expected true or false"),
    ("model.bias=3", "expected true or false"),
    ("train.steps=true", "expected an integer"),
    ("parallel.sequence=2", "expected true or false or null"),
    ("train.compile=2", "expected true or false or null"),
    ("train.compile=always", "expected true or false or null"),
    ("data.path=[a]", "expected text or null"),
    ("data.split=3", "expected a list like [number, number]"),
    ("optimizer.lr=${train.stepz}", "optimizer.lr", "train.stepz"),
    # ranges and choices
    ("train.steps=0", "train.steps=0: must be at least 1"),
    ("train.max_minutes=0", "train.max_minutes=0.0: must be above 0.0"),
    ("model.hidden_size=0 model.num_attention_heads=0", "hidden_size=0", "num_attention_heads=0"),
    ("train.initial_loss_scale=0.5", "train.initial_loss_scale=0.5: must be at least 1.0"),
    ("train.loss_scale_window=0", "must be at least 1"),
    ("optimizer.lr=0", "optimizer.lr=0.0: must be above 0.0"),
    ("optimizer.lr=nan", "must be a finite number"),
    ("data.split=[inf,1,1]", "must be a finite number"),
    ("optimizer.beta2=1", "optimizer.beta2=1.0: must be below 1.0"),
    ("parallel.dp_shard=-2", "must be at least -1"),
    ("parallel.zero=4", "parallel.zero=4", "known: 1, 2, 3"),
    ("train.precision=bf61", "did you mean bf16?", "known: fp32, bf16, fp64, tf32, fp16"),
    ("model.activation=swigluu", "did you mean swiglu?", "known: gelu, gelu_tanh, relu2, swiglu"),
    ("model.rope_scaling=llama", "did you mean llama3?"),
    ("model.rope_scaling_factor=0.5", "model.rope_scaling_factor=0.5: must be at least 1.0"),
    ("model.sliding_window=0", "must be at least 1"),
    ("schedule.name=cosin", "did you mean cosine?"),
    ("log.wandb=of", "did you mean off?", "offline, online"),
    ("data.corpus=sampel", "did you mean sample?"),
    # not built yet
    ("parallel.cp=2 world_size=2", "parallel.cp=2 is not available in this version; use parallel.cp=1"),
    ("model.num_experts=8", "use model.num_experts=null"),
    ("data.blend=[a]", "use data.blend=null"),
    # the model
    (
        "model.num_attention_heads=5 model.hidden_size=256 model.num_query_groups=null",
        "model.num_attention_heads=5 does not divide model.hidden_size=256; try 4 or 8",
    ),
    (
        "model.num_attention_heads=12 model.num_query_groups=5",
        "does not divide model.num_attention_heads=12; try 4 or 6",
    ),
    ("model.num_attention_heads=12 model.num_query_groups=24", "does not divide model.num_attention_heads=12; try 12"),
    ("model.head_dim=15", "model.head_dim=15 is odd", "try 14 or 16"),
    ("model.num_attention_heads=12 model.hidden_size=60", "odd width 5", "try model.num_attention_heads=10 or 15"),
    (
        f"{GPT2} model.rope_scaling=llama3",
        "model.rope_scaling=llama3: model.position_embedding=learned has no rotary frequencies",
        "use model.position_embedding=rope or model.rope_scaling=null",
    ),
    (
        "model.rope_scaling=llama3 model.rope_low_frequency_factor=5",
        "model.rope_high_frequency_factor=4.0 must be above model.rope_low_frequency_factor=5.0",
        "try model.rope_high_frequency_factor=20.0",
    ),
    (f"{GPT2} data.seq_length=2048", "1024 learned positions", "data.seq_length=1024"),
    (f"{GPT2} model.vocab_size=300", "less than the 1536 tokens", "null or at least 1536"),
    ("data.tokenizer=gpt2 model.vocab_size=50000", "less than the 50257 tokens of tokenizer gpt2"),
    ("optimizer.groups=[{a:1}]", "entries must be plain values"),
    # pipeline stages
    ("parallel.virtual_stages=2", "about pipeline stages, but parallel.pp=1", "try parallel.virtual_stages=null"),
    (
        "parallel.virtual_stages=2 world_size=4",
        "about pipeline stages, but parallel.pp=1",
        "try parallel.pp=2 with parallel.pp_schedule=interleaved or parallel.virtual_stages=null",
    ),
    ("parallel.layers_per_stage=[3,3,3,3] world_size=4", "try parallel.pp=4 or parallel.layers_per_stage=null"),
    ("parallel.pp=2 world_size=2 train.timeline_step=9 train.steps=8", "timeline_step=9 is not out of train.steps=8"),
    ("checkpoint.keep_best=true", "nothing says which is best", "try train.eval_interval=500"),
    ("parallel.pp=2 world_size=12", "by 6 data-parallel ranks; try train.global_batch_size=12"),
    (
        "parallel.pp=4 world_size=4 parallel.pp_schedule=interleaved parallel.virtual_stages=4",
        "16 stages is more than model.num_layers=12",
        "try parallel.pp=2 or parallel.virtual_stages=3 or model.num_layers=16",
    ),
    ("parallel.pp=2 parallel.pp_schedule=zbvv world_size=2", "did you mean zbv?"),
    ("parallel.pp_schedule=1F1B", "did you mean 1f1b?"),
    ("parallel.pp=2 parallel.virtual_stages=2 world_size=2", "1f1b has one stage a rank", "pp_schedule=interleaved"),
    ("parallel.pp=2 parallel.pp_schedule=zbv parallel.virtual_stages=3 world_size=2", "two stages a rank", "2 or null"),
    ("parallel.pp=2 parallel.pp_schedule=interleaved parallel.virtual_stages=1 world_size=2", "several stages a rank"),
    (
        "parallel.pp=8 parallel.pp_schedule=interleaved world_size=8",
        "parallel.pp=8 * 2 stages a rank = 16 stages is more than model.num_layers=12",
        "try parallel.pp=4 or parallel.pp_schedule=1f1b or model.num_layers=16",
    ),
    (
        "parallel.pp=2 parallel.layers_per_stage=[5,6,1] world_size=2",
        "has 12 layers in 3 stages, but there are model.num_layers=12 in 2; try [6, 6]",
    ),
    ("parallel.pp=2 parallel.layers_per_stage=[1] world_size=2", "has 1 layer in 1 stage, but there are"),
    ("parallel.pp=2 parallel.layers_per_stage=[12,0] world_size=2", "must be at least 1"),
    (
        "parallel.pp=4 world_size=4 train.micro_batch_size=4",
        "parallel.pp_schedule=1f1b needs at least 4 micro-batches a step, but a global batch of 8 over 1 "
        "data-parallel rank * 4 samples gives 2",
        "try train.micro_batch_size=2, or train.global_batch_size=16",
    ),
    (
        "parallel.pp=4 world_size=4 parallel.pp_schedule=zb train.micro_batch_size=1 train.global_batch_size=9",
        "needs micro-batches that 2 rounds share equally a step",
        "try train.global_batch_size=8 or 10",
    ),
    ("parallel.pp=2 parallel.zero=3 parallel.pp_schedule=zb world_size=2", "use parallel.zero=1 or null"),
    (
        "parallel.pp=2 parallel.pp_schedule=zb train.compile=true world_size=2",
        "cannot put off",
        "use train.compile=null or",
        "interleaved",
    ),
    # the optimizer
    ("optimizer.name=muno", "did you mean muon?", "known: adamw, muon"),
    ("optimizer=muons", "did you mean muon?"),
    ("optimizer.adjust_lr=match_rms", "did you mean match_rms_adamw?"),
    ("optimizer.newton_schulz_steps=100", "must be below 100"),
    ("optimizer.groups=['*norm*']", "optimizer.groups: '*norm*': it is written PATTERN:lr_scale=0.5,weight_decay=0.0"),
    ("optimizer.groups=['*norm*:']", "a group has no setting; known: lr_scale, weight_decay"),
    ("optimizer.groups=['*norm*:lr=1']", "a group has no lr; did you mean lr_scale?"),
    ("optimizer.groups=['*:lr_scle=1']", "did you mean lr_scale? known: lr_scale, weight_decay"),
    ("optimizer.groups=['*:lr_scale=1,weight_decay=inf']", "weight_decay=inf: must be a finite number of at least 0"),
    ("optimizer.groups=['*:lr_scale=-1']", "lr_scale=-1: must be a finite number of at least 0"),
    ("optimizer.groups=['*:lr_scale=fast']", "lr_scale=fast: must be a finite number"),
    ("optimizer.groups=[*norm*:lr_scale=2]", "quote it: \"optimizer.groups=['*norm*:lr_scale=2']\""),
    # ranks
    (
        "world_size=6 parallel.tp=4",
        "world_size=6 with parallel.tp=4: tp must divide 6: 1, 2, 3, 6; world_size=4 or 8 fits",
    ),
    ("parallel.pp=2", "world_size=2 fits; `torchrun --standalone --nproc-per-node=2 pretrain_gpt.py ...`"),
    ("world_size=6 parallel.dp_replicate=4", "dp_replicate must divide 6: 1, 2, 3, 6; world_size=4 or 8 fits"),
    (f"{GPT2} world_size=10 parallel.tp=4", "tp must divide 10: 1, 2, 5, 10 (the model allows 1, 2)"),
    (
        "world_size=6 parallel.dp_shard=4",
        "world_size=6 with parallel.dp_shard=4: dp_shard must be 6 or -1; world_size=4",
    ),
    ("world_size=8 parallel.dp_shard=1", "parallel.dp_shard=1: dp_shard must be 8 or -1; world_size=1 fits"),
    (
        "world_size=12 parallel.dp_replicate=4 parallel.tp=2",
        "world_size=12 with parallel.dp_replicate=4, parallel.tp=2: dp_replicate * tp = 8 must divide 12",
        "; dp_replicate may be 1, 2, 3, 6; tp may be 1, 3; world_size=8 or 16 fits",
    ),
    (
        "world_size=8 parallel.dp_shard=3 parallel.tp=2",
        "dp_shard * tp = 6 must equal 8; dp_shard may be 4 or -1; world_size=6 fits",
    ),
    # what tensor-parallel ranks share
    (
        "world_size=8 parallel.tp=8",
        "parallel.tp=8 does not divide model.num_attention_heads=12",
        "whole heads; try parallel.tp=4",
    ),
    (
        "world_size=20 parallel.tp=5 train.global_batch_size=20",
        "parallel.tp=5 does not divide model.num_attention_heads=12",
        "try parallel.tp=4",
    ),
    (
        "world_size=4 parallel.tp=4 model.num_query_groups=6",
        "parallel.tp=4 and model.num_query_groups=6: one must divide the other",
        "try parallel.tp=2, or model.num_query_groups=4 or 12",
    ),
    (
        "world_size=4 parallel.tp=4 model.ffn_hidden_size=382",
        "parallel.tp=4 does not divide model.ffn_hidden_size=382,",
        "try parallel.tp=2, or model.ffn_hidden_size=380 or 384",
    ),
    (
        "world_size=12 parallel.tp=12 model.hidden_size=180 model.ffn_hidden_size=null",
        "parallel.tp=12 does not divide model.ffn_hidden_size=512 (derived, as it is null)",
        "try parallel.tp=4, or model.ffn_hidden_size=504 or 516",
    ),
    (
        "world_size=4 parallel.tp=4 data.seq_length=90",
        "parallel.tp=4 does not divide data.seq_length=90",
        "try data.seq_length=88 or 92, or parallel.sequence=false",
    ),
    (
        f"{GPT2} world_size=3 parallel.tp=3 parallel.sequence=true",
        "parallel.tp=3 does not divide data.seq_length=1024",
        "try data.seq_length=1023, or parallel.sequence=false",
    ),
    ("world_size=4 parallel.tp=4 data.seq_length=3", "try data.seq_length=4, or parallel.sequence=false"),
    # ranks and batches
    ("parallel.dp_shard=0", "use -1 for all ranks that remain, or at least 1"),
    ("world_size=3 train.global_batch_size=8", "not divisible by 3", "train.global_batch_size=6 or 9"),
    ("world_size=16 train.global_batch_size=8", "not divisible by 16", "try train.global_batch_size=16"),
    ("train.batch_schedule=32", "train.batch_schedule='32': 32 is not TOKENS:SAMPLES, such as 0:32"),
    ("train.batch_schedule='0:8 1m:16'", "1m:16 is not TOKENS:SAMPLES", "k, M, B or T"),
    ("train.batch_schedule='0:8 1k:0'", "1k:0 is not TOKENS:SAMPLES"),
    ("train.batch_schedule='1k:16'", "must begin at 0 tokens; try '0:32 1k:16'"),
    ("train.batch_schedule=''", "must begin at 0 tokens; try '0:32'"),
    ("train.batch_schedule='0:8 2k:12 2000:16'", "must ascend, but 2000:16 does not come after 2,000 tokens"),
    (
        "world_size=2 train.batch_schedule='0:8 2k:9'",
        "train.batch_schedule='0:8 2k:9': 9 is not divisible by 2 data-parallel ranks; try 8 or 10",
    ),
    (
        "world_size=2 train.micro_batch_size=4 train.batch_schedule='0:8 2k:12'",
        "12 is not divisible by 2 data-parallel ranks * train.micro_batch_size=4",
        "; try 8 or 16, or train.micro_batch_size=2",
    ),
    (
        "world_size=2 train.global_batch_size=24 train.micro_batch_size=5",
        "2 data-parallel ranks * train.micro_batch_size=5",
        "train.global_batch_size=20 or 30, or train.micro_batch_size=4 or 6",
    ),
    (
        "train.global_batch_size=1000000000000",
        "train.global_batch_size=1000000000000: a global batch of 1000000000000 samples over 1 data-parallel rank is",
        "more than fits into memory: token ids of a sample of data.seq_length=",
        "; try at most train.global_batch_size=",
    ),
    ("train.global_batch_size=1000000000000000003 world_size=2", "more than fits into memory", "try at most"),
    (
        "train.global_batch_size=1000000000000000003 world_size=2 parallel.pp=2 parallel.pp_schedule=zb",
        "more than fits into memory",
    ),
    ("train.batch_schedule='0:8 1T:1000000000000'", "train.batch_schedule='0:8 1T:1000000000000': a global batch of"),
    # the schedule
    ("schedule.warmup_steps=100", "leaves nothing of train.steps=100", "at most 99"),
    ("schedule.steps=10 schedule.warmup_steps=10", "leaves nothing of schedule.steps=10"),
    ("schedule=wsd schedule.warmup_steps=50 schedule.decay_steps=60", "more than train.steps=100", "decay_steps=50"),
    ("schedule=wsd schedule.warmup_steps=95", "schedule.decay_steps=10 is more than", "try schedule.decay_steps=5"),
    ("schedule.min_lr=1", "above optimizer.lr=0.0006"),
    # seeing
    ("train.timeline_step=3", "about pipeline stages, but parallel.pp=1"),
    ("train.profile=ten", "not the number of a step", "try train.profile=10-12"),
    ("train.profile=10:12", "try train.profile=10-12"),
    ("train.profile=12-10", "try train.profile=10-12"),
    ("train.profile=0", "try train.profile=1"),
    ("train.profile=90-110", "out of train.steps=100; try train.profile=90-100"),
    ("train.profile=101", "try train.profile=100"),
    ("train.gc_interval=-1", "must be at least 0"),
    ("parallel.timeout_minutes=0", "must be above 0.0"),
    ("log.tensorboard=on-off", "expected true or false"),
    # data, checkpoints, names
    ("data=files", "no data is chosen"),
    ("data.path=missing/prefix", "missing/prefix"),
    ("data.tokenizer=gpt3", "did you mean gpt2?"),
    ("data.split=[1,1]", "three shares"),
    ("data.split=[98,-1,3]", "a share cannot be negative"),
    ("data.split=[0,1,1]", "nothing is left to train on"),
    ("data.split=[0,0,0]", "nothing is left to train on"),
    ("data.split=[1,0,0] train.eval_interval=5", "no document is for validation", "train.eval_interval=0"),
    ("checkpoint.resume=nevr", "did you mean never?"),
    ("checkpoint.resume=-5", "the number of a step"),
    ("checkpoint.load=setup.py", "is a file, and a checkpoint is a directory"),
    ("checkpoint.load=conf", "is no checkpoint; say a directory like RUN_DIR/checkpoints"),
    ("checkpoint.load=conf/modle", "no such directory", "nearest: conf/model"),
    ("checkpoint.load=nowhere/at/all", "RUN_DIR/checkpoints"),
    ("name=a/b", "name of one directory", "try name=a-b"),
    ("name=..", "name of one directory", "try name=run"),
    (f"name={'x' * 201}", "at most 200 bytes long", f"try name={'x' * 40}"),
    ("parallel.timeout_minutes=1e300", "must be below 1000000.0"),
    ("parallel.startup_minutes=1e300", "must be below 1000000.0"),
    # numbers that float32 does not have
    ("optimizer.lr=1e300", "is infinite in float32, in which weights are updated; the default is 0.0006"),
    ("optimizer.weight_decay=1e39", "is infinite in float32"),
    ("optimizer=muon optimizer.lr=3e38", "optimizer.lr=3e+38: is infinite in float32"),
    ("optimizer.eps=1e-50", "is 0 in float32", "try optimizer.eps=1e-8"),
    (
        "optimizer.lr=1e30 optimizer.groups=['*:lr_scale=1e10']",
        "'*:lr_scale=1e10' with optimizer.lr=1e+30: is infinite",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=[case[0] for case in BAD])
def test_a_bad_configuration_is_refused_with_what_would_work(case):
    typed, *fragments = case
    before, spaced, after = typed.partition("train.batch_schedule=")
    words = [typed] if typed.startswith("model={") else [*before.split(), *([spaced + after] if spaced else [])]
    with pytest.raises(ConfigError) as caught:
        resolve(compose(words), {})
    message = str(caught.value)
    assert caught.value.exit_code == 78
    assert all(fragment in message for fragment in fragments), message
    assert "Traceback" not in message
    assert "full_key" not in message


def test_a_workspace_of_cublas_that_is_not_deterministic_is_refused():
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
    assert resolve(compose([]), environment)
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 .* unset it, or use :4096:8 or :16:8"):
        resolve(compose(["train.deterministic=true"]), environment)
    assert resolve(compose(["train.deterministic=true"]), {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        compose(["tp=2", "model=x", "train.steps=ten", "seed=3"])
    assert len(caught.value.args) == len(str(caught.value).splitlines()) == 3
    with pytest.raises(ConfigError) as caught:
        resolve(compose(["data=files", "parallel.cp=2", "name=a/b", "train.precision=fp8", "schedule.min_lr=1"]), {})
    assert len(caught.value.args) == 6  # one rank is no multiple of cp=2 either
    with pytest.raises(ConfigError) as caught:
        resolve(compose(["parallel.layers_per_stage=[1,0,0]"]), {})
    assert len(caught.value.args) == 1


@pytest.mark.parametrize(
    ("world", "environment", "fragment"),
    [
        (4, {"WORLD_SIZE": "2"}, "world_size=4, but 2 ranks were started"),
        (None, {"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (None, {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_the_world_must_be_the_one_that_was_started(world, environment, fragment):
    config = dataclasses.replace(compose([]), world_size=world)
    with pytest.raises(ConfigError, match="WORLD_SIZE") as caught:
        resolve(config, environment)
    assert fragment in str(caught.value)


def test_every_rule_is_collected():
    modules = [import_module(f"settings.checks.{found.name}") for found in pkgutil.iter_modules(checks.__path__)]
    members = [member for module in modules for member in inspect.getmembers(module, inspect.isfunction)]
    rules = {value for name, value in members if name.startswith("check_")}
    called = {check_ranges, check_choices, check_vocabulary, check_relations, check_deterministic}
    called.add(check_batch_epochs)
    assert rules == {*RELATIONS, *called}


def test_the_defaults_lack_nothing():
    defaults = {key: value for key, _, value in each_setting(RunConfig())}
    assert all(defaults[key] in works for key, works in NOT_AVAILABLE)


def test_choices_and_bounds_are_spelled_as_they_are_read():
    known = {"min", "above", "below", "choices"}
    assert all(set(item.metadata) <= known for _, item, _ in each_setting(RunConfig()))


def test_every_type_has_words():
    assert all(describe_type(declared) for declared in setting_types().values())
    assert describe_type(int | None) == "an integer or null"


SIZES = st.integers(1, 16)


@given(world=st.integers(1, 64), dp_replicate=SIZES, dp_shard=st.sampled_from([-1, 1, 2, 3, 4, 6, 8]), tp=SIZES)
def test_the_sizes_that_a_refused_layout_names_are_legal(world, **sizes):
    def problems(world, **sizes):
        layout = dataclasses.replace(BASE.parallel, **sizes)
        return list(check_world(dataclasses.replace(BASE, world_size=world, parallel=layout)))

    found = "".join(problems(world, **sizes))
    fixed = sizes["dp_replicate"] * sizes["tp"]
    legal = world % fixed == 0 if sizes["dp_shard"] == -1 else world == fixed * sizes["dp_shard"]
    assert bool(found) != legal
    named = re.findall(r"(dp_replicate|dp_shard|tp) (?:may be|must be|must divide \d+:) ([-\d, or]+)", found)
    for key, values in named:
        for value in map(int, re.findall(r"-?\d+", values)):
            assert not problems(world, **{**sizes, key: value})
    for fit in re.findall(r"\d+", found.rpartition("; world_size=")[2]):
        assert not problems(int(fit), **sizes)


TENSOR_RULES = [rule for rule in RELATIONS if rule.__name__.startswith("check_tensor_")]


@given(
    tp=SIZES,
    groups=SIZES,
    shares=st.integers(1, 4),
    ffn=st.integers(1, 100),
    length=st.integers(1, 40),
    sequence=st.sampled_from([None, False, True]),
    positions=st.sampled_from(["learned", "rope"]),
)
def test_tensor_parallel_ranks_share_equally_and_what_a_refusal_names_is_legal(
    tp, groups, shares, ffn, length, sequence, positions
):
    model = dataclasses.replace(
        BASE.model,
        num_attention_heads=groups * shares,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        max_position_embeddings=length,
        position_embedding=positions,
    )
    layout = dataclasses.replace(BASE.parallel, tp=tp, sequence=sequence)
    config = dataclasses.replace(BASE, model=model, parallel=layout)
    equally = model.num_attention_heads % tp == 0 == ffn % tp
    equally &= groups % tp == 0 or tp % groups == 0
    equally &= sequence is False or length % tp == 0
    found = {rule: "".join(rule(config)) for rule in TENSOR_RULES}
    assert any(found.values()) != equally
    for rule, message in found.items():
        for key, values in re.findall(r"([a-z]+\.\w+)=((?:\d+|false)(?: or \d+)?)", message.partition("; try ")[2]):
            for value in values.split(" or "):
                group, _, name = key.partition(".")
                section = dataclasses.replace(getattr(config, group), **{name: value != "false" and int(value)})
                changed = dataclasses.replace(config, **{group: section})
                cured = TENSOR_RULES if key == "parallel.tp" else [rule]
                assert not [problem for rule in cured for problem in rule(changed)], message
                assert not list(check_positions(changed))


@given(batch=st.integers(1, 200), ranks=st.integers(1, 12), micro=st.none() | st.integers(1, 12))
def test_the_batches_that_a_refusal_names_are_legal(batch, ranks, micro):
    def problems(batch, micro):
        train = dataclasses.replace(BASE.train, global_batch_size=batch, micro_batch_size=micro)
        layout = dataclasses.replace(BASE.parallel, dp_shard=ranks)
        return list(check_batch(dataclasses.replace(BASE, train=train, parallel=layout)))

    found = problems(batch, micro)
    assert bool(found) == (batch % (ranks * (micro or 1)) != 0)
    for hint in "".join(found).partition("try ")[2].split(", or "):
        key, _, values = hint.partition("=")
        for value in map(int, values.split(" or ") if values else []):
            assert not (problems(value, micro) if key == "train.global_batch_size" else problems(batch, value))


@given(
    profile=st.from_regex(r"\A[0-9a-z:-]{1,8}\Z") | st.from_regex(r"\A\d{1,3}(-\d{1,3})?\Z"), end=st.integers(1, 150)
)
def test_the_steps_to_profile_are_a_range_that_is_taken_and_those_of_a_refusal_are(profile, end):
    def problems(profile):
        train = dataclasses.replace(BASE.train, profile=profile, steps=end)
        steps = train.profile_steps
        found = list(check_profile(dataclasses.replace(BASE, train=train)))
        assert bool(found) != (len(steps) > 0 and set(steps) <= set(range(1, end + 1)))
        return found

    for problem in problems(profile):
        assert not problems(problem.rpartition("=")[2])


BASE = RunConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a\n#SBATCH --nodes=99"}, "try name=a-#SBATCH --nodes=99"),
        ({"name": "a\x1b[2J"}, "try name=a-[2J"),
        ({"out_dir": "a\nb"}, "try out_dir=outputs"),
    ],
)
def test_names_that_are_not_one_line_are_refused(changes, message):
    (problem,) = check_name(dataclasses.replace(RunConfig(), **changes))
    assert "on one line" in problem
    assert message in problem
