"""GPT-2 as Hugging Face writes it: matrices are stored `[in, out]`, query, key and value side by side."""

from models.hugging_face import Family, Setting

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base="transformer.",
    settings=(
        Setting("num_layers", "n_layer", 12),
        Setting("hidden_size", "n_embd", 768),
        Setting("ffn_hidden_size", "n_inner", None),
        Setting("num_attention_heads", "n_head", 12),
        Setting("vocab_size", "vocab_size", 50257),
        Setting("max_position_embeddings", "n_positions", 1024),
        Setting("norm_eps", "layer_norm_epsilon", 1e-5),
        Setting(
            *("activation", "activation_function", "gelu_new"),
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        ),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("init_std", "initializer_range", 0.02),
    ),
    constants={},
    requirements={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    modules={
        "{base}wte": "embedding.word",
        "{base}wpe": "embedding.position",
        "{base}h.{layer}.ln_1": "attention_norm",
        "{base}h.{layer}.attn.c_attn": "attention.query attention.key attention.value",
        "{base}h.{layer}.attn.c_proj": "attention.output",
        "{base}h.{layer}.ln_2": "mlp_norm",
        "{base}h.{layer}.mlp.c_fc": "mlp.up",
        "{base}h.{layer}.mlp.c_proj": "mlp.down",
        "{base}ln_f": "final_norm",
        "lm_head": "head",
    },
    transposed=("c_attn", "c_proj", "c_fc"),
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
