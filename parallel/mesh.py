"""The one object that knows how ranks are laid out; it is passed to whatever communicates."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import ParallelConfig


class ParallelMesh:
    """Ranks as a grid (dp_replicate, dp_shard): neighbours in rank shard one copy of the model, rows replicate it.

    Args:
        config: resolved; its sizes multiply to the world size.
        device_type: "cpu" or "cuda".
    """

    def __init__(self, config: ParallelConfig, device_type: str) -> None:
        self.device_mesh: DeviceMesh = init_device_mesh(
            device_type, (config.dp_replicate, config.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        self.dp_size = config.dp
        self.dp_replicate_rank = self.device_mesh.get_local_rank("dp_replicate")
        self.dp_rank = self.dp_replicate_rank * config.dp_shard + self.device_mesh.get_local_rank("dp_shard")

    @property
    def fsdp(self) -> DeviceMesh:
        """What `fully_shard` takes: the sharding dimension alone, or (replicate, shard) where there are replicas."""
        return self.device_mesh["dp_shard"] if self.device_mesh.shape[0] == 1 else self.device_mesh

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that feed different samples: sums over a global batch run over it."""
        group = dist.group.WORLD
        if group is None:
            raise RuntimeError("the process group is not initialised")
        return group
