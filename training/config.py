"""The root of the configuration: the groups that training owns, and one frozen object that holds all of them."""

from dataclasses import dataclass, field

from core.config import ModelConfig
from data.config import DataConfig
from parallel.config import ParallelConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients move weights."""

    name: str = field(default="adamw", metadata={"choices": ("adamw",)})
    """The optimizer."""
    lr: float = field(default=6e-4, metadata={"above": 0.0})
    """Peak learning rate."""
    weight_decay: float = field(default=0.1, metadata={"min": 0.0})
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    beta1: float = field(default=0.9, metadata={"min": 0.0, "below": 1.0})
    """Decay of the first moment."""
    beta2: float = field(default=0.95, metadata={"min": 0.0, "below": 1.0})
    """Decay of the second moment."""
    eps: float = field(default=1e-8, metadata={"above": 0.0})
    """Added to the root of the second moment."""
    clip_grad: float = field(default=1.0, metadata={"min": 0.0})
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: str = field(default="cosine", metadata={"choices": ("cosine", "wsd", "constant")})
    """Shape after the warm-up: cosine decay, warm-up-stable-decay, or constant."""
    warmup_steps: int = field(default=0, metadata={"min": 0})
    """Steps of linear warm-up from zero."""
    steps: int | None = field(default=None, metadata={"min": 1})
    """Steps after which the minimum is reached; null: train.steps."""
    min_lr: float = field(default=0.0, metadata={"min": 0.0})
    """Learning rate at the end of the decay."""
    decay_steps: int | None = field(default=None, metadata={"min": 1})
    """Steps of wsd's final decay; null: a tenth of the schedule."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much at once, in which numbers."""

    steps: int = field(default=100, metadata={"min": 1})
    """Optimizer steps of the run; raising it continues a finished run."""
    micro_batch_size: int | None = field(default=None, metadata={"min": 1})
    """Samples a rank takes at once; null: its whole share of the global batch."""
    global_batch_size: int = field(default=8, metadata={"min": 1})
    """Samples an optimizer step takes over all ranks."""
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16", "fp64", "tf32", "fp16")})
    """Numbers that layers compute in; bf16 keeps float32 master weights."""
    compile: bool = False
    """Compile each layer."""
    recompute: str = field(default="none", metadata={"choices": ("none", "selective", "full")})
    """Activations that backward computes again instead of keeping."""
    eval_interval: int = field(default=0, metadata={"min": 0})
    """Steps between evaluations on the validation split; 0: none."""
    eval_steps: int = field(default=8, metadata={"min": 1})
    """Global batches an evaluation takes."""
    log_interval: int = field(default=1, metadata={"min": 1})
    """Steps between logged steps."""
    exit_after: int | None = field(default=None, metadata={"min": 1})
    """Save and end as preempted once this many steps were taken by this start; null: never."""
    max_minutes: float | None = field(default=None, metadata={"above": 0.0})
    """Save and end as preempted this many minutes after the start of the process; null: never."""
    init_device: str | None = field(default=None, metadata={"choices": ("cpu", "cuda")})
    """Device that draws initial weights; null: the training device. `cpu` makes them equal across kinds of device."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and what a start takes up."""

    interval: int = field(default=500, metadata={"min": 0})
    """Steps between checkpoints; 0: only the last step. The last step is always saved."""
    keep: int = field(default=2, metadata={"min": 1})
    """Newest checkpoints that stay on disk."""
    resume: str = "auto"
    """`auto` continues from the newest valid checkpoint, a step number from that one; `never` only starts anew."""
    load: str | None = None
    """A checkpoint directory whose weights a new run starts from."""
    verify: str = field(default="auto", metadata={"choices": ("auto", "full", "sizes", "off")})
    """What is checked before loading: `full` hashes every file, `sizes` compares lengths; auto: full up to 50 GB."""


@dataclass(frozen=True)
class LogConfig:
    """What is recorded beside metrics.jsonl."""

    wandb: str = field(default="off", metadata={"choices": ("off", "offline", "online")})
    """Report to Weights & Biases; never hurts the run where it fails."""
    wandb_project: str = "kilotron"
    """Project that runs are reported to."""
    sample_ids: bool = False
    """Write the samples of every step, gathered from what each rank fed, to samples.jsonl."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Composed once, validated once, passed down, never changed."""

    name: str = "run"
    """Name of the run; its directory is out_dir/name."""
    out_dir: str = "outputs"
    """Where run directories and the prepared sample corpus lie."""
    seed: int = field(default=1234, metadata={"min": 0})
    """Seed of initial weights and of the data order."""
    check: bool = False
    """Only validate the configuration, then end."""
    world_size: int | None = field(default=None, metadata={"min": 1})
    """Ranks, for check and tools; null: WORLD_SIZE as torchrun sets it, else 1."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def run_dir(self) -> str:
        """Directory that everything the run writes lies in."""
        return f"{self.out_dir}/{self.name}"

    @property
    def seq_length(self) -> int:
        """Tokens the model sees of a sample."""
        return self.model.max_position_embeddings if self.data.seq_length is None else self.data.seq_length

    @property
    def micro_batch_size(self) -> int:
        """Samples a rank takes at once."""
        share = self.train.global_batch_size // self.parallel.dp
        return share if self.train.micro_batch_size is None else self.train.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a rank takes in one optimizer step."""
        return self.train.global_batch_size // (self.parallel.dp * self.micro_batch_size)

    @property
    def schedule_steps(self) -> int:
        """Steps after which the schedule reaches its minimum."""
        return self.train.steps if self.schedule.steps is None else self.schedule.steps

    @property
    def decay_steps(self) -> int:
        """Steps of wsd's final decay."""
        return max(1, self.schedule_steps // 10) if self.schedule.decay_steps is None else self.schedule.decay_steps
