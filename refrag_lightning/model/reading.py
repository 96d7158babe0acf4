"""How a decoder reads a batch: packed or not, to final states, logits or a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from refrag_lightning.model.decoder import (
    apply_head,
    evaluation_mode,
    takes_position_ids,
    vocabulary_size,
    word_embeddings,
)
from refrag_lightning.model.losses import next_token_loss

# Long enough for layers that read blocks of positions to have some of another text.
_PROBE_LENGTH = 160


class TooLongError(ValueError):
    """A text takes more positions than the decoder has.

    Args:
        text: Its number in the batch, or what it is called.
        positions: Positions that it takes.
        window: Positions that the decoder has.
        new_tokens: Positions that are to follow.
        advice: What can be done.
    """

    def __init__(
        self, text: int | str, positions: int, window: int, new_tokens: int = 0, advice: str = ""
    ) -> None:
        name = f"text {text} of the batch" if isinstance(text, int) else text
        more = f" and max_new_tokens ({new_tokens}) more" if new_tokens else ""
        super().__init__(
            f"{name} takes {positions} positions{more}, but the decoder has {window}"
            f"{advice and f': {advice}'}"
        )
        self.text = text
        self.sizes = (positions, window, new_tokens)


@contextmanager
def naming_texts(names: Sequence[str], advice: str = "") -> Iterator[None]:
    """Has a `TooLongError` say what the text is called, and what can be done.

    Args:
        names: What the batch's texts are called.
        advice: What can be done.
    """
    try:
        yield
    except TooLongError as error:
        assert isinstance(error.text, int)
        raise TooLongError(names[error.text], *error.sizes, advice) from None


class DecoderReading(nn.Module):
    """The methods of `RefragModel` and `PlainModel` that run the decoder."""

    decoder: Any
    window: int | None
    """Positions that the decoder has for a text; None where nothing limits them."""
    # Key of the batch, attention and device -> whether texts are kept apart.
    _apart: dict[tuple[str, str, str], bool]

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Builds the decoder's input (B, S, D); each model has its own."""
        raise NotImplementedError

    def hidden(self, batch: Mapping[str, Tensor], *, inputs_embeds: Tensor | None = None) -> Tensor:
        """The decoder's final states (B, S, D), which `head` turns into logits.

        Args:
            batch: A whole batch, or its decoder side alone where `inputs_embeds` is given.
            inputs_embeds: What `embed` gave for the batch, so that it is not called again.

        Raises:
            TooLongError: A text takes more positions than the decoder has.
        """
        self._check_window(batch)
        if not self.keeps_apart(batch):
            return self._hidden_apart(batch, inputs_embeds)
        return self._hidden(batch, inputs_embeds)

    def _hidden(self, batch: Mapping[str, Tensor], inputs_embeds: Tensor | None = None) -> Tensor:
        inputs = self._decoder_inputs(batch, inputs_embeds)
        return self.decoder.base_model(**inputs).last_hidden_state

    def keeps_apart(
        self,
        batch: Mapping[str, Tensor],
        *,
        agree: Callable[[bool], bool] = bool,
        warns: bool = True,
    ) -> bool:
        """Whether the decoder reads each text of a line as if it were alone.

        transformers derives who sees whom from positions that start anew, or from a mask, but not
        every family heeds it: recurrent and convolutional layers have no mask, and some decoders
        count positions themselves. So it is tried, once for packed texts and once for those that
        share a beginning. Where it fails, `hidden` and `read` give such texts one a line.

        Args:
            batch: A batch; with one text a line there is nothing to try.
            agree: What this process found -> what holds on all of them; asked at the first batch.
            warns: Whether to say so where texts are not kept apart.
        """
        kind = next((key for key in ("branch_ids", "segment_ids") if key in batch), None)
        if kind is None:
            return True
        # Another attention may tell texts apart in another way.
        how = (kind, str(self.decoder.config._attn_implementation), self.decoder.device.type)
        if how not in self._apart:
            if kind == "branch_ids":
                self._check_branches(batch["attention_mask"])
            self._apart[how] = agree(_tells_apart(self, kind, batch["attention_mask"].shape[1]))
            if warns and not self._apart[how]:
                what = "share a context" if kind == "branch_ids" else "are packed into a line"
                warnings.warn(
                    f"texts that {what} would see each other in {type(self.decoder).__name__}, so "
                    "each is read on a line of its own, padded to the longest",
                    stacklevel=2,
                )
        return self._apart[how]

    def _hidden_apart(self, batch: Mapping[str, Tensor], inputs_embeds: Tensor | None) -> Tensor:
        """Final states (B, S, D) of a batch with several texts a line, each read alone.

        Padding gets zeros.
        """
        embeds_BSD = self.embed(batch) if inputs_embeds is None else inputs_embeds
        real_BS = batch["attention_mask"].bool()
        lines_BS = torch.arange(len(real_BS), device=real_BS.device)[:, None].expand_as(real_BS)
        segments_BS = batch.get("segment_ids", lines_BS)
        # Of every real position N: its text (-1 where several share it), its group and its place.
        text_N = batch.get("branch_ids", segments_BS)[real_BS]
        group_N, place_N = segments_BS[real_BS], batch["position_ids"][real_BS]
        own_K = (text_N >= 0).nonzero().flatten()
        group_T = group_N.new_zeros(int(text_N.max()) + 1).index_put(
            (text_N[own_K],), group_N[own_K]
        )
        shared_K = (text_N < 0).nonzero().flatten()
        copy_text, copy = (group_T[:, None] == group_N[shared_K]).nonzero(as_tuple=True)
        # Every text's positions, and those that it shares.
        index = torch.cat([own_K, shared_K[copy]])
        at = torch.cat([text_N[own_K], copy_text]), place_N[index]
        shape = len(group_T), int(place_N.max()) + 1
        mask = text_N.new_zeros(shape).index_put(at, text_N.new_ones(()))
        embeds = embeds_BSD.new_zeros((*shape, embeds_BSD.shape[-1]))
        embeds = embeds.index_put(at, embeds_BSD[real_BS][index])
        positions = torch.arange(shape[1], device=mask.device) * mask
        hidden = self._hidden({"attention_mask": mask, "position_ids": positions}, embeds)
        # What texts share is the same in each of them; the first one's is taken.
        first_N = text_N.new_zeros(len(text_N)).index_put((index.flip(0),), at[0].flip(0))
        first_N = torch.where(text_N >= 0, text_N, first_N)
        hidden_BSD = hidden.new_zeros((*real_BS.shape, hidden.shape[-1]))
        return hidden_BSD.index_put((real_BS,), hidden[first_N, place_N])

    def _check_window(self, batch: Mapping[str, Tensor], new_tokens: int = 0) -> None:
        """Refuses a batch with a text of more positions than the decoder reads.

        Args:
            batch: The batch.
            new_tokens: Positions that are to follow.
        """
        mask_BS = batch["attention_mask"]
        # The padded shape is known without asking the device, and nearly always enough.
        if self.window is None or mask_BS.shape[1] + new_tokens <= self.window:
            return
        places_BS = batch.get("position_ids", mask_BS.cumsum(1) - 1)
        last = int(places_BS.masked_fill(~mask_BS.bool(), -1).argmax())
        positions = int(places_BS.flatten()[last]) + 1
        if positions + new_tokens > self.window:
            texts_BS = batch.get("branch_ids", batch.get("segment_ids"))
            line = last // mask_BS.shape[1]
            text = line if texts_BS is None else int(texts_BS.flatten()[last])
            raise TooLongError(text, positions, self.window, new_tokens)

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
            TooLongError: A text takes more positions than the decoder has.
            ValueError: `logits_to_keep` with labels.
        """
        options: dict[str, Any] = {}
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            if labels is not None:
                raise ValueError("logits_to_keep leaves out logits that the loss on labels needs")
            options["logits_to_keep"] = logits_to_keep
        self._check_window(batch)
        if not self.keeps_apart(batch):
            hidden_BSD = self.hidden(batch)
            if options:
                kept = logits_to_keep
                hidden_BSD = hidden_BSD[:, slice(-kept, None) if isinstance(kept, int) else kept]
            logits = self.head(hidden_BSD)
        else:
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
        if attention not in ("eager", "sdpa"):
            raise ValueError(
                f"{name} with {attention!r} attention cannot read texts that share what they begin "
                "with: it needs a mask of its own (attn_implementation 'sdpa' or 'eager'); or let "
                "each text stand alone"
            )
        window = getattr(config, "sliding_window", None)
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if slides and window is not None and mask.shape[1] > window:
            raise ValueError(
                f"{name} looks back {window} positions in some layers, so texts that share what "
                f"they begin with may have so many positions together, not {mask.shape[1]}"
            )

    def _check_packing(self, mask: Tensor) -> None:
        if "flash" in (self.decoder.config._attn_implementation or "") and mask.shape[0] > 1:
            raise ValueError(
                f"flash attention tells packed texts apart in a batch of 1 only, not of "
                f"{mask.shape[0]}; use attn_implementation='sdpa'"
            )


@torch.no_grad()
def _tells_apart(model: DecoderReading, kind: str, width: int) -> bool:
    """Whether a text is read behind two others as it is alone.

    What it differs by has to be rounding; how much that is in the decoder's precision is told by
    what padding behind the text changes. Random states, modes and gradients stay as they are.

    Args:
        model: The model.
        kind: `segment_ids` for packed texts, `branch_ids` for texts behind a shared beginning.
        width: Positions of a line.
    """
    decoder = model.decoder
    if not takes_position_ids(decoder):
        return False
    embedding = word_embeddings(decoder)
    device = embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size(decoder), (3, _PROBE_LENGTH), generator=generator)
    begin, text = ids[0, : 3 if kind == "branch_ids" else 0], ids[0, 3:8]
    room = min(width, model.window or width) - len(begin) - len(text)
    others = ids[1:, : max(1, min(room, _PROBE_LENGTH))]

    def states(*texts: Tensor, padding: int = 0) -> Tensor:
        """Final states of the last text on a line, (length, D) in float32."""
        parts = [begin, *texts]
        places = [torch.arange(len(begin))]
        places += [torch.arange(len(begin), len(begin) + len(each)) for each in texts]
        owners = [torch.full((len(part),), number) for number, part in enumerate(parts, start=-1)]
        batch = {"position_ids": F.pad(torch.cat(places), (0, padding))}
        length = sum(map(len, parts))
        batch["attention_mask"] = F.pad(torch.ones(length, dtype=torch.long), (0, padding))
        if len(texts) > 1:
            batch[kind] = torch.cat(owners)
        # Padding is a token too: some decoders look up which one an embedding is of.
        ids_S = torch.cat([*parts, text[:padding]]).to(device)
        hidden_SD = model._hidden(
            {key: value[None].to(device) for key, value in batch.items()}, embedding(ids_S)[None]
        )[0]
        return hidden_SD[length - len(texts[-1]) : length].float()

    rngs = [device] if device.type == "cuda" else []
    with evaluation_mode(decoder), torch.random.fork_rng(devices=rngs):
        alone = states(text)
        rounding = (states(text, padding=4) - alone).abs().max()
        try:
            moved = max((states(other, text) - alone).abs().max() for other in others)
        except Exception:  # such as that of ALiBi for a mask of four dimensions
            return False
    scale = alone.abs().max()
    # Where padding changes more than a fortieth, it is not by rounding.
    return bool(moved <= 1e-5 * scale + 4 * rounding.clamp(max=scale / 40))


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
