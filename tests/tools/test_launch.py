"""`kilotron launch`: checks before it writes, and what it writes is slurm/pretrain.sbatch with its own values."""

import os
import shlex
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.cli import main
from tools.launch import CHECKOUT, TEMPLATE, fill

SIZE = ["--nodes", "4", "--gpus-per-node", "2", "--time", "4:00:00"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place to work in, where no sbatch is to be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def sbatch_options(script):
    """What sbatch reads, until the first command, as it does."""
    lines = script.split("\nset ")[0].splitlines()
    return dict(shlex.split(line)[1].removeprefix("--").split("=", 1)
                for line in lines if line.startswith("#SBATCH") and "=" in line)  # fmt: skip


def run_with(script, *arguments):
    """The overrides that the script starts with, as bash reads them."""
    line = next(line for line in script.splitlines() if line.startswith("overrides="))
    command = ["/bin/bash", "-c", f'{line}\nprintf "%s\\0" "${{overrides[@]}}"', "bash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_the_script_is_the_template_with_other_values(folder, capsys):
    words = ["model=tiny", "name=my run", "train.global_batch_size=16"]
    options = [*SIZE, "--partition", "gpu", "--account", "a b", "--job-name", "it's"]
    assert main(["launch", *options, "--", *words]) == 0
    printed = capsys.readouterr().out
    path = folder / "outputs" / "my run" / "pretrain.sbatch"
    script = path.read_text()
    assert script in printed
    assert "OK: my run is legal on 8 ranks" in printed
    assert printed.endswith(f"next: sbatch '{path}'\n")
    assert sbatch_options(script) == sbatch_options(TEMPLATE.read_text()) | {
        "nodes": "4", "gpus-per-node": "2", "time": "4:00:00", "partition": "gpu", "account": "a b", "job-name": "it's",
        "chdir": str(folder), "output": f"{folder}/outputs/my run/slurm-%j.log",
    }  # fmt: skip
    assert run_with(script, "train.steps=9") == [*words, "train.steps=9"]
    changed = {line.partition("=")[0] for line in set(script.splitlines()) ^ set(TEMPLATE.read_text().splitlines())}
    assert {name for name in changed if not name.startswith("#SBATCH")} == {"checkout", "python", "overrides"}
    assert f"checkout={CHECKOUT}" in script
    assert sys.executable in script
    assert subprocess.run(["/bin/bash", "-n", path], check=False).returncode == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@given(words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_overrides_reach_the_run_as_they_were_typed(words):
    line = fill('#SBATCH --nodes=1\noverrides=("$@")\n', {"nodes": 2}, words).removeprefix("#SBATCH --nodes=2\n")
    printed = subprocess.run(
        ["/bin/bash", "-c", f'{line}\nprintf "%s\\0" "${{overrides[@]}}"'], capture_output=True, check=True
    ).stdout
    assert printed.decode().split("\0")[:-1] == (words or [""])


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        (SIZE, ["model=tinyy"], "did you mean tiny?"),
        (SIZE, ["train.global_batch_size=12"], "train.global_batch_size=12"),
        (SIZE, ["world_size=4", "train.global_batch_size=16"], "4 nodes of 2 GPUs have 8 ranks; leave world_size out"),
    ],
)
def test_what_check_refuses_is_not_written(folder, capsys, options, words, message):
    assert main(["launch", *options, "--", *words]) == 78
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--nodes", "0", "0 is no number from 1 on"),
        ("--gpus-per-node", "two", "two is no number"),
        ("--time", "4h", "4h is no time; write minutes, hours:minutes:seconds or days-hours"),
        ("--partition", "a\n#SBATCH --uid=0", "words on one line"),
        ("--dir", "", "words on one line"),
    ],
)
def test_options_that_sbatch_would_misread_exit_78(folder, capsys, option, value, message):
    with pytest.raises(SystemExit) as ended:
        main(["launch", *SIZE, option, value, "--", "model=tiny"])
    assert ended.value.code == 78
    assert message in capsys.readouterr().err


def test_submitting_hands_the_script_to_sbatch(folder, capfd):
    words = ["--", "model=tiny", "train.global_batch_size=8"]
    place = ["--dir", "100% new", "--submit"]
    path = folder / "100% new" / "pretrain.sbatch"
    assert main(["launch", *SIZE, *place, *words]) == 78
    assert f"error: --submit: there is no sbatch on this machine; submit {path} where" in capfd.readouterr().err
    assert "100%% new/slurm-%j.log" in path.read_text()
    (folder / "bin").mkdir()
    sbatch = folder / "bin" / "sbatch"
    sbatch.write_text('#!/bin/bash\n[ -f "$1" ] && echo "got $1" && exit 3\n')
    sbatch.chmod(0o755)
    assert main(["launch", *SIZE, *place, *words]) == 3
    assert capfd.readouterr().out.endswith(f"wrote {path}\ngot {path}\n")


def test_nothing_heavy_is_imported(tmp_path):
    code = (
        "import sys, tools.cli\n"
        f"code = tools.cli.main(['launch', *{SIZE!r}, 'train.global_batch_size=8'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == 0
