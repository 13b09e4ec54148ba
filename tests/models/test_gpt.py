"""GPTModel: published parameter counts, and its outputs beside the reference implementations of transformers."""

from dataclasses import replace

import pytest
import torch
import transformers

from core.config import ModelConfig
from models.gpt import build_meta_model
from parallel.initialization import materialize
from settings.compose import compose

GPT2 = ModelConfig(num_layers=3, hidden_size=48, num_attention_heads=4, vocab_size=97, max_position_embeddings=32,
                   activation="gelu_tanh")  # fmt: skip
LLAMA = ModelConfig(num_layers=3, hidden_size=48, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=80,
                    vocab_size=97, max_position_embeddings=32, normalization="rmsnorm", activation="swiglu",
                    position_embedding="rope", bias=False, tie_embeddings=False, norm_eps=1e-6)  # fmt: skip


def build(config, dtype=torch.float32, seed=0):
    model = build_meta_model(config, dtype)
    materialize(model, seed, torch.device("cpu"))
    return model


def test_a_model_is_built_without_memory():
    model = build_meta_model(compose(["model=gpt3_175b"]).model, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())


def copy_layers(reference, ours, mapping):
    for index, layer in enumerate(ours.block.layers.values()):
        for source, target in mapping.items():
            getattr_path(layer, target).copy_(reference[source.format(index)])


def getattr_path(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


@torch.no_grad()
def test_gpt2_equals_the_reference_in_float64():
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, initializer_range=0.3)
    ).double().eval()  # fmt: skip
    weights = {}
    for name, value in reference.state_dict().items():
        # transformers stores these matrices transposed, and query, key and value side by side
        value = value.t() if value.dim() == 2 and ".c_" in name else value
        if ".c_attn." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace("c_attn", part)] = piece
        weights[name] = value
    ours = build(GPT2, torch.float64)
    ours.embedding.word.weight.copy_(weights["transformer.wte.weight"])
    ours.embedding.position.weight.copy_(weights["transformer.wpe.weight"])
    names = {"ln_1": "attention_norm", "attn.q": "attention.query", "attn.k": "attention.key",
             "attn.v": "attention.value", "attn.c_proj": "attention.output", "ln_2": "mlp_norm",
             "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}  # fmt: skip
    copy_layers(weights, ours, {f"transformer.h.{{}}.{theirs}.{part}": f"{name}.{part}"
                                for theirs, name in names.items() for part in ("weight", "bias")})  # fmt: skip
    for part in ("weight", "bias"):
        getattr(ours.final_norm, part).copy_(weights[f"transformer.ln_f.{part}"])
    compare(reference, ours, tolerance=1e-9)


@torch.no_grad()
def test_llama_equals_the_reference():
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=97, max_position_embeddings=32, hidden_size=48, intermediate_size=80,
                                 num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=False, rms_norm_eps=1e-6, initializer_range=0.3)
    ).eval()  # fmt: skip
    copy_llama(reference, ours := build(LLAMA))
    compare(reference, ours, tolerance=1e-5)


QWEN = replace(LLAMA, num_query_groups=1, head_dim=16, qk_norm=True, sliding_window=7, rope_theta=1e6,
               rope_scaling="llama3", rope_scaling_factor=4.0, rope_original_length=20)  # fmt: skip


@torch.no_grad()
def test_qwen3_with_scaled_frequencies_and_a_window_equals_the_reference():
    reference = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(vocab_size=97, max_position_embeddings=32, hidden_size=48, intermediate_size=80,
                                 num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
                                 tie_word_embeddings=False, rms_norm_eps=1e-6, initializer_range=0.3,
                                 use_sliding_window=True, sliding_window=7, max_window_layers=0,
                                 rope_parameters={"rope_type": "llama3", "rope_theta": 1e6, "factor": 4.0,
                                                  "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                  "original_max_position_embeddings": 20})
    ).eval()  # fmt: skip
    for layer in reference.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    copy_llama(reference, ours := build(QWEN), q_norm="query_norm", k_norm="key_norm")
    compare(reference, ours, tolerance=1e-5)


def copy_llama(reference, ours, **more):
    weights = reference.state_dict()
    ours.embedding.word.weight.copy_(weights["model.embed_tokens.weight"])
    ours.final_norm.weight.copy_(weights["model.norm.weight"])
    ours.head.weight.copy_(weights["lm_head.weight"])
    names = {"input_layernorm": "attention_norm", "self_attn.q_proj": "attention.query",
             "self_attn.k_proj": "attention.key", "self_attn.v_proj": "attention.value",
             "self_attn.o_proj": "attention.output", "post_attention_layernorm": "mlp_norm",
             "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}  # fmt: skip
    names |= {f"self_attn.{theirs}": f"attention.{name}" for theirs, name in more.items()}
    copy_layers(
        weights, ours, {f"model.layers.{{}}.{theirs}.weight": f"{name}.weight" for theirs, name in names.items()}
    )


def compare(reference, ours, tolerance):
    ids = torch.randint(0, 97, (2, 20))
    logits = reference(ids).logits
    assert (ours.next_token_logits(ids) - logits[:, -1]).abs().max() <= tolerance * logits.abs().max()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss = ours(ids[:, :-1], ids[:, 1:])
    assert abs(loss - expected) <= tolerance * expected


def test_initial_weights_follow_gpt2():
    model = build(ModelConfig(num_layers=8, hidden_size=96, num_attention_heads=4, vocab_size=500))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            std = 0.02 / 4 if residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < std / 10, name


def test_every_parameter_gets_a_gradient_and_tied_weights_are_one():
    tied, untied = build(GPT2), build(LLAMA)
    ids = torch.randint(0, 97, (2, 8))
    for model in (tied, untied):
        model(ids, ids).backward()
        assert all(
            p.grad is not None and p.grad.abs().max() > 0
            for name, p in model.named_parameters()
            if "key.bias" not in name
        )
    assert not any(name.startswith("head") for name, _ in tied.named_parameters())
