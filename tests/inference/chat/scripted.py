"""Tiny decoders that say what a test wants, through real weights.

Attention and feed-forward parts give zero, so the last token alone decides what comes next: its
embedding, which no other token's is like, meets one row of the output layer. That makes a chain of
tokens, in which each token may stand once.
"""

from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from refrag_lightning import RefragModel, RefragTokenizer, hub


def scripted_decoder(folder: Path, says: str, *, endless: bool = False) -> Path:
    """Writes a plain decoder that answers every chat with `says`.

    Args:
        folder: Where to.
        says: The answer; no token may stand in it twice.
        endless: Whether it begins again at its end, instead of stopping.
    """
    path = hub.resolve("tiny/decoder").path
    tokenizer = RefragTokenizer.from_encoder_decoder(None, path, compression=1)
    prompt = tokenizer.apply_chat([{"role": "user", "content": "a"}], expand="all")
    first = int(prompt["input_ids"][0, -1])
    said = tokenizer.decoder.encode(says, add_special_tokens=False)
    assert len({first, *said}) == len(said) + 1, tokenizer.decoder.convert_ids_to_tokens(said)
    chain = [first, *said, said[0] if endless else tokenizer.decoder.eos_token_id]
    # Its weights are written into a model of the same kind with an output layer of its own.
    model = AutoModelForCausalLM.from_pretrained(path, tie_word_embeddings=False)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight.zero_()
        for now, following in pairwise(chain):
            head[following] += embeddings[now] / embeddings[now].norm() * 10
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    tokenizer.decoder.save_pretrained(folder)
    return folder


def scripted_refrag(folder: Path, says: str, *, endless: bool = False) -> Path:
    """Writes a run folder with `model/`; its decoder in `base/` answers every chat with `says`."""
    encoder = hub.resolve("tiny/encoder", weights=False).path
    decoder = str(scripted_decoder(folder / "base", says, endless=endless))
    torch.manual_seed(0)
    shape = {"compression": 4, "context": "document"}
    for kind in (RefragModel, RefragTokenizer):
        kind.from_encoder_decoder(encoder, decoder, **shape).save_pretrained(folder / "model")
    return folder
