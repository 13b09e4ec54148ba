"""GPTModel: embedding, transformer block, final norm, and the output head with its loss."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from core.attention import KeyValueCache
from core.block import TransformerBlock, TransformerLayer
from core.config import ModelConfig
from core.dropout import DropoutKey, DropoutSite, dropout, dropout_site_hash
from core.embedding import LanguageModelEmbedding
from core.loss import LinearCrossEntropy, VocabularyShard
from core.norm import build_norm
from parallel.stages import Stage
from parallel.tensor import TensorParallel, VocabParallelEmbedding, local


class GPTModel(nn.Module):
    """A decoder-only transformer language model, or one pipeline stage of it.

    Built on the meta device; `parallel.initialization.materialize` gives it memory and values. A parameter has the same
    name in every stage and layout. A last stage has its own copy of a tied embedding, under the embedding's name.

    Args:
        tensor: the ranks that share each weight matrix; None: this rank alone.
        stage: which part of the model; None: all of it.
        seed: what dropout depends on beside samples and positions.
        recompute: what the backward pass computes again rather than keep: none, selective or full.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        *,
        stage: Stage | None = None,
        seed: int = 0,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.tensor = tensor = tensor or TensorParallel()
        self.stage = stage = stage or Stage(0, range(config.num_layers))
        if stage.is_first or (stage.is_last and config.tie_embeddings):
            self.embedding = LanguageModelEmbedding(config, tensor, is_input=stage.is_first)
        self.embedding_place = dropout_site_hash(0, DropoutSite.EMBEDDING)
        self.block = TransformerBlock(config, stage.layers, tensor, recompute=recompute)
        self.head: VocabParallelEmbedding | None = None
        if not stage.is_last:
            return
        self.final_norm = build_norm(config, tensor)
        if not config.tie_embeddings:
            self.head = VocabParallelEmbedding(
                config.vocabulary, config.hidden_size, init_std=config.init_std, tensor=tensor
            )
        self.cross_entropy = LinearCrossEntropy()

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor, sample_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The summed loss of labels `[batch, seq]` after input ids `[batch, seq]`: a scalar in at least float32.

        A stage that is not the first takes the hidden states `[batch, seq, hidden]` of the one before, one that is not
        the last returns its own; with sequence parallelism they are a shard of the sequence. `sample_indices`
        `[batch]`, each sample's index in the run, are what dropout depends on; without them nothing is dropped out.
        """
        positions = torch.arange(labels.shape[1], device=labels.device)
        key = None
        if self.config.dropout and sample_indices is not None:
            of_shard = self.tensor.sequence_shard(positions, 0)
            key = DropoutKey.build(self.config.dropout, self.seed, sample_indices, of_shard, self.config.hidden_size)
        hidden = self._hidden(inputs, positions, None, key)
        if not self.stage.is_last:
            return hidden
        hidden = self.tensor.expand(hidden)
        table, shard = self._output, None
        if self.tensor.size > 1:
            shard = VocabularyShard(table.first_row, table.own_tokens, self.tensor.group)
        return self.cross_entropy(hidden.flatten(0, 1), local(table.weight), labels.flatten(), shard)

    @torch.no_grad()
    def next_token_logits(self, input_ids: torch.Tensor, caches: Sequence[KeyValueCache] | None = None) -> torch.Tensor:
        """Logits `[batch, vocabulary]` of the token after input ids `[batch, seq]`.

        With caches, `input_ids` are the tokens after those the caches hold.
        """
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        with self.tensor.whole_sequences():
            last = self._hidden(input_ids, positions, caches)[:, -1]
        logits = F.linear(last, local(self._output.weight))
        if self.tensor.size > 1:
            parts = [torch.empty_like(logits) for _ in range(self.tensor.size)]
            dist.all_gather(parts, logits, group=self.tensor.group)
            logits = torch.cat(parts, dim=1)
        return logits[:, : self.config.vocabulary]

    def new_caches(self, batch_size: int, max_length: int) -> list[KeyValueCache]:
        """Empty key/value caches, one a layer, with room for `max_length` positions."""
        weight = self.embedding.word.weight
        return [
            KeyValueCache(
                batch_size,
                cast(TransformerLayer, layer).attention.local_groups,
                max_length,
                self.config.head_size,
                weight.dtype,
                weight.device,
            )
            for layer in self.block.layers.values()
        ]

    def sharding_units(self) -> list[nn.Module]:
        """Parts that data parallelism gathers one by one; the rest (final norm, head, tied embedding) is one more."""
        layers: list[nn.Module] = list(self.block.layers.values())
        apart = self.stage.is_first and self.stage.is_last and not self.config.tie_embeddings
        return [self.embedding, *layers] if apart else layers

    @property
    def _output(self) -> VocabParallelEmbedding:
        return self.embedding.word if self.head is None else self.head

    def _hidden(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[KeyValueCache] | None,
        key: DropoutKey | None = None,
    ) -> torch.Tensor:
        """The residual stream, after the last norm where that is here: `[batch, seq, hidden]`, with sequence
        parallelism a shard of it."""
        x = inputs
        if self.stage.is_first:
            x = dropout(self.embedding(inputs, positions), key, self.embedding_place)
        x = self.block(x, positions, caches, key)
        return cast(torch.Tensor, self.final_norm(x)) if self.stage.is_last else x


def build_meta_model(
    config: ModelConfig,
    dtype: torch.dtype,
    tensor: TensorParallel | None = None,
    *,
    stage: Stage | None = None,
    seed: int = 0,
    recompute: str = "none",
) -> GPTModel:
    """The model, or a stage of it, on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return GPTModel(config, tensor, stage=stage, seed=seed, recompute=recompute).to(dtype)
