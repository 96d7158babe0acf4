"""The perplexity grid: every cell predicts the same tokens, after the contexts that it says."""

import numpy as np
import pytest

from refrag_lightning.data import PerplexityDataModule, PydocSource
from refrag_lightning.data.perplexity import Cell, Window
from tests.text.loading import refrag

SOURCE = PydocSource(limit=30)
GRID = {"contexts": [48, 16], "continuations": [8, 20], "num_windows": 3}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache of corpora for these tests; the tiny models stay where they are."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("refrag_lightning.data.corpus.cache_dir", lambda: folder)
        yield


def _data(tokenizer=None, **options):
    tokenizer = tokenizer or refrag(rates=(4, 8))
    return PerplexityDataModule(source=SOURCE, tokenizer=tokenizer, **{**GRID, **options})


def _texts(example, kind):
    return [s.text for s in example.segments if s.kind == kind and not s.train]


def test_cells_and_their_names():
    cells = _data().cells()
    assert cells == [
        ("full", 16),
        ("full", 48),
        ("none", 0),
        ("last", 16),
        ("last", 48),
        ("compressed", 16),
        ("compressed", 48),
    ]
    assert cells[-1].task == "compressed-48"
    assert [Cell.of(cell.task) for cell in cells] == cells


def test_bare_text_goes_on_as_it_stands_in_the_source():
    data = _data()
    wholes = [*SOURCE.texts("test")]
    for index in range(3):
        texts = []
        for context in (16, 48):
            example = data.example(Window(index, Cell("full", context), 4))
            texts.append("".join(segment.text for segment in example.segments))
            (document,) = _texts(example, "document")
            size = len(data.tokenizer.plain_decoder([document])[0].ids)
            # Whole words: the next one would have been too much.
            assert context - 12 <= size <= context
        assert any(texts[1] in whole for whole in wholes)
        assert texts[1].endswith(texts[0])
        none = data.example(Window(index, Cell("none", 0), 4))
        assert not _texts(none, "document")
        assert texts[0].endswith("".join(segment.text for segment in none.segments))


@pytest.mark.parametrize(
    "options",
    [{"rates": (4, 8)}, {"compression": 8, "num_slots": 2}],
    ids=["two rates", "two slots"],
)
@pytest.mark.parametrize("style", [{}, {"headers": True, "chat": True}], ids=["bare", "chat"])
def test_last_tokens_take_exactly_the_positions_of_the_rows(options, style):
    data = _data(refrag(**options), num_windows=12, **style)
    for rate in data.tokenizer.rates:
        for context in (16, 48):
            windows = [
                [Window(n, Cell(reading, context), rate) for n in range(12)]
                for reading in ("compressed", "last")
            ]
            rows, last = (data.collate(some).student["attention_mask"].sum(1) for some in windows)
            assert last.tolist() == rows.tolist()
            for compressed, tail in zip(*windows, strict=True):
                (whole,), (end,) = (
                    _texts(data.example(window), "document") for window in (compressed, tail)
                )
                assert whole.endswith(end) and whole != end


@pytest.mark.parametrize(
    "options", [{}, {"instruction": "Go on.", "headers": True}, {"chat": True}]
)
def test_every_cell_and_rate_has_the_same_targets(options):
    data = _data(**options)
    targets = {}
    slots = {}
    for loader in data.test_dataloader():
        for batch in loader:
            for number, name in enumerate(batch.ids):
                mine = batch.text_ids == number
                task = batch.tasks[int(batch.task_ids[mine][0])]
                key = task, batch.compression, name
                assert key not in targets
                targets[key] = tuple(batch.targets[mine].tolist())
                slots[key] = int((batch.student["slot_ids"][number] >= 0).sum())
    # Readings that do not depend on the rate come once; 3 cells of those, 4 of the others.
    assert len(targets) == 3 * (3 + 2 * 4)
    assert len(set(targets.values())) == 3
    assert min(map(len, targets.values())) >= 20
    for (task, rate, _), count in slots.items():
        reading, context = Cell.of(task)
        if reading == "compressed":
            # About as many encoder tokens as decoder tokens, within a factor of 1.5.
            assert context / rate / 1.5 <= count <= context / rate * 1.5 + 1
        else:
            assert count == 0


def test_windows_do_not_depend_on_the_model_or_its_rates():
    data, other = _data(), _data(refrag(compression=16, context="document"))
    for index in range(3):
        window = Window(index, Cell("full", 48), 4)
        assert data.example(window) == other.example(window)
    texts = {data.example(Window(index, Cell("none", 0), 4)).segments for index in range(3)}
    assert len(texts) == 3


def test_a_causal_language_model_alone_reads_all_but_rows():
    from refrag_lightning.text.tokenizer import RefragTokenizer
    from tests.text.loading import hugging_face

    tokenizer = RefragTokenizer(None, hugging_face("tiny/decoder"), compression=4)
    data = _data(tokenizer, readings=["full", "none", "last"])
    (loader,) = data.test_dataloader()
    batches = [*loader]
    assert {task for batch in batches for task in batch.tasks} == {
        "full-16",
        "full-48",
        "none-0",
        "last-16",
        "last-48",
    }
    lengths = np.concatenate([batch.student["attention_mask"].sum(dim=1) for batch in batches])
    assert lengths.max() > 48


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"contexts \(\[0, 16\]\) must be at least 1"):
        _data(contexts=[16, 0])
    with pytest.raises(ValueError, match=r"continuations \(\[-1\]\) must be at least 1"):
        _data(continuations=[-1])
    with pytest.raises(ValueError, match=r"num_windows \(0\) must be at least 1"):
        _data(num_windows=0)
    with pytest.raises(ValueError, match=r"test, .*no text has the 90000 decoder tokens"):
        _data(contexts=[90000]).corpus("test")
