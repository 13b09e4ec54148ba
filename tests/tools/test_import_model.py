"""`kilotron import`: what generates, trains on and goes back is what transformers has."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import pretrain_gpt
from checkpoint.manifest import read_manifest
from data.preparation import prepare_documents
from models.hugging_face import OTHER_FILES
from runtime.errors import ConfigError
from settings.compose import compose
from settings.resolve import resolve
from tests.models.hugging_face_models import MODELS, equal_bytes, reference, rewrite, save, save_tokenizer, stored
from tools.cli import main


def run(*words):
    return main([str(word) for word in words])


def train(folder, *words):
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    prepare_documents([f"document {number}" for number in range(99)], folder / "data", "bytes", seed=0)
    words = [*words, f"out_dir={folder}", "data=files", f"data.path={folder}/data", "train.steps=1"]
    return pretrain_gpt.main([*words, "data.seq_length=8"], environment)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_import_and_export_keep_every_byte(tmp_path, name, dtype):
    source = save(reference(name, dtype), tmp_path / "source", max_shard_size="100KB")
    assert run("import", source, tmp_path / "run") == 0
    assert run("export", tmp_path / "run", tmp_path / "back") == 0
    assert equal_bytes(stored(source), stored(tmp_path / "back"))
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())


def test_other_forms_of_names_come_back_too(tmp_path):
    source = save(reference("gpt2", torch.float16), tmp_path / "source")
    tensors = {name.removeprefix("transformer."): value for name, value in stored(source).items()}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    tensors["ln_f.bias"] = tensors["ln_f.bias"].double()
    rewrite(source, tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)})
    assert run("import", source, tmp_path / "run") == 0
    assert run("export", tmp_path / "run", tmp_path / "back") == 0
    assert equal_bytes(tensors, stored(tmp_path / "back"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(folder with source/ and run/, the model of transformers)"""
    folder = tmp_path_factory.mktemp("imported")
    model = reference("gpt2", vocab_size=300, eos_token_id=0, bos_token_id=0)
    save(model, folder / "source")
    save_tokenizer(folder / "source")
    assert run("import", folder / "source", folder / "run") == 0
    return folder, model


def test_the_tokenizer_passes_through_byte_for_byte(imported, tmp_path):
    folder, _ = imported
    assert run("export", folder / "run", tmp_path / "back") == 0
    names = {file.name for file in (folder / "source").iterdir()} & set(OTHER_FILES)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    for name in names:
        assert (folder / "source" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_generate_continues_as_transformers_does(imported, capsys):
    folder, model = imported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "source")
    for prompt in ("the cat", "a dog on", " mat, "):
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
        capsys.readouterr()
        words = ["--prompt", prompt, "--max-new-tokens", 9, "--temperature", 0]
        assert run("generate", folder / "run", *words) == 0
        assert capsys.readouterr().out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


def test_a_run_starts_from_either_form(imported, tmp_path):
    folder, model = imported
    size = ["model=gpt2_small", "model.num_layers=3", "model.hidden_size=48", "model.ffn_hidden_size=null"]
    size += ["model.num_attention_heads=4", "model.vocab_size=300", "model.max_position_embeddings=64"]
    for name, load in (("own", folder / "run/checkpoints/step_00000000"), ("theirs", f"hf:{folder / 'source'}")):
        words = [*size, f"name={name}", f"checkpoint.load={load}", "train.precision=fp64", "optimizer.lr=1e-30"]
        assert train(tmp_path, *words) == 0
        assert run("export", tmp_path / name, tmp_path / f"{name}_hf") == 0
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}_hf", dtype=torch.float64)
        for key, value in model.state_dict().items():
            assert torch.allclose(found.state_dict()[key], value, rtol=0, atol=1e-20), key


