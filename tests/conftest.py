"""Settings that hold for every test."""

import os
import tempfile
from pathlib import Path

# Before torch is imported: ranks share few cores, and the server that they are forked from may have no threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two workers of pytest-xdist that compile the same function at once would write the same files.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_tests_{worker}")))

import multiprocessing
import multiprocessing.forkserver

import pytest
import torch
from hypothesis import settings

from verification.local_ranks import PRELOADED

# A loaded machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


USED_BY_TESTS = [
    "pretrain_gpt",
    "training.run",
    "verification.parity",
    "parallel.pipeline",
    "matplotlib.backends.backend_agg",
]


@pytest.fixture(scope="session", autouse=True)
def server_of_ranks():
    """Ranks are forked from a server, which need not import again in each what nearly all of them use."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, *USED_BY_TESTS, "matplotlib.figure"])
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory):
    """name -> a place for runs; all of them share the sample corpus, which takes seconds to prepare."""
    corpus = tmp_path_factory.mktemp("sample_corpus")

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        (folder / "sample_corpus").symlink_to(corpus)
        return folder

    return make


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="where tests marked gpu run (default: cuda, where it is); cpu skips those marked cuda_only",
    )


def chosen_device(config):
    """Where tests marked `gpu` run, None where they do not."""
    wanted, found = config.getoption("--device"), torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise pytest.UsageError("--device cuda, but torch finds no CUDA device here; --device cpu runs what a CPU can")
    return wanted or ("cuda" if found else None)


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The kind of device of tests marked `gpu`."""
    return chosen_device(pytestconfig)


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` need CUDA, or to be told to do without."""
    device = chosen_device(config)
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        claim = item.get_closest_marker("cuda_only")
        if device is None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        elif device == "cpu" and claim is not None:
            item.add_marker(pytest.mark.skip(reason=f"claims something about CUDA: {claim.args[0]}"))
