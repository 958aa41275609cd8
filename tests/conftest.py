"""Offline, quiet, one thread per process, in a cache of its own: tests never touch the user's.

    python -m pytest           the proofs, minutes
    python -m pytest --all     whole runs, kills and the notebook, too
"""
import os
import sys
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

QUICK = ["--device", "cpu", "--base-steps", "4", "--base-batch", "4", "--train-examples", "32",
         "--eval-examples", "8", "--prompts", "2", "--completions", "4", "--eval-steps", "4,2",
         "--eval-every", "2"]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="whole runs, kills and the notebook, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "whole: a whole run, minutes; with --all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("whole"):
                item.add_marker(pytest.mark.skip(reason="a whole run: python -m pytest --all"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    """An empty working directory, with the cache of the session's tiny base models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGRPO_CACHE", str(cache))
    return tmp_path


@pytest.fixture
def quick():
    """Flags of a run of seconds."""
    return list(QUICK)


@pytest.fixture
def checkpoint():
    """The same where no tiny model is made, and examples come from a file."""
    return [word for flag, value in zip(QUICK[::2], QUICK[1::2]) for word in (flag, value)
            if not flag.startswith("--base-") and flag != "--train-examples"]
