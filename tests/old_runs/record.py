"""Runs whose numbers later versions must reproduce: writes their record, and compares this version with it.

    python -m tests.old_runs.record compare   # returns 1 where a number differs by a bit
    python -m tests.old_runs.record write     # replaces recorded.json, and makes the kept run directories anew

`compare` is for a change that must not change any number. Bits depend on torch's version and on the processor's
instructions, which the record names. The kept run directories hold a checkpoint of half a run each.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import pretrain_gpt
from verification.local_ranks import run_ranks

FOLDER = Path(__file__).parent
RECORD = FOLDER / "recorded.json"
STEPS, HALF = 6, 3

COMMON = [
    "model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
    "model.ffn_hidden_size=32", "model.max_position_embeddings=32", "data=files", "data.tokenizer=bytes",
    "data.split=[90,10,0]", "train.global_batch_size=8", f"train.steps={STEPS}", "train.eval_interval=3",
    "train.eval_steps=2", "optimizer.lr=1e-2", "schedule.warmup_steps=1", "log.sample_ids=true",
    "checkpoint.interval=0",
]  # fmt: skip
GPT2 = ["model.normalization=layernorm", "model.activation=gelu_tanh", "model.position_embedding=learned",
        "model.bias=true"]  # fmt: skip
LLAMA = ["model.num_query_groups=2", "model.qk_norm=true"]
FP64 = ["train.precision=fp64"]
ONE_SAMPLE = ["train.micro_batch_size=1"]

RUNS: dict[str, tuple[int, list[str]]] = {
    "fp64": (1, [*GPT2, *FP64, "train.micro_batch_size=2"]),
    "fp64_llama_window": (1, [*LLAMA, *FP64, "model.sliding_window=5"]),
    "fp32_llama_untied": (1, [*LLAMA, "model.tie_embeddings=false"]),
    "bf16": (1, [*GPT2, "train.precision=bf16"]),
    "bf16_llama": (1, [*LLAMA, "train.precision=bf16", "train.micro_batch_size=2"]),
    "fp16": (1, [*LLAMA, "train.precision=fp16"]),
    "dropout_recompute_full": (1, [*LLAMA, *FP64, "model.dropout=0.1", "train.recompute=full"]),
    "dropout_recompute_selective": (1, [*GPT2, *FP64, "model.dropout=0.1", "train.recompute=selective"]),
    "compiled_dropout": (1, [*LLAMA, "model.dropout=0.1", "train.compile=true"]),
    "tp2_dp_shard2": (4, [*GPT2, *FP64, "parallel.tp=2", "parallel.dp_shard=2"]),
    "tp2_dp_shard2_bf16": (4, [*LLAMA, "train.precision=bf16", "parallel.tp=2", "parallel.dp_shard=2"]),
    "tp4_grouped_heads": (4, [*LLAMA, *FP64, "parallel.tp=4", "model.dropout=0.1"]),
    "pp2_zb_tied": (2, [*GPT2, *FP64, *ONE_SAMPLE, "parallel.pp=2", "parallel.pp_schedule=zb"]),
    "pp2_interleaved": (
        2,
        [*LLAMA, *FP64, *ONE_SAMPLE, "model.num_layers=4", "parallel.pp=2", "parallel.pp_schedule=interleaved",
         "parallel.virtual_stages=2"],
    ),
    "zero1": (2, [*GPT2, *FP64, *ONE_SAMPLE, "parallel.zero=1"]),
    "zero2": (2, [*GPT2, *FP64, *ONE_SAMPLE, "parallel.zero=2"]),
    "zero3": (2, [*GPT2, *FP64, *ONE_SAMPLE, "parallel.zero=3"]),
    "replicas": (2, [*LLAMA, *FP64, *ONE_SAMPLE, "parallel.dp_replicate=2"]),
    "muon_tp2": (2, [*LLAMA, *FP64, "optimizer=muon", "parallel.tp=2"]),
}  # fmt: skip
"""Number of ranks and settings of every run."""

KEPT: dict[str, tuple[int, list[str]]] = {
    "gpt2_one_process": (1, [*GPT2, "model.dropout=0.1", "model.ffn_hidden_size=8"]),
    "llama_tp2_dp_shard2_muon": (4, [*LLAMA, "optimizer=muon", "parallel.tp=2", "parallel.dp_shard=2"]),
}
"""The runs of which a half stands in a folder of this name."""


def environment() -> dict[str, str]:
    """What bits depend on, beside the code."""
    return {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}


def one_rank(rank: int, world_size: int, words: list[str]) -> int:
    """`pretrain_gpt.py` on one rank."""
    return pretrain_gpt.main(words, os.environ)


def train(out_dir: Path, name: str, ranks: int, words: list[str]) -> int:
    """Run `pretrain_gpt.py` on local ranks; returns its exit code."""
    data = os.path.relpath(FOLDER / "data" / "tokens")
    words = [*COMMON, *words, f"data.path={data}", f"out_dir={out_dir}", f"name={name}"]
    return run_ranks(ranks, one_rank, words, initialize=False, timeout=300)[0]


def numbers(run_dir: Path) -> dict[str, Any]:
    """What a run computed: numbers and samples of each step, validation losses, and a digest of its last checkpoint."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    fed = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return {
        "steps": {
            str(record["step"]): [record["loss"], record["grad_norm"], record["lr"]]
            for record in records
            if "loss" in record
        },
        "validation": {str(record["step"]): record["eval_loss"] for record in records if "eval_loss" in record},
        "samples": {str(record["step"]): [record["samples"], record["crc"]] for record in fed},
        "state": state_digest(max((run_dir / "checkpoints").glob("step_*"))),
    }


