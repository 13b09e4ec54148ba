"""What `--help` prints and docs/settings.md says, made of the presets and of the docstrings of the settings."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

from omegaconf import DictConfig, OmegaConf

from settings.compose import compose
from settings.config import RunConfig
from settings.keys import CONF, describe_type, each_setting, presets, setting_types, show

WIDTH = 100
KEYS_THAT_MATTER = (
    "name",
    "data.path",
    "data.seq_length",
    "train.steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.precision",
    "train.eval_interval",
    "optimizer.lr",
    "schedule.warmup_steps",
    "parallel.tp",
    "parallel.sequence",
    "parallel.dp_replicate",
    "parallel.dp_shard",
    "parallel.zero",
    "parallel.pp",
    "parallel.pp_schedule",
    "checkpoint.interval",
    "checkpoint.resume",
    "log.wandb",
)
SETTINGS_PAGE_COMMAND = (
    ".venv/bin/python -c 'from settings.help_page import settings_page; print(settings_page(), end=\"\")' "
    "> docs/settings.md"
)
EXAMPLES = (
    ("a small GPT on a laptop, in minutes", "python pretrain_gpt.py experiment=pretrain"),
    (
        "GPT-2 on own text, on 8 GPUs",
        "torchrun --standalone --nproc-per-node=8 pretrain_gpt.py model=gpt2_small \\\n"
        "      data.path=corpus/text train.global_batch_size=512 train.micro_batch_size=16",
    ),
    (
        "is this legal on 64 GPUs? nothing is started, no GPU is needed",
        "python pretrain_gpt.py check=true world_size=64 model=llama3_8b parallel.tp=8 \\\n"
        "      parallel.dp_replicate=2 train.global_batch_size=512",
    ),
    ("three learning rates, one run after another", "python pretrain_gpt.py -m optimizer.lr=1e-3,2e-3,4e-3"),
)


def field_docs(schema: type[Any] = RunConfig, prefix: str = "") -> dict[str, str]:
    """The docstring of every key, such as `train.steps`, read from the source of the dataclasses."""
    docs: dict[str, str] = {}
    # Level by level, so statements of the class come one after another.
    for statement, following in pairwise(ast.walk(ast.parse(inspect.getsource(schema)))):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[prefix + name] = inspect.cleandoc(text)
    for item in fields(schema):
        if is_dataclass(item.type) and isinstance(item.type, type):
            docs |= field_docs(item.type, f"{item.name}.")
    return docs


def help_page() -> str:
    """Usage, groups with their presets, the keys that matter, examples, and where to look next."""
    page = [
        "Trains a GPT. A run is a choice of presets and of values, written key=value in any order.",
        "",
        "  python pretrain_gpt.py [GROUP=PRESET ...] [KEY=VALUE ...]            one process",
        "  torchrun --standalone --nproc-per-node=N pretrain_gpt.py ...         N processes",
        "",
        "Presets (* where nothing is said; files of conf/)",
        *_preset_lines(),
        "",
        "Keys that matter [value where nothing is said]",
        *_key_lines(),
        "",
        "Examples",
        *(f"  # {what}\n  {command}" for what, command in EXAMPLES),
        "",
        "Look next",
        "  --cfg job                   every key with its value, as these words compose it",
        "  check=true world_size=N     whether N ranks can run it, and how the work is divided",
        "  kilotron describe           parameters, arithmetic a token, and bytes of a model",
        "  kilotron layouts            every way to divide world_size=N ranks, with the memory it takes",
        "  docs/settings.md            every key with what it does; docs/architecture.md: how it is built",
    ]
    return "\n".join(page)


def settings_page() -> str:
    """docs/settings.md: every key with its type, its default and its docstring, by groups."""
    docs, types = field_docs(), setting_types()
    choices = {key: item.metadata.get("choices") for key, item, _ in each_setting(RunConfig())}
    defaults = {key: value for key, _, value in each_setting(RunConfig())}
    groups: dict[str, list[str]] = {}
    for key in defaults:
        groups.setdefault(key.rpartition(".")[0], []).append(key)
    titles = {item.name: inspect.getdoc(item.type) for item in fields(RunConfig) if is_dataclass(item.type)}
    page = [
        "# Settings",
        "",
        "Every key that a run takes, as `key=value` in any order, with its type and the value that it has where",
        "neither a preset nor the command line gives one. `--cfg job` shows the values that your words compose. This",
        "page is made of the docstrings of the settings, by",
        "",
        f"    {SETTINGS_PAGE_COMMAND}",
    ]
    for group, keys in groups.items():
        page += ["", f"## {group or 'The run'}", "", f"{titles.get(group, RunConfig.__doc__)}", ""]
        page += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            meaning = " ".join(docs[key].split()).replace("|", "\\|")
            kind = ", ".join(f"`{choice}`" for choice in choices[key] or ()) or describe_type(types[key])
            page.append(f"| `{key}` | {kind} | `{show(defaults[key])}` | {meaning} |")
    return "\n".join(page) + "\n"


def _preset_lines() -> Iterator[str]:
    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    chosen = {str(group): name for item in defaults if isinstance(item, DictConfig) for group, name in item.items()}
    for group, default in chosen.items():
        for preset in presets()[group]:
            lines = (CONF / group / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
            comment = next((line[2:] for line in lines if line.startswith("# ") and "@package" not in line), "")
            yield f"{'*' if preset == default else ' '} {group}={preset}".ljust(26) + comment


def _key_lines() -> Iterator[str]:
    docs = field_docs()
    defaults = {key: show(value) for key, _, value in each_setting(compose([]))}
    for key in KEYS_THAT_MATTER:
        text = f"{' '.join(docs[key].split())} [{defaults[key]}]"
        yield textwrap.fill(text, WIDTH, initial_indent=f"  {key}".ljust(30), subsequent_indent=" " * 30)
