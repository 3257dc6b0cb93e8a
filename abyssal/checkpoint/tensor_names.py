"""Official tensor names <-> our parameters. Owns the splitting of stacked experts and the numbering of MTP layers.

The whole conversion is one dict of views: each official name points at the piece of our weights that it names. Loading
copies into the views, saving reads them, and a name without a view is a tensor that does not belong.
Letters: E experts, F expert width, D width.
"""

from __future__ import annotations

import re

from torch import Tensor

from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer

# Llama checkpoints of 2023 carry their rotary table; it follows from config.json and is never a weight
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


def official_views(model: Transformer) -> dict[str, Tensor]:
    """Official name -> view of the model's own tensor (no copies)."""
    views: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        name = _official_name(ours, n_layers=model.config.num_hidden_layers)
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, gate_up_XD in enumerate(tensor):
                gate_FD, up_FD = gate_up_XD.chunk(2)
                views[f"{prefix}{expert}.gate_proj.weight"] = gate_FD
                views[f"{prefix}{expert}.up_proj.weight"] = up_FD
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down_DF in enumerate(tensor):
                views[f"{prefix}{expert}.down_proj.weight"] = down_DF
        else:
            views[name] = tensor
    return views


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Names under which official checkpoints repeat a tensor -> its main name. MTP layers repeat embedding and head."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    copies = {}
    for k in range(config.num_nextn_predict_layers):
        prefix = mtp_prefix(config, k)
        copies[f"{prefix}embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{prefix}shared_head.head.weight"] = head
    return copies


def mtp_prefix(config: ModelConfig, k: int) -> str:
    """MTP modules are numbered on after the main layers: V3's only one is model.layers.61."""
    return f"model.layers.{config.num_hidden_layers + k}."


def keeps_fp32(name: str) -> bool:
    """The balance bias is about 5 and moves by 0.001: BF16 would lose every update."""
    return name.endswith(".e_score_correction_bias")


def _official_name(ours: str, *, n_layers: int) -> str:
    if ours.startswith("lm_head."):
        return ours
    if not ours.startswith("mtp."):
        return f"model.{ours}"
    _, k, rest = ours.split(".", 2)
    rest = rest.removeprefix("block.").replace("shared_head_norm.", "shared_head.norm.")
    return f"model.layers.{n_layers + int(k)}.{rest}"
