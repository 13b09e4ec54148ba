"""What can be wrong with data, each with the exit code a process ends with."""


class DataPathError(Exception):
    """A missing file, or a setting with which the data cannot be used."""

    exit_code = 78


class TokenizerError(Exception):
    """A tokenizer that is unknown, unreachable, malformed or not the one the data was prepared with."""

    exit_code = 78


class CorruptDataError(Exception):
    """Bad data inside a file that opens."""

    exit_code = 65
