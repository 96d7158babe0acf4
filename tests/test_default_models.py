"""Tokenizer and model together, on the default pair: what the README promises of them."""

import random

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from refrag_lightning import RefragModel, RefragTokenizer, hub
from refrag_lightning.text.segments import render
from tests.strategies import random_prompt

pytestmark = pytest.mark.real_models

PROMPTS = [
    'Where? <doc id="1" title="Rivers">The Seine flows through Paris, and on to the sea.</doc> It',
    "Say: <doc>Blue is a colour.</doc> and then a good deal more than stands in the other text, so",
    "No document at all",
    "Again: <doc>The Seine flows through Paris, and on to the sea.</doc> so",
]


@pytest.fixture(scope="module", params=["row", "document"])
def context(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(real_pair, context):
    return RefragTokenizer.from_encoder_decoder(*real_pair, compression=4, context=context)


@pytest.fixture(scope="module")
def model(real_pair, context):
    torch.manual_seed(0)
    return RefragModel.from_encoder_decoder(*real_pair, compression=4, context=context)


@torch.inference_mode()
def test_expanded_documents_give_the_plain_decoders_logits(real_pair):
    rng = random.Random(3)
    prompts = [random_prompt(rng) for _ in range(8)]
    assert largest_difference(real_pair, prompts) < 1e-4


def largest_difference(pair, prompts):
    """Of the logits, expanded prompts against the plain decoder on the segments' ids."""
    tokenizer = RefragTokenizer.from_encoder_decoder(*pair, compression=4)
    model = RefragModel.from_encoder_decoder(*pair, compression=4)
    differences = []
    for prompt in prompts:
        segments = render(prompt, header=tokenizer.header, footer=tokenizer.footer)
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids = [i for s in segments for i in tokenizer.decoder(s.text, **options)["input_ids"]]
        if ids:
            logits = model(**tokenizer([prompt], expand="all")).logits[0]
            expected = model.decoder(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            differences.append((logits - expected).abs().max().item())
    return max(differences)


@torch.inference_mode()
def test_alone_in_a_batch_and_padded_on_either_side(model, tokenizer):
    batches = {side: tokenizer(PROMPTS, padding_side=side) for side in ("left", "right")}
    logits = {side: model(**batch).logits for side, batch in batches.items()}
    for number, prompt in enumerate(PROMPTS):
        alone = model(**tokenizer(prompt)).logits[0]
        for side, batch in batches.items():
            mine = logits[side][number][batch["attention_mask"][number].bool()]
            torch.testing.assert_close(mine, alone, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_greedy_tokens_alone_in_a_batch_and_from_given_states(model, tokenizer):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    batch = tokenizer(PROMPTS)
    tokens = model.generate(**batch, **options)
    first = model(**batch).logits[:, -1].argmax(-1)
    assert torch.equal(tokens[:, 0], first)
    for number, prompt in enumerate(PROMPTS):
        assert torch.equal(model.generate(**tokenizer(prompt), **options)[0], tokens[number])
    states = model.encode(batch)
    given = tokenizer(PROMPTS, row_states=states)
    assert given["encoder_input_ids"].numel() == 0
    assert torch.equal(model.generate(**given, **options), tokens)
    some = torch.arange(batch.num_rows) % 2 == 0
    partly = tokenizer(PROMPTS, row_states=states, row_states_mask=some)
    assert torch.equal(model.generate(**partly, **options), tokens)


def test_a_row_of_two_texts_is_encoded_once(tokenizer):
    batch = tokenizer(PROMPTS)
    assert [r.row for r in batch.trace[0]] == [r.row for r in batch.trace[3]]
    rows = batch["encoder_row_ids"]
    assert (
        len(rows[rows >= 0].unique())
        == batch.num_rows
        == len({r.row for t in batch.trace for r in t})
    )


def test_folder_has_the_bases_bit_for_bit(model, tokenizer, real_pair, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert sum(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors")) < 10e6
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    encoder = AutoModel.from_pretrained(hub.resolve(real_pair[0]).path, add_pooling_layer=False)
    decoder = AutoModelForCausalLM.from_pretrained(hub.resolve(real_pair[1]).path)
    for part, base in ((loaded.encoder, encoder), (loaded.decoder, decoder)):
        for (name, mine), theirs in zip(
            part.state_dict().items(), base.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs), name
    for mine, theirs in zip(
        loaded.projector.parameters(), model.projector.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
