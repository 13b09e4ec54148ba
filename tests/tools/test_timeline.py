"""`kilotron timeline`: what it prints and draws, and what it refuses."""

from tools.cli import main


def test_a_schedule_is_printed_and_drawn(tmp_path, capsys):
    picture = tmp_path / "new" / "picture.png"
    words = ["parallel.pp=2", "--microbatches", "5", "parallel.pp_schedule=zbv", "--output", str(picture)]
    words += ["parallel.tp=4"]
    assert main(["timeline", *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith("rank 0 F0F1")
    assert "zbv, 2 ranks, 4 stages, 5 micro-batches" in said
    assert "in theory 3.3%" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_no_pipeline_is_refused(capsys):
    assert main(["timeline", "parallel.tp=2"]) == 78
    assert "parallel.pp=1: say how many ranks" in capsys.readouterr().err
    assert main(["timeline", "parallel.pp=2", "--microbatches", "0"]) == 78
    assert "must be at least 1" in capsys.readouterr().err
