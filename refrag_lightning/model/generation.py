"""Generation from a batch: the decoder's own `generate`, on the embeddings that `embed` builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

POSITION_KEYS = ("input_ids", "attention_mask", "position_ids", "slot_ids", "labels")
# What transformers writes where no length is given.
_DEFAULT_NEW = 20
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class Generation(nn.Module):
    """The methods of `RefragModel` and `PlainModel` that generate."""

    decoder: Any
    _check_window: Callable[..., None]

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Builds the decoder's input; each model has its own."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        slot_ids: Tensor,
        encoder_input_ids: Tensor,
        encoder_attention_mask: Tensor,
        encoder_row_ids: Tensor,
        row_states_mask: Tensor,
        row_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Continues each text of a batch with the decoder's own `generate`.

        Logits processors and stopping criteria see the new tokens only, since the prompt has no
        ids; a repetition penalty, for one, does not look at the prompt. Padding may stand on
        either side.

        Args:
            input_ids: (B, S); this and the following tensors are the batch's, `model.generate(
                **batch)`.
            attention_mask: (B, S).
            slot_ids: (B, S).
            encoder_input_ids: (R, T).
            encoder_attention_mask: (R, T).
            encoder_row_ids: (R, T).
            row_states_mask: (C,).
            row_states: (C, m, E_row).
            position_ids: (B, S); not read, positions follow from the mask.
            labels: (B, S); not read.
            segment_ids: (B, S); refused.
            options: transformers' own: `max_new_tokens`, `do_sample`, `num_beams`, `streamer`,
                `stop_strings` (with `tokenizer=`), ... Defaults are the decoder's
                `generation_config`, which `answering.answer` does not look at.
                `checks_window=False` leaves it to the caller that every text has room for its new
                tokens.

        Returns:
            The new tokens only, (B, N); or transformers' output object with
            `return_dict_in_generate`.

        Raises:
            TooLongError: A text and its new tokens (`max_new_tokens`, or else what `max_length`
                leaves, or else 20) take more positions than the decoder has.
            ValueError: Assisted decoding or prompt lookup is asked for, or the batch is packed.
        """
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "slot_ids": slot_ids,
            "encoder_input_ids": encoder_input_ids,
            "encoder_attention_mask": encoder_attention_mask,
            "encoder_row_ids": encoder_row_ids,
            "row_states_mask": row_states_mask,
        }
        if row_states is not None:
            batch["row_states"] = row_states
        if segment_ids is not None or options.pop("branch_ids", None) is not None:
            raise ValueError("a packed batch cannot be continued; generate from texts on their own")
        return self.continued(batch, options)

    def continued(self, batch: Mapping[str, Tensor], options: dict[str, Any]) -> Any:
        """Continues the texts of a batch; `generate` of the models ends here."""
        config = options.get("generation_config") or self.decoder.generation_config
        if options.pop("checks_window", True):
            mask = batch["attention_mask"]
            self._check_window({"attention_mask": mask}, self._num_new(config, options, mask))
        for name in ASSISTED:
            if options.get(name) is not None or getattr(config, name, None) is not None:
                raise ValueError(
                    f"{name} needs a prompt of token ids, and the prompt is given as vectors; "
                    "leave assisted decoding off"
                )
        if "pad_token_id" not in options and config.pad_token_id is None:
            end = options.get("eos_token_id", config.eos_token_id)
            if end is not None:
                options["pad_token_id"] = end[0] if isinstance(end, (list, tuple)) else end
        batch = pad_left(batch)
        return self.decoder.generate(
            inputs_embeds=self.embed(batch), attention_mask=batch["attention_mask"], **options
        )

    def _num_new(self, config: Any, options: Mapping[str, Any], mask: Tensor) -> int:
        """Most tokens that transformers would write behind a batch with this mask (B, S)."""
        for name, before in (("max_new_tokens", 0), ("max_length", mask.shape[1])):
            for value in (
                options.get(name),
                getattr(config, name),
                getattr(self.decoder.generation_config, name),
            ):
                if value is not None:
                    return max(1, int(value) - before)
        return _DEFAULT_NEW


def pad_left(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moves the padding of every text to the left; the order of what is real stays.

    Args:
        batch: A batch padded on either side.

    Returns:
        The mapping with the tensors of shape (B, S) rearranged; the others are the same objects.
    """
    # A stable sort of 0s and 1s puts the padding first, without asking the device where it is.
    order_BS = batch["attention_mask"].argsort(dim=1, stable=True)
    return {
        key: value.gather(1, order_BS) if key in POSITION_KEYS else value
        for key, value in batch.items()
    }
