"""The passes that the plan counts are those that the code makes: it runs under a counter of bytes and operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.plan.eager_passes import as_torch_runs
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import MachineSpec, read_machine
from abyssal.plan.operation import Operation
from abyssal.plan.operations import embedding_operations, head_operations, layer_operations
from abyssal.plan.unit_costs import unit_cost
from abyssal.stages.objective import Batch, language_loss

ROWS, ROW_LEN = 4, 64
MOE: dict[str, Any] = {
    "attention": "mla", "feed_forward": "moe", "kv_lora_rank": 48, "q_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 80, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
}  # fmt: skip
DENSE: dict[str, Any] = {
    "attention": "gqa", "feed_forward": "dense", "num_key_value_heads": 2, "head_dim": 32, "num_attention_heads": 4,
}  # fmt: skip
# not passes: views, products, and what attention's own core does, which a machine's attention rates stand for
VIEWS = {
    "view", "t", "transpose", "expand", "unsqueeze", "slice", "select", "split", "split_with_sizes", "as_strided",
    "detach", "alias", "permute", "_unsafe_view", "squeeze", "unbind", "empty_like", "empty", "new_empty", "ones_like",
    "empty_strided", "new_empty_strided", "ones", "tril", "where", "scalar_tensor",
}  # fmt: skip
PRODUCTS = {"mm", "bmm", "_grouped_mm"}


class Counter(TorchDispatchMode):
    """Bytes and operations of everything that is neither, by direction; of a loss, all but its own softmax's."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.bytes, self.calls = "forward", dict.fromkeys(("forward", "backward"), 0.0), 0
        self.is_core = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name not in VIEWS | PRODUCTS and not self.is_core:
            tensors = [x for x in (*tree_flatten((args, kwargs))[0], *tree_flatten(out)[0]) if isinstance(x, Tensor)]
            self.bytes[self.direction] += sum(x.numel() * x.element_size() for x in tensors)
            self.calls += 1
        return out

    @contextmanager
    def core(self) -> Iterator[None]:
        self.is_core = True
        yield
        self.is_core = False


def counted(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Counter:
    from abyssal.model import attention

    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    ids_BT = torch.randint(config.vocab_size, (ROWS, ROW_LEN), generator=torch.Generator().manual_seed(1))
    counter = Counter()
    forward, backward = attention.BackwardInFloat32.forward, attention.BackwardInFloat32.backward

    def of_core(function: Any) -> Any:
        def run(*args: Any) -> Any:
            with counter.core():
                return function(*args)

        return staticmethod(run)

    monkeypatch.setattr(attention.BackwardInFloat32, "forward", of_core(forward))
    monkeypatch.setattr(attention.BackwardInFloat32, "backward", of_core(backward))
    batch = Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), None)
    with counter:
        loss = language_loss(model, batch, mtp_weight=0.0, balance_weight=1e-4).total
        counter.direction = "backward"
        loss.backward()
    return counter


def planned(config: ModelConfig) -> list[Operation]:
    shape: dict[str, Any] = {"n_rows": ROWS, "new_tokens": ROW_LEN, "precision": "float32"}
    operations = [*embedding_operations(config, **shape), *head_operations(config, **shape)]
    for layer in range(config.num_hidden_layers):
        operations += layer_operations(config, layer, **shape)
    written = as_torch_runs(operations, config, n_tokens=ROWS * ROW_LEN, on_cpu=True)
    return [operation for operation in written if operation.kind == "memory"]


@pytest.mark.parametrize("kind", [MOE, DENSE], ids=["mla moe", "gqa dense"])
def test_bytes_and_operations_are_those_of_the_code(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    shape: dict[str, Any] = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256}
    config = ModelConfig(**{"num_attention_heads": 4, "max_position_embeddings": 128} | shape | kind)
    counter, passes = counted(config, monkeypatch), planned(config)
    assert sum(o.moved_bytes for o in passes) == pytest.approx(counter.bytes["forward"], rel=0.12)
    assert sum(o.backward_bytes for o in passes) == pytest.approx(counter.bytes["backward"], rel=0.12)
    assert sum(o.calls + o.backward_calls for o in passes) == pytest.approx(counter.calls, rel=0.25)


@pytest.fixture(scope="module")
def laptop() -> MachineSpec:
    return replace(read_machine("rtx4090"), kind="cpu")


def test_fused_kernels_take_less(laptop: MachineSpec):
    config = ModelConfig(vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=256, max_position_embeddings=128, **MOE)  # fmt: skip
    eager, fused = (
        unit_cost(
            "moe", config, machine=laptop, layout=Layout(kernels=kernels, dp=1), precision="float32", micro_rows=4,
            row_len=64, accumulated=False,
        )
        for kernels in ("eager", "fused")
    )  # fmt: skip
    assert eager.work_seconds > fused.work_seconds
    assert eager.backward_weight.units_seconds >= fused.backward_weight.units_seconds


def test_products_that_are_apart_are_the_same_work_in_more_operations():
    config = ModelConfig(vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=256, max_position_embeddings=128, **MOE)  # fmt: skip
    operations = layer_operations(config, 1, n_rows=4, new_tokens=64, precision="float32")
    written = as_torch_runs(operations, config, n_tokens=256, on_cpu=False)
    assert len(written) == len(operations) + 2  # the query's and the entry's, the shared expert's gate and up
    assert sum(o.flops for o in written) == pytest.approx(sum(o.flops for o in operations))
    assert sum(o.weights for o in written) == sum(o.weights for o in operations)
