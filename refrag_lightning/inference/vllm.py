"""From a batch to vLLM's mixed prompt, and the decoder folder that vLLM loads.

vLLM itself was not run here: what is tested is the form of its documented request
(`vllm.inputs.EmbedsPrompt`) and that the vectors in it are exactly those of `model.embed`.

A mixed prompt gives, for each position, a token id or a vector of the decoder's embedding space:

- `prompt_token_ids`: (S,) ids, with a placeholder where a vector stands;
- `prompt_embeds`: (S, D), with zeros where a token stands;
- `prompt_is_token_ids`: (S,), True where the id is embedded by vLLM, False where the row of
  `prompt_embeds` is taken as it is.

The zeros are not for looks. vLLM's prefix cache finds a block by its ids and its vectors, but not
by the mask (issue 56655 of vllm-project/vllm, September 2026): anything else at the positions of
tokens could be mistaken for a vector of another prompt.

    from vllm import LLM, SamplingParams

    llm = LLM("decoder", enable_prompt_embeds=True, dtype="bfloat16")
    prompt = vllm_request(model, tokenizer, tokenizer(text))
    ends = end_tokens(model, tokenizer)  # of model/answering.py; vLLM knows the decoder's own only
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=64, stop_token_ids=ends))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from refrag_lightning.model.base import quiet
from refrag_lightning.model.files import replace_folder
from refrag_lightning.model.merge import merged_decoder
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.model.refrag import RefragModel
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.tokenizer import RefragTokenizer

# vLLM's own code of Gemma 2 multiplies given vectors by the square root of the hidden size, as it
# does the embeddings of ids; transformers does it inside the embedding module, so vectors made for
# it are scaled already. Gemma is taken to be alike. Later families were not looked at.
SCALED_AGAIN = ("gemma", "gemma2")

# In the vocabulary of every decoder; vLLM does not embed it.
PLACEHOLDER = 0


class _TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


class VllmPrompt(_TokensPrompt, total=False):
    """What `LLM.generate` takes for one prompt.

    Attributes:
        prompt_token_ids: (S,) ids.
        prompt_embeds: (S, D) on the CPU, in the decoder's dtype; left out, with the mask, where no
            vector stands in the prompt.
        prompt_is_token_ids: (S,) whether an id counts.
    """

    prompt_embeds: Tensor
    prompt_is_token_ids: list[bool]


def vllm_request(
    model: RefragModel | PlainModel,
    tokenizer: RefragTokenizer,
    prompt: Mapping[str, Tensor] | Sequence[Segment],
) -> VllmPrompt:
    """One prompt as vLLM takes it.

    Args:
        model: The model, with a LoRA or without one.
        tokenizer: Its tokenizer.
        prompt: A batch of one text, or the segments of one; all documents are vectors then.

    Returns:
        The request.

    Raises:
        ValueError: If the batch holds several texts, or as in `vllm_requests`.
    """
    batch = prompt if isinstance(prompt, Mapping) else tokenizer.build([prompt])
    requests = vllm_requests(model, batch)
    if len(requests) != 1:
        raise ValueError(
            f"the batch holds {len(requests)} texts, and a request is one; use vllm_requests"
        )
    return requests[0]


@torch.no_grad()
def vllm_requests(model: RefragModel | PlainModel, batch: Mapping[str, Tensor]) -> list[VllmPrompt]:
    """Each text of a batch as vLLM takes it; the rows of all texts are encoded in one call.

    Args:
        model: The model.
        batch: A batch, padded on either side; the padding is left out.

    Returns:
        A request for each text, in order.

    Raises:
        ValueError: If texts are packed, or the decoder is of a family whose vectors vLLM scales
            once more.
    """
    if "segment_ids" in batch or "branch_ids" in batch:
        raise ValueError("texts on one line cannot be told apart; build the batch without packing")
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    vectors_BS = batch["slot_ids"] >= 0
    kind = model.decoder.config.get_text_config().model_type
    if kind.removesuffix("_text") in SCALED_AGAIN and vectors_BS.any():
        raise ValueError(
            f"vLLM multiplies the vectors of a prompt by the square root of the hidden size for "
            f"decoders of the kind {kind!r}, so documents cannot be handed to it as vectors"
        )
    embeds_BSD = torch.where(vectors_BS[..., None], model.embed(batch), 0).cpu()
    ids_BS = batch["input_ids"].masked_fill(vectors_BS, PLACEHOLDER).cpu()
    is_id_BS = ~vectors_BS.cpu()
    requests = []
    for text, mask_S in enumerate(batch["attention_mask"].bool().cpu()):
        request: VllmPrompt = {"prompt_token_ids": ids_BS[text, mask_S].tolist()}
        is_id_S = is_id_BS[text, mask_S]
        if not is_id_S.all():
            request["prompt_embeds"] = embeds_BSD[text, mask_S]
            request["prompt_is_token_ids"] = is_id_S.tolist()
        requests.append(request)
    return requests


def vllm_decoder_folder(
    model: RefragModel | PlainModel,
    tokenizer: RefragTokenizer,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes the decoder alone, LoRA merged, with its tokenizer: what `vllm.LLM` loads.

    It is an ordinary Hugging Face folder. The LoRA is merged because vLLM's own LoRA is known to
    crash together with given vectors (on Llama, with several requests at once).

    Args:
        model: The model; it stays as it is.
        tokenizer: Its tokenizer.
        out: Where to; must not exist, or be empty.
        dtype: Of the weights; as they are if None. bfloat16 is a good choice: vLLM takes a type of
            half precision by itself where it finds float32, and float16 can overflow on vectors.
        max_shard_size: Largest size of one file.

    Raises:
        FileExistsError: If `out` is not empty.
        ValueError: If the adapter cannot be merged.
    """
    place = Path(out).expanduser()
    if place.is_dir() and any(place.iterdir()):
        raise FileExistsError(f"{place} is not empty; give another folder for the decoder")
    decoder: Any = merged_decoder(model.decoder, dtype=dtype)
    with replace_folder(place, ours=()) as new, quiet():
        decoder.save_pretrained(new, max_shard_size=max_shard_size)
        tokenizer.decoder.save_pretrained(new)
