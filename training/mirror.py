"""Metrics repeated for other programs, best effort: whatever goes wrong is said in one line and hurts no run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from training.metrics import EvaluationMetrics, StepMetrics


class Service(Protocol):
    """A program that shows metrics; its methods may raise anything."""

    def write(self, values: dict[str, Any]) -> None:
        """Takes what is known after `values["step"]` steps, by the names of metrics.jsonl; None is unknown."""

    def close(self, failed: bool, /) -> None:
        """Hands over what is left; `failed` is how the run ended."""


class Mirror:
    """Repeats the metrics of a run in a service until that fails. For rank 0 only; raises nothing."""

    def __init__(self, name: str, starts: Mapping[str, Callable[[], Service]], note: Callable[[str], None]) -> None:
        """Takes the first of `starts` that works, by what it would start; `note` prints a line."""
        self._name, self._note = name, note
        self._service: Service | None = None
        failed: list[str] = []
        for what, start in starts.items():
            try:
                self._service = start()
            except Exception as error:
                failed.append(f"{name}: no {what} ({first_line(error)})")
            else:
                failed = [f"{'; '.join(failed)}; recording an {what} instead"] if failed else []
                break
        for line in failed:
            note(line)

    def log_step(self, metrics: StepMetrics) -> None:
        """Repeats a training step."""
        self._attempt(lambda service: service.write(asdict(metrics)))

    def log_evaluation(self, metrics: EvaluationMetrics) -> None:
        """Repeats an evaluation."""
        values = {"step": metrics.step, "eval_loss": metrics.loss, "perplexity": metrics.perplexity}
        self._attempt(lambda service: service.write(values))

    def close(self, failed: bool) -> None:
        """Hands over what is left and ends."""
        self._attempt(lambda service: service.close(failed))
        self._service = None

    def _attempt(self, action: Callable[[Service], None]) -> None:
        if self._service is None:
            return
        try:
            action(self._service)
        except Exception as error:
            self._service = None
            self._note(f"{self._name}: turned off ({first_line(error)}); metrics.jsonl goes on")


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its type where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
