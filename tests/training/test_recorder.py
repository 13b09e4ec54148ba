"""What a run tells the world: the order in which it closes."""

from training import recorder
from training.config import RunConfig
from training.recorder import Recorder
from training.run_directory import RunDirectory


def test_the_status_is_written_before_a_picture_is_drawn(tmp_path, monkeypatch):
    directory, seen = RunDirectory(tmp_path), []
    monkeypatch.setattr(recorder, "plot_loss", lambda *_: seen.append(directory.read_status().state))
    Recorder(RunConfig(), directory).close("preempted", 3, "SIGUSR1")
    assert seen == ["preempted"]
