"""config.json both ways: every model comes back as it went, and what Kilotron or a family cannot do is named."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import ModelConfig
from models.families import FAMILIES, family_for, open_directory
from models.gpt2 import GPT2
from models.hugging_face import TensorRule, identity
from models.llama import LLAMA
from runtime.errors import HuggingFaceError
from settings.compose import compose
from tests.models.hugging_face_models import reference, rewrite, save

WIDE = st.integers(1, 9).map(lambda number: 8 * number)
SHARED = {
    "num_layers": st.integers(1, 99),
    "hidden_size": WIDE,
    "ffn_hidden_size": st.none() | WIDE,
    "vocab_size": WIDE,
    "num_attention_heads": st.sampled_from([2, 4]),
    "max_position_embeddings": st.integers(1, 99),
    "tie_embeddings": st.booleans(),
    "norm_eps": st.sampled_from([1e-5, 1e-6]),
}
GPT2_MODELS = st.builds(ModelConfig, **SHARED, activation=st.sampled_from(["gelu", "gelu_tanh"]))
LLAMA_MODELS = st.builds(
    ModelConfig, **SHARED, num_query_groups=st.sampled_from([None, 1, 2]), head_dim=st.none() | WIDE,
    bias=st.booleans(), rope_theta=st.sampled_from([1e4, 5e5]), rope_scaling=st.sampled_from([None, "llama3"]),
    rope_scaling_factor=st.sampled_from([4.0, 8.0]), rope_original_length=st.integers(1, 99),
    activation=st.just("swiglu"), normalization=st.just("rmsnorm"), position_embedding=st.just("rope"),
)  # fmt: skip


@given(model=GPT2_MODELS | LLAMA_MODELS)
def test_a_model_comes_back_as_it_went(model):
    family = family_for(model)
    written = json.loads(json.dumps(family.config_json(model)))
    assert identity(family.model_config(written)) == identity(model)


@pytest.mark.parametrize(
    ("preset", "family"),
    [("gpt2_small", GPT2), ("gpt2_xl", GPT2), ("gpt3_175b", GPT2), ("llama2_7b", LLAMA), ("llama3_8b", LLAMA),
     ("llama3_70b", LLAMA)],
)  # fmt: skip
def test_presets_are_of_their_family(preset, family):
    assert family_for(compose([f"model={preset}"]).model) is family


def test_published_configurations_are_the_presets():
    """Keys as the hub's files have them, defaults left out or not."""
    gpt2 = {"model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024, "n_embd": 768, "n_layer": 12}
    assert identity(GPT2.model_config(gpt2)) == identity(compose(["model=gpt2_small"]).model)
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000,
             "rms_norm_eps": 1e-05, "rope_scaling": None, "torch_dtype": "bfloat16"}  # fmt: skip
    preset = compose(["model=llama3_8b"]).model
    assert identity(LLAMA.model_config(llama)) == identity(preset)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
               "original_max_position_embeddings": 8192}  # fmt: skip
    scaled = identity(replace(preset, rope_scaling="llama3"))
    assert identity(LLAMA.model_config(llama | {"rope_scaling": scaling})) == scaled
    newer = {key: value for key, value in llama.items() if not key.startswith("rope")}
    newer["rope_parameters"] = scaling | {"rope_theta": 500000.0}
    assert identity(LLAMA.model_config(newer)) == scaled


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (GPT2, {"activation_function": "relu"}, "activation_function='relu', only gelu_new, gelu_pytorch_tanh, gelu"),
        (GPT2, {"activation_function": ["gelu"]}, "activation_function="),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, only False"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False, only True"),
        (GPT2, {"n_layer": "12"}, "n_layer='12'"),
        (GPT2, {"n_embd": None}, "n_embd=None"),
        (GPT2, {"n_head": 0, "layer_norm_epsilon": float("nan")}, "n_head=0; layer_norm_epsilon=nan"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu', only silu"),
        (LLAMA, {"attention_bias": True}, "mlp_bias=False where others differ, but model.bias is one for all"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope.rope_type='linear', only default, llama3"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope.rope_type='yarn'"),
        (LLAMA, {"rope_scaling": "linear"}, "rotary settings are no object but 'linear'"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "rope.partial_rotary_factor=0.5, only 1.0"),
        (LLAMA, {"rope_theta": "big", "num_hidden_layers": 1.5}, "num_hidden_layers=1.5; rope.rope_theta='big'"),
    ],
)
def test_what_kilotron_cannot_do_is_named(family, settings, message):
    with pytest.raises(HuggingFaceError) as caught:
        family.model_config(settings)
    assert message in str(caught.value)


