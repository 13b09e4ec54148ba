"""The embedding of token ids, and of their positions where those are learned."""

import torch
from torch import nn

from core.config import ModelConfig
from parallel.layers import Embedding


class LanguageModelEmbedding(nn.Module):
    """word[id] + position[index], the second only with learned positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = Embedding(config.vocabulary, config.hidden_size, init_std=config.init_std)
        self.position: Embedding | None = None
        if config.position_embedding == "learned":
            self.position = Embedding(config.max_position_embeddings, config.hidden_size, init_std=config.init_std)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Ids `[batch, seq]` at `positions` `[seq]` to `[batch, seq, hidden]`."""
        embedded = self.word(input_ids)
        return embedded if self.position is None else embedded + self.position(positions)
