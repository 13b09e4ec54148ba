"""`kilotron train-tokenizer`: from text to a file that `kilotron prepare` takes."""

import re
import shlex
from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from tools.cli import main


def test_the_command_it_names_next_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in put.txt").write_text("the cat and the dog and the bird " * 20)
    output = tmp_path / "vocabularies" / "small.tiktoken"
    assert main(["train-tokenizer", str(tmp_path / "in put.txt"), "--vocab-size", "270", "--output", str(output)]) == 0
    written, following = capsys.readouterr().out.splitlines()
    assert written == f"wrote {output}: a vocabulary of 270"
    assert load_tokenizer(str(output)).vocab_size == 270
    command = shlex.split(following.removeprefix("next: kilotron "))
    assert main(command) == 0
    assert output.with_suffix(".bin").exists()


@pytest.mark.parametrize(
    ("size", "output", "message"),
    [("270", "x.json", "try .*x.tiktoken"), ("99999", "x.tiktoken", "at most"), ("-5", "x.tiktoken", "at least 257")],
)
def test_errors_exit_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, output: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text("the cat and the dog and the bird")
    arguments = ["train-tokenizer", str(tmp_path / "a.txt"), "--vocab-size", size, "--output", str(tmp_path / output)]
    assert main(arguments) == 78
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("line", "said"), [("{", "not a JSON object"), ('{"text": "a cat \\ud800"}', "half of a surrogate pair")]
)
def test_a_bad_line_met_while_training_exits_65(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "the cat"}}\n{line}')
    arguments = ["train-tokenizer", str(tmp_path / "a.jsonl"), "--vocab-size", "258", "--output"]
    assert main([*arguments, str(tmp_path / "x.tiktoken")]) == 65
    assert f"a.jsonl:2: {said}" in capsys.readouterr().err
