"""PlainModel: a causal language model alone, called as `RefragModel` is.

For supervised fine-tuning without documents, full-text baselines and teachers: the same batches,
training flags, losses and generation, but no encoder and no vectors. What it saves is an ordinary
Hugging Face folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from refrag_lightning import hub
from refrag_lightning.model.base import as_dtype, load_base, quiet
from refrag_lightning.model.decoder import check_head, word_embeddings
from refrag_lightning.model.files import replace_folder
from refrag_lightning.model.generation import Generation
from refrag_lightning.model.merge import merged_decoder
from refrag_lightning.model.reading import DecoderReading
from refrag_lightning.model.trainable import TrainableParts
from refrag_lightning.text.limits import num_positions


@dataclass
class PlainRecord:
    """How a causal language model differs from what it was loaded as; see `RefragConfig`."""

    trained: list[str] | None = None
    train_word_embeddings: bool = False
    lora: dict[str, Any] | None = None

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """The settings of each part's LoRA, by part."""
        return {} if self.lora is None else {"decoder": self.lora}


class PlainModel(TrainableParts, Generation, DecoderReading):
    """A causal language model, called with the tensors of a `RefragBatch` without slots.

    Nothing requires gradients until `set_trainable(["decoder"])`.

    Args:
        decoder: The model.
        source: Where it came from, if it was loaded.
    """

    part_names: ClassVar[tuple[str, ...]] = ("decoder",)

    def __init__(self, decoder: PreTrainedModel, *, source: hub.ModelSource | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.source = source
        self._record = PlainRecord()
        self.window = num_positions(self.decoder)
        self._apart = {}
        self.set_trainable([])

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> PlainModel:
        """Loads a causal language model in evaluation mode.

        Args:
            name: Hub name or folder.
            dtype: Of the weights; float32 if None.
            attn_implementation: As transformers takes it; its own choice if None.
            device: Where to put it.
            revision: Hub branch, tag or commit.

        Raises:
            ValueError: It is no causal language model, or its head is of an unknown kind.
            OSError: It is not found.
        """
        decoder, source = load_base(
            "decoder",
            os.fspath(name),
            revision=revision,
            dtype=as_dtype(dtype),
            attn_implementation=attn_implementation,
        )
        check_head(decoder)
        model = cls(decoder, source=source).eval()
        return model if device is None else model.to(device)

    @property
    def config(self) -> PretrainedConfig:
        """The decoder's configuration."""
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return word_embeddings(self.decoder).weight.device

    @property
    def record(self) -> PlainRecord:
        """How it differs from what it was loaded as."""
        return self._record

    @property
    def base_models(self) -> tuple[Any, ...]:
        """The decoder."""
        return (self.decoder,)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The decoder's word embeddings."""
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The decoder's output layer."""
        return self.decoder.get_output_embeddings()

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The embeddings (B, S, D) of a batch without slots.

        Raises:
            ValueError: The batch has slots, which only an encoder could fill.
        """
        if _has_slots(batch):
            raise ValueError(
                "the batch holds compressed documents, and this model has no encoder; "
                "build it with expand='all'"
            )
        return word_embeddings(self.decoder)(batch["input_ids"])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Tensor,
    ) -> CausalLMOutput:
        """Runs the batch; the arguments are the batch's keys (see `text/batch.py`).

        Args:
            input_ids: (B, S).
            attention_mask: (B, S).
            position_ids: (B, S).
            labels: (B, S), -100 where no loss is taken.
            segment_ids: (B, S); given exactly when texts are packed.
            branch_ids: (B, S); given exactly when texts share what they begin with.
            logits_to_keep: As in `RefragModel.forward`.
            others: The encoder's tensors, which must be empty.

        Returns:
            `logits` (B, S, V) and, with labels, `loss`: mean cross-entropy in float32.

        Raises:
            ValueError: The batch has slots, or `logits_to_keep` with labels.
        """
        batch = {
            **others,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        if segment_ids is not None:
            batch["segment_ids"] = segment_ids
        if branch_ids is not None:
            batch["branch_ids"] = branch_ids
        return self.read(batch, labels=labels, logits_to_keep=logits_to_keep)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        slot_ids: Tensor | None = None,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_row_ids: Tensor | None = None,
        row_states_mask: Tensor | None = None,
        row_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Continues each text of a batch with the decoder's own `generate`.

        Args:
            input_ids: (B, S), padded on either side.
            attention_mask: (B, S).
            slot_ids: (B, S); all -1.
            encoder_input_ids: (R, T); empty, and so are the encoder's other tensors.
            encoder_attention_mask: (R, T).
            encoder_row_ids: (R, T).
            row_states_mask: (C,); not read.
            row_states: (C, m, E_row); not read.
            position_ids: (B, S); not read, positions follow from the mask.
            labels: (B, S); not read.
            segment_ids: (B, S); refused.
            options: transformers' own; see `RefragModel.generate`.

        Returns:
            The new tokens only, (B, N).

        Raises:
            ValueError: The batch has slots or is packed, or assisted decoding is asked for.
        """
        if segment_ids is not None or options.pop("branch_ids", None) is not None:
            raise ValueError("a packed batch cannot be continued; generate from texts on their own")
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "slot_ids": slot_ids,
            "encoder_input_ids": encoder_input_ids,
            "row_states": row_states,
        }
        batch = {name: tensor for name, tensor in named.items() if tensor is not None}
        return self.continued(batch, options)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Writes an ordinary Hugging Face folder of a causal language model.

        An adapter is merged into the weights on disk; the model itself keeps it. Files of other
        kinds in the folder stay, a tokenizer for one. It is written beside its place and renamed,
        so an interrupted call leaves what was there before.

        Args:
            folder: Where to.
            dtype: Of the saved floating-point tensors; as they are if None.
            max_shard_size: Largest size of one file.
        """
        whole = merged_decoder(self.decoder, dtype=dtype)
        with replace_folder(Path(folder)) as new, quiet():
            whole.save_pretrained(new, max_shard_size=max_shard_size)


def _has_slots(batch: Mapping[str, Tensor]) -> bool:
    """Whether a vector stands anywhere; says so from shapes, without waiting for the device."""
    if "encoder_input_ids" in batch and batch["encoder_input_ids"].shape[0] > 0:
        return True
    # Where all rows' states are given no sequence is left to encode. Training never does that.
    return "row_states" in batch and bool((batch["slot_ids"] >= 0).any())
