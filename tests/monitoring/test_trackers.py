"""Mirrors: the first start that works, and no failure that reaches the run."""

import pytest

from monitoring.metrics import EvaluationMetrics
from monitoring.trackers import Mirror
from runtime.messages import first_line
from tests.monitoring.test_metrics import STEP


class Memory:
    """A service that remembers, and raises in what `broken` names."""

    def __init__(self, broken=""):
        self.broken, self.seen = broken, []

    def write(self, values):
        self.act("write", values)

    def close(self, failed):
        self.act("close", failed)

    def act(self, name, value):
        self.seen.append((name, value))
        if name == self.broken:
            raise OSError("no space\nleft")


def fail():
    raise KeyError


def test_the_first_start_that_works_is_told_everything():
    memory, notes = Memory(), []
    mirror = Mirror("memory", {"fast one": fail, "slow one": lambda: memory, "third": fail}, notes.append)
    mirror.log_step(STEP)
    mirror.log_evaluation(EvaluationMetrics(step=3, loss=0.0))
    mirror.close(failed=True)
    mirror.close(failed=True)
    assert notes == ["memory: no fast one (KeyError); recording an slow one instead"]
    (_, step), evaluation, closed = memory.seen
    assert (step["step"], step["loss"], step["mfu"]) == (3, 4.125, None)
    assert evaluation == ("write", {"step": 3, "eval_loss": 0.0, "perplexity": 1.0})
    assert closed == ("close", True)


@pytest.mark.parametrize("broken", ["write", "close"])
def test_what_fails_is_one_line_and_is_left_alone(broken):
    memory, notes = Memory(broken), []
    mirror = Mirror("memory", {"one": lambda: memory}, notes.append)
    for _ in range(2):
        mirror.log_step(STEP)
    mirror.close(failed=False)
    mirror.close(failed=False)
    assert notes == ["memory: turned off (no space); metrics.jsonl goes on"]
    assert memory.seen[-1][0] == broken


def test_without_a_start_nothing_happens():
    notes = []
    Mirror("memory", {}, notes.append).log_step(STEP)
    assert notes == []


def test_an_error_without_words_is_its_type():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
