from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from abyssal.loss.cross_entropy import cross_entropy, next_token_targets
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.plan.eager_memory import (
    expert_rows,
    head_kept_bytes,
    is_muon,
    layer_kept_bytes,
    mtp_kept_bytes,
    optimizer_scratch_bytes,
    optimizer_state_numbers,
)
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import Precision, read_machine
from abyssal.plan.parameters import weights
from abyssal.plan.training import plan_training
from abyssal.stages.objective import Batch, language_loss
from abyssal.stages.state import build_optimizers

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=160,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
)
GQA = replace(SMALL, attention="gqa", feed_forward="dense", num_key_value_heads=2, head_dim=16, qk_norm=True)


def saved_bytes(model: Transformer, ids_BT: torch.Tensor, *, whole_loss: bool) -> int:
    """Of the storages that autograd keeps, weights themselves left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if whole_loss:
            batch = Batch(ids_BT, torch.ones_like(ids_BT))
            language_loss(model, batch, mtp_weight=0.3, balance_weight=0.0)
        else:
            targets_N = next_token_targets(ids_BT, torch.ones_like(ids_BT), None).flatten()
            cross_entropy(model.logits(model.hidden(ids_BT)).flatten(0, 1), targets_N)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def made(config: ModelConfig, precision: Precision) -> Transformer:
    model = Transformer(config, dtype=getattr(torch, precision))
    return model.init_weights(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "n_rows", "row_len"),
    [(SMALL, 4, 128), (replace(SMALL, q_lora_rank=None), 1, 600), (GQA, 4, 128)],
    ids=["mla-moe", "long-rows", "gqa-dense"],
)
def test_autograd_keeps_what_is_planned(config: ModelConfig, n_rows: int, row_len: int, precision: Precision):
    ids_BT = torch.randint(config.vocab_size, (n_rows, row_len), generator=torch.Generator().manual_seed(1))
    shape = {"n_rows": n_rows, "row_len": row_len, "precision": precision, "on_cpu": True}
    planned = sum(layer_kept_bytes(config, layer, **shape) for layer in range(config.num_hidden_layers))
    planned += head_kept_bytes(config, n_tokens=n_rows * row_len, precision=precision)
    assert planned == pytest.approx(saved_bytes(made(config, precision), ids_BT, whole_loss=False), rel=0.04)


def test_an_mtp_module_too():
    config = replace(SMALL, num_nextn_predict_layers=1)
    ids_BT = torch.randint(config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(1))
    without = saved_bytes(made(SMALL, "float32"), ids_BT, whole_loss=True)
    module = saved_bytes(made(config, "float32"), ids_BT, whole_loss=True) - without
    planned = mtp_kept_bytes(config, n_rows=4, row_len=128, precision="float32", on_cpu=True)
    assert planned == pytest.approx(module, rel=0.05)


def test_rows_of_experts_are_filled_up_on_a_cpu():
    """4,096 x 4 choices over 16 experts: 1,024 each, filled up to multiples of 64, so 31.5 rows lost for each."""
    assert expert_rows(SMALL, 4096, on_cpu=True, wide=4) == 16384 + 16 * 31.5
    assert expert_rows(SMALL, 4096, on_cpu=False, wide=4) == 16384


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_optimizers_keep_what_is_planned(kind):
    model = made(SMALL, "float32")
    optimizers = build_optimizers(model, kind=kind, lr=0.02, adamw_lr=1e-3, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers.values():
        optimizer.step()
    states = [state for optimizer in optimizers.values() for state in optimizer.state.values()]
    n = sum(t.numel() for state in states for t in state.values() if t.ndim)
    assert optimizer_state_numbers(weights(SMALL), kind) == n
    by_muon = sum(
        p.numel() for group in optimizers.get("muon", optimizers["adamw"]).param_groups for p in group["params"]
    )
    assert sum(w.n for w in weights(SMALL) if is_muon(w)) == (
        by_muon if kind == "muon" else by_muon - outside_muon(model)
    )
    assert (optimizer_scratch_bytes(weights(SMALL), kind) > 0) == (kind == "muon")


def outside_muon(model: Transformer) -> int:
    optimizers = build_optimizers(model, kind="muon", lr=0.02, adamw_lr=1e-3, weight_decay=0.1)
    return sum(p.numel() for group in optimizers["adamw"].param_groups for p in group["params"])


def test_one_device_holds_gradients_or_activations():
    """The first micro-batch has no gradient when its backward begins; later ones add to it."""
    machine = read_machine("mac_unified")
    layout = Layout(precision="float32")
    whole = plan_training(SMALL, machine=machine, layout=layout, row_len=256, batch_rows=8).memory[0]
    assert (whole.gradients_bytes, whole.master_bytes) == (0, 0) and whole.activations_bytes > 0
    micro = plan_training(SMALL, machine=machine, layout=replace(layout, micro_rows=2), row_len=256, batch_rows=8)
    assert micro.memory[0].gradients_bytes == 4 * sum(w.n for w in weights(SMALL) if w.is_trained)
    assert micro.memory[0].activations_bytes < whole.activations_bytes / 3
