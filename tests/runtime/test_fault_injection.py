"""KILOTRON_FAULT: what may be asked for, and that it happens once, there and nowhere else."""

import errno

import pytest

from runtime.errors import ConfigError
from runtime.fault_injection import Fault, Faults, parse_fault


def faults(text, rank=0, **environment):
    return Faults(rank, {"KILOTRON_FAULT": text, **environment})


def test_a_fault_is_read():
    text = "rank=1, step=7, phase=checkpoint.write, action=sleep, seconds=0.5"
    assert parse_fault(text) == Fault("checkpoint.write", "sleep", rank=1, step=7, seconds=0.5)
    assert parse_fault("phase=data,action=kill") == Fault("data", "kill")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phase=data", "action is one of kill, "),
        ("action=kill", "phase is one of data, "),
        ("phase=checkpoint.wrte,action=kill", r"did you mean checkpoint.write\? phase is one of"),
        ("phase=data,action=explode", "action is one of"),
        ("phase=data,action=kill,rank=one", "it is written like"),
        ("phase=data,action=kill,node=1", "node is no word of it; known are phase, action, rank"),
        ("phse=data,action=kill", "did you mean phase?"),
        ("phase=dta,action=kill", "did you mean data?"),
        ("phase=data,action=sleep,seconds=-1", "seconds=-1 must be from 0 to"),
        ("phase=data,action=sleep,seconds=nan", "seconds=nan must be from 0 to"),
        ("phase=log,action=nan", "action=nan goes with the phases forward, "),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(text, message):
    with pytest.raises(ConfigError, match=message):
        faults(text)


def test_it_happens_once_and_only_where_it_was_asked_for():
    asked = faults("rank=1,step=7,phase=data,action=eio", rank=1)
    assert not asked.at(6, "data")
    assert not asked.at(7, "log")
    with pytest.raises(OSError, match="Input/output error") as caught:
        asked.of_step(7)("data")
    assert caught.value.errno == errno.EIO
    assert not asked.at(7, "data")
    for inert in (
        faults("rank=1,step=7,phase=data,action=eio", rank=0),
        faults("rank=1,step=7,phase=data,action=eio", rank=1, TORCHELASTIC_RESTART_COUNT="1"),
        Faults(),
    ):
        assert not inert.at(7, "data")


def test_numbers_are_said_to_become_nan():
    assert faults("phase=forward,action=nan").at(3, "forward") is True
    with pytest.raises(RuntimeError, match="asks for an error in forward"):
        faults("phase=forward,action=raise").at(3, "forward")
