"""Where prepared data lies: known before anything heavy is imported."""

import difflib
import platform
from pathlib import Path

from data.config import DataConfig
from runtime.errors import CorruptDataError, DataPathError
from runtime.files import is_there, sha256_of


def require_pair(prefix: str) -> tuple[Path, Path]:
    """The `.bin` and `.idx` of `prefix`.

    Raises DataPathError where neither exists, naming the nearest prefixes in that folder, or one is no regular file,
    and CorruptDataError where only one exists.
    """
    paths = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [path for path in paths if not is_there(path)]
    if len(missing) == 1:
        present = next(path for path in paths if path not in missing)
        raise CorruptDataError(
            f"{present} has no {missing[0].name} beside it: the copy or preparation was interrupted; prepare it again"
        )
    if missing:
        raise DataPathError(f"no prepared data at {prefix} (wanted {prefix}.bin and {prefix}.idx); {_nearest(prefix)}")
    return paths


def _nearest(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        return f"a prefix has no suffix: try {prefix[:-4]}"
    folder = Path(prefix).parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = sorted(path.stem for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    nearest = difflib.get_close_matches(Path(prefix).name, names, n=3, cutoff=0.0)
    if not nearest:
        return f"{folder} holds no prepared data; `kilotron prepare INPUT --output {prefix}` makes it from text"
    return "nearest: " + ", ".join(str(folder / name) for name in nearest)


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
