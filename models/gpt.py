"""GPTModel: embedding, transformer block, final norm, and the output head with its loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from core.attention import KeyValueCache
from core.block import TransformerBlock
from core.config import ModelConfig
from core.embedding import LanguageModelEmbedding
from core.loss import LinearCrossEntropy
from core.norm import build_norm
from parallel.layers import Linear


class GPTModel(nn.Module):
    """A decoder-only transformer language model.

    Built on the meta device; `parallel.initialization.materialize` gives it memory and values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = LanguageModelEmbedding(config)
        self.block = TransformerBlock(config, range(config.num_layers))
        self.final_norm = build_norm(config)
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocabulary, bias=False, init_std=config.init_std)
        self.cross_entropy = LinearCrossEntropy()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The summed loss of labels `[batch, seq]` after input ids `[batch, seq]`: a scalar in at least float32."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self._hidden(input_ids, positions, None)
        return self.cross_entropy(hidden.flatten(0, 1), self._output_weight, labels.flatten())

    @torch.no_grad()
    def next_token_logits(self, input_ids: torch.Tensor, caches: Sequence[KeyValueCache] | None = None) -> torch.Tensor:
        """Logits `[batch, vocabulary]` of the token after input ids `[batch, seq]`.

        With caches, `input_ids` are the tokens after those the caches hold.
        """
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        return F.linear(self._hidden(input_ids, positions, caches)[:, -1], self._output_weight)

    def new_caches(self, batch_size: int, max_length: int) -> list[KeyValueCache]:
        """Empty key/value caches, one a layer, with room for `max_length` positions."""
        weight = self.embedding.word.weight
        return [
            KeyValueCache(
                batch_size, self.config.query_groups, max_length, self.config.head_size, weight.dtype, weight.device
            )
            for _ in range(self.config.num_layers)
        ]

    def sharding_units(self) -> list[nn.Module]:
        """Parts that data parallelism gathers one by one; the rest (final norm, head, tied embedding) is one more."""
        layers: list[nn.Module] = list(self.block.layers.values())
        return layers if self.config.tie_embeddings else [self.embedding, *layers]

    @property
    def _output_weight(self) -> torch.Tensor:
        return self.embedding.word.weight if self.head is None else self.head.weight

    def _hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, caches: Sequence[KeyValueCache] | None
    ) -> torch.Tensor:
        embedded = self.embedding(input_ids, positions)
        return self.final_norm(self.block(embedded, positions, caches))


def build_meta_model(config: ModelConfig, dtype: torch.dtype) -> GPTModel:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return GPTModel(config).to(dtype)
