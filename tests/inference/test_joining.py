"""Batches of several requests as one."""

import torch

from refrag_lightning.inference.joining import join
from tests.inference.pipelines import QUESTION, RIVERS, parts, pipeline


def test_joined_lines_have_the_embeddings_of_each_alone():
    model, tokenizer = parts()
    pipe = pipeline()
    requests = [
        (QUESTION, RIVERS[:1], {"rate": 8}),
        ("Who?", (), {}),
        (QUESTION, RIVERS, {"expand": ["none", "all", [0]]}),
        ("Why?", RIVERS[:2], {"expand": "all"}),
    ]
    batches = [pipe.prepare(q, d, **options).batch for q, d, options in requests]
    padding_id = tokenizer.assembler.decoder_pad_id
    joined = join(batches, padding_id=padding_id)
    embeds = model.embed(joined)
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    for line, batch in enumerate(batches):
        length = batch["input_ids"].shape[1]
        assert joined["attention_mask"][line].tolist() == [0] * (longest - length) + [1] * length
        assert (joined["input_ids"][line, : longest - length] == padding_id).all()
        assert joined["position_ids"][line, -length:].tolist() == list(range(length))
        # The projector's matrix products may sum in another order for another number of rows.
        torch.testing.assert_close(embeds[line, -length:], model.embed(batch)[0])


def test_one_batch_is_itself():
    batch = pipeline().prepare(QUESTION, RIVERS).batch
    joined = join([batch], padding_id=0)
    assert all(joined[key] is batch[key] for key in batch)
