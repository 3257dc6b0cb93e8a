"""All ranks' shards, built on meta: together they are the model, each is what the plan says."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from typing import get_args

import pytest
import torch
from small_models import KINDS

from abyssal.model.config import ModelConfig
from abyssal.model.presets import v3
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import read_machine
from abyssal.plan.rank_shards import Sharding, all_shards, shard_rows, typed
from abyssal.plan.training import plan_training
from abyssal.plan.training_plan import TrainingPlan
from abyssal.plan.weight_updates import Optimizer

# DeepSeek-V3 section 3.2: PP16, EP64 over 8 nodes, ZeRO-1, no tensor parallel; section 3.3 for the types
V3_LAYOUT = Layout(
    pp=16, ep=64, zero=1, schedule="dualpipe", micro_rows=1, recompute="selective", precision="fp8",
    weights="bfloat16", master="float32", moments="bfloat16", gradients="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def v3_sharding() -> Sharding:
    layout = V3_LAYOUT.on(read_machine("h800x2048"))
    plan = plan_training(v3(), machine=read_machine("h800x2048"), layout=layout, row_len=4096, batch_rows=15360)
    return Sharding(v3(), layout=plan.layout, stages=plan.stages)


def test_all_ranks_of_v3_are_the_whole_model(v3_sharding: Sharding):
    """671,026,419,200 parameters, and 11,610,068,224 of the MTP module, by every rank's own tensors."""
    assert v3_sharding.n_weights() == (671_026_419_200, 11_610_068_224)


def test_v3_has_2048_ranks_of_eight_kinds(v3_sharding: Sharding):
    classes = v3_sharding.classes()
    assert [one.n_ranks for one in classes] == [256] * 8
    assert sorted(rank for one in classes for rank in one.pipeline_ranks) == list(range(16))
    assert classes[0].pipeline_ranks == (0, 15)  # embedding and head on the same ranks (section 3.2.3)
    assert classes[0].holds.startswith("embedding, layers ") and classes[0].holds.endswith(", head, MTP")
    experts = [p for one in classes for p in one.shard.pieces if ".experts." in p.name]
    assert {piece.end - piece.start for piece in experts} == {4}  # of 256, on each of 64


def test_v3_rank_by_rank_is_what_the_plan_says(v3_sharding: Sharding):
    machine = read_machine("h800x2048")
    plan = plan_training(v3(), machine=machine, layout=V3_LAYOUT.on(machine), row_len=4096, batch_rows=15360)
    rows = shard_rows(v3_sharding.classes(), plan.memory)
    assert len(rows) == 8 * 4
    for row in rows:
        assert row.built_bytes == row.planned_bytes, row
    # all ranks' optimizer state is that of the model once: FP32 master, and two BF16 moments
    trained = 671_026_419_200 + 11_610_068_224 - 59 * 256  # no optimizer moves balance biases
    for part in ("master", "moments"):
        assert sum(row.n_ranks * row.built_bytes for row in rows if row.part == part) == 4 * trained


def check_places(sharding: Sharding) -> None:
    """Pieces of a weight tile it, each on as many ranks as copies of it; shares of optimizer state tile what is trained
    there, each on one rank."""
    layout = sharding.layout
    pieces: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    shares: dict[tuple[object, ...], list[range]] = defaultdict(list)
    sizes: dict[tuple[object, ...], int] = {}
    for place in sharding.places():
        held, stages = sharding.held(place), frozenset(layout.stages_of(place.pipeline))
        pieces_here = {piece.name: (piece.start, piece.end) for piece in held.pieces}
        assert len(pieces_here) == len(held.pieces)
        for name, span in pieces_here.items():
            pieces[name][span] += 1
        for kind, numbers, size in zip(("adamw", "muon", "experts"), sharding.owned(place), held[1:], strict=True):
            key = (stages, kind, place.expert if kind == "experts" else place.tensor)
            shares[key].append(numbers)
            sizes[key] = size
    assert set(pieces) == set(sharding.state)
    for name, spans in pieces.items():
        cut, shape = sharding.cuts[name], sharding.state[name].shape
        assert [0, *(end for _, end in sorted(spans))] == [
            *(start for start, _ in sorted(spans)),
            shape[cut.tp_dim or 0],
        ]
        assert len(set(spans.values())) == 1
    for key, ranges in shares.items():
        in_order = sorted((share.start, share.stop) for share in ranges)
        assert [0, *(end for _, end in in_order)] == [*(start for start, _ in in_order), sizes[key]]


