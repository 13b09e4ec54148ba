"""`kilotron generate`: repeatable, and a plain word for every wrong use."""

import os

import pytest

import pretrain_gpt
from tools import generate
from tools.cli import main
from tools.generate import load_model


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of one step over bytes."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("\n\n".join(f"document {number} says little" for number in range(60)))
    prepare = ["prepare", f"{folder}/text.txt", "--document-separator", "\\n\\n", "--tokenizer", "bytes"]
    assert main([*prepare, "--output", f"{folder}/data"]) == 0
    words = ["model=tiny", "model.num_layers=2", "model.max_position_embeddings=32", "data=files"]
    words += [f"data.path={folder}/data", f"out_dir={folder}", "train.steps=1", "name=short"]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    assert pretrain_gpt.main(words, environment) == 0
    return folder / "short"


def written(capsys, *words):
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_seed_decides_what_is_written(run_dir, capsys):
    words = [run_dir, "--prompt", "doc", "--max-new-tokens", "12"]
    first = written(capsys, *words, "--seed", 1)
    assert first.startswith("doc")
    assert first == written(capsys, *words, "--seed", 1) != written(capsys, *words, "--seed", 2)
    assert written(capsys, *words, "--temperature", 0) == written(capsys, *words, "--top-k", 1, "--seed", 5)


def test_it_stops_where_the_positions_end_and_says_so(run_dir, capsys):
    assert main(["generate", str(run_dir), "--prompt", "x" * 30, "--max-new-tokens", "50"]) == 0
    assert "room for 2 new tokens" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_document(run_dir, capsys):
    assert written(capsys, run_dir, "--prompt", "", "--max-new-tokens", 5)


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["--prompt", "x" * 40], 78, "40 tokens"),
        (["--prompt", "x", "--temperature", "-1"], 78, "--temperature"),
        (["--prompt", "x", "--temperature", "1e-320"], 78, "--temperature=1e-320 must be 0, or 1e-06 or more"),
        (["--prompt", "x", "--temperature", "nan"], 78, "--temperature"),
        (["--prompt", "x", "--seed", str(10**23)], 78, "--seed"),
        (["--prompt", "x", "--top-p", "0"], 78, "--top-p"),
        (["--prompt", "x", "--max-new-tokens", "0"], 78, "--max-new-tokens"),
        (["--prompt", "x", "--step", "7"], 74, "steps there: 1"),
    ],
)
def test_wrong_uses_are_refused(run_dir, capsys, words, exit_code, said):
    assert main(["generate", str(run_dir), *words]) == exit_code
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def with_tokenizer(run_dir):
    """A run of one step over a tokenizer of its own, for a model that has words to spare."""
    folder = run_dir.parent
    train = ["train-tokenizer", f"{folder}/text.txt", "--vocab-size", "280", "--output", f"{folder}/own.tiktoken"]
    assert main(train) == 0
    prepare = ["prepare", f"{folder}/text.txt", "--document-separator", "\\n\\n", "--tokenizer"]
    assert main([*prepare, f"{folder}/own.tiktoken", "--output", f"{folder}/own"]) == 0
    words = ["model=tiny", "model.num_layers=1", "model.max_position_embeddings=16", "data=files", "train.steps=1"]
    words += [f"data.path={folder}/own", f"out_dir={folder}", "name=own", "model.vocab_size=300"]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    assert pretrain_gpt.main(words, environment) == 0
    return folder / "own"


def cut(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-5]))


def test_a_tokenizer_that_was_cut_is_refused(with_tokenizer, capsys):
    kept = with_tokenizer / "tokenizer.tiktoken"
    content = kept.read_bytes()
    assert written(capsys, with_tokenizer, "--prompt", "doc")
    cut(kept)
    for words in (["generate", with_tokenizer, "--prompt", "doc"], ["export", with_tokenizer, f"{with_tokenizer}_hf"]):
        assert main([str(word) for word in words]) == 78
        assert f"{kept} is not the tokenizer's file with which the checkpoint was made" in capsys.readouterr().err
    kept.write_bytes(content)


def test_of_an_older_checkpoint_a_tokenizer_with_few_tokens_is_pointed_out(with_tokenizer, capsys, monkeypatch):
    def load_older(*arguments):
        config, model, path, state = load_model(*arguments)
        return config, model, path, {key: value for key, value in state.items() if key != "tokenizer_sha256"}

    monkeypatch.setattr(generate, "load_model", load_older)
    assert main(["generate", str(with_tokenizer), "--prompt", "doc"]) == 0
    assert "has 280 tokens, the model 300: unless the model was given more" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", "x"]) == 78
    assert "is no directory" in capsys.readouterr().err
