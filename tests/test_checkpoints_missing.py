"""Protects: a model that is not there is told in one line, before GPUs and the hub are asked.
Run: pytest tests/test_checkpoints_missing.py"""
import pytest

import agrpo
import eval as evaluation
from rewards import BadInput
from support.checkpoints import check_model_exists, find_folder

NO_FOLDER = ["./missing", "../missing", "/missing/model", "~/missing", "runs/nothing",
             "runs/nothing/model", "./" + "x" * 300]
NO_NAME = ["", "missing", "a/b/c", "owner/name/", "owner name/model", "owner/" + "x" * 300]


@pytest.fixture
def offline(monkeypatch):
    """The hub must not be asked."""
    import huggingface_hub

    def refuse(*_, **__):
        pytest.fail("the hub was asked")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize("model", NO_FOLDER)
def test_a_path_that_leads_nowhere(model, here, offline):
    for look in (check_model_exists, find_folder):
        with pytest.raises(BadInput, match="there is no such folder") as error:
            look(model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", NO_NAME)
def test_what_is_no_name_on_the_hub_either(model, here, offline):
    for look in (check_model_exists, find_folder):
        with pytest.raises(BadInput, match="no such directory") as error:
            look(model)
        assert "\n" not in str(error.value)


def test_a_folder_beside_others_is_no_name_on_the_hub(here, offline):
    (here / "models" / "there").mkdir(parents=True)
    check_model_exists("models/there")
    with pytest.raises(BadInput, match="there is no such folder"):
        check_model_exists("models/nothing")


def test_what_may_be_on_the_hub_passes(here):
    check_model_exists("owner/name-8B_v1.5")


@pytest.mark.parametrize("model", ["./missing", "runs/nothing"])
@pytest.mark.parametrize("main", [agrpo.main, evaluation.main], ids=["agrpo", "eval"])
def test_the_command_says_so_first(main, model, here, offline, capsys):
    assert main(["--task", "gsm8k", "--model", model]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"--model {model}: there is no such folder") and "\n" not in said
