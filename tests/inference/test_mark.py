"""Which folders an export may replace, and what of them it takes away."""

import pytest

from refrag_lightning.inference.mark import (
    CARD,
    MARK,
    changed_by_hand,
    check_place,
    read_mark,
    replaced,
    write_mark,
)

HISTORY = {"stages": [], "reports": [], "complete": False}


@pytest.fixture
def exported(tmp_path):
    (tmp_path / CARD).write_text("# Model\n")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "LICENSE.md").write_text("mine")
    (tmp_path / "results.json").write_text("{}")
    write_mark(tmp_path, card="# Model\n", history=HISTORY)
    return tmp_path


def test_a_marked_folder_may_be_replaced_but_for_what_others_put_there(exported):
    check_place(exported)
    assert read_mark(exported)["history"] == HISTORY
    assert set(replaced(exported)) == {
        CARD,
        MARK,
        "adapter",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_a_card_changed_by_hand_is_not_replaced(exported):
    assert not changed_by_hand(exported)
    (exported / CARD).write_text("# Model\n\nMine.\n")
    assert changed_by_hand(exported)
    assert CARD not in replaced(exported)
    (exported / CARD).unlink()
    assert not changed_by_hand(exported)


def test_free_and_empty_places(tmp_path):
    check_place(tmp_path)
    check_place(tmp_path / "nothing")
    assert replaced(tmp_path / "nothing") == ()


@pytest.mark.parametrize("mark", [None, "{", "[]", '{"card": "x"}'])
def test_a_folder_without_a_whole_mark_is_somebody_elses(exported, mark):
    (exported / MARK).unlink()
    if mark is not None:
        (exported / MARK).write_text(mark)
    with pytest.raises(FileExistsError, match="is not empty and no export wrote it"):
        check_place(exported)
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_place(exported / CARD)
