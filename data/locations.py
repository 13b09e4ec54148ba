"""Where prepared data lies: known before anything heavy is imported."""

import platform
from pathlib import Path

from data.config import DataConfig
from data.files import sha256_of


def data_prefix(config: DataConfig, out_dir: str) -> str:
    """The prefix of the `.bin`/`.idx` pair that `config` chooses: its path, else the embedded corpus."""
    return config.path if config.path is not None else sample_prefix(config, out_dir)


def sample_prefix(config: DataConfig, out_dir: str) -> str:
    """Where the embedded corpus lies once prepared: one place for each version of Python and each tokenizer."""
    tokenizer = config.tokenizer
    if tokenizer is None:
        tokenizer = f"bpe{config.corpus_vocab_size}"
    elif Path(tokenizer).is_file():
        tokenizer = f"{Path(tokenizer).stem}-{sha256_of(Path(tokenizer))[:12]}"
    return str(Path(out_dir) / "sample_corpus" / f"python{platform.python_version()}-{tokenizer}" / "sample")
