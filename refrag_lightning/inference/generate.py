"""What a model folder answers to one prompt with `<doc>` blocks."""

import sys
from pathlib import Path
from typing import Literal

from refrag_lightning.plain_text import say


def generate(
    model: str,
    prompt: str | None = None,
    chat: bool = False,
    expand: Literal["none", "all"] = "none",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    allow_base_mismatch: bool = False,
) -> None:
    """Prints what a model answers to a prompt, and nothing else.

    Args:
        model: A model folder, or a run folder that has one. A causal language model alone can be
            asked too, with documents as text.
        prompt: The prompt, with documents in `<doc>` blocks; read from standard input if None.
        chat: Put the prompt into the decoder's chat template, as a user's message.
        expand: Hand the documents over as vectors (none) or as text (all).
        max_new_tokens: Most tokens of the answer.
        temperature: Of sampling; 0 takes the most likely token each time.
        seed: Of sampling.
        device: Where to run, such as cuda.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
    """
    import torch

    from refrag_lightning.model.answering import answer
    from refrag_lightning.model.load import load, model_folder

    folder = model_folder(model)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{model!r} is no model folder: there is no such folder")
    loaded, tokenizer = load(folder, device=device, allow_base_mismatch=allow_base_mismatch)
    text = sys.stdin.read() if prompt is None else prompt
    if chat:
        batch = tokenizer.apply_chat([{"role": "user", "content": text}], expand=expand)
    else:
        batch = tokenizer(text, expand=expand)
    torch.manual_seed(seed)
    [text] = answer(
        loaded,
        tokenizer,
        batch.to(device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    say(text)
