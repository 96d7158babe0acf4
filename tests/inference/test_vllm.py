"""vLLM's mixed prompt, by its documented form; vLLM itself is not here.

`vllm.inputs.EmbedsPrompt` (vllm/inputs/llm.py): `prompt_embeds: torch.Tensor` of (sequence_length,
hidden_size), `prompt_token_ids: list[int]`, `prompt_is_token_ids: list[bool]` of the same length,
True for an id and False for a row of `prompt_embeds`. `vllm.inputs.TokensPrompt`:
`prompt_token_ids: list[int]`.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refrag_lightning import RefragModel, RefragTokenizer
from refrag_lightning.inference.vllm import vllm_decoder_folder, vllm_request, vllm_requests
from refrag_lightning.model import PlainModel
from refrag_lightning.text.documents import Document, parse
from refrag_lightning.text.segments import render
from tests.inference.exporting import PROMPT, ROUNDING, its_tokenizer, trained_model
from tests.model.batches import ROWS, TEXTS, make_batch
from tests.model.conftest import build

OTHER = 'And <doc id="2">a much longer passage, which has several rows of its own.</doc>?'


def as_vllm_reads(request, decoder):
    """The decoder's input as vLLM builds it from a request: ids embedded, then rows put in."""
    ids = torch.tensor(request["prompt_token_ids"])
    with torch.no_grad():
        embeds = decoder.get_input_embeddings()(ids)
    if "prompt_embeds" in request:
        given = ~torch.tensor(request["prompt_is_token_ids"])
        embeds[given] = request["prompt_embeds"][given].to(embeds.dtype)
    return embeds


def check_form(request, *, width):
    """The documented schema."""
    ids = request["prompt_token_ids"]
    assert isinstance(ids, list) and all(type(number) is int for number in ids)
    if request.keys() == {"prompt_token_ids"}:
        return
    assert request.keys() == {"prompt_token_ids", "prompt_embeds", "prompt_is_token_ids"}
    mask, embeds = request["prompt_is_token_ids"], request["prompt_embeds"]
    assert isinstance(mask, list) and all(type(flag) is bool for flag in mask)
    assert len(mask) == len(ids)
    assert isinstance(embeds, torch.Tensor)
    assert embeds.shape == (len(ids), width) and embeds.is_floating_point()
    assert embeds.device.type == "cpu" and not embeds.requires_grad
    is_id = torch.tensor(mask)
    # Nothing at tokens, a vector everywhere else: only so the prefix cache cannot mix them up.
    assert not embeds[is_id].any()
    assert embeds[~is_id].abs().sum(1).min() > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("expand", ["none", [[1], [0, 2]]])
def test_ids_and_rows_are_exactly_what_the_model_embeds(side, expand):
    model, tokenizer = trained_model(), its_tokenizer()
    batch = tokenizer([PROMPT, OTHER], expand=expand, padding_side=side)
    with torch.no_grad():
        expected = model.embed(batch)
    requests = vllm_requests(model, batch)
    assert len(requests) == 2
    for text, request in enumerate(requests):
        check_form(request, width=64)
        real = batch["attention_mask"][text].bool()
        assert torch.equal(as_vllm_reads(request, model.decoder), expected[text, real])
        slots = batch["slot_ids"][text, real] >= 0
        assert slots.any()
        assert request["prompt_is_token_ids"] == (~slots).tolist()


@pytest.mark.parametrize("decoder", ["llama", "gemma3", "gpt2"])
def test_every_family_embeds_ids_by_itself(decoder):
    # Gemma 3 scales inside its embedding module, so the weight's rows would be wrong.
    model = build(decoder)
    batch = make_batch(TEXTS, ROWS)
    with torch.no_grad():
        expected = model.embed(batch)
    for text, request in enumerate(vllm_requests(model, batch)):
        real = batch["attention_mask"][text].bool()
        assert torch.equal(as_vllm_reads(request, model.decoder), expected[text, real])


