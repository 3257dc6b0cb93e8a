"""What attention remembers, as flat slots that blocks are carved from. Owns the tensors; ids are `engine/blocks.py`'s.

One slot holds one token's entry in one layer: the normalised latent and the rotated shared key (MLA), or the keys and
values of all KV heads (GQA). Slot 0 is nobody's: padding tokens write there.
Letters: B sequences, T new tokens, S key positions, W entry width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abyssal.model.config import ModelConfig


def allocate_cache(config: ModelConfig, n_slots: int, *, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One (n_slots, W) tensor a layer, MTP modules included, in the compute dtype."""
    n_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return [_zeros(n_slots, config.cache_width, dtype=dtype, device=device) for _ in range(n_layers)]


def _zeros(n_slots: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU from calloc: pages that nobody has written to cost neither time nor memory, as torch.zeros' would."""
    if device.type != "cpu":
        return torch.zeros(n_slots, width, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((n_slots, width * dtype.itemsize), np.uint8)).view(dtype)


@dataclass(frozen=True)
class CacheView:
    """Where one batch writes its new entries and reads its context.

    slots_BT: flat slot of each new token. context_BS: flat slot of every key position of each sequence, position s at
    column s; columns past a sequence's end may hold anything because `positions <= query position` hides them.
    """

    layers: list[Tensor]
    slots_BT: Tensor
    context_BS: Tensor

    def update(self, layer: int, entries_BTW: Tensor) -> Tensor:
        """Write the new entries, return the whole context (B, S, W)."""
        store = self.layers[layer]
        store.index_copy_(0, self.slots_BT.flatten(), entries_BTW.flatten(0, 1))
        return store.index_select(0, self.context_BS.flatten()).view(*self.context_BS.shape, -1)
