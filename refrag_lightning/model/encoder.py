"""The encoder's side: all sequences of a batch in one go, and rows pooled by segment reductions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class Pooling(nn.Module):
    """Reduces the states of a row's tokens to m vectors.

    Every kind is one `index_add` into (C * slots) segments and a spare one, which takes the
    special tokens and the padding. There is no loop over rows, and nothing waits for the device.

    A row's tokens stand side by side in one sequence. With several slots, token t of a row
    belongs to slot floor(t * m / compression).

    Args:
        kind: `mean`, `cls` (the sequence's first token), `last` (the segment's last token),
            `attention` (softmax over the segment with a learned query; starts out as the mean) or
            `concat` (the row's states one after another, zeros where the row is short).
        hidden_size: E.
        compression: Tokens a row, the largest of several rates.
        num_slots: m.
        order: Adds to the mean each state's linear map for its place in the row, zero at the start:
            sum_j (h_j + A_j h_j) / tokens of the row.
    """

    def __init__(
        self,
        *,
        kind: str,
        hidden_size: int,
        compression: int,
        num_slots: int,
        order: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.compression = compression
        self.num_slots = num_slots
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(hidden_size))
        self.order: nn.Parameter | None = None
        if order:
            self.order = nn.Parameter(torch.zeros(compression * hidden_size, hidden_size))

    def forward(
        self,
        states_RTE: Tensor,
        row_ids_RT: Tensor,
        attention_mask_RT: Tensor,
        num_rows: int,
    ) -> Tensor:
        """Pools the encoder's states.

        Args:
            states_RTE: (R, T, E).
            row_ids_RT: (R, T), the row of each token, or -1.
            attention_mask_RT: (R, T), 1 at real tokens.
            num_rows: C.

        Returns:
            (C, m, E_row) in the states' dtype, summed in float32; zeros in slots without tokens.
        """
        dtype, hidden_size = states_RTE.dtype, states_RTE.shape[-1]
        if states_RTE.numel() == 0:
            width = hidden_size * (self.compression if self.kind == "concat" else 1)
            return states_RTE.new_zeros((num_rows, self.num_slots, width))
        if self.kind == "cls":
            # The first attended token, wherever padding stands; a sequence holds one row.
            first_R = attention_mask_RT.int().argmax(dim=1)
            x = states_RTE[torch.arange(len(first_R), device=first_R.device), first_R]
            rows = row_ids_RT.amax(dim=1)
            target = torch.where(rows >= 0, rows, num_rows)
            return _sum_into(target, x, num_rows)[:, None].to(dtype)

        x = states_RTE.flatten(0, 1)
        rows = row_ids_RT.flatten()
        rank = _rank_in_run(rows)
        if self.kind == "concat":
            return self._side_by_side(x, rows, rank, num_rows, self.compression)[:, None].to(dtype)

        num = num_rows * self.num_slots
        slot = (rank * self.num_slots // self.compression).clamp(max=self.num_slots - 1)
        target = torch.where(rows >= 0, rows * self.num_slots + slot, num)
        if self.kind == "last":
            ends = F.pad(target[1:] != target[:-1], (0, 1), value=True)
            pooled = _sum_into(torch.where(ends, target, num), x, num)
        else:
            pooled = _weighted_mean(target, x, self._weights(target, x, num), num)
        if self.order is not None:
            places = len(self.order) // hidden_size
            mapped = self._side_by_side(x, rows, rank, num_rows, places) @ self.order
            sizes = _sum_into(target, torch.ones_like(x[:, :1]), num)
            pooled = pooled + mapped / sizes.clamp(min=1)
        return pooled.view(num_rows, self.num_slots, hidden_size).to(dtype)

    def _side_by_side(
        self, x: Tensor, rows: Tensor, rank: Tensor, num_rows: int, places: int
    ) -> Tensor:
        """The states (N, E) of each row one after another, (C, places * E), zeros behind them."""
        num = num_rows * places
        kept = (rows >= 0) & (rank < places)
        target = torch.where(kept, rows * places + rank, num)
        return _sum_into(target, x, num).view(num_rows, places * x.shape[-1])

    def _weights(self, target: Tensor, x: Tensor, num: int) -> Tensor:
        """Weights (N,) up to a factor a segment: ones, or exponentials of the query's scores."""
        if self.kind == "mean":
            return torch.ones(x.shape[0], device=x.device)
        scores = (x.float() * self.query.float()).sum(-1) / x.shape[-1] ** 0.5
        highest = scores.new_full((num + 1,), -torch.inf)
        highest = highest.scatter_reduce(0, target, scores.detach(), "amax")
        return torch.exp(scores - highest[target])


def run_encoder(
    encoder: PreTrainedModel,
    input_ids_RT: Tensor,
    attention_mask_RT: Tensor,
    *,
    max_tokens: int | None = None,
) -> Tensor:
    """Runs the encoder over all sequences of a batch.

    On a GPU this is one call. On a CPU the sequences are sorted by length and go through in
    slices whose activations stay in the caches, each cut to its longest sequence; slices without
    padding get no mask, which lets attention take its fast path.

    Args:
        encoder: The encoder.
        input_ids_RT: (R, T).
        attention_mask_RT: (R, T), 1 at real tokens.
        max_tokens: Tokens a slice at most; None means one call.

    Returns:
        Last hidden states (R, T, E); undefined at padding.
    """
    num_sequences, length = input_ids_RT.shape
    if num_sequences == 0:
        size = encoder.config.get_text_config().hidden_size
        return torch.zeros((0, length, size), dtype=encoder.dtype, device=input_ids_RT.device)
    if max_tokens is None or input_ids_RT.device.type != "cpu":
        return _call(encoder, input_ids_RT, attention_mask_RT)

    lengths_R = attention_mask_RT.sum(dim=1)
    positions_T = torch.arange(length, device=lengths_R.device)
    if not torch.equal(attention_mask_RT.bool(), positions_T < lengths_R[:, None]):
        return _call(encoder, input_ids_RT, attention_mask_RT)
    sorted_lengths, order = lengths_R.sort(stable=True, descending=True)
    states, start = [], 0
    while start < num_sequences:
        longest = max(1, int(sorted_lengths[start]))
        stop = min(num_sequences, start + max(1, max_tokens // longest))
        rows = order[start:stop]
        mask = None
        if int(sorted_lengths[stop - 1]) < longest:
            mask = attention_mask_RT[rows, :longest]
        hidden = _call(encoder, input_ids_RT[rows, :longest], mask)
        states.append(F.pad(hidden, (0, 0, 0, length - longest)))
        start = stop
    return torch.cat(states)[order.argsort()]


def _call(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _rank_in_run(ids_N: Tensor) -> Tensor:
    """Position of each element within its run of equal values: [4, 4, 7] gives [0, 1, 0]."""
    index = torch.arange(len(ids_N), device=ids_N.device)
    starts = F.pad(ids_N[1:] != ids_N[:-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=0).values


def _sum_into(target_N: Tensor, x_NE: Tensor, num: int) -> Tensor:
    sums = torch.zeros((num + 1, x_NE.shape[-1]), device=x_NE.device)
    return sums.index_add(0, target_N, x_NE.float())[:-1]


def _weighted_mean(target_N: Tensor, x_NE: Tensor, weights_N: Tensor, num: int) -> Tensor:
    sums = _sum_into(target_N, x_NE.float() * weights_N[:, None], num)
    totals = _sum_into(target_N, weights_N[:, None], num)
    return sums / torch.where(totals > 0, totals, 1.0)