def state_digest(checkpoint: Path) -> str:
    """SHA-256 of the names and bytes of all tensors in a checkpoint, whatever file they lie in."""
    parts = []
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                values = opened.get_tensor(key).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                parts.append((key, hashlib.sha256(values).hexdigest()))
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def run_all(names: list[str]) -> dict[str, Any]:
    """Every named run from its start to its end, and every kept half from where it stands to the end."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            ranks, words = RUNS[name] if name in RUNS else KEPT[name]
            if name in KEPT:
                shutil.copytree(FOLDER / name, Path(folder, name))
            code = train(Path(folder), name, ranks, words)
            found[name] = numbers(Path(folder, name)) if code == 0 else {"exit code": code}
            print(f"{name}: ran", flush=True)
    return found


def keep_halves() -> None:
    """Make the kept run directories anew: what a later start reads, without what names this machine."""
    for name, (ranks, words) in KEPT.items():
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        code = train(Path(os.path.relpath(FOLDER)), name, ranks, [*words, f"train.exit_after={HALF}"])
        if code != 75:
            raise RuntimeError(f"{name} ended with {code}, not as one that stops early")
        for path in (FOLDER / name).iterdir():
            if path.name in ("logs", "environment.json", "loss.png") or path.name.startswith(".lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def differences(recorded: Any, found: Any, place: str = "") -> list[str]:
    """Where two trees of plain values are not equal."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        keys = [*recorded, *(key for key in found if key not in recorded)]
        return [line for key in keys for line in differences(recorded.get(key), found.get(key), f"{place}/{key}")]
    return [] if recorded == found else [f"{place}: recorded {recorded}, found {found}"]


def main() -> int:
    """Writes the record, or compares; returns 0 where all is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("compare", "write"))
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *KEPT], default=[*RUNS, *KEPT])
    arguments = parser.parse_args()
    if arguments.action == "write":
        keep_halves()
        runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in run_all([*RUNS, *KEPT]).items())
        RECORD.write_text(f'{{"environment": {json.dumps(environment())}, "runs": {{\n{runs}\n}}}}\n')
        return 0
    record = json.loads(RECORD.read_text())
    if record["environment"] != environment():
        print(f"recorded on {record['environment']}, here is {environment()}: bits may differ")
    found = run_all(arguments.runs)
    unequal = [line for name in found for line in differences(record["runs"][name], found[name], name)]
    print("\n".join(unequal) or f"all of {len(found)} runs are equal bit for bit")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
