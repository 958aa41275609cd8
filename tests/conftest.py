"""Offline, quiet, and in a cache of its own, so that tests never touch the user's."""
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

QUICK = ["--device", "cpu", "--base-steps", "4", "--base-batch", "4", "--train-examples", "32", "--eval-examples", "8", "--prompts", "2",
         "--completions", "4", "--eval-steps", "4,2", "--eval-every", "2"]


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
