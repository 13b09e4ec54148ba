"""The root of the configuration: the groups that training owns, and one frozen object that holds all of them."""

import math
import re
from dataclasses import dataclass, field

from core.config import ModelConfig
from core.flops import head_flops, layer_flops
from data.batch_schedule import BatchSchedule, parse_batch_schedule
from data.config import DataConfig
from parallel.config import ParallelConfig
from parallel.stages import divide_layers, supports_micro_batches
from runtime.messages import divisors


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients move weights."""

    name: str = field(default="adamw", metadata={"choices": ("adamw", "muon")})
    """AdamW; or Muon for the matrices of layers with AdamW for all else."""
    lr: float = field(default=6e-4, metadata={"above": 0.0})
    """Peak learning rate."""
    weight_decay: float = field(default=0.1, metadata={"min": 0.0})
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    groups: list[str] = field(default_factory=list)
    """Exceptions, each `PATTERN:lr_scale=0.5,weight_decay=0.0` (either or both): parameters whose name matches the
    shell pattern, such as `*.attention.*` or `embedding.word.weight`, have their own weight decay and a multiple of
    the scheduled rate. Of several that match and name a setting the last counts."""
    beta1: float = field(default=0.9, metadata={"min": 0.0, "below": 1.0})
    """Decay of the first moment."""
    beta2: float = field(default=0.95, metadata={"min": 0.0, "below": 1.0})
    """Decay of the second moment."""
    eps: float = field(default=1e-8, metadata={"above": 0.0})
    """Added to the root of the second moment."""
    momentum: float = field(default=0.95, metadata={"min": 0.0, "below": 1.0})
    """Muon's decay of the momentum."""
    nesterov: bool = True
    """Muon looks a step ahead along the momentum."""
    newton_schulz_steps: int = field(default=5, metadata={"min": 1, "below": 100})
    """Iterations with which Muon makes an update orthogonal."""
    adjust_lr: str = field(default="match_rms_adamw", metadata={"choices": ("match_rms_adamw", "original")})
    """How Muon's rate depends on a matrix's shape: `match_rms_adamw` takes AdamW's rates and weight decays, `original`
    multiplies by sqrt(max(1, rows / columns))."""
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
    """Samples a rank takes at once; null: as many as divide its share of every global batch and suit a pipeline."""
    global_batch_size: int = field(default=8, metadata={"min": 1})
    """Samples an optimizer step takes over all ranks; with batch_schedule its first size, whatever is set here."""
    batch_schedule: str | None = None
    """Global batch sizes by consumed tokens, as in "0:32 1B:64": 32 samples at first, 64 from the first step on that
    starts with 1B (k, M, B, T) tokens consumed. Evaluations keep to the first size."""
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16", "fp64", "tf32", "fp16")})
    """Numbers that layers compute in; bf16 and fp16 keep float32 master weights, fp16 scales its loss."""
    initial_loss_scale: float = field(default=65_536.0, metadata={"min": 1.0})
    """Loss scale that an fp16 run starts with; a step whose numbers overflow is skipped and halves it."""
    loss_scale_window: int = field(default=2_000, metadata={"min": 1})
    """Finite steps in a row after which fp16 doubles the loss scale."""
    compile: bool | None = None
    """Compile each layer with torch.compile; the first step then takes longer. null: on CUDA, where every rank finds a
    compiler and the pipeline schedule allows it."""
    deterministic: bool = False
    """The same bits whenever the same configuration runs on the same kind of machine, at some cost of speed; an
    operation that cannot do so is refused by name."""
    recompute: str = field(default="none", metadata={"choices": ("none", "selective", "full")})
    """What backward computes again instead of keeping: selective keeps a layer's input, the outputs of its linear
    layers and of attention, and computes norms, activations, rotary embedding and dropout again; full keeps only the
    layer's input."""
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
    profile: str | None = None
    """Steps, such as 10-12, of which rank 0 writes a trace, a table of operators and, on a GPU, its memory over time to
    logs/profile; null: none. Three are enough; profiled steps are slower."""
    timeline_step: int | None = field(default=None, metadata={"min": 1})
    """A step whose pipeline schedule is drawn as it was executed, to logs/timeline_step_N.png; null: none."""
    gc_interval: int = field(default=50, metadata={"min": 0})
    """Steps between Python's garbage collections, which happen on all ranks at once; 0 leaves them to Python."""

    @property
    def profile_steps(self) -> range:
        """The steps that `profile` names, counted from 1; empty for null and for what cannot be read."""
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", self.profile or "")
        return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and what a start takes up."""

    interval: int = field(default=500, metadata={"min": 0})
    """Steps between checkpoints; 0: only the last step. The last step is always saved."""
    keep: int = field(default=2, metadata={"min": 1})
    """Newest checkpoints that stay on disk."""
    keep_every: int = field(default=0, metadata={"min": 0})
    """Checkpoints of every so many steps stay too; 0: none."""
    keep_best: bool = False
    """The checkpoint with the smallest validation loss stays too, of those saved at a step that was evaluated."""
    asynchronous: bool = True
    """Write beside training, from a copy in host memory; false: training waits, and no copy is made."""
    max_failures: int = field(default=3, metadata={"min": 0})
    """Saves in a row that may fail, a full disk say, before the run stops; one with which lines of metrics.jsonl or
    samples.jsonl cannot be written counts as failed."""
    resume: str = "auto"
    """`auto` continues from the newest valid checkpoint, a step number from that one; `never` only starts anew."""
    drop_moments: bool = False
    """Where the optimizer is another than the checkpoint's, continue without the old one's state."""
    load: str | None = None
    """Whose weights a new run starts from: a checkpoint directory, or `hf:DIR` for a Hugging Face one."""
    verify: str = field(default="auto", metadata={"choices": ("auto", "full", "sizes", "off")})
    """What is checked before loading: `full` hashes every file, `sizes` compares lengths; auto: full up to 50 GB a
    node, above the files that a node reads."""


@dataclass(frozen=True)
class LogConfig:
    """What is recorded beside metrics.jsonl."""

    wandb: str = field(default="off", metadata={"choices": ("off", "offline", "online")})
    """Report to Weights & Biases; never hurts the run where it fails."""
    wandb_project: str = "kilotron"
    """Project that runs are reported to."""
    tensorboard: bool = False
    """Write event files for TensorBoard to the run's folder tensorboard; never hurts the run where it fails."""
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
    def batches(self) -> BatchSchedule:
        """The sizes of global batches. Raises ValueError where train.batch_schedule is malformed."""
        text = self.train.batch_schedule
        return parse_batch_schedule(f"0:{self.train.global_batch_size}" if text is None else text, self.seq_length)

    @property
    def micro_batch_size(self) -> int:
        """Samples a rank takes at once: as many as there are, or as leave enough micro-batches for a pipeline."""
        if self.train.micro_batch_size is not None:
            return self.train.micro_batch_size
        shares = [size // self.parallel.dp for size in self.batches.sizes]
        most, layout = math.gcd(*shares), self.parallel
        if layout.pp == 1:
            return most
        enough = (
            number
            for number in reversed(divisors(most))
            if all(supports_micro_batches(layout.pp_schedule, layout.pp, share // number) for share in shares)
        )
        return next(enough, 1)

    @property
    def layers_per_stage(self) -> list[int]:
        """Layers of each pipeline stage: as given, or balanced. Raises ValueError where there are fewer than stages."""
        return self.parallel.layers_per_stage or self.balanced_layers

    @property
    def balanced_layers(self) -> list[int]:
        """Layers of each pipeline stage by what they and the output head cost; an embedding is a look-up and costs
        nothing. Raises ValueError where there are fewer than stages."""
        costs = layer_flops(self.model, self.seq_length), 0, head_flops(self.model)
        return divide_layers(self.model.num_layers, self.parallel.stages, *costs)

    @property
    def accumulated(self) -> list[int]:
        """Micro-batches a rank takes in one optimizer step, for each size of global batch."""
        return [size // (self.parallel.dp * self.micro_batch_size) for size in self.batches.sizes]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a rank takes in one optimizer step, in the first of them."""
        return self.accumulated[0]

    @property
    def schedule_steps(self) -> int:
        """Steps after which the schedule reaches its minimum."""
        return self.train.steps if self.schedule.steps is None else self.schedule.steps

    @property
    def decay_steps(self) -> int:
        """Steps of wsd's final decay."""
        return max(1, self.schedule_steps // 10) if self.schedule.decay_steps is None else self.schedule.decay_steps
