"""What a model answers: one rule for the pipeline, validation, evaluation, teachers and commands.

An answer follows from the model, the prompt and the request's own settings. Unless those say
otherwise each token is the one with the largest logit: one beam, nothing is drawn, penalised,
suppressed or forced, and there is no least length. Of a decoder's `generation_config`, which often
says how its authors wanted it to be sampled from, only the end tokens count.

An answer ends before an end token of that configuration, before what ends the assistant's turn in
the chat template, and before a stop string. Special tokens and the white space around it are left
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from refrag_lightning.text.plain import control_tokens
from refrag_lightning.text.segments import end_ids, render_chat

if TYPE_CHECKING:
    from refrag_lightning.model.plain import PlainModel
    from refrag_lightning.model.refrag import RefragModel
    from refrag_lightning.text.tokenizer import RefragTokenizer


@torch.no_grad()
def answer(
    model: RefragModel | PlainModel,
    tokenizer: RefragTokenizer,
    batch: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    strip: bool = True,
    **sampling: Any,
) -> list[str]:
    """Answers the prompts of a batch.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        batch: The prompts' tensors, on the model's device, padded on either side.
        max_new_tokens: Most tokens of an answer.
        stop: Texts that end an answer; they are not part of it.
        strip: Whether white space around an answer is dropped. Not where the prompt's text is
            continued, as code is.
        **sampling: As in `answer_settings`.

    Returns:
        The B answers.

    Raises:
        ValueError: A setting is unknown or out of range, or the batch is refused by `generate`.
    """
    ends = {*end_tokens(model, tokenizer), *stop_tokens(tokenizer, stop)}
    tokens_BN = model.generate(
        **batch,
        generation_config=answer_settings(ends, max_new_tokens=max_new_tokens, **sampling),
        stopping_criteria=StoppingCriteriaList([_AtStop(tokenizer, stop)] if stop else []),
    )
    answers = []
    for ids in tokens_BN.tolist():
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = _text(tokenizer, ids[:length], stop)
        answers.append(text.strip() if strip else text)
    return answers


def answer_settings(
    ends: Iterable[int], *, max_new_tokens: int, temperature: float = 0.0, **further: Any
) -> GenerationConfig:
    """Settings for a model's `generate` to which the decoder's own ones add nothing.

    Args:
        ends: Tokens that end an answer, from `end_tokens`.
        max_new_tokens: Most tokens of an answer.
        temperature: Of sampling, from all tokens; 0 takes the most likely one each time.
        **further: Other fields of transformers' `GenerationConfig`: `top_p`, `num_beams`, ...

    Raises:
        ValueError: `temperature` is below 0, or there is no such setting.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature ({temperature}) must be at least 0")
    if unknown := sorted(further.keys() - vars(GenerationConfig()).keys()):
        raise ValueError(f"{', '.join(unknown)}: generation has no such setting")
    # Unless asked for, none but the 50 most likely tokens would be drawn.
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    order = sorted(ends)
    return _Settings(
        max_new_tokens=max_new_tokens,
        eos_token_id=order or None,
        pad_token_id=order[0] if order else None,
        **(drawn | further),
    )


def end_tokens(model: RefragModel | PlainModel, tokenizer: RefragTokenizer) -> list[int]:
    """Tokens that end an answer: the decoder's own, and what ends a turn of the chat template.

    Base models do not stop at the latter by themselves.
    """
    own = model.decoder.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({*own, *_turn_ends(tokenizer)} - {None})


def stop_tokens(tokenizer: RefragTokenizer, stop: Sequence[str]) -> set[int]:
    """The control tokens among stop strings: they are no part of a text in which to find them."""
    if not stop:
        return set()
    return {i for i, token in control_tokens(tokenizer.decoder).items() if token.content in stop}


def _turn_ends(tokenizer: RefragTokenizer) -> list[int]:
    if not tokenizer.decoder.chat_template:
        return []
    said = [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": ["b"]}]
    for turns in (said, [{"role": "system", "content": ["c"]}, *said]):
        try:
            segments = render_chat(
                tokenizer.decoder, turns, header="", footer="", add_generation_prompt=False
            )
        except ValueError:  # a template may want other turns than these
            continue
        return end_ids([segments], tokenizer.plain_template)
    return []


class _Settings(GenerationConfig):
    """A configuration that stays as it is.

    Transformers fills what is None, first from the decoder's `generation_config`, then with its own
    defaults. A copy of the decoder with another `generation_config` would do too, but not where
    the decoder is sharded, and to set and restore it would change the answers of other threads.
    """

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **settings: Any
    ) -> dict[str, Any]:
        # Only what comes from the decoder may bring entries that transformers does not know.
        if allow_custom_entries:
            return {}
        if defaults_only:
            settings.pop("max_length", None)  # or it warns that `max_new_tokens` is set as well
        return dict(super().update(defaults_only=defaults_only, **settings))


class _AtStop(StoppingCriteria):
    """Says which answers hold a stop string. Transformers' own compares token by token."""

    def __init__(self, tokenizer: RefragTokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = [_decode(self._tokenizer, ids) for ids in input_ids.tolist()]
        done = [any(text in said for text in self._stop) for said in texts]
        return torch.tensor(done, device=input_ids.device)


def _text(tokenizer: RefragTokenizer, ids: list[int], stop: Sequence[str]) -> str:
    """What tokens say up to a stop string, the one that was whole first."""
    text = _decode(tokenizer, ids)
    if not any(s in text for s in stop):
        return text
    for length in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[:length])
        places = [text.index(s) for s in stop if s in text]
        if places:
            break
    return text[: min(places)]


def _decode(tokenizer: RefragTokenizer, ids: list[int]) -> str:
    # Cleaning up would take away white space that the model wrote.
    decoded = tokenizer.decoder.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(decoded)
