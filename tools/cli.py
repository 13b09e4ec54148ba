"""The `kilotron` command: finds the tool, hands it its arguments, and turns its errors into exit codes."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from runtime.streams import flush_streams, open_missing_streams, tell

_STORAGE_FAILED = 74
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(78, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one tool and returns its exit status. `arguments` default to the command line's."""
    open_missing_streams()
    try:
        return _run_tool(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        flush_streams()


def _run_tool(words: list[str]) -> int:
    tools = {
        "prepare": "turn text files or JSON lines into training data",
        "train-tokenizer": "train a vocabulary on text",
        "generate": "let a trained model write",
        "describe": "say how large a model is, what a token costs and what training it holds",
        "layouts": "list the ways to divide a model over ranks",
        "timeline": "draw what pipeline ranks do when, and how long they idle",
        "parity": "compare a layout with one process, scaled down to this machine",
        "checkpoint": "list, show and verify the checkpoints of a run",
        "import": "make a run directory of a Hugging Face model",
        "export": "write a run's model as a Hugging Face directory",
        "launch": "write, show and submit a batch script for SLURM",
    }
    parser = _Parser(prog="kilotron", description="Tools around pretrain_gpt.py.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = None
    for name, purpose in tools.items():
        command = commands.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        # only the tool that runs is imported, so that --help answers at once
        if words[:1] == [name]:
            tool = importlib.import_module(f"tools.{'import_model' if name == 'import' else name.replace('-', '_')}")
            tool.add_arguments(command)
            chosen, run = command, tool.run
    if chosen is None:
        parser.parse_args(words)  # shows help, or says what is wrong
        return 0
    # Options may stand between KEY=VALUE words; where -- ends them, what follows is left to the tool.
    parsed = (chosen.parse_args if "--" in words else chosen.parse_intermixed_args)(words[1:])
    try:
        status = int(run(parsed))
        # What cannot be written is this command's error, rather than one of the interpreter at its end.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return 0  # whoever reads has read enough
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        exit_code = getattr(error, "exit_code", _STORAGE_FAILED if isinstance(error, OSError) else None)
        if exit_code is None:
            raise
        tell(f"error: {error}".replace("\n", "\n       "))
        return int(exit_code)


if __name__ == "__main__":
    sys.exit(main())
