"""The one object that knows how ranks are laid out; it is passed to whatever communicates."""

from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import ParallelConfig
from parallel.process_group import group_timeout
from parallel.stages import rank_of_stage
from parallel.tensor import TensorParallel


class ParallelMesh:
    """Ranks as a grid (pp, dp_replicate, dp_shard, tp): neighbours in rank share weight matrices, the most talkative
    way, and pipeline stages, which only hand on, lie the farthest apart.

    `config` is resolved: its sizes multiply to the world size. `device_type` is "cpu" or "cuda".
    """

    def __init__(self, config: ParallelConfig, device_type: str) -> None:
        names = ("pp", "dp_replicate", "dp_shard", "tp")
        sizes = (config.pp, config.dp_replicate, config.dp_shard, config.tp)
        self.device_mesh: DeviceMesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
        self.dp_size = config.dp
        self.dp_replicate_rank = self.device_mesh.get_local_rank("dp_replicate")
        self.dp_rank = self.dp_replicate_rank * config.dp_shard + self.device_mesh.get_local_rank("dp_shard")
        self.tp_size, self.tp_rank = config.tp, self.device_mesh.get_local_rank("tp")
        sharing = self.device_mesh["tp"] if config.tp > 1 else None
        self.pp_size, self.pp_rank = config.pp, self.device_mesh.get_local_rank("pp")
        self.has_loss = self.pp_rank == rank_of_stage(config.stages - 1, config.pp, config.pp_schedule)
        """Whether this rank has the last stage."""
        self.tensor = TensorParallel(sharing, sequence=config.sequence_parallel)
        """What layers are built with."""
        self.pipeline_group: dist.ProcessGroup | None = None
        """The ranks that a micro-batch passes through, in order."""
        if config.pp > 1:
            # A group of its own: in gloo, who waits for one rank keeps to the time-out that the group was made with.
            pipelines = self.device_mesh.mesh.flatten(1).t().tolist()
            timeout = group_timeout(timedelta(minutes=config.timeout_minutes), device_type)
            groups = dist.new_subgroups_by_enumeration(pipelines, timeout=timeout, group_desc="pp")
            self.pipeline_group = cast(dist.ProcessGroup, groups[0])
        self.data_group = self._data_group(config)
        """The ranks that feed different samples: sums over a global batch run over it."""

    @property
    def fsdp(self) -> DeviceMesh:
        """What `fully_shard` takes: the sharding dimension alone, or (replicate, shard) where there are replicas."""
        replicas = self.device_mesh["dp_replicate"].size() > 1
        return self.device_mesh["dp_replicate", "dp_shard"] if replicas else self.device_mesh["dp_shard"]

    def embedding_group(self) -> dist.ProcessGroup | None:
        """A new group of the ranks with the first and the last stage of this rank's pipeline, None where this rank has
        neither. Collective over all ranks; the two lie on different ranks."""
        ends = [[column[0], column[-1]] for column in self.device_mesh.mesh.flatten(1).t().tolist()]
        group, _ = dist.new_subgroups_by_enumeration(ends, group_desc="tied")
        return cast(dist.ProcessGroup | None, group)

    def _data_group(self, config: ParallelConfig) -> dist.ProcessGroup:
        if config.tp == config.pp == 1:
            return cast(dist.ProcessGroup, dist.group.WORLD)
        if config.dp_replicate == 1:
            return self.device_mesh.get_group("dp_shard")
        columns = self.device_mesh.mesh.flatten(1, 2).transpose(1, 2).flatten(0, 1).tolist()
        return cast(dist.ProcessGroup, dist.new_subgroups_by_enumeration(columns)[0])
