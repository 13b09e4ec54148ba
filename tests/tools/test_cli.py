"""The `kilotron` command: fast help, and errors as messages with exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.cli import main


def test_help_lists_the_tools_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, tools.cli\n"
        "try:\n    tools.cli.main(['--help'])\n"
        "except SystemExit as end:\n    print('status', end.code)\n"
        "print(sorted({'numpy', 'torch', 'tiktoken', 'tokenizers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("prepare", "train-tokenizer", "generate"):
        assert name in ended.stdout
    assert ended.stdout.endswith("status 0\n[]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["prepar"], "invalid choice: 'prepar'"),
        (["prepare"], "required: --output, --tokenizer"),
        (["prepare", "a", "--output", "b", "--tokenizer", "bytes", "--seed", "x"], "invalid int value"),
        (["prepare", "a", "--output", "b", "--tokenizer", "bytes", "--document-separator", ""], "cuts nowhere"),
    ],
)
def test_wrong_arguments_exit_78(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 78
    assert message in capsys.readouterr().err


def test_a_full_or_forbidden_disk_exits_74(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    output = str(tmp_path / "a.txt" / "out")
    assert main(["prepare", str(tmp_path / "a.txt"), "--output", output, "--tokenizer", "bytes"]) == 74
    assert capsys.readouterr().err.startswith("error: ")


def test_an_interruption_exits_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data.documents.read_documents", interrupt)
    assert main(["prepare", "a", "--output", "b", "--tokenizer", "bytes"]) == 130


def test_a_fault_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("data.documents.read_documents", fail)
    with pytest.raises(ZeroDivisionError):
        main(["prepare", "a", "--output", "b", "--tokenizer", "bytes"])
