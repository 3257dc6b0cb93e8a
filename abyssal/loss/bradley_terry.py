"""Bradley-Terry: the chance that an answer is preferred grows with how far its score lies above the other's.

Letters: N pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected): log 2 where a model cannot tell them apart. Shift both: the same."""
    if len(chosen_N) == 0:
        raise ValueError("no pairs to compare; a batch of preferences needs at least one")
    return -F.logsigmoid(chosen_N.float() - rejected_N.float()).mean()