def test_a_family_whose_vectors_vllm_scales_again_is_refused():
    model = build("gemma2")
    with pytest.raises(ValueError, match=r"square root of the hidden size.*'gemma2'"):
        vllm_requests(model, make_batch(TEXTS, ROWS))
    (request,) = vllm_requests(model, make_batch([[5, 6, 7]], []))
    assert request == {"prompt_token_ids": [5, 6, 7]}


def test_one_text_from_a_batch_or_from_segments():
    model, tokenizer = trained_model(), its_tokenizer()
    segments = render(parse(PROMPT), header=tokenizer.header, footer=tokenizer.footer)
    first = vllm_request(model, tokenizer, segments)
    second = vllm_request(model, tokenizer, tokenizer(PROMPT))
    assert first["prompt_token_ids"] == second["prompt_token_ids"]
    assert first["prompt_is_token_ids"] == second["prompt_is_token_ids"]
    assert torch.equal(first["prompt_embeds"], second["prompt_embeds"])
    with pytest.raises(ValueError, match="holds 2 texts"):
        vllm_request(model, tokenizer, tokenizer([PROMPT, OTHER]))


def test_a_prompt_without_vectors_is_one_of_ids():
    model, tokenizer = trained_model(), its_tokenizer()
    batch = tokenizer(PROMPT, expand="all")
    expected = {"prompt_token_ids": batch["input_ids"][0].tolist()}
    assert vllm_request(model, tokenizer, batch) == expected
    plain = PlainModel.from_pretrained("tiny/decoder")
    text_only = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    assert vllm_request(plain, text_only, text_only(PROMPT, expand="all")) == expected


def test_given_states_are_taken(tmp_path):
    model, tokenizer = trained_model(), its_tokenizer()
    with torch.no_grad():
        states = model.encode(tokenizer(PROMPT))
    request = vllm_request(model, tokenizer, tokenizer(PROMPT, row_states=2 * states))
    with torch.no_grad():
        expected = model.embed(tokenizer(PROMPT, row_states=2 * states))[0]
        fresh = model.embed(tokenizer(PROMPT))[0]
    assert torch.equal(as_vllm_reads(request, model.decoder), expected)
    assert not torch.equal(expected, fresh)


def test_packed_texts_are_refused():
    model, tokenizer = trained_model(), its_tokenizer()
    texts = [render([Document(text="Paris.")], header="", footer="")] * 2
    with pytest.raises(ValueError, match="without packing"):
        vllm_requests(model, tokenizer.build(texts, line_length=64))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_decoder_folder_reads_a_request_as_the_model_does(tmp_path, dtype):
    model, tokenizer = trained_model(), its_tokenizer()
    batch = tokenizer(PROMPT)
    request = vllm_request(model, tokenizer, batch)
    vllm_decoder_folder(model, tokenizer, tmp_path / "decoder", dtype=dtype)
    decoder, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "decoder", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert decoder.dtype == (torch.float32 if dtype is None else torch.bfloat16)
    embeds = as_vllm_reads(request, decoder)
    with torch.no_grad():
        expected = model(**batch).logits[0]
        logits = decoder.eval()(inputs_embeds=embeds[None]).logits[0].float()
        base = RefragModel.from_encoder_decoder("tiny/encoder", "tiny/decoder", compression=4)
        unmerged = base.decoder(inputs_embeds=embeds.float()[None]).logits[0]
    assert (unmerged - expected).abs().max() > 1
    if dtype is None:
        assert (logits - expected).abs().max() < ROUNDING * expected.abs().max()
    else:
        # Half precision: nearer to what it should be than the decoder without its LoRA.
        assert (logits - expected).abs().mean() < 0.1 * (unmerged - expected).abs().mean()
    ids = AutoTokenizer.from_pretrained(tmp_path / "decoder")("The Seine").input_ids
    assert ids == tokenizer.decoder("The Seine").input_ids


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        vllm_decoder_folder(trained_model(), its_tokenizer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
