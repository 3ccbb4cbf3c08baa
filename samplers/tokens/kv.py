"""Keys and values of a whole canvas, written and read by position, as a transformers cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class PositionLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (B, heads, L + 1, d): one slot per column, and one that takes what counts nothing.

    Keys are stored as the model hands them over, after their rotation, so that they stay valid wherever they are.
    """

    def __init__(self, frame: PositionCache) -> None:
        super().__init__()
        self.frame = frame

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room, once the shape of a layer's keys is known."""

        def room(states: Tensor) -> Tensor:
            return states.new_zeros(self.frame.batch, states.shape[1], self.frame.length + 1, states.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes keys and values (R, heads, Q, d) of a query and returns those of the canvas, (R, heads, L, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = self.frame.rows[:, None], self.frame.columns
        new = value_states.transpose(1, 2)
        if self.frame.probing:
            old = self.values[rows, :, columns].flatten(2).float()
            change = (new.flatten(2).float() - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-12)
            self.frame.add_drift(change)
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = new
        keys, values = self.keys[..., :-1, :], self.values[..., :-1, :]
        if self.frame.rows.numel() == self.frame.batch:
            return keys, values
        return keys[self.frame.rows], values[self.frame.rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and the position of the first."""
        return self.frame.length, 0

    def get_seq_length(self) -> int:
        """No tokens count as past ones: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Length of the canvas."""
        return self.frame.length


class PositionCache(Cache):  # type: ignore[misc]
    """Keys and values of a canvas of (batch, length) for any transformers decoder.

    Before a forward pass `aim` says which columns of which rows the queries are.

    Args:
        batch: rows B of the canvas.
        length: columns L of it.
        device: where the canvas is.

    Attributes:
        rows: (R,) rows of the queries, ascending.
        columns: (R, Q) their columns; L where the entry is filling.
        probing: whether to measure how much the values change that are written over.
        drift: (B, L + 1) relative change |new - old| / |old| of a position's values, the mean over layers of the last
            forward pass that probed; meaningless where nothing had been stored.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.batch = batch
        self.length = length
        self.probing = False
        self.drift = torch.zeros(batch, length + 1, device=device)
        self.rows = torch.arange(batch, device=device)
        self.columns = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self._changes: list[Tensor] = []

    def aim(self, rows: Tensor, columns: Tensor, probing: bool = False) -> None:
        """Says where the keys and values of the next forward pass belong."""
        self.rows, self.columns, self.probing = rows, columns, probing
        self._changes = []

    def add_drift(self, change: Tensor) -> None:
        """Notes the change (R, Q) that one layer saw."""
        self._changes.append(change)
        self.drift[self.rows[:, None], self.columns] = torch.stack(self._changes).mean(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes and reads one layer; see `PositionLayer.update`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(PositionLayer(self))
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        layers = [layer for layer in self.layers if layer.is_initialized]
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)