def test_a_run_over_a_tokenizer_json_keeps_it(imported, tmp_path):
    shutil.copytree(imported[0] / "source", tmp_path / "source")
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat number {number}" for number in range(60)))
    words = ["--document-separator", "\\n\\n", "--tokenizer", tmp_path / "source/tokenizer.json"]
    assert run("prepare", tmp_path / "text.txt", *words, "--output", tmp_path / "data") == 0
    words = ["model=tiny", "model.num_layers=1", "data=files", f"data.path={tmp_path}/data", f"out_dir={tmp_path}"]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    assert pretrain_gpt.main([*words, "train.steps=1", "data.seq_length=8"], environment) == 0
    originals = {
        name: (tmp_path / "source" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")
    }
    for path in (tmp_path / "source", *tmp_path.glob("data*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("generate", tmp_path / "run", "--prompt", "the", "--max-new-tokens", 3) == 0
    assert run("export", tmp_path / "run", tmp_path / "hf") == 0
    assert originals == {name: (tmp_path / "hf" / name).read_bytes() for name in originals}
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 0


def test_another_model_is_refused_with_what_to_type(imported, tmp_path):
    folder, _ = imported
    words = [f"checkpoint.load=hf:{folder / 'source'}", "data=sample", "data.tokenizer=bytes", f"out_dir={tmp_path}"]
    with pytest.raises(ConfigError) as caught:
        resolve(compose(["model=gpt2_small", *words]), {})
    (message,) = caught.value.args
    assert "num_layers 3 rather than 12" in message
    advice = message.partition("what fits: ")[2].split()
    resolve(compose(["model=gpt2_small", *words, *advice]), {})
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        resolve(compose([f"checkpoint.load=hf:{tmp_path}/nothing", *words[1:]]), {})


def test_a_configuration_is_held_against_a_directory_without_torch(imported, tmp_path):
    folder, _ = imported
    words = [f"checkpoint.load=hf:{folder / 'source'}", "data=sample", "data.tokenizer=bytes", f"out_dir={tmp_path}"]
    code = f"import sys, pretrain_gpt\nsys.argv[1:] = {words}\nprint(pretrain_gpt.run(), 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "78 False\n"
    assert "is of another model: it has num_layers 3 rather than 12" in ended.stderr


def test_what_is_wrong_with_the_files_ends_a_start(imported, tmp_path):
    folder, _ = imported
    words = [f"checkpoint.load=hf:{folder / 'source'}", "data=sample", "data.tokenizer=bytes"]
    try:
        resolve(compose(["model=gpt2_small", *words]), {})
    except ConfigError as error:
        advice = str(error).partition("what fits: ")[2].split()
    source = save(reference("gpt2", vocab_size=300), tmp_path / "source")
    tensors = stored(source)
    tensors.pop("transformer.wpe.weight")
    rewrite(source, tensors)
    with pytest.raises(ConfigError, match=r"hf:.*transformer\.wpe\.weight is missing"):
        train(tmp_path, "model=gpt2_small", *advice, f"checkpoint.load=hf:{source}")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_nothing_is_overwritten_or_left_behind(imported, tmp_path, capsys):
    folder, _ = imported
    assert run("import", folder / "source", folder / "run") == 78
    assert f"{folder / 'run'} is there already" in capsys.readouterr().err
    source = save(reference("llama"), tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"torn")
    assert run("import", source, tmp_path / "run") == 78
    assert "model.safetensors is damaged" in capsys.readouterr().err
    rewrite(source, num_attention_heads=0)
    assert run("import", source, tmp_path / "run") == 78
    assert "config.json: num_attention_heads=0" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_model_without_tokenizer_is_imported_and_says_so(tmp_path, capsys):
    source = save(reference("llama"), tmp_path / "source")
    assert run("import", source, tmp_path / "run") == 0
    assert "has no tokenizer.json" in capsys.readouterr().out
    assert run("generate", tmp_path / "run", "--prompt", "x") == 78
    assert "tokenizer, is not known" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "run/checkpoints/step_00000000")
    assert manifest.state["config"]["model"]["num_query_groups"] == 2
