"""A rank's part of a tensor as torch.distributed.checkpoint understands it, wherever parallelism has put it."""

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.sharding import Box, local_box, local_values


class TensorPart(torch.Tensor):
    """The values in a box of a whole tensor; shares memory with the tensor it was made of.

    The methods with underscores are torch's protocol for tensors that say themselves where their parts belong. Made by
    `tensor_part`.
    """

    box: Box
    whole: torch.Size

    # A part is data for the checkpoint, and its results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def size(self, dim: Any = None) -> Any:
        """Of the whole tensor."""
        return self.whole if dim is None else self.whole[dim]

    @property
    def plain(self) -> torch.Tensor:
        """The part as a plain tensor."""
        return self.as_subclass(torch.Tensor)

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.box.offsets), torch.Size(self.box.lengths))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        chunk = self._chunk()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.plain), self.whole)
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        if index.offset is not None and tuple(index.offset) != self.box.offsets:
            raise ValueError(f"{index.fqn} has no part at {list(index.offset)} on this rank")
        return self.plain


def tensor_part(tensor: torch.Tensor, shape: torch.Size) -> TensorPart:
    """This rank's part of `tensor`, sharded or not, whose whole has `shape` without padding."""
    box = local_box(tensor, shape)
    part: TensorPart = torch.Tensor._make_subclass(TensorPart, local_values(tensor, box))
    part.box, part.whole = box, shape
    return part
