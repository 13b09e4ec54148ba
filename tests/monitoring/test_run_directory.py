"""The run directory: what a start records, how it counts starts, and which changes make it another run."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from data.config import DataConfig
from data.tokenizer import save_tiktoken, train_tokenizer
from monitoring import run_directory
from monitoring.run_directory import RunDirectory, Status
from runtime.errors import ConfigError, DataPathError, RunDirectoryError, StorageError
from runtime.files import sha256_of, write_atomically
from settings.config import OptimizerConfig, RunConfig
from settings.stored import restore_config


def test_a_start_records_configuration_overrides_and_environment(tmp_path: Path):
    path = tmp_path / "outputs" / "first"
    config = RunConfig(name="first", data=DataConfig(path="a/b: #c", split=[98.0, 1.5, 0.5]), seed=7)
    directory = RunDirectory(path)
    directory.own()
    directory.record_start(config, ["model=tiny", "seed=7"])
    directory.ownership.release()
    assert restore_config(directory.saved_config()) == config
    assert (path / "overrides.txt").read_text() == "model=tiny\nseed=7\n"
    environment = json.loads((path / "environment.json").read_text())
    assert environment["attempt"] == 0
    assert environment["packages"].keys() >= {"torch", "hydra-core"}
    assert {"command", "host", "python", "git_commit", "git_dirty"} <= environment.keys()


def test_the_git_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "checkout" / "training"
    package.mkdir(parents=True)
    monkeypatch.setattr(run_directory, "__file__", str(package / "run_directory.py"))
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    RunDirectory(before).record_start(RunConfig(), [])
    environment = json.loads((before / "environment.json").read_text())
    assert (environment["git_commit"], environment["git_dirty"]) == (None, None)
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init"], [*identity, "commit", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *command], cwd=package, check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package, check=True, capture_output=True, text=True).stdout
    for dirty in (False, True):
        if dirty:
            (package / "new.py").touch()
        RunDirectory(after).record_start(RunConfig(), [])
        environment = json.loads((after / "environment.json").read_text())
        assert (environment["git_commit"], environment["git_dirty"]) == (head.strip(), dirty)


def test_attempts_count_the_starts_that_wrote_a_status(tmp_path: Path):
    for attempt in range(3):
        directory = RunDirectory(tmp_path)
        assert directory.attempt == attempt
        directory.write_status("running", 0, "started")
        directory.saved_step += 10
        directory.write_status("preempted", 10 * attempt, "train.exit_after")
        assert directory.attempt == attempt
    expected = {"state": "preempted", "step": 20, "reason": "train.exit_after", "attempt": 2, "saved_step": 30}
    assert json.loads((tmp_path / "status.json").read_text()) == expected
    assert directory.read_status() == Status(**expected)
    del expected["saved_step"]  # as an older version wrote it
    (tmp_path / "status.json").write_text(json.dumps(expected))
    assert directory.read_status() == Status(**expected, saved_step=0)


def test_reading_an_absent_directory_finds_nothing_and_makes_nothing(tmp_path: Path):
    directory = RunDirectory(tmp_path / "none")
    assert (directory.attempt, directory.read_status(), directory.saved_config()) == (0, None, None)
    assert not directory.path.exists()


def test_a_file_in_the_way_is_a_configuration_error(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "link" / "run"):
        with pytest.raises(ConfigError, match=r"(file|link) is no directory; choose another out_dir") as caught:
            RunDirectory(path).own()
        assert caught.value.exit_code == 78


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="Permission denied; choose an out_dir you may write to") as caught:
        RunDirectory(tmp_path / "run").own()
    assert caught.value.exit_code == 74


def test_a_directory_has_one_owner_at_a_time(tmp_path: Path):
    owner, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    owner.own()
    with pytest.raises(RunDirectoryError, match=rf"in use by process {os.getpid()} on .*name=run-2") as caught:
        second.own()
    assert caught.value.exit_code == 73
    owner.write_status("completed", 3, "")
    owner.ownership.release()
    second.own()
    assert second.attempt == 1, "of the status that the owner left, not of the one that was there before"
    second.ownership.release()


def test_a_failing_rank_leaves_its_traceback_and_the_reason(tmp_path: Path):
    RunDirectory(tmp_path).write_status("running", 20, "training")
    try:
        raise ValueError("no such sample")
    except ValueError as error:
        RunDirectory(tmp_path).write_rank_failure(3, 0, error)
    status = RunDirectory(tmp_path).previous
    assert status is not None
    assert (status.state, status.step, status.reason) == ("failed", 20, "rank 3: ValueError: no such sample")
    assert "Traceback" in (tmp_path / "logs" / "rank_00003.log").read_text()


@pytest.mark.parametrize("attempt", [0, None])
def test_a_rank_of_another_start_says_nothing_in_the_status_of_this_one(tmp_path: Path, attempt: int | None):
    for _ in range(2):
        RunDirectory(tmp_path).write_status("running", 20, "training")
    RunDirectory(tmp_path).write_rank_failure(3, 1, ValueError("of this start"))
    before = (tmp_path / "status.json").read_bytes()
    RunDirectory(tmp_path).write_rank_failure(3, attempt, ValueError("of a start that is over"))
    assert (tmp_path / "status.json").read_bytes() == before
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    (other,) = logs.keys() - {"rank_00003.log"}
    assert "of this start" in logs["rank_00003.log"]
    assert other == f"rank_00003.attempt_{'unknown' if attempt is None else attempt}.log"
    assert "of a start that is over" in logs[other]


STATUS = {"state": "running", "step": 3, "reason": "", "attempt": 0, "saved_step": 0}
FOREIGN = [{"state": 3}, {"state": ["running"]}, {"state": "lost"}, {"step": "x"}, {"step": -1}, {"step": True},
           {"step": 10**400}, {"reason": None}, {"attempt": 1.5}, {"saved_step": []}]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"state": "running"}', "\udcff", "[" * 100_000, *(json.dumps(STATUS | f) for f in FOREIGN)],
    ids=lambda content: content[:60],
)
def test_a_broken_status_is_a_storage_error_that_names_the_file(tmp_path: Path, content: str):
    (tmp_path / "status.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match=r"status\.json is not a status"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"a: [", b"- 1\n", b"\xff", b"a: !!python/name:os.system\n", b"[" * 2000])
def test_a_broken_configuration_is_a_storage_error_that_names_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(StorageError, match=r"config\.yaml"):
        RunDirectory(tmp_path).saved_config()


def test_a_recorded_configuration_is_text_that_nothing_resolves(tmp_path: Path):
    words = [
        "${oc.env:HOME}",
        "${seed}",
        "${",
        "???",
        "!!python/name:os.system",
        "2001-01-01",
        "1e5",
        "yes",
        "~",
        "0x1f",
    ]
    text = "".join(f"k{number}: {json.dumps(word)}\n" for number, word in enumerate(words))
    (tmp_path / "config.yaml").write_text(f"_target_: os.system\nbare: ${{oc.env:HOME}}\n{text}")
    found = RunDirectory(tmp_path).saved_config()
    assert found == {"_target_": "os.system", "bare": "${oc.env:HOME}"} | {
        f"k{n}": word for n, word in enumerate(words)
    }
    with pytest.raises(ConfigError, match="holds _target_, bare, k0"):
        restore_config(found)


@pytest.mark.parametrize("name", ["2001-01-01", "1e5", "yes", "~", "${oc.env:HOME}", "12:30", "1_000", "a: b #c"])
def test_every_name_is_recorded_as_it_is(tmp_path: Path, name: str):
    config = RunConfig(name=name, optimizer=OptimizerConfig(lr=1e-5))
    RunDirectory(tmp_path).record_start(config, [])
    assert restore_config(RunDirectory(tmp_path).saved_config()) == config


def test_aliases_and_devices_take_no_memory(tmp_path: Path):
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert len(RunDirectory(tmp_path).saved_config()) == 30
    with pytest.raises(ConfigError, match=r"data\.split is not a list"):
        restore_config({"data": {"split": RunDirectory(tmp_path).saved_config()["a29"]}})
    for content in ("/dev/zero", tmp_path / "pipe"):
        (tmp_path / "config.yaml").unlink()
        (tmp_path / "config.yaml").symlink_to(content)
        if not Path(content).exists():
            os.mkfifo(content)
        with pytest.raises(StorageError, match="no regular file"):
            RunDirectory(tmp_path).saved_config()


def begun(path: Path) -> RunDirectory:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text('{"step": 1, "attempt": 0}\n')
    return RunDirectory(path)


def small_tokenizer(path: Path, text: str, tokens: int = 262) -> str:
    save_tiktoken(path, train_tokenizer([text], tokens))
    return str(path)


def test_the_first_copy_of_a_tokenizer_stays_once_the_run_has_begun(tmp_path: Path):
    first, other = (
        small_tokenizer(tmp_path / f"{text[:5]}.tiktoken", text)
        for text in ("small small text", "quite, quite different")
    )
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    for tokenizer in (other, first, first):
        directory.keep_tokenizer(tokenizer)  # nothing has been trained with it yet
    kept = directory.path / "tokenizer.tiktoken"
    assert kept.read_bytes() == Path(first).read_bytes()
    directory = begun(directory.path)
    directory.keep_tokenizer(first)
    for tokenizer in (other, "bytes"):
        with pytest.raises(ConfigError, match=rf"{kept}, .*{tokenizer}, .* differ: restore .*name=run-2") as caught:
            directory.keep_tokenizer(tokenizer)
        assert caught.value.exit_code == 78
    assert kept.read_bytes() == Path(first).read_bytes()
    kept.write_bytes(kept.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="differ"):
        directory.keep_tokenizer(first)
    kept.unlink()
    directory.keep_tokenizer(first)
    assert kept.read_bytes() == Path(first).read_bytes()


def test_a_tokenizer_of_a_start_that_came_to_nothing_is_not_the_runs(tmp_path: Path):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.keep_tokenizer(small_tokenizer(tmp_path / "x.tiktoken", "small small text"))
    directory.keep_tokenizer("bytes")
    assert directory.tokenizer(DataConfig(tokenizer="bytes"), "out") == "bytes"


def test_of_a_tokenizer_json_the_end_of_a_document_counts_too(tmp_path: Path):
    vocabulary = {"model": {"vocab": {"a": 0, "</s>": 1, "<s>": 2}}}
    source, companion = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    source.write_text(json.dumps(vocabulary))
    companion.write_text('{"eos_token": "</s>"}')
    directory = begun(tmp_path / "run")
    directory.keep_tokenizer(str(source))
    companion.write_text('{"eos_token": "</s>", "chat_template": "x"}')
    directory.keep_tokenizer(str(source))
    assert (directory.path / "tokenizer_config.json").read_text() == '{"eos_token": "</s>"}'
    companion.write_text('{"eos_token": "<s>"}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json, .* differ"):
        directory.keep_tokenizer(str(source))


def test_the_kept_tokenizer_is_the_one_that_a_checkpoint_names(tmp_path: Path):
    first = small_tokenizer(tmp_path / "x.tiktoken", "small small text")
    directory, data = begun(tmp_path / "run"), DataConfig(tokenizer=first)
    directory.keep_tokenizer(first)
    kept, digest = directory.path / "tokenizer.tiktoken", sha256_of(Path(first))
    for known in (digest, None):
        assert directory.tokenizer(data, "out", known) == str(kept)
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=rf"{kept} is not the tokenizer's file .*{digest}.* restore it"):
        directory.tokenizer(data, "out", digest)
    assert directory.tokenizer(data, "out") == str(kept), "an older checkpoint does not know"
    kept.unlink()
    assert directory.tokenizer(data, "out", digest) == first
    os.mkfifo(kept)
    with pytest.raises(DataPathError, match=r"tokenizer\.tiktoken is a FIFO"):
        directory.tokenizer(data, "out", digest)


def test_a_crash_while_writing_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "status.json"
    write_atomically(path, b"old")

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
