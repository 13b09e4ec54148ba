"""Runs that are made to fail, started again, and compared with one that nothing interrupted."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pretrain_gpt
from monitoring.metrics import read_metrics
from runtime.errors import RunError
from runtime.fault_injection import VARIABLE
from verification.local_ranks import RankError, run_ranks

ROOT = Path(pretrain_gpt.__file__).parent
STEPS = 8
WORDS = ["model=tiny", "model.num_layers=2", "model.hidden_size=48", "model.dropout=0.1", "data=sample",
         "data.tokenizer=bytes", "data.seq_length=32", "train.global_batch_size=4", "train.micro_batch_size=1",
         f"train.steps={STEPS}", "train.eval_interval=4", "train.eval_steps=1", "checkpoint.interval=2",
         "log.sample_ids=true", "optimizer.lr=1e-2"]  # fmt: skip
LAYOUTS = {"dp": ["parallel.dp_shard=2"], "pp": ["parallel.pp=2"]}
RANKS = 2
KILLED = "a rank was killed"


@dataclass(frozen=True)
class Start:
    """How a start of a run ended."""

    code: int | str
    """That of pretrain_gpt.py; under torchrun that of torchrun."""
    said: str
    """On standard error, where that was kept."""


@dataclass(frozen=True)
class Job:
    """A run of two ranks that can be started again and again."""

    out_dir: Path
    name: str
    layout: str

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.out_dir / self.name

    @property
    def command(self) -> list[str]:
        """The words after pretrain_gpt.py."""
        return [*WORDS, *LAYOUTS[self.layout], f"out_dir={self.out_dir}", f"name={self.name}"]

    def torchrun(self, fault: str = "", *words: str) -> subprocess.Popen[str]:
        """Starts it as a user does."""
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "pretrain_gpt.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({VARIABLE: fault} if fault else {})
        return subprocess.Popen(
            [sys.executable, *command, *self.command, *words],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, fault: str = "", *words: str) -> Start:
        """Under torchrun, to its end."""
        process = self.torchrun(fault, *words)
        try:
            _, said = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                # Not killed: torchrun would leave its ranks behind.
                process.terminate()
                process.communicate(timeout=60)
        return Start(process.returncode, said)

    def start_quickly(self, fault: str = "", *words: str) -> Start:
        """In ranks that are forked rather than started, which takes a second instead of ten."""
        try:
            codes = run_ranks(RANKS, _rank, [*self.command, *words], fault, initialize=False)
        except RankError as error:
            return Start(KILLED, str(error))
        except RunError as error:
            return Start(error.exit_code, str(error))
        except Exception as error:
            return Start(1, str(error))
        return Start(codes[0], "")

    @staticmethod
    def signal(process: int, number: int) -> None:
        """To a process that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    def numbers(self) -> dict[int, list[float]]:
        """Loss and gradient norm by step, as last logged."""
        records = read_metrics(self.path / "metrics.jsonl")
        return {record["step"]: [record["loss"], record["grad_norm"]] for record in records if "loss" in record}

    def evaluations(self) -> dict[int, float]:
        """Validation losses by step."""
        records = read_metrics(self.path / "metrics.jsonl")
        return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}

    def samples(self) -> dict[int, object]:
        """What each step was fed."""
        return {line["step"]: (line["samples"], line["crc"]) for line in read_metrics(self.path / "samples.jsonl")}

    def status(self) -> dict[str, object]:
        """status.json."""
        return json.loads((self.path / "status.json").read_text())

    def checkpoints(self) -> list[str]:
        """What lies in the folder of checkpoints."""
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())


def _rank(rank: int, world_size: int, words: list[str], fault: str) -> int:
    environment = dict(os.environ, **({VARIABLE: fault} if fault else {}))
    os.environ |= environment
    return pretrain_gpt.main(words, environment)


def assert_equal(job: Job, reference: Job) -> None:
    """Every loss, norm, evaluation and sample of every step, bit for bit."""
    assert job.numbers() == reference.numbers()
    assert job.samples() == reference.samples()
    assert job.evaluations() == reference.evaluations()
    assert len(job.numbers()) == STEPS
    assert job.status()["state"] == "completed"


def rank_processes(job: Job) -> dict[int, int]:
    """The process of each rank by what its heartbeat says; {} where the ranks are not up yet."""
    beats = {}
    for path in (job.path / "logs" / "heartbeats").glob("rank_*.json"):
        try:
            beat = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if beat["host"] == socket.gethostname():
            beats[int(path.stem[5:])] = beat["pid"]
    return beats
