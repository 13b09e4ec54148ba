"""How much arithmetic a token costs."""

from core.config import ModelConfig


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating-point operations of matrix products that training takes for a token, forward and backward.

        6 * layers * hidden * (2 * query + 2 * key_value + matrices * ffn)    projections of attention and MLP
      + 12 * layers * query * min(seq_length, sliding_window)                 scores, and their product with the values
      + 6 * hidden * vocabulary                                               output head

    where query and key_value are heads * head_dim and query_groups * head_dim, and matrices 3 with swiglu, else 2. A
    product is a multiplication and an addition a weight in the forward pass, and twice that in the backward pass. As
    usual (arXiv:2204.02311, appendix B) attention counts as if every query saw every key; looking up an embedding
    and computing activations again cost nothing. Raises ValueError while `vocab_size` is null.
    """
    return config.num_layers * layer_flops(config, seq_length) + head_flops(config)


def layer_flops(config: ModelConfig, seq_length: int) -> int:
    """What one layer takes of that."""
    query, key_value = (heads * config.head_size for heads in (config.num_attention_heads, config.query_groups))
    ffn = config.ffn_size * (3 if config.activation == "swiglu" else 2)
    keys = min(seq_length, config.sliding_window or seq_length)
    return 6 * (config.hidden_size * (2 * query + 2 * key_value + ffn) + 2 * query * keys)


def head_flops(config: ModelConfig) -> int:
    """What the output head takes of that."""
    return 6 * config.hidden_size * config.vocabulary
