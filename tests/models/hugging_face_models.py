"""Small random models of transformers, saved as their users save them."""

import json

import torch
from safetensors.torch import load_file, save_file

SCALED = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LLAMA = {"vocab_size": 97, "max_position_embeddings": 64, "hidden_size": 48, "intermediate_size": 80,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
         "initializer_range": 0.2, "bos_token_id": 3, "eos_token_id": 5}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.2,
        "bos_token_id": 5, "eos_token_id": 5}  # fmt: skip
MODELS = {
    "gpt2": ("GPT2", GPT2, torch.float64),
    "gpt2_untied": (
        "GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 100, "activation_function": "gelu"}, torch.float64
    ),
    "llama": ("Llama", LLAMA, torch.float32),
    "llama_tied": (
        "Llama",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        torch.float32,
    ),
    "llama3": ("Llama", LLAMA | {"rope_parameters": SCALED}, torch.float32),
}  # fmt: skip
"""name -> (family, configuration, dtype); each has what the others lack."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def reference(name, dtype=None, **changes):
    """The model with all parameters random: biases and norms too, which transformers starts at constants."""
    import transformers  # ranks that never ask for one need not wait for it

    family, settings, own_dtype = MODELS[name]
    settings = settings | changes
    torch.manual_seed(1)
    if family == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in key or "ln_" in key), std=0.2)
    return model.to(dtype or own_dtype).eval()


def save(model, path, **options):
    model.save_pretrained(path, **options)
    return path


def save_tokenizer(path):
    """A byte-level tokenizer of 300 tokens, of which `<|endoftext|>` is number 0, as its users save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator(["the cat sat on the mat, and the dog on the log"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>").save_pretrained(path)
    return path


def stored(path):
    """Every tensor of a directory's files by name."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite(path, tensors=None, **settings):
    """Change a saved model: its tensors, keys of its config.json."""
    if tensors is not None:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    if settings:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | settings))
    return path


def equal_bytes(one, other):
    """Whether two directories' tensors have the same names, dtypes and bytes."""
    assert one.keys() == other.keys()
    return all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name in one
    )
