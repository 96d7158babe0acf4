import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

from refrag_lightning.model.generation import pad_left
from tests.model.batches import ROWS, TEXTS, make_batch
from tests.model.conftest import build

# A real end token would cut some of the texts short.
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def greedy(model, batch, num):
    """Greedy decoding by full forward passes, one text at a time."""
    tokens = []
    for line in range(len(batch["input_ids"])):
        text = {key: value[line : line + 1] for key, value in pad_left(batch).items() if key in S}
        text = {**batch, **text}
        start = int((text["attention_mask"] == 0).sum())
        text.update({key: text[key][:, start:] for key in S})
        new = []
        for _ in range(num):
            token = model(**text).logits[0, -1].argmax()
            new.append(int(token))
            for key, value in (
                ("input_ids", token),
                ("attention_mask", 1),
                ("position_ids", text["position_ids"][0, -1] + 1),
                ("slot_ids", -1),
            ):
                text[key] = torch.cat([text[key], torch.tensor([[value]])], dim=1)
        tokens.append(new)
    return tokens


S = ("input_ids", "attention_mask", "position_ids", "slot_ids")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_greedy_is_the_argmax_of_forward_at_every_step(name, side):
    # Among others: the prefill's logits give the first token, nothing starts from a special token.
    model = build(name)
    batch = make_batch(TEXTS, ROWS, side=side)
    with torch.no_grad():
        expected = greedy(model, batch, 6)
    tokens = model.generate(**batch, **OPTIONS)
    assert tokens.tolist() == expected
    assert len({tuple(line) for line in expected}) > 1


def test_each_text_of_a_batch_gives_what_it_gives_alone(model):
    tokens = model.generate(**make_batch(TEXTS, ROWS), **OPTIONS)
    for line, text in enumerate(TEXTS):
        alone = model.generate(**make_batch([text], ROWS), **OPTIONS)
        assert alone[0].tolist() == tokens[line].tolist()


def test_row_states_from_outside_give_the_same_tokens(model):
    batch = make_batch(TEXTS, ROWS)
    expected = model.generate(**batch, **OPTIONS)
    given = make_batch(TEXTS, [])
    given["row_states_mask"] = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        given["row_states"] = model.encode(batch)
    assert model.generate(**given, **OPTIONS).tolist() == expected.tolist()


def test_beams_are_those_of_the_decoder_on_the_same_embeddings(model):
    batch = make_batch(TEXTS, ROWS)
    tokens = model.generate(**batch, **OPTIONS, num_beams=3)
    with torch.no_grad():
        expected = model.decoder.generate(
            inputs_embeds=model.embed(batch),
            attention_mask=batch["attention_mask"],
            num_beams=3,
            **OPTIONS,
        )
    assert tokens.shape == (3, 6)
    assert tokens.tolist() == expected.tolist()


def test_sampling_depends_on_the_seed_alone(model):
    batch = make_batch(TEXTS, ROWS)
    options = {**OPTIONS, "do_sample": True, "temperature": 2.0}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(**batch, **options).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_processors_see_new_tokens_only(model):
    lengths = []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return scores

    model.generate(**make_batch(TEXTS, ROWS), **OPTIONS, logits_processor=[Recorder()])
    assert lengths == list(range(6))


def test_the_end_token_stops_and_pads(model):
    batch = make_batch(TEXTS, ROWS)
    free = model.generate(**batch, **OPTIONS)
    end = int(free[0, 1])
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=end)
    assert tokens[0, :2].tolist() == free[0, :2].tolist()
    assert tokens[0, 2:].unique().tolist() in ([], [0])


def test_options_come_from_the_decoders_generation_config(model):
    model.decoder.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert model.generate(**make_batch(TEXTS, ROWS), eos_token_id=None).shape == (3, 3)


@pytest.mark.parametrize(
    "options", [{"assistant_model": object()}, {"prompt_lookup_num_tokens": 3}]
)
def test_assisted_decoding_is_refused(model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        model.generate(**make_batch(TEXTS, ROWS), **options)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(
            **make_batch(TEXTS, ROWS),
            generation_config=GenerationConfig(prompt_lookup_num_tokens=3),
        )


def test_a_packed_batch_is_refused(model):
    batch = make_batch(TEXTS, ROWS)
    with pytest.raises(ValueError, match="packed"):
        model.generate(**batch, segment_ids=batch["slot_ids"], max_new_tokens=1)


def test_pad_left_is_the_batch_padded_on_the_left():
    left, right = (make_batch(TEXTS, ROWS, side=side) for side in ("left", "right"))
    moved = pad_left(right)
    for key, value in left.items():
        assert torch.equal(moved[key], value), key
    for key, value in pad_left(left).items():
        assert torch.equal(value, left[key]), key


def test_forward_after_generate_can_train(model):
    batch = make_batch(TEXTS, ROWS)
    model.generate(**batch, **OPTIONS)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.projector.scale.grad is not None
