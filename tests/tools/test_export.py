"""`kilotron export`: transformers computes with it what the run does."""

import json
import os

import pytest
import torch
import transformers

import pretrain_gpt
from tests.models.hugging_face_models import equal_bytes, stored
from tools.cli import main
from tools.generate import load_model

MODELS = {
    "gpt2": ["model=gpt2_small", "model.num_layers=2", "model.hidden_size=48", "model.num_attention_heads=4",
             "model.ffn_hidden_size=null", "model.max_position_embeddings=32", "model.dropout=0.1"],
    "llama": ["model=tiny", "model.num_layers=2", "model.num_query_groups=4", "model.max_position_embeddings=32",
              "model.rope_scaling=llama3", "model.rope_original_length=8", "model.tie_embeddings=false"],
}  # fmt: skip


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of each model over a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "text.txt").write_text("\n\n".join(f"document {number} says little" for number in range(60)))
    assert run("train-tokenizer", folder / "text.txt", "--vocab-size", 280, "--output", folder / "own.tiktoken") == 0
    words = ["--document-separator", "\\n\\n", "--tokenizer", folder / "own.tiktoken", "--output", folder / "data"]
    assert run("prepare", folder / "text.txt", *words) == 0
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    for name, model in MODELS.items():
        words = ["data=files", f"data.path={folder}/data", f"out_dir={folder}", "train.steps=2", f"name={name}"]
        # the smallest vocabulary is the data's; null asks for it
        words += ["model.vocab_size=null", "model.init_std=0.2", "checkpoint.interval=1", "data.seq_length=16"]
        assert pretrain_gpt.main([*model, *words], environment) == 0
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(folder, tmp_path, name):
    assert run("export", folder / name, tmp_path / "hf") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    _, ours, *_ = load_model(folder / name, "auto")
    assert next(theirs.parameters()).dtype == torch.float32
    ids = torch.randint(0, 280, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = ours.next_token_logits(ids)
    assert (theirs(ids).logits[:, -1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert theirs.config.eos_token_id == 279
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "document 7 says höhere   Häuser\n\n12345 <|endoftext|>"
    from data.tokenizer import load_tokenizer

    assert tokenizer(text.replace("<|endoftext|>", "")).input_ids == load_tokenizer(
        str(folder / "own.tiktoken")
    ).encode(text.replace("<|endoftext|>", ""))
    assert tokenizer.eos_token_id == 279


def test_files_are_cut_and_indexed(folder, tmp_path):
    assert run("export", folder / "gpt2", tmp_path / "whole") == 0
    assert run("export", folder / "gpt2", tmp_path / "cut", "--max-shard-size", "100KB") == 0
    files = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 110_000 for file in files)
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    whole = stored(tmp_path / "whole")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert equal_bytes(whole, stored(tmp_path / "cut"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


def test_steps_and_dtypes_are_chosen(folder, tmp_path):
    assert run("export", folder / "llama", tmp_path / "first", "--step", 1, "--dtype", "bf16") == 0
    assert run("export", folder / "llama", tmp_path / "last", "--dtype", "bfloat16") == 0
    first, last = stored(tmp_path / "first"), stored(tmp_path / "last")
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    assert not equal_bytes(first, last)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last", dtype="auto").dtype == torch.bfloat16


def test_it_comes_back(folder, tmp_path):
    assert run("export", folder / "llama", tmp_path / "hf") == 0
    assert run("import", tmp_path / "hf", tmp_path / "run") == 0
    one, other = (dict(load_model(path, "auto")[1].named_parameters()) for path in (folder / "llama", tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert run("generate", tmp_path / "run", "--prompt", "document", "--max-new-tokens", 3) == 0


def test_wrong_uses_are_refused(folder, tmp_path, capsys):
    assert run("export", folder / "gpt2", tmp_path) == 78
    assert "is there already" in capsys.readouterr().err
    assert run("export", folder / "gpt2", tmp_path / "x", "--step", 7) == 74
    assert "steps there: 2, 1" in capsys.readouterr().err
    assert run("export", tmp_path / "none", tmp_path / "x") == 78
    assert "is no directory" in capsys.readouterr().err
    for words in (["--max-shard-size", "5"], ["--max-shard-size", "0GB"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as ended:
            run("export", folder / "gpt2", tmp_path / "x", *words)
        assert ended.value.code == 78
    assert not list(tmp_path.iterdir())


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path, capsys):
    from tests.models.hugging_face_models import reference, save

    model = reference("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[3, 4] = 1e6
    assert run("import", save(model, tmp_path / "source"), tmp_path / "run") == 0
    assert run("export", tmp_path / "run", tmp_path / "hf", "--dtype", "fp16") == 78
    assert "transformer.wte.weight holds numbers beyond torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_model_without_family_is_refused(folder, tmp_path, capsys):
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    words = ["model=tiny", "model.num_layers=1", "model.bias=true", "model.normalization=layernorm", "data=files"]
    words += [f"data.path={folder}/data", f"out_dir={tmp_path}", "train.steps=1", "name=odd", "data.seq_length=8"]
    assert pretrain_gpt.main(words, environment) == 0
    assert run("export", tmp_path / "odd", tmp_path / "hf") == 78
    assert "llama: model.normalization=layernorm (it has rmsnorm)" in capsys.readouterr().err
