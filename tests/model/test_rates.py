"""One model at several rates."""

import pytest
import torch

from refrag_lightning.model import RefragConfig, RefragModel
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.model.conftest import DECODERS, TINY_ENCODER

NAMES = ("tiny/encoder", "tiny/decoder")
TEXT = "Where? <doc>The Seine flows through Paris, and Rome lies on the Tiber.</doc> Answer:"
RATES = [2, 4, 8]


def model(**options):
    torch.manual_seed(0)
    return RefragModel.from_encoder_decoder(*NAMES, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return RefragTokenizer.from_encoder_decoder(*NAMES, compression=8, rates=RATES)


@pytest.mark.parametrize("context", ["row", "document"])
@pytest.mark.parametrize("rate", RATES)
def test_a_mean_model_is_at_each_rate_the_model_of_that_rate(rate, context):
    several = model(compression=8, rates=RATES, context=context)
    one = model(compression=rate, context=context)
    one.projector.load_state_dict(several.projector.state_dict())
    settings = {"context": context}
    both = RefragTokenizer.from_encoder_decoder(*NAMES, compression=8, rates=RATES, **settings)
    alone = RefragTokenizer.from_encoder_decoder(*NAMES, compression=rate, **settings)
    with torch.no_grad():
        first = several(**both.at(rate)(TEXT)).logits
        second = one(**alone(TEXT)).logits
    assert torch.equal(first, second)


@pytest.mark.parametrize("rate", RATES)
def test_a_concat_model_has_at_each_rate_that_rates_states_and_zeros(rate, tokenizer):
    several = model(compression=8, rates=RATES, pooling="concat")
    one = model(compression=rate, pooling="concat")
    batch = tokenizer.at(rate)(TEXT)
    size = one.config.row_size
    with torch.no_grad():
        wide, narrow = several.encode(batch), one.encode(batch)
        assert torch.equal(wide[..., :size], narrow)
        assert (wide[..., size:] == 0).all()
        assert wide.shape[-1] == 8 * 64
        # And the logits are those of a model of the largest rate alone, which knows short rows.
        largest = model(compression=8, pooling="concat")
        largest.projector.load_state_dict(several.projector.state_dict())
        assert torch.equal(several(**batch).logits, largest(**batch).logits)


def test_rates_are_saved(tmp_path):
    model(compression=4, rates=RATES, pooling="concat").save_pretrained(tmp_path)
    loaded = RefragModel.from_pretrained(tmp_path)
    assert (loaded.config.compression, loaded.config.rates) == (4, RATES)


def test_a_mean_model_takes_any_rates_later(tokenizer):
    some = model(compression=8)
    some.set_rates([4, 16])
    assert (some.config.compression, some.config.rates) == (4, [4, 16])
    some.set_rates([4, 16], compression=16)
    assert some.config.compression == 16
    with pytest.raises(ValueError, match=r"compression \(0\)"):
        some.set_rates([4, 0])
    with pytest.raises(ValueError, match="rates is empty"):
        some.set_rates([])
    # What was refused changed nothing.
    assert (some.config.compression, some.config.rates) == (16, [4, 16])


def test_a_concat_model_takes_rates_up_to_the_largest_it_was_built_with(tmp_path, tokenizer):
    some = model(compression=8, pooling="concat")
    batch = tokenizer.at(2)(TEXT)
    with torch.no_grad():
        before = some(**batch).logits
    some.set_rates([2, 4])
    with pytest.raises(ValueError, match=r"room for 8 tokens a row.* 16"):
        some.set_rates([2, 16])
    assert some.config.rates == [2, 4]
    some.save_pretrained(tmp_path)
    loaded = RefragModel.from_pretrained(tmp_path)
    assert loaded.config.row_size == 8 * 64
    with torch.no_grad():
        for same in (some, loaded):
            assert torch.equal(same(**batch).logits, before)


def test_slots_follow_the_rate():
    some = model(compression=8, num_slots=2)
    some.set_rates([4])
    four = model(compression=4, num_slots=2)
    four.projector.load_state_dict(some.projector.state_dict())
    batch = RefragTokenizer.from_encoder_decoder(*NAMES, compression=4, num_slots=2)(TEXT)
    with torch.no_grad():
        assert torch.equal(some(**batch).logits, four(**batch).logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compression": 8, "rates": [4, 16]}, r"compression \(8\) must be one of rates"),
        ({"compression": 4, "rates": [0, 4]}, r"compression \(0\) must be at least 1"),
        ({"compression": 4, "rates": [4, 8], "num_slots": 2}, r"num_slots \(2\).*several rates"),
    ],
)
def test_bad_rates_are_quoted(values, message):
    with pytest.raises(ValueError, match=message):
        RefragConfig(encoder_config=TINY_ENCODER, decoder_config=DECODERS["llama"], **values)


def test_a_configuration_has_one_rate_by_default():
    config = RefragConfig(encoder_config=TINY_ENCODER, decoder_config=DECODERS["llama"])
    assert config.rates == [8]
