"""Sending a folder to the Hub, with the Hub's own functions replaced."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from refrag_lightning.inference.push import check_name, push


class FakeUrl(str):
    repo_id = "me/model"


@pytest.fixture
def hub(monkeypatch):
    """The calls that were made, and whether the repository is private once it is there."""
    state = SimpleNamespace(calls=[], private=True)

    def create_repo(name, **options):
        state.calls.append(("create", name, options))
        return FakeUrl("https://huggingface.co/me/model")

    def upload_folder(**options):
        state.calls.append(("upload", options["repo_id"], options["folder_path"]))

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr(
        huggingface_hub, "model_info", lambda name: SimpleNamespace(private=state.private)
    )
    return state


@pytest.mark.parametrize("private", [True, False])
def test_the_repository_is_made_and_filled(hub, tmp_path, private):
    hub.private = private
    assert push(tmp_path, "model", private=private) == "https://huggingface.co/me/model"
    assert hub.calls == [
        ("create", "model", {"private": private, "exist_ok": True}),
        # To the repository that the Hub made of the name: the account's own.
        ("upload", "me/model", tmp_path),
    ]


def test_a_public_repository_is_not_taken_for_a_private_one(hub, tmp_path):
    hub.private = False
    with pytest.raises(ValueError, match="is there already and public: give --private false"):
        push(tmp_path, "me/model", private=True)
    assert [call[0] for call in hub.calls] == ["create"]


@pytest.mark.parametrize("function", ["create_repo", "model_info", "upload_folder"])
def test_a_failure_is_one_line(hub, tmp_path, monkeypatch, function):
    def fail(*_, **__):
        raise LocalTokenNotFoundError("no token\nwas found: hf auth login")

    monkeypatch.setattr(huggingface_hub, function, fail)
    with pytest.raises(OSError, match="me/model could not be sent to the Hub: no token was") as got:
        push(tmp_path, "me/model", private=True)
    assert "\n" not in str(got.value)


def test_without_a_network_it_says_so(tmp_path):
    # The tests run with HF_HUB_OFFLINE.
    with pytest.raises(OSError, match=r"could not be sent to the Hub: .*offline"):
        push(tmp_path, "me/model", private=True)


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-x", "", "a--b"])
def test_impossible_names_are_refused(name):
    with pytest.raises(ValueError, match="must be a name on the Hub, OWNER/NAME"):
        check_name(name)


def test_possible_names():
    check_name("model")
    check_name("owner/model-1.0")
