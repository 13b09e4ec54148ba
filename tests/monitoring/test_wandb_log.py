"""Weights & Biases: reports when it can, and never hurts a run when it cannot."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from monitoring.metrics import EvaluationMetrics
from monitoring.trackers import open_wandb

EVALUATION = EvaluationMetrics(step=1, loss=2.0)


class FakeWandb(SimpleNamespace):
    """Stands for the wandb module: remembers what was asked of it, and raises in what `broken` names."""

    def __init__(self, *broken: str) -> None:
        super().__init__(broken=broken, asked=[], held=False, Settings=dict, base_url="")

    def setup(self, _settings: dict) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(base_url=self.base_url))

    def act(self, name: str, value: object) -> None:
        self.asked.append((name, value))
        if name in self.broken:
            raise RuntimeError(f"{name} broke\nin many lines")

    def init(self, **options: object) -> "FakeWandb":
        if self.held:
            raise RuntimeError("the run's id is in use")
        self.held = True
        self.act(f"init {options['mode']}", options)
        return self

    def teardown(self) -> None:
        self.held = False

    def define_metric(self, _name: str, step_metric: str) -> None:
        self.act("define_metric", step_metric)

    def log(self, values: dict) -> None:
        self.act("log", values)

    def finish(self, exit_code: int) -> None:
        self.act("finish", exit_code)


def report(monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb | None, mode: str, run_dir: Path) -> list[str]:
    """A mirror's life with `wandb` in the module's place and a server that listens; returns what was printed."""
    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with socket.create_server(("127.0.0.1", 0)) as server:
        if wandb is not None:
            wandb.base_url = f"http://127.0.0.1:{server.getsockname()[1]}"
        mirror = open_wandb(mode, "project", run_dir, "name", {"seed": 1}, notes.append)
        mirror.log_evaluation(EVALUATION)
        mirror.log_evaluation(EVALUATION)
        mirror.close(failed=True)
        mirror.close(failed=False)
    return notes


def test_off_does_not_even_import_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert report(monkeypatch, None, "off", tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_everything_is_reported_by_its_own_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wandb = FakeWandb()
    assert report(monkeypatch, wandb, "online", tmp_path) == []
    assert [name for name, _ in wandb.asked] == ["init online", "define_metric", "log", "log", "finish"]
    assert wandb.asked[1:3] == [
        ("define_metric", "step"),
        ("log", {"step": 1, "eval_loss": 2.0, "perplexity": EVALUATION.perplexity}),
    ]
    assert wandb.asked[-1] == ("finish", 1)


def test_a_resume_reports_to_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ids = []
    for _ in range(2):
        wandb = FakeWandb()
        report(monkeypatch, wandb, "offline", tmp_path)
        options = wandb.asked[0][1]
        ids.append(options["id"])
        assert options["resume"] == "allow"
    assert ids[0] == ids[1] == (tmp_path / "wandb_id.txt").read_text()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (note,) = report(monkeypatch, None, "offline", tmp_path)
    assert note.startswith("wandb: no offline run (")


def test_online_that_cannot_go_on_becomes_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wandb = FakeWandb("init online")
    assert report(monkeypatch, wandb, "online", tmp_path) == [
        "wandb: no online run (init online broke); recording an offline run instead"
    ]
    assert [name for name, _ in wandb.asked][1:] == ["init offline", "define_metric", "log", "log", "finish"]


@pytest.mark.parametrize("broken", ["define_metric", "log", "finish"])
def test_whatever_raises_is_one_line_and_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str):
    wandb = FakeWandb(broken)
    (note,) = report(monkeypatch, wandb, "offline", tmp_path)
    assert f"({broken} broke)" in note
    assert [name for name, _ in wandb.asked].count(broken) == 1
    assert wandb.asked[-1][0] == broken


def test_an_identity_that_cannot_be_kept_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wandb = FakeWandb()
    (note,) = report(monkeypatch, wandb, "offline", tmp_path / "gone")
    assert "wandb_id.txt" in note
    assert wandb.asked == []


PROGRAM = """
import sys
from pathlib import Path
from monitoring.metrics import EvaluationMetrics
import monitoring.trackers
monitoring.trackers.LIMIT_SECONDS = 3
log = monitoring.trackers.open_wandb(sys.argv[1], "project", Path(sys.argv[2]), "name", {"seed": 1}, print)
log.log_evaluation(EvaluationMetrics(step=2, loss=float("nan")))
log.log_evaluation(EvaluationMetrics(step=1, loss=2.0))
log.close(failed=False)
print("end")
"""


def test_without_a_network_it_is_offline_before_wandb_has_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("monitoring.trackers.getproxies", dict)
    for wandb.base_url in ("http://127.0.0.1:9", "https://nowhere.invalid"):
        notes: list[str] = []
        open_wandb("online", "project", tmp_path, "name", {}, notes.append).close(failed=False)
        assert len(notes) == 1
        assert notes[0].startswith("wandb: no online run (")
    assert "init online" not in [name for name, _ in wandb.asked]
    # Behind a proxy only wandb can tell.
    monkeypatch.setattr("monitoring.trackers.getproxies", lambda: {"https": "http://proxy"})
    open_wandb("online", "project", tmp_path, "name", {}, notes.append).close(failed=False)
    assert "init online" in [name for name, _ in wandb.asked]


PROXY = {"http_proxy": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("mode", "more", "said"),
    [
        ("offline", {}, []),
        ("online", {}, ["wandb: no online run ([Errno "]),
        ("online", PROXY, ["wandb: no online run (No API key configured"]),
        ("online", {"WANDB_API_KEY": "0" * 40, **PROXY}, ["wandb: no online run ("]),
    ],
)
def test_the_real_package_records_offline_without_a_key_or_a_server(
    tmp_path: Path, mode: str, more: dict[str, str], said: list[str]
):
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    nobody_listens = "http://127.0.0.1:9"
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": nobody_listens, **more}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(tmp_path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(said) + 1
    assert all(line.startswith(start) for line, start in zip(lines, [*said, "end"], strict=True))
    run_id = (tmp_path / "wandb_id.txt").read_text()
    (records,) = tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    assert records.stat().st_size > 0
