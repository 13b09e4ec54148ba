"""The `model` group: every dimension and choice that defines a GPT, free of torch and numpy."""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """What the model is. A null dimension is derived from the others: read it by the property below."""

    num_layers: int = field(default=12, metadata={"min": 1})
    """Transformer layers."""
    hidden_size: int = field(default=768, metadata={"min": 1})
    """Width of the residual stream."""
    ffn_hidden_size: int | None = field(default=None, metadata={"min": 1})
    """Width inside the MLP; null: 4 * hidden_size, for swiglu 8/3 * hidden_size rounded up to a multiple of 64."""
    num_attention_heads: int = field(default=12, metadata={"min": 1})
    """Query heads."""
    num_query_groups: int | None = field(default=None, metadata={"min": 1})
    """Key/value heads, each shared by a group of query heads; null: num_attention_heads."""
    head_dim: int | None = field(default=None, metadata={"min": 1})
    """Width of a head; null: hidden_size / num_attention_heads."""
    vocab_size: int | None = field(default=None, metadata={"min": 1})
    """Rows of the embedding; null: the tokenizer's vocabulary, else at least as large."""
    max_position_embeddings: int = field(default=1024, metadata={"min": 1})
    """Longest sequence the model is meant for; the number of learned positions where they are learned."""
    normalization: str = field(default="layernorm", metadata={"choices": ("layernorm", "rmsnorm")})
    """Normalisation before attention, before the MLP and before the output head."""
    norm_eps: float = field(default=1e-5, metadata={"above": 0.0})
    """Added to the variance under the root."""
    activation: str = field(default="gelu", metadata={"choices": ("gelu", "gelu_tanh", "relu2", "swiglu")})
    """Non-linearity of the MLP; gelu_tanh is GPT-2's approximation, relu2 a squared ReLU (arXiv:2109.08668), swiglu is
    gated (arXiv:2002.05202)."""
    position_embedding: str = field(default="learned", metadata={"choices": ("learned", "rope", "none")})
    """How positions enter: a learned table, rotary embedding (arXiv:2104.09864), or not at all."""
    rope_theta: float = field(default=10_000.0, metadata={"above": 0.0})
    """Base of the rotary frequencies."""
    rope_scaling: str | None = field(default=None, metadata={"choices": ("llama3",)})
    """Slowing of the low rotary frequencies for contexts longer than trained on: llama3, as Llama 3.1; null: none."""
    rope_scaling_factor: float = field(default=8.0, metadata={"min": 1.0})
    """What low frequencies are divided by."""
    rope_low_frequency_factor: float = field(default=1.0, metadata={"above": 0.0})
    """Frequencies of fewer turns than this in rope_original_length are low."""
    rope_high_frequency_factor: float = field(default=4.0, metadata={"above": 0.0})
    """Frequencies of more turns than this in rope_original_length stay; those between are blended."""
    rope_original_length: int = field(default=8192, metadata={"min": 1})
    """Positions that the frequencies were trained on before."""
    bias: bool = True
    """Biases in linear layers and in layernorm."""
    qk_norm: bool = False
    """Root-mean-square normalisation of each head's queries and keys before rotary embedding, as in Qwen3."""
    sliding_window: int | None = field(default=None, metadata={"min": 1})
    """Positions that a query sees, itself and those just before it, as in Mistral; null: itself and all before."""
    tie_embeddings: bool = True
    """Use the word embedding as the output head."""
    dropout: float = field(default=0.0, metadata={"min": 0.0, "below": 1.0})
    """Probability of dropping an element of the embedding and of each residual branch."""
    init_std: float = field(default=0.02, metadata={"above": 0.0})
    """Standard deviation of initial weights; residual projections take init_std / sqrt(2 * num_layers), like GPT-2."""
    num_experts: int | None = field(default=None, metadata={"min": 1})
    """Experts a mixture-of-experts layer holds; null: dense."""
    moe_top_k: int = field(default=2, metadata={"min": 1})
    """Experts each token visits."""

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP, derived where `ffn_hidden_size` is null."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Key/value heads, derived where `num_query_groups` is null."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_size(self) -> int:
        """Width of a head, derived where `head_dim` is null."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, once the configuration is resolved. Raises ValueError before."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is null: it is known once the tokenizer is (settings.resolve)")
        return self.vocab_size

    def resolved(self) -> dict[str, Any]:
        """Every setting by its name, with what null stands for."""
        derived = {"ffn_hidden_size": self.ffn_size, "num_query_groups": self.query_groups, "head_dim": self.head_size}
        return {part.name: getattr(self, part.name) for part in fields(self)} | derived

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the tables of words and of learned positions; an untied head is none. Raises ValueError while
        `vocab_size` is null."""
        positions = self.max_position_embeddings if self.position_embedding == "learned" else 0
        return self.hidden_size * (self.vocabulary + positions)

    def parameter_count(self, tp: int = 1) -> int:
        """Parameters of the model, without padding; with `tp` ranks to share them, those that one rank holds.

        What is whole on every rank counts whole: norms, biases of row-parallel layers, learned positions, and keys and
        values of fewer groups than ranks. Vocabulary rows count as padded to a multiple of `tp`. Raises ValueError
        while `vocab_size` is null.
        """
        twice = self.hidden_size * -(-self.vocabulary // tp) if self.tie_embeddings else 0
        return self.stage_parameters(self.num_layers, is_first=True, is_last=True, tp=tp) - twice

    def stage_parameters(self, layers: int, *, is_first: bool, is_last: bool, tp: int = 1) -> int:
        """Parameters of a pipeline stage of so many layers, a tied embedding's copy on the last included."""
        columns, _ = self._layer_widths(tp)
        norm = self.hidden_size * (2 if self.normalization == "layernorm" and self.bias else 1)
        layer = self.matrix_parameters(tp) // self.num_layers + 2 * norm
        if self.bias:
            layer += columns + 2 * self.hidden_size
        if self.qk_norm:
            layer += 2 * self.head_size
        table = self.hidden_size * -(-self.vocabulary // tp)
        learned = self.max_position_embeddings if self.position_embedding == "learned" else 0
        ends = (table + self.hidden_size * learned if is_first else 0) + (table + norm if is_last else 0)
        return layers * layer + ends

    def matrix_parameters(self, tp: int = 1) -> int:
        """Parameters of the matrices of layers, as `parameter_count` counts."""
        return self.num_layers * self.hidden_size * sum(self._layer_widths(tp))

    def _layer_widths(self, tp: int) -> tuple[int, int]:
        """Columns of a layer's projections from the hidden size, and rows of those back to it, on one rank."""
        query = self.num_attention_heads // tp * self.head_size
        groups = self.query_groups // tp if self.query_groups >= tp else self.query_groups
        ffn = self.ffn_size // tp
        return query + 2 * groups * self.head_size + ffn * (2 if self.activation == "swiglu" else 1), query + ffn
