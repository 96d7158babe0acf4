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
        if "branch_ids" in batch:
            self._check_branches(mask)
            inputs["position_ids"] = position_ids
            inputs["attention_mask"] = branch_mask(
                mask,
                batch["branch_ids"],
                batch.get("segment_ids"),
                # Eager attention adds the mask; the others take it as it is.
                dtype=embeds.dtype
                if self.decoder.config.get_text_config()._attn_implementation == "eager"
                else None,
            )
            return inputs
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

    def _check_branches(self, mask: Tensor) -> None:
        config = self.decoder.config.get_text_config()
        name, attention = type(self.decoder).__name__, config._attn_implementation or ""
        if not takes_position_ids(self.decoder) or attention not in ("eager", "sdpa"):
            raise ValueError(
                f"{name} with {attention!r} attention cannot read texts that share what they begin "
                "with: it needs position_ids and a mask of its own (attn_implementation 'sdpa' or "
                "'eager'); or let each text stand alone"
            )
        window = getattr(config, "sliding_window", None)
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if slides and window is not None and mask.shape[1] > window:
            raise ValueError(
                f"{name} looks back {window} positions in some layers, so texts that share what "
                f"they begin with may have so many positions together, not {mask.shape[1]}"
            )

    def _check_packing(self, mask: Tensor) -> None:
        name = type(self.decoder).__name__
        if not takes_position_ids(self.decoder):
            raise ValueError(f"{name} takes no position_ids, so its texts cannot be packed")
        if "flash" in (self.decoder.config._attn_implementation or "") and mask.shape[0] > 1:
            raise ValueError(
                f"flash attention tells packed texts apart in a batch of 1 only, not of "
                f"{mask.shape[0]}; use attn_implementation='sdpa'"
            )


def branch_mask(
    attention_mask: Tensor,
    branch_ids: Tensor,
    segment_ids: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Who sees whom where texts share a beginning: a text sees what is shared and itself.

    Args:
        attention_mask: (B, S), 1 at real positions.
        branch_ids: (B, S), the text of each position, -1 where it is shared.
        segment_ids: (B, S), where several such stand on a line: which.
        dtype: What attention adds to its scores: 0 or the least number; None gives booleans.

    Returns:
        (B, 1, S, S), True (or 0) where a position (the third dimension) sees another. Padding sees
        itself alone.
    """
    real_BS = attention_mask.bool()
    positions = torch.arange(real_BS.shape[1], device=real_BS.device)
    sees_BSS = (positions[:, None] >= positions) & real_BS[:, :, None] & real_BS[:, None, :]
    own_BSS = branch_ids[:, :, None] == branch_ids[:, None, :]
    sees_BSS &= own_BSS | (branch_ids < 0)[:, None, :]
    if segment_ids is not None:
        sees_BSS &= segment_ids[:, :, None] == segment_ids[:, None, :]
    sees_BSS |= positions[:, None] == positions
    if dtype is None:
        return sees_BSS[:, None]
    least = torch.finfo(dtype).min
    return torch.zeros(sees_BSS.shape, dtype=dtype, device=sees_BSS.device).masked_fill(
        ~sees_BSS, least
    )[:, None]
