"""`kilotron describe`: the contract's JSON, the table, and what it does without."""

import json
import subprocess
import sys

import pytest

from tools.cli import main


def described(capsys, *words):
    assert main(["describe", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_json_is_that_of_the_contract(capsys):
    assert described(capsys, "model=gpt2_small") == {
        "parameters": {"total": 124_439_808, "embedding": (50_257 + 1024) * 768, "active": 124_439_808},
        "flops_per_token": 854_438_400,
        "bytes": {"weights": 497_759_232, "gradients": 497_759_232, "optimizer": 995_518_464},
    }


def test_an_untied_head_is_no_embedding_and_padding_is_not_counted(capsys):
    found = described(capsys, "model=llama3_8b", "model.vocab_size=128257", "parallel.tp=8", "world_size=8")
    assert found["parameters"]["embedding"] == 128_257 * 4096
    assert found["parameters"]["total"] == 8_030_261_248 + 2 * 4096


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 4), ("fp64", 8)])
def test_bytes_follow_the_precision(capsys, precision, size):
    found = described(capsys, "model=tiny", f"train.precision={precision}")
    count = found["parameters"]["total"]
    assert found["bytes"] == {"weights": size * count, "gradients": size * count, "optimizer": 2 * size * count}


def test_muon_keeps_one_number_of_each_matrix_of_a_layer(capsys):
    found = described(capsys, "model=gpt2_small", "optimizer=muon")
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert found["bytes"]["optimizer"] == 4 * (2 * 124_439_808 - matrices)


def test_arithmetic_follows_the_length_of_a_sample(capsys):
    costs = [described(capsys, "model=llama2_7b", f"data.seq_length={n}")["flops_per_token"] for n in (1024, 2048)]
    assert costs[1] - costs[0] == 12 * 32 * 4096 * 1024


def test_data_and_layout_need_not_fit_this_machine(capsys):
    words = ["model=qwen3_8b", "data.path=nowhere", "parallel.tp=8", "checkpoint.load=elsewhere"]
    assert main(["describe", *words]) == 0
    said = capsys.readouterr()
    assert "36 layers, 4,096 wide, 32 heads of 128, 8 key/value heads, MLP 12,288 wide" in said.out
    assert "8,190,735,360: 622,329,856 of embeddings" in said.out
    assert "weights 32.76 GB, gradients 32.76 GB, optimizer 65.53 GB" in said.out
    assert said.err.startswith("the data is not looked at")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=gpt2_smal"], "did you mean gpt2_small?"),
        (["model=tiny", "model.num_attention_heads=5"], "does not divide model.hidden_size=144"),
        (["model=tiny", "data.path=nowhere"], "give model.vocab_size"),
    ],
)
def test_what_is_wrong_exits_78(words, message, capsys):
    assert main(["describe", *words]) == 78
    assert message in capsys.readouterr().err


def test_it_imports_neither_torch_nor_numpy():
    code = (
        "import sys, tools.cli; tools.cli.main(['describe', 'model=llama3_70b']);"
        "print([name for name in ('torch', 'numpy', 'tiktoken', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "70,553,706,496" in done.stdout
    assert done.stdout.endswith("\n[]\n")
