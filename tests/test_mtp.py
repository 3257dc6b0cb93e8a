"""MTP against the formulas written out in float64, and against the module with which transformers drafts.

Letters: T tokens, D width, H heads, N nope dim, R rope dim, C latent.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.tensor_names import official_views
from abyssal.model.config import ModelConfig, RopeScaling
from abyssal.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, q_lora_rank=12,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1, routed_scaling_factor=1.5,
    max_position_embeddings=32, num_nextn_predict_layers=2,
)


YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=8, mscale=0.9, mscale_all_dim=1.1)


def random_model(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.2 if "norm" in name else p.shape[-1] ** -0.5
            p.copy_(("norm" in name) + torch.empty_like(p).normal_(0.0, std, generator=generator))
        for gate in model.gates():
            gate.e_score_correction_bias.normal_(0.0, 0.3, generator=generator)
    return model


class Exact:
    """The whole model as formulas over official tensor names, float64, one token and one head at a time."""

    def __init__(self, model: Transformer) -> None:
        self.w = {name.removeprefix("model."): tensor.double() for name, tensor in official_views(model).items()}

    def rms(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.w[f"{name}.weight"]

    def rope(self, x_R: Tensor, position: int) -> Tensor:
        """Each neighbouring pair is a complex number turned by position * 10000^(-2j/R)."""
        turned = []
        for j in range(len(x_R) // 2):
            angle = position * 10000.0 ** (-2 * j / len(x_R))
            a, b = x_R[2 * j], x_R[2 * j + 1]
            turned += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        return torch.stack(turned)

    def attention(self, x_TD: Tensor, at: str) -> Tensor:
        n_heads, nope, rope, value = 2, 8, 4, 6
        q_latent_TX = self.rms(x_TD @ self.w[f"{at}.q_a_proj.weight"].T, f"{at}.q_a_layernorm")
        q_TQ = q_latent_TX @ self.w[f"{at}.q_b_proj.weight"].T
        down_TX = x_TD @ self.w[f"{at}.kv_a_proj_with_mqa.weight"].T
        kv_TK = self.rms(down_TX[:, :8], f"{at}.kv_a_layernorm") @ self.w[f"{at}.kv_b_proj.weight"].T
        k_rope = [self.rope(row, t) for t, row in enumerate(down_TX[:, 8:])]  # one rotated key for all heads
        heads = []
        for h in range(n_heads):
            q = q_TQ[:, h * (nope + rope) : (h + 1) * (nope + rope)]
            kv = kv_TK[:, h * (nope + value) : (h + 1) * (nope + value)]
            rows = []
            for t in range(len(x_TD)):
                query = torch.cat((q[t, :nope], self.rope(q[t, nope:], t)))
                scores = torch.stack([query @ torch.cat((kv[s, :nope], k_rope[s])) for s in range(t + 1)])
                rows.append((scores / math.sqrt(nope + rope)).softmax(0) @ kv[: t + 1, nope:])
            heads.append(torch.stack(rows))
        return torch.cat(heads, dim=-1) @ self.w[f"{at}.o_proj.weight"].T

    def swiglu(self, x: Tensor, at: str) -> Tensor:
        gate, up = x @ self.w[f"{at}.gate_proj.weight"].T, x @ self.w[f"{at}.up_proj.weight"].T
        return (gate * torch.sigmoid(gate) * up) @ self.w[f"{at}.down_proj.weight"].T

    def experts(self, x_TD: Tensor, at: str) -> Tensor:
        rows = []
        for x_D in x_TD:
            scores = torch.sigmoid(self.w[f"{at}.gate.weight"] @ x_D)
            chosen = (scores + self.w[f"{at}.gate.e_score_correction_bias"]).argsort(descending=True)[:2].tolist()
            routed = sum(scores[e] * self.swiglu(x_D, f"{at}.experts.{e}") for e in chosen) / scores[chosen].sum()
            rows.append(self.swiglu(x_D, f"{at}.shared_experts") + 1.5 * routed)
        return torch.stack(rows)

    def block(self, x_TD: Tensor, layer: int) -> Tensor:
        at = f"layers.{layer}"
        x_TD = x_TD + self.attention(self.rms(x_TD, f"{at}.input_layernorm"), f"{at}.self_attn")
        feed_forward = self.swiglu if layer == 0 else self.experts
        return x_TD + feed_forward(self.rms(x_TD, f"{at}.post_attention_layernorm"), f"{at}.mlp")

    def hidden(self, ids_T: Tensor) -> Tensor:
        x_TD = self.w["embed_tokens.weight"][ids_T]
        for layer in range(2):
            x_TD = self.block(x_TD, layer)
        return self.rms(x_TD, "norm")

    def mtp(self, hidden_TD: Tensor, ids_T: Tensor, k: int) -> Tensor:
        """h'_i = M_k [norm(Emb(t_{i+k})) ; norm(h_i)], then a block, the head's norm. (V3 section 2.2, file order)"""
        at = f"layers.{2 + k - 1}"
        embedded = self.rms(self.w["embed_tokens.weight"][ids_T[k:]], f"{at}.enorm")
        known = self.rms(hidden_TD[: len(embedded)], f"{at}.hnorm")
        joined = torch.cat((embedded, known), dim=-1) @ self.w[f"{at}.eh_proj.weight"].T
        return self.rms(self.block(joined, 2 + k - 1), f"{at}.shared_head.norm")

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return hidden_TD @ self.w["lm_head.weight"].T


IDS_BT = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(5))


def test_main_model_and_both_modules_equal_the_formulas():
    model, exact = random_model(), Exact(random_model())
    with torch.no_grad():
        hidden_BTD = model.hidden(IDS_BT)
        drafts = model.mtp_hidden(hidden_BTD, IDS_BT)
        assert [draft.shape[1] for draft in drafts] == [10, 9]
        for b, ids_T in enumerate(IDS_BT):
            want_TD = exact.hidden(ids_T)
            torch.testing.assert_close(model.logits(hidden_BTD)[b].double(), exact.logits(want_TD), atol=1e-5, rtol=0)
            for k in (1, 2):
                want_TD = exact.mtp(want_TD, ids_T, k)
                got = model.logits(drafts[k - 1])[b].double()
                torch.testing.assert_close(got, exact.logits(want_TD), atol=1e-5, rtol=0)


def test_a_module_sees_k_tokens_ahead_and_no_further():
    """Row i of module k depends on tokens up to i + k: changing token 6 moves rows 5, 4, .. only from 6 - k on."""
    model = random_model()
    changed = IDS_BT.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    with torch.no_grad():
        for k, (a, b) in enumerate(zip(model.mtp_hidden(model.hidden(IDS_BT), IDS_BT),
                                       model.mtp_hidden(model.hidden(changed), changed), strict=True), start=1):
            moved = (a - b).abs().amax(dim=(0, 2)) > 1e-6
            assert moved.int().argmax() == 6 - k


def test_packed_examples_do_not_see_each_other_through_mtp():
    """Two examples in one row give, well inside each, what each gives alone."""
    model = random_model()
    ids_BT = IDS_BT[:1]
    segments_BT = torch.tensor([[1] * 6 + [2] * 5])
    positions_BT = torch.tensor([[*range(6), *range(5)]])
    with torch.no_grad():
        packed_hidden = model.hidden(ids_BT, positions_BT=positions_BT, segments_BT=segments_BT)
        packed = model.mtp_hidden(packed_hidden, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT)
        for start, end in ((0, 6), (6, 11)):
            alone = ids_BT[:, start:end]
            for k, want in enumerate(model.mtp_hidden(model.hidden(alone), alone), start=1):
                torch.testing.assert_close(packed[k - 1][:, start : end - k], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN, "q_lora_rank": None}], ids=["plain", "yarn"])
def test_transformers_drafts_from_our_files_with_the_same_numbers(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint(tmp_path, random_model(replace(CONFIG, **changes)), None)
    ours = load_checkpoint(tmp_path).model
    # transformers knows the MTP layer by V3's own layer number
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\..*"])
    main = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    drafter = MtpModel.from_pretrained(main)
    with torch.no_grad():
        hidden = main.model(IDS_BT).last_hidden_state
        for k, got in enumerate(ours.mtp_hidden(ours.hidden(IDS_BT), IDS_BT), start=1):
            n_rows = IDS_BT.shape[1] - k
            positions = torch.arange(n_rows)[None]
            mask = torch.full((n_rows, n_rows), -torch.inf).triu(1)[None, None]
            embedded, tables = main.get_input_embeddings()(IDS_BT[:, k:]), main.model.rotary_emb(hidden, positions)
            hidden = drafter.layers[k - 1](embedded, hidden[:, :n_rows], tables, mask, positions, None)
            torch.testing.assert_close(got, hidden, atol=1e-5, rtol=0)
