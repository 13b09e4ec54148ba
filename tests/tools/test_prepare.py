"""`kilotron prepare` from its command line to bytes that an independent reader understands."""

import os
import struct
from pathlib import Path

import pytest

from tests.data.independent_reader import read_independently
from tools.cli import main


def test_files_become_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\n\ntwö\n\n\n\n")
    (tmp_path / "in" / "b.jsonl").write_text('{"body": "three"}\n{"body": ""}\n')
    output = tmp_path / "out" / "corpus"
    arguments = ["--tokenizer", "bytes", "--json-key", "body", "--document-separator", r"\n\n", "--seed", "3"]
    assert main(["prepare", str(tmp_path / "in"), "--output", str(output), *arguments]) == 0
    documents = read_independently(output)
    expected = [[*text.encode(), 256] for text in ("one", "twö", "three")]
    assert sorted(documents) == sorted(expected)
    written, following = capsys.readouterr().out.splitlines()
    assert written == (
        f"wrote {output}.bin, .idx and .meta.json: 3 documents (3 without text skipped), 15 tokens, vocabulary of 257"
    )
    assert following == f"next: python pretrain_gpt.py name=my_run data=files data.path={output}"
    assert struct.unpack("<3H", Path(f"{output}.bin").read_bytes()[-6:])[-1] == 256


def test_few_documents_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert main(["prepare", str(tmp_path / "a.txt"), "--output", str(tmp_path / "a"), "--tokenizer", "bytes"]) == 0
    assert "--document-separator cuts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "tokenizer", "code", "message"),
    [
        ("b.txt", "bytes", 78, "nearest:"),
        ("a.txt", "gpt3", 78, "did you mean gpt2"),
        ("bad.jsonl", "bytes", 65, "bad.jsonl:1"),
        ("half.jsonl", "bytes", 65, "half.jsonl:2: half of a surrogate pair"),
        ("twice.jsonl", "bytes", 65, "twice.jsonl:1: not a JSON object a line: key 'text' is there twice"),
        ("pipe", "bytes", 78, "pipe is a FIFO, no regular file"),
    ],
)
def test_errors_end_with_their_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, tokenizer: str, code: int, message: str
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "half.jsonl").write_text('{"text": "x"}\n{"text": "\\ud800"}')
    (tmp_path / "twice.jsonl").write_text('{"text": "x", "text": "y"}')
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    arguments = ["prepare", str(tmp_path / name), "--output", str(tmp_path / "x"), "--tokenizer", tokenizer]
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_preparation_left_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one\r\n")
    left = tmp_path / ".x.0123456789ab.tmp"
    left.mkdir()
    os.utime(left, (0, 0))
    assert main(["prepare", str(tmp_path / "a.txt"), "--output", str(tmp_path / "x"), "--tokenizer", "bytes"]) == 0
    said = capsys.readouterr().err
    assert f"{left} is of a preparation that runs now or was killed, and was last written to at 19" in said
    assert left.exists()
    assert read_independently(tmp_path / "x") == [[*b"one\r\n", 256]]
