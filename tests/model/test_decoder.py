import pytest
import torch

from refrag_lightning.model.decoder import apply_head, check_head, embedding_rms
from tests.model.batches import ROWS, TEXTS, make_batch
from tests.model.conftest import DECODERS, build


@pytest.mark.parametrize("name", DECODERS)
def test_head_of_hidden_is_forward(name):
    model = build(name)
    batch = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        logits = model.head(model.hidden(batch))
        expected = model(**batch).logits
    assert logits.dtype == torch.float32
    assert expected.std() > 0.1
    mask = batch["attention_mask"].bool()
    assert torch.allclose(logits[mask], expected[mask], atol=1e-5)
    check_head(model.decoder)


@pytest.mark.parametrize(("name", "field"), [("cohere", "logit_scale"), ("gemma2", "lm_head")])
def test_a_head_that_is_not_known_is_refused(name, field):
    decoder = build(name).decoder
    if field == "lm_head":
        original = decoder.forward

        def forward(**arguments):
            output = original(**arguments)
            output.logits = output.logits * 1.5
            return output

        decoder.forward = forward
    else:
        decoder.logit_scale = 0.5
    with pytest.raises(ValueError, match=type(decoder).__name__):
        check_head(decoder)


def test_apply_head_takes_any_leading_shape():
    model = build("gemma2")
    hidden = torch.randn(2, 3, 32)
    flat = apply_head(model.decoder, hidden.flatten(0, 1))
    assert torch.allclose(apply_head(model.decoder, hidden).flatten(0, 1), flat)


def test_embedding_figures_are_of_outputs_not_weights():
    # Gemma multiplies by sqrt(D) inside the embedding module.
    model = build("gemma3")
    weight = model.decoder.get_input_embeddings().weight
    assert embedding_rms(model.decoder) == pytest.approx(
        weight.square().mean().sqrt().item() * 32**0.5, rel=1e-4
    )
    mean = model.mean_embedding()
    assert torch.allclose(mean, weight.mean(0) * 32**0.5, atol=1e-5)


def test_mean_embedding_follows_embeddings_that_train():
    model = build("llama")
    model.set_trainable(["decoder"], train_word_embeddings=True)
    before = model.mean_embedding()
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight.add_(1.0)
    assert torch.allclose(model.mean_embedding(), before + 1, atol=1e-5)
