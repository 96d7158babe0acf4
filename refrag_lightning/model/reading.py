"""How a decoder reads a batch: packed or not, to final states, logits or a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from refrag_lightning.model.decoder import apply_head, takes_position_ids
from refrag_lightning.model.losses import next_token_loss


class DecoderReading(nn.Module):
    """The methods of `RefragModel` and `PlainModel` that run the decoder."""

    decoder: Any

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Builds the decoder's input (B, S, D); each model has its own."""
        raise NotImplementedError

    def hidden(self, batch: Mapping[str, Tensor], *, inputs_embeds: Tensor | None = None) -> Tensor:
        """The decoder's final states (B, S, D), which `head` turns into logits.

        Args:
            batch: A whole batch, or its decoder side alone where `inputs_embeds` is given.
            inputs_embeds: What `embed` gave for the batch, so that it is not called again.
        """
        inputs = self._decoder_inputs(batch, inputs_embeds)
        return self.decoder.base_model(**inputs).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32 of final states (..., D): the decoder's own head."""
        return apply_head(self.decoder, hidden)

    def read(
        self,
        batch: Mapping[str, Tensor],
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """Runs a batch; `forward` of the models ends here.

        Args:
            batch: The batch.
            labels: (B, S), -100 where no loss is taken.
            logits_to_keep: Only the last positions' logits, or those at these indices; 0 for all.

        Returns:
            `logits` (B, S, V) and, with labels, `loss`: mean cross-entropy in float32.

        Raises:
            ValueError: `logits_to_keep` with labels.
        """
        options: dict[str, Any] = {}
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            if labels is not None:
                raise ValueError("logits_to_keep leaves out logits that the loss on labels needs")
            options["logits_to_keep"] = logits_to_keep
        logits = self.decoder(**self._decoder_inputs(batch), **options).logits
        loss = None if labels is None else next_token_loss(logits, labels)
        return CausalLMOutput(loss=loss, logits=logits)

    def _decoder_inputs(
        self, batch: Mapping[str, Tensor], inputs_embeds: Tensor | None = None
    ) -> dict[str, Any]:
        mask, position_ids = batch["attention_mask"], batch["position_ids"]
        embeds = self.embed(batch) if inputs_embeds is None else inputs_embeds
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False}
        if "segment_ids" in batch:
            # transformers tells packed texts apart by positions that start anew, and only without
            # a 2-D mask. Padding positions all get 0: each is a segment of its own, so that no
            # text sees them.
            self._check_packing(mask)
            inputs["position_ids"] = torch.where(mask.bool(), position_ids, 0)
            return inputs
        inputs["attention_mask"] = mask
        if takes_position_ids(self.decoder):
            inputs["position_ids"] = position_ids
        return inputs

    def _check_packing(self, mask: Tensor) -> None:
        name = type(self.decoder).__name__
        if not takes_position_ids(self.decoder):
            raise ValueError(f"{name} takes no position_ids, so its texts cannot be packed")
        if "flash" in (self.decoder.config._attn_implementation or "") and mask.shape[0] > 1:
            raise ValueError(
                f"flash attention tells packed texts apart in a batch of 1 only, not of "
                f"{mask.shape[0]}; use attn_implementation='sdpa'"
            )
