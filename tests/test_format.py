"""The demonstration model's format does not change under it: docs/format.md."""

import json

import pytest

from tests.golden import FILE, NUM_PROMPTS, ROOT, make, settings

pytestmark = [pytest.mark.real_models, pytest.mark.slow]


@pytest.fixture(scope="module")
def made(real_pair):
    return make()


@pytest.fixture(scope="module")
def kept():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", ["input_ids", "slot_ids", "encoder_input_ids", "rows"])
def test_ids_slots_and_rows_are_those_of_the_golden_file(made, kept, key):
    assert len(kept) == NUM_PROMPTS
    for number, (now, then) in enumerate(zip(made, kept, strict=True)):
        assert now[key] == then[key], number


def test_logits_are_those_of_the_golden_file(made, kept):
    for number, (now, then) in enumerate(zip(made, kept, strict=True)):
        assert now["norm"] == pytest.approx(then["norm"], rel=1e-5), number
        scale = max(map(abs, then["logits"]))
        assert now["logits"] == pytest.approx(then["logits"], rel=0, abs=1e-5 * scale), number


def test_the_page_says_what_the_configurations_say():
    page = (ROOT / "docs" / "format.md").read_text()
    align, _, shape = settings()
    for value in (
        align["encoder"]["num_layers"],
        align["context"],
        align["pooling"],
        align["tokenizer_options"]["max_encoder_length"],
        *shape["rates"],
    ):
        assert f"`{value}`" in page, value
    indented = align["tokenizer_options"]["chat_template"].replace("\n", "\n    ")
    assert f"    {indented}" in page