def test_what_no_family_can_express_is_named():
    model = ModelConfig(activation="relu2", position_embedding="rope", normalization="rmsnorm", bias=False)
    with pytest.raises(HuggingFaceError) as caught:
        family_for(model)
    gpt2, llama = str(caught.value).splitlines()[1:]
    assert "gpt2: " in gpt2
    assert "model.position_embedding=rope (it has learned)" in gpt2
    assert "model.num_query_groups" not in gpt2
    assert llama.strip() == "llama: model.activation=relu2 (it has swiglu)"
    assert GPT2.unsupported_settings(ModelConfig(num_query_groups=3)) == ["model.num_query_groups=3 (it has 12)"]
    assert GPT2.unsupported_settings(ModelConfig(head_dim=128)) == ["model.head_dim=128 (it has 64)"]
    (window,) = LLAMA.unsupported_settings(replace(compose(["model=llama3_8b"]).model, sliding_window=7))
    assert window == "model.sliding_window=7 (it has None)"


def test_unknown_families_and_missing_files_are_named(tmp_path):
    with pytest.raises(HuggingFaceError, match=r"config\.json cannot be read: No such file"):
        open_directory(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(HuggingFaceError, match="model_type='bert' is not supported; known: gpt2, llama"):
        open_directory(tmp_path)
    path = save(reference("llama"), tmp_path / "saved")
    for text in ("", "[]", "{", "7"):
        (path / "config.json").write_text(text)
        with pytest.raises(HuggingFaceError, match=r"config\.json"):
            open_directory(path)


def test_every_name_of_theirs_and_of_ours_is_told_once():
    for family, preset in ((GPT2, "gpt2_small"), (LLAMA, "llama3_8b")):
        names = [f"{name}.weight" for name in ("embedding.word", "final_norm", "head")]
        per_layer = [ours for theirs, fused in family.modules.items() if "{layer}" in theirs for ours in fused.split()]
        names += [f"block.layers.{layer}.{ours}.weight" for layer in range(3) for ours in per_layer]
        rules = family.tensor_rules(names, 3, family.base)
        assert sorted(name for rule in rules for name in rule.ours) == sorted(names)
        assert len({rule.theirs for rule in rules}) == len(rules)
        assert family in FAMILIES
        assert not family.unsupported_settings(compose([f"model={preset}"]).model)


def test_shapes_of_fused_and_transposed_tensors():
    shapes = {"a": (4, 6), "b": (2, 6), "c": (5,)}
    assert TensorRule("x", ("a", "b"), False).shape(shapes) == (6, 6)
    assert TensorRule("x", ("b",), True).shape(shapes) == (6, 2)
    assert TensorRule("x", ("c",), False).shape(shapes) == (5,)


def test_derived_dimensions_are_filled_in():
    model = ModelConfig(hidden_size=64, num_attention_heads=4)
    expected = {"ffn_hidden_size": 256, "num_query_groups": 4, "head_dim": 16}
    assert expected.items() <= model.resolved().items()
    assert identity(model) == identity(replace(model, **expected, dropout=0.5, init_std=1.0, rope_theta=5.0))
    assert identity(model) != identity(replace(model, max_position_embeddings=7))


def test_a_directory_is_understood_without_torch(tmp_path):
    path = rewrite(save(reference("llama"), tmp_path / "saved"))
    code = (
        "import sys; from pathlib import Path; from models.families import open_directory\n"
        f"assert open_directory(Path({str(path)!r})).model.num_query_groups == 2\n"
        "print(sorted({'numpy', 'torch', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
