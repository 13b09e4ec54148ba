"""The `parallel` group: over which ranks the work is laid out, free of torch and numpy."""

from dataclasses import dataclass, field

from parallel.stages import default_stages_per_rank


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are laid out: world = pp * dp_replicate * dp_shard * cp * tp."""

    tp: int = field(default=1, metadata={"min": 1})
    """Tensor parallelism: ranks that share each weight matrix."""
    sequence: bool | None = None
    """Sequence parallelism beside tp: norms and residuals on shards of the sequence; null: on where tp > 1."""
    pp: int = field(default=1, metadata={"min": 1})
    """Pipeline parallelism: ranks that divide the layers between them."""
    pp_schedule: str = field(
        default="1f1b", metadata={"choices": ("gpipe", "1f1b", "interleaved", "zb", "zbv", "dualpipev")}
    )
    """Its schedule: gpipe, 1f1b, interleaved, zb, zbv or dualpipev."""
    virtual_stages: int | None = field(default=None, metadata={"min": 1})
    """Stages a pipeline rank has; null: 2 for interleaved, zbv and dualpipev, else 1."""
    layers_per_stage: list[int] | None = field(default=None, metadata={"min": 1})
    """Layers of each stage in order; null: divided by cost, the output head's included."""
    cp: int = field(default=1, metadata={"min": 1})
    """Context parallelism: ranks that share each sequence."""
    cp_method: str = field(default="allgather", metadata={"choices": ("allgather", "ulysses", "ring")})
    """How context-parallel ranks exchange keys and values."""
    ep: int = field(default=1, metadata={"min": 1})
    """Expert parallelism: ranks, out of dp_shard * cp, that share the experts."""
    dp_replicate: int = field(default=1, metadata={"min": 1})
    """Data-parallel replicas that hold whole weights."""
    dp_shard: int = field(default=-1, metadata={"min": -1})
    """Data-parallel ranks over which weights, gradients and optimizer state are sharded; -1: all ranks that remain."""
    zero: int | None = field(default=None, metadata={"choices": (1, 2, 3)})
    """3 gathers weights in every pass and reduces gradients every micro-batch, 2 gathers once a step, 1 both;
    null: 3; 1 with pp."""
    timeout_minutes: float = field(default=10.0, metadata={"above": 0.0, "below": 1e6})
    """Minutes that a rank waits for the others, once the first step is taken, before it takes them for lost."""
    startup_minutes: float = field(default=30.0, metadata={"above": 0.0, "below": 1e6})
    """The same until then, while data is prepared, a checkpoint is loaded and layers are compiled."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks: those that feed different samples. Meaningful once `dp_shard` is resolved."""
        return self.dp_replicate * self.dp_shard

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms and residuals are on shards of the sequence."""
        return self.tp > 1 and self.sequence is not False

    @property
    def zero_stage(self) -> int:
        """`zero`, or what stands for null."""
        return self.zero or (1 if self.pp > 1 else 3)

    @property
    def stages_per_rank(self) -> int:
        """`virtual_stages`, or what stands for null."""
        return self.virtual_stages or (default_stages_per_rank(self.pp_schedule) if self.pp > 1 else 1)

    @property
    def stages(self) -> int:
        """Parts that the layers are divided into."""
        return self.pp * self.stages_per_rank
