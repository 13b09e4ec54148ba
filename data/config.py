"""The `data` group: which tokens are trained on, free of torch and numpy."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Which token stream is read and how it is cut into samples."""

    path: str | None = None
    """Prefix of a prepared `.bin`/`.idx` pair (see `kilotron prepare`); it wins over `corpus`."""
    corpus: str | None = field(default=None, metadata={"choices": ("sample",)})
    """An embedded corpus, prepared on first use: `sample` is the documentation inside the running Python."""
    corpus_vocab_size: int = field(default=1536, metadata={"min": 257})
    """Vocabulary of the tokenizer trained on the embedded corpus, where `tokenizer` is null."""
    blend: list[str] | None = None
    """Several prefixes with weights."""
    split: list[float] = field(default_factory=lambda: [98.0, 1.0, 1.0])
    """Shares of the documents for training, validation and test."""
    tokenizer: str | None = None
    """`bytes`, a tiktoken encoding (gpt2, cl100k_base, o200k_base), a `.tiktoken` file or a tokenizer.json; null: the
    one the data was prepared with."""
    seq_length: int | None = field(default=None, metadata={"min": 1})
    """Tokens the model sees of a sample; null: model.max_position_embeddings."""
    num_workers: int = field(default=1, metadata={"min": 0})
    """Threads that read batches ahead; 0 reads in the training loop."""