CASES = [
    ("mla_moe", 8, Layout(ep=4, zero=1)),
    ("mla_moe_query_latent", 8, Layout(pp=2, ep=4, zero=2, schedule="dualpipe", weights="bfloat16")),
    ("mla_moe_query_latent", 8, Layout(pp=2, ep=2, zero=3, schedule="1f1b", weights="bfloat16", master="bfloat16")),
    ("mla_moe", 16, Layout(pp=2, tp=2, cp=2, ep=4, schedule="zb1p", moments="bfloat16")),
    ("mla_moe", 16, Layout(tp=2, cp=2, ep=4, zero=1)),
    ("mla_dense", 8, Layout(tp=4, zero=1)),
    ("gqa_dense", 8, Layout(pp=4, zero=1, schedule="1f1b", gradients="bfloat16")),
    ("gqa_dense_norms", 4, Layout(pp=2, schedule="interleaved", chunks=2, zero=1)),
    ("gqa_dense_norms", 2, Layout(pp=2, schedule="zbv")),
]


def laid_out(
    kind: str, n_devices: int, layout: Layout, optimizer: Optimizer = "adamw", **changes: object
) -> tuple[Sharding, TrainingPlan]:
    """A small model whose sizes divide unless changed."""
    config = ModelConfig(**(KINDS[kind] | {"vocab_size": 64, "num_hidden_layers": 4} | changes))
    machine, layout = read_machine("h800x2048"), replace(layout, micro_rows=1).on_devices(n_devices)
    plan = plan_training(config, machine=machine, layout=layout, row_len=32, batch_rows=64, optimizer=optimizer)
    return Sharding(config, layout=plan.layout, stages=plan.stages, optimizer=optimizer), plan


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize(("kind", "n_devices", "layout"), CASES)
def test_any_layout_is_what_the_plan_says(kind: str, n_devices: int, layout: Layout, optimizer: Optimizer):
    sharding, plan = laid_out(kind, n_devices, layout, optimizer)
    classes = sharding.classes()
    assert sum(one.n_ranks for one in classes) == n_devices
    for row in shard_rows(classes, plan.memory):
        if row.part == "moments" and optimizer == "muon" and layout.pp * layout.tp > 1:
            continue  # the plan takes the mean of the model's numbers, and ranks have more or less of Muon's
        assert row.built_bytes == row.planned_bytes, row
    if layout.zero:
        check_places(sharding)


def test_all_of_v3_is_somewhere_and_its_optimizer_state_nowhere_twice(v3_sharding: Sharding):
    check_places(v3_sharding)


def test_what_does_not_divide_is_whole_all_the_same():
    """61 ids over four tensor ranks are 16, 16, 16 and 13: the plan is that of the fullest. Its shares of optimizer
    state are exact fractions, those of ranks whole numbers: in each of two, for both moments, up to four bytes more."""
    sharding, plan = laid_out("mla_moe", 16, Layout(pp=2, tp=4, ep=8, zero=1, schedule="1f1b"), vocab_size=61)
    check_places(sharding)
    assert sum(sharding.n_weights()) == sum(tensor.numel() for tensor in sharding.state.values())
    rows = shard_rows(sharding.classes(), plan.memory)
    fullest = {
        row.pipeline_ranks: row for row in rows if row.part == "weights" and row.built_bytes >= row.planned_bytes
    }
    assert [row.built_bytes for row in fullest.values()] == [row.planned_bytes for row in fullest.values()]
    assert set(fullest) == {(0,), (1,)}
    for row in rows:
        if row.part in ("master", "moments"):
            assert row.built_bytes <= row.planned_bytes + 2 * 2 * 4


def test_fp8_has_its_scales():
    """128 numbers of one byte and one FP32 scale; a number that is alone has a scale as well."""
    assert [(t.dtype, t.numel()) for t in typed([torch.empty(129, device="meta")], "fp8")] == [
        (torch.float8_e4m3fn, 129),
        (torch.float32, 2),
    ]
    sharding, plan = laid_out("mla_dense", 1, Layout(weights="fp8", zero=1), hidden_size=128, intermediate_size=256)
    (row,) = (row for row in shard_rows(sharding.classes(), plan.memory) if row.part == "weights")
    n_tensors = len(sharding.state)
    assert row.planned_bytes <= row.built_bytes <= row.planned_bytes + 4 * n_tensors


def test_what_cannot_be_cut_is_refused():
    _, plan = laid_out("mla_dense", 8, Layout())
    with pytest.raises(ValueError, match="every device holds the whole model; shards need parallel.pp"):
        all_shards(ModelConfig(**KINDS["mla_dense"]), plan)
    with pytest.raises(ValueError, match="parallel.dp is not filled in"):
        Sharding(v3(), layout=V3_LAYOUT, stages=[range(1)] * 16)
    with pytest.raises(ValueError, match="3 stages were split, the layout has 16"):
        Sharding(v3(), layout=replace(V3_LAYOUT, dp=128), stages=[range(1)] * 3)


def test_nothing_else_of_the_plan_knows_torch_by_import():
    """A plan takes well under a second because torch is not loaded for it."""
    rooms = "abyssal.plan.training, abyssal.plan.serving, abyssal.plan.draw_schedule"
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
