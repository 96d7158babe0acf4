import pytest
import torch

from refrag_lightning.model.encoder import Pooling, run_encoder
from tests.model.conftest import build

# Two sequences of 5 and 3 tokens: [CLS] a b c [SEP] and [CLS] d [SEP]; a b are row 0, c row 1,
# d row 2. States are chosen so that every token can be told from the others.
STATES = torch.tensor(
    [
        [[100.0, 0.0], [1.0, 2.0], [3.0, 6.0], [5.0, 5.0], [200.0, 0.0]],
        [[300.0, 0.0], [7.0, 9.0], [400.0, 0.0], [999.0, 999.0], [999.0, 999.0]],
    ]
)
ROW_IDS = torch.tensor([[-1, 0, 0, 1, -1], [-1, 2, -1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def pool(kind, *, compression=2, num_slots=1, num_rows=3, row_ids=ROW_IDS):
    pooling = Pooling(kind=kind, hidden_size=2, compression=compression, num_slots=num_slots)
    return pooling(STATES, row_ids, MASK, num_rows)


def test_mean_by_hand():
    assert pool("mean").tolist() == [[[2.0, 4.0]], [[5.0, 5.0]], [[7.0, 9.0]]]


def test_last_by_hand():
    assert pool("last").tolist() == [[[3.0, 6.0]], [[5.0, 5.0]], [[7.0, 9.0]]]


def test_concat_by_hand():
    assert pool("concat").tolist() == [
        [[1.0, 2.0, 3.0, 6.0]],
        [[5.0, 5.0, 0.0, 0.0]],
        [[7.0, 9.0, 0.0, 0.0]],
    ]


def test_cls_takes_the_special_token_not_the_first_content_token():
    row_ids = torch.tensor([[-1, 1, 1, 1, -1], [-1, 0, -1, -1, -1]])
    assert pool("cls", num_rows=2, row_ids=row_ids).tolist() == [[[300.0, 0.0]], [[100.0, 0.0]]]


def test_cls_finds_the_first_token_behind_padding():
    pooling = Pooling(kind="cls", hidden_size=2, compression=2, num_slots=1)
    row_ids = torch.tensor([[-1, 1, 1, 1, -1], [-1, -1, -1, 0, -1]])
    states = pooling(STATES.flip(1), row_ids, MASK.flip(1), 2)
    assert states.tolist() == [[[400.0, 0.0]], [[200.0, 0.0]]]


def test_attention_starts_as_the_mean_and_follows_its_query():
    pooling = Pooling(kind="attention", hidden_size=2, compression=2, num_slots=1)
    assert torch.allclose(pooling(STATES, ROW_IDS, MASK, 3), pool("mean"))
    with torch.no_grad():
        pooling.query.copy_(torch.tensor([2**0.5, 0.0]))
    # Scores 1 and 3 within row 0.
    weights = torch.tensor([1.0, 3.0]).softmax(0)
    expected = weights[0] * STATES[0, 1] + weights[1] * STATES[0, 2]
    assert torch.allclose(pooling(STATES, ROW_IDS, MASK, 3)[0, 0], expected)


def test_slots_split_a_row_in_order_and_short_rows_leave_zeros():
    row_ids = torch.tensor([[-1, 0, 0, 0, -1], [-1, 1, -1, -1, -1]])
    # compression 4, 2 slots: tokens 0, 1 | 2 of the row of three, one token in the other row.
    states = pool("mean", compression=4, num_slots=2, num_rows=2, row_ids=row_ids)
    assert states.tolist() == [[[2.0, 4.0], [5.0, 5.0]], [[7.0, 9.0], [0.0, 0.0]]]


def test_a_row_longer_than_compression_keeps_to_its_last_slot():
    row_ids = torch.tensor([[-1, 0, 0, 0, -1], [-1] * 5])
    states = pool("mean", compression=2, num_slots=2, num_rows=1, row_ids=row_ids)
    assert states.tolist() == [[[1.0, 2.0], [4.0, 5.5]]]


@pytest.mark.parametrize("kind", ["mean", "last", "attention", "concat", "cls"])
def test_no_rows_and_rows_without_sequences(kind):
    pooling = Pooling(kind=kind, hidden_size=2, compression=3, num_slots=1)
    width = 6 if kind == "concat" else 2
    empty = torch.zeros(0, 0, dtype=torch.long)
    for num_rows in (0, 2):
        states = pooling(torch.zeros(0, 0, 2), empty, empty, num_rows)
        assert states.shape == (num_rows, 1, width)


@pytest.mark.parametrize("kind", ["mean", "last", "attention", "concat", "cls"])
def test_neither_padding_nor_other_rows_reach_a_row(kind):
    pooling = Pooling(kind=kind, hidden_size=2, compression=2, num_slots=1)
    states = STATES.clone().requires_grad_()
    pooling(states, torch.tensor([[-1, 0, 0, -1, -1], [-1, 1, -1, -1, -1]]), MASK, 2)[
        1
    ].sum().backward()
    assert states.grad[0].abs().sum() == 0
    assert states.grad[1, 3:].abs().sum() == 0
    assert states.grad[1].abs().sum() > 0


def ragged(num, generator):
    lengths = torch.randint(3, 19, (num,), generator=generator)
    ids = torch.randint(4, 64, (num, 18), generator=generator)
    mask = (torch.arange(18) < lengths[:, None]).long()
    return ids * mask, mask


def test_slices_give_the_same_states_as_one_row_at_a_time():
    encoder = build().encoder
    ids, mask = ragged(50, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for max_tokens in (1, 40, 200, 10_000, None):
            states = run_encoder(encoder, ids, mask, max_tokens=max_tokens)
            assert states.shape == (50, 18, 16)
            for index, length in enumerate(mask.sum(1).tolist()):
                alone = encoder(input_ids=ids[index : index + 1, :length]).last_hidden_state[0]
                assert torch.allclose(states[index, :length], alone, atol=1e-5)


def test_slices_hold_no_more_than_they_may_and_equal_lengths_get_no_mask():
    encoder = build().encoder
    seen = []

    def record(module, arguments, kwargs):
        seen.append((kwargs["input_ids"].shape, kwargs["attention_mask"]))

    encoder.register_forward_pre_hook(record, with_kwargs=True)
    ids, mask = torch.full((4, 10), 5), torch.ones(4, 10, dtype=torch.long)
    run_encoder(encoder, ids, mask, max_tokens=20)
    assert [(tuple(shape), given) for shape, given in seen] == [((2, 10), None)] * 2


def test_padding_on_the_left_is_not_cut():
    encoder = build().encoder
    ids, mask = ragged(9, torch.Generator().manual_seed(1))
    ids, mask = ids.flip(1), mask.flip(1)
    with torch.no_grad():
        states = run_encoder(encoder, ids, mask, max_tokens=20)
        expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(states[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_gradients_pass_through_slices():
    encoder = build().encoder.requires_grad_(True)
    ids, mask = ragged(6, torch.Generator().manual_seed(2))
    gradients = []
    for max_tokens in (20, None):
        encoder.zero_grad()
        states = run_encoder(encoder, ids, mask, max_tokens=max_tokens)
        (states * mask[..., None]).square().sum().backward()
        gradients.append(encoder.embeddings.word_embeddings.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
