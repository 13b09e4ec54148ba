"""Run directories that earlier versions left half-way go on, to the losses that those versions went on to."""

import json
import shutil

import numpy as np
import pytest

from tests.old_runs.record import FOLDER, KEPT, RECORD, environment, numbers, train

RECORDED = json.loads(RECORD.read_text())


@pytest.mark.parametrize("name", KEPT)
def test_a_run_of_an_earlier_version_goes_on(tmp_path, name):
    ranks, words = KEPT[name]
    shutil.copytree(FOLDER / name, tmp_path / name)
    assert train(tmp_path, name, ranks, words) == 0
    recorded, found = RECORDED["runs"][name], numbers(tmp_path / name)
    assert found["samples"] == recorded["samples"]
    if environment() == RECORDED["environment"]:
        assert found == recorded
    else:  # another processor or torch rounds differently
        for kind in ("steps", "validation"):
            assert found[kind].keys() == recorded[kind].keys()
            for step, expected in recorded[kind].items():
                np.testing.assert_allclose(found[kind][step], expected, rtol=1e-4)
