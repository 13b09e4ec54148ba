"""Errors that end a process with a message and an exit code that scripts rely on."""

RANK_ZERO_REPORT_GRACE_SECONDS = 1.0
"""How much later other ranks end with an error than rank 0, which puts it down: torchrun ends all when one ends."""


class RunError(Exception):
    """Something that ends a run; the message says what is wrong, where, and what would work."""

    exit_code = 1


class ConfigError(RunError):
    """The configuration, or a path it names, cannot be used. Takes one message a problem."""

    exit_code = 78

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.args)


class NonDeterministicError(Exception):
    """train.deterministic=true and an operation that is not. No RunError: each rank finds that out for itself."""

    exit_code = 78


class NonFiniteError(RunError):
    """The loss, a gradient or a weight is NaN or infinite."""

    exit_code = 70


class PeerError(RunError):
    """Another rank left or did not answer."""

    exit_code = 76


class RunDirectoryError(RunError):
    """The run directory belongs to another job."""

    exit_code = 73


class StorageError(RunError):
    """Files of the run cannot be read or written."""

    exit_code = 74


class DamageError(StorageError):
    """A file is not what was written."""


class RemovedError(DamageError):
    """A checkpoint that another process, whose run it is of, has removed while it was read."""


class DataPathError(Exception):
    """A missing file, or a setting with which the data cannot be used."""

    exit_code = 78


class TokenizerError(Exception):
    """A tokenizer that is unknown, unreachable, malformed or not the one the data was prepared with."""

    exit_code = 78


class CorruptDataError(Exception):
    """Bad data inside a file that opens."""

    exit_code = 65


class HuggingFaceError(Exception):
    """A Hugging Face directory that cannot be used, or a model that no family can express."""

    exit_code = 78
