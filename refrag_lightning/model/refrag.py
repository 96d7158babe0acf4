"""RefragModel: a small encoder, a projector and a decoder LLM.

Rows of `compression` tokens go through the encoder, are pooled and projected, and stand among the
decoder's token embeddings as one vector a slot (REFRAG, arXiv 2509.01092). `embed` is the one
place where vectors and tokens come together; training, generation and serving all go through it.

Shape suffixes as in `text/batch.py`: B texts, S decoder positions, R encoder sequences, T encoder
tokens, C rows, E encoder hidden, D decoder hidden, V vocabulary, m slots a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from refrag_lightning.model.base import build_decoder, build_encoder, share_weights
from refrag_lightning.model.config import RefragConfig
from refrag_lightning.model.decoder import embedding_slices, vocabulary_size, word_embeddings
from refrag_lightning.model.encoder import Pooling, run_encoder
from refrag_lightning.model.folder import FolderMethods
from refrag_lightning.model.generation import Generation
from refrag_lightning.model.projector import Projector
from refrag_lightning.model.reading import DecoderReading
from refrag_lightning.model.trainable import requires_gradients
from refrag_lightning.text.limits import num_positions

BATCH_KEYS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "slot_ids",
    "encoder_input_ids",
    "encoder_attention_mask",
    "encoder_row_ids",
    "row_states_mask",
)


class RefragModel(FolderMethods, Generation, DecoderReading, PreTrainedModel):  # type: ignore[misc]
    """An encoder, a projector and a decoder, called with the tensors of a `RefragBatch`.

    Building it loads nothing: parts that are not given get random weights from the configuration.
    Use `from_encoder_decoder` or `from_pretrained` for trained ones.

    Frozen parts stay in evaluation mode when the model is set to training, so that what they give
    does not depend on dropout.

    Args:
        config: The configuration; must hold both models' configurations.
        encoder: The encoder, if it exists already.
        decoder: The decoder, if it exists already.
    """

    config_class = RefragConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: RefragConfig,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ) -> None:
        if config.encoder_config is None or config.decoder_config is None:
            raise ValueError("the configuration must hold encoder_config and decoder_config")
        super().__init__(config)
        self.encoder = build_encoder(config.encoder_config) if encoder is None else encoder
        self.decoder = build_decoder(config.decoder_config) if decoder is None else decoder
        if config.shares_weights:
            share_weights(self.encoder, self.decoder)
        config.encoder_config = self.encoder.config
        config.decoder_config = self.decoder.config
        self.pool = Pooling(
            kind=config.pooling,
            hidden_size=config.encoder_hidden_size,
            compression=config.largest_row,
            num_slots=config.num_slots,
            order=config.row_order,
        )
        self.projector = Projector(
            input_size=config.row_size,
            output_size=word_embeddings(self.decoder).weight.shape[1],
            kind=config.projector,
            scale=config.projector_scale,
        )
        # Tokens that go through the encoder at once on a CPU; see `run_encoder`.
        self.encoder_max_tokens = 2048
        self._mean_embedding: Tensor | None = None
        self.window = num_positions(self.decoder)
        self.encoder_window = num_positions(self.encoder)
        self._apart = {}
        self.post_init()

    def init_weights(self) -> None:
        """Does nothing: every part draws its own weights, and given parts keep theirs."""

    @classmethod
    def can_generate(cls) -> bool:
        """False for transformers, which would look for a cache here; `generate` is our own."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embeddings."""
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's output layer."""
        return self.decoder.get_output_embeddings()

    def set_rates(self, rates: Iterable[int], compression: int | None = None) -> None:
        """Sets the compressions that the model runs at; nothing that it learnt changes.

        Args:
            rates: The rates.
            compression: The one to take where none is named; the first of the rates if None.

        Raises:
            ValueError: A rate below 1; several rates with several slots a row; or, with pooling
                `concat`, a rate above the largest that the model was built with.
        """
        self.config.set_rates(rates, compression)
        self.pool.compression = self.config.largest_row

    # ---- from a batch to the decoder's input -------------------------------------------------

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Row states: one encoder call for all rows of the batch.

        Args:
            batch: The encoder's tensors, `row_states_mask`, and `row_states` where rows are given.

        Returns:
            (C, m, E_row): given states where the mask says so, pooled states elsewhere.

        Raises:
            ValueError: A sequence is longer than the encoder reads.
        """
        mask_C = batch["row_states_mask"]
        length = batch["encoder_input_ids"].shape[1]
        if self.encoder_window is not None and length > self.encoder_window:
            raise ValueError(
                f"an encoder sequence has {length} tokens, but the encoder reads "
                f"{self.encoder_window}: give the tokenizer max_encoder_length "
                f"({self.encoder_window}), and shorter rows where one alone is longer"
            )
        # Without gradients to give, nothing is kept for a backward pass.
        with torch.set_grad_enabled(torch.is_grad_enabled() and requires_gradients(self.encoder)):
            states_RTE = run_encoder(
                self.encoder,
                batch["encoder_input_ids"],
                batch["encoder_attention_mask"],
                max_tokens=self.encoder_max_tokens,
            )
        states = self.pool(
            states_RTE,
            batch["encoder_row_ids"],
            batch["encoder_attention_mask"],
            num_rows=mask_C.shape[0],
        )
        given = batch.get("row_states")
        if given is None:
            return states
        return torch.where(mask_C[:, None, None], given.to(states.dtype), states)

    def project(self, states: Tensor) -> Tensor:
        """Projects row states (..., E_row) into the decoder's embedding space (..., D)."""
        return self.projector(states)

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Builds the decoder's input: token embeddings, with projected vectors at the slots.

        Args:
            batch: A whole batch; see `text/batch.py`.

        Returns:
            (B, S, D) in the decoder's dtype.
        """
        slot_ids = batch["slot_ids"]
        tokens_BSD = self.get_input_embeddings()(batch["input_ids"])
        if batch["row_states_mask"].shape[0] > 0:
            vectors = self.project(self.encode(batch)).flatten(0, 1).to(tokens_BSD.dtype)
            at_slots = vectors.index_select(0, slot_ids.clamp(min=0).flatten())
            tokens_BSD = torch.where(
                (slot_ids >= 0)[..., None], at_slots.view_as(tokens_BSD), tokens_BSD
            )
        if self.training and batch["encoder_input_ids"].shape[0] == 0:
            tokens_BSD = tokens_BSD + self._untouched()
        return tokens_BSD

    def mean_embedding(self) -> Tensor:
        """Mean of the decoder's embedding outputs over its vocabulary, (D,) in float32."""
        weight = word_embeddings(self.decoder).weight
        if self._mean_embedding is None or weight.requires_grad:
            sums = [rows.sum(0, dtype=torch.float64) for rows in embedding_slices(self.decoder)]
            self._mean_embedding = (
                torch.stack(sums).sum(0) / vocabulary_size(self.decoder)
            ).float()
        return self._mean_embedding.to(weight.device)

    def _untouched(self) -> Tensor:
        """0, connected to what a batch without encoder sequences leaves out.

        Every parameter that trains gets a gradient from every batch, so data-parallel training
        need not search for those without one.
        """
        weight = word_embeddings(self.decoder).weight
        zero = torch.zeros((), device=weight.device)
        for parameter in (*self.parts("projector"), *self.parts("encoder")):
            zero = zero + 0 * parameter.flatten()[:1].float().sum()
        return zero.to(weight.dtype)

    # ---- the decoder -------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        slot_ids: Tensor,
        encoder_input_ids: Tensor,
        encoder_attention_mask: Tensor,
        encoder_row_ids: Tensor,
        row_states_mask: Tensor,
        row_states: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """Runs the batch; the arguments are the batch's keys (see `text/batch.py`).

        Args:
            input_ids: (B, S).
            attention_mask: (B, S).
            position_ids: (B, S).
            slot_ids: (B, S).
            encoder_input_ids: (R, T).
            encoder_attention_mask: (R, T).
            encoder_row_ids: (R, T).
            row_states_mask: (C,).
            row_states: (C, m, E_row).
            labels: (B, S), -100 where no loss is taken.
            segment_ids: (B, S); given exactly when texts are packed, that is, when
                `position_ids` start anew inside a line of the batch.
            branch_ids: (B, S); given exactly when texts share what they begin with.
            logits_to_keep: Only the last positions' logits, or those at these indices; 0 for all.
                Without `labels` only.

        Returns:
            `logits` (B, S, V) and, with labels, `loss`: mean cross-entropy in float32.

        Raises:
            ValueError: `logits_to_keep` with labels.
        """
        arguments = dict(locals())
        batch = {
            key: arguments[key]
            for key in (*BATCH_KEYS, "row_states", "segment_ids", "branch_ids")
            if arguments[key] is not None
        }
        return self.read(batch, labels=labels, logits_to_keep=logits_to_keep)
