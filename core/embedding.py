"""The embedding of token ids, and of their positions where those are learned."""

import torch
from torch import nn

from core.config import ModelConfig
from parallel.tensor import Embedding, TensorParallel, VocabParallelEmbedding


class LanguageModelEmbedding(nn.Module):
    """word[id] + position[index], the second only with learned positions.

    Args:
        is_input: false for the copy of the words that a pipeline's last stage computes logits with.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel, *, is_input: bool = True) -> None:
        super().__init__()
        self.tensor = tensor
        self.word = VocabParallelEmbedding(
            config.vocabulary, config.hidden_size, init_std=config.init_std, tensor=tensor
        )
        self.position: Embedding | None = None
        if is_input and config.position_embedding == "learned":
            self.position = Embedding(
                config.max_position_embeddings, config.hidden_size, init_std=config.init_std, tensor=tensor
            )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Ids `[batch, seq]` at `positions` `[seq]` to `[batch, seq, hidden]`: a shard of it if the sequence is cut."""
        embedded: torch.Tensor = self.word(input_ids)
        if self.position is None:
            return embedded
        return embedded + self.position(self.tensor.sequence_shard(positions, 0))
