"""Loading to generate: weights in the compute type, each tensor on its own, and an engine that makes no second copy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_models import KINDS, random_prompts, small_model

from abyssal.checkpoint import hf_directory as directory_room
from abyssal.checkpoint import load as load_room
from abyssal.checkpoint import safetensors_header as header_room
from abyssal.checkpoint.convert import config_from_hf
from abyssal.checkpoint.hf_directory import HfDirectory
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.safetensors_header import StoredTensor, read_header
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.tensor_names import official_views
from abyssal.engine.engine import Engine
from abyssal.model.transformer import Transformer
from abyssal.progress import bytes_bar
from abyssal.types import SamplingParams

FP32_ALWAYS = ("norm.weight", "layernorm.weight", ".gate.weight", "e_score_correction_bias", "rope_frequencies")


@pytest.mark.parametrize("kind", KINDS)
def test_compute_weights_are_bf16_but_router_and_norms_and_give_the_bits_of_masters(kind: str, tmp_path: Path):
    save_checkpoint(tmp_path / "base", small_model(kind), None)
    masters = load_checkpoint(tmp_path / "base", dtype="bfloat16").model
    cast = load_checkpoint(tmp_path / "base", dtype="bfloat16", weights="compute").model
    assert {p.dtype for p in masters.parameters()} == {torch.float32} and masters.embed_tokens.weight.requires_grad
    for name, tensor in [*cast.named_parameters(), *cast.named_buffers()]:
        stays = name.endswith(FP32_ALWAYS) or name.split(".")[-2].endswith("norm")
        assert tensor.dtype == (torch.float32 if stays else torch.bfloat16), name
        assert not tensor.requires_grad
    twin = masters.inference_copy()
    assert [(n, p.dtype) for n, p in twin.state_dict().items()] == [(n, p.dtype) for n, p in cast.state_dict().items()]
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), cast.parameters(), strict=True))
    ids_BT = torch.tensor(random_prompts([12]))
    assert torch.equal(masters.logits(masters.hidden(ids_BT)), cast.logits(cast.hidden(ids_BT)))


def test_fp32_compute_weights_are_masters(tmp_path: Path):
    save_checkpoint(tmp_path / "base", small_model(), None)
    model = load_checkpoint(tmp_path / "base", weights="compute").model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.is_cast and model.inference_copy() is model


def test_nothing_is_copied_that_needs_no_cast(tmp_path: Path):
    save_checkpoint(tmp_path / "base", small_model(), None)
    cast = load_checkpoint(tmp_path / "base", dtype="bfloat16", weights="compute").model
    assert cast.inference_copy() is cast
    invariant = cast.inference_copy(invariant=True)
    assert invariant is not cast and invariant.layers[1].mlp.gate.invariant and not cast.layers[1].mlp.gate.invariant
    for a, b in zip(invariant.state_dict().values(), cast.state_dict().values(), strict=True):
        assert a.data_ptr() == b.data_ptr()
    masters = small_model(dtype=torch.bfloat16)
    copied = masters.inference_copy()
    assert copied.embed_tokens.weight.dtype == torch.bfloat16 and masters.embed_tokens.weight.dtype == torch.float32
    for a, b in zip(copied.parameters(), masters.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr() and b.requires_grad and not a.requires_grad


def test_an_engine_takes_new_weights_and_never_writes_to_those_it_shares():
    """First over weights that it shares with their owner, then over a copy of its own."""
    cast, masters = small_model(seed=1, dtype=torch.bfloat16).cast_weights(), small_model(seed=2, dtype=torch.bfloat16)
    engine = Engine(cast, eos_ids=(), max_batch=2, record_experts=False)
    assert engine._runner.model is cast
    before = {name: tensor.clone() for name, tensor in cast.state_dict().items()}
    params = SamplingParams(temperature=0.0, max_tokens=8)

    def answer(model: object) -> list[int]:
        fresh = Engine(model, eos_ids=(), max_batch=2, record_experts=False)
        return fresh.generate(random_prompts([5]), params)[0].ids

    for new in (masters, small_model(seed=3, dtype=torch.bfloat16), cast, masters):
        engine.load_weights(new)
        assert engine.generate(random_prompts([5]), params)[0].ids == answer(new)
        assert all(torch.equal(tensor, before[name]) for name, tensor in cast.state_dict().items())
    assert {p.dtype for p in masters.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # with a cast on the way, and straight into place
def test_tensors_are_read_once_each_in_the_order_of_the_disk(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint(tmp_path / "base", small_model("mla_moe_query_latent"), None, max_shard_bytes=30_000)
    read: list[str] = []
    read_bytes, n_tensors = header_room.read_bytes, len(HfDirectory(tmp_path / "base").tensors)

    def recorded(place: StoredTensor, out: torch.Tensor) -> None:
        assert out.nbytes == place.n_bytes <= 16_000
        read.append(name_at[place.file, place.begin])
        read_bytes(place, out)

    name_at = {
        (place.file, place.begin): name
        for file in (tmp_path / "base").glob("*.safetensors")
        for name, place in read_header(file).items()
    }
    for room in (header_room, directory_room):
        monkeypatch.setattr(room, "read_bytes", recorded)
    steps: list[tuple[int, int]] = []
    load_checkpoint(
        tmp_path / "base", dtype=dtype, weights="compute", on_bytes=lambda done, total: steps.append((done, total))
    )
    assert len(read) == n_tensors
    on_disk = [
        name
        for file in sorted((tmp_path / "base").glob("*.safetensors"))
        for name in load_file(file)
        if not name.endswith(("layers.3.embed_tokens.weight", "shared_head.head.weight"))
    ]
    assert sorted(read[: len(on_disk)]) == sorted(on_disk)
    shard_of = [HfDirectory(tmp_path / "base")._stored[name][::3] for name in read[: len(on_disk)]]
    assert shard_of == sorted(shard_of)
    assert sorted(read[len(on_disk) :]) == [  # copies come last, when their originals are there
        "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"]
    done, total = zip(*steps, strict=True)
    assert done == tuple(sorted(done)) and set(total) == {done[-1]}


def test_a_copy_is_compared_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last row of the last piece counts too."""
    monkeypatch.setattr(load_room, "ROWS", 7)
    save_checkpoint(tmp_path / "base", small_model("mla_moe_query_latent"), None)
    load_checkpoint(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"][60, 31] += 1
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="embed_tokens.weight differs from"):
        load_checkpoint(tmp_path / "base", dtype="bfloat16", weights="compute")


PEAK_OF_LOADING = """
import json, sys
from abyssal.checkpoint.load import load_checkpoint

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
model = load_checkpoint(sys.argv[1], dtype="bfloat16", weights="compute").model
print(json.dumps([before, peak(), sum(tensor.nbytes for tensor in model.state_dict().values())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to say how high memory rose")
def test_loading_takes_the_memory_of_the_model_and_no_more_than_one_shard(tmp_path: Path):
    """490 MB in shards of 100: a second copy of anything big would show."""
    save_checkpoint(tmp_path / "small", small_model("gqa_dense"), None)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    widths = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 40_000, "num_hidden_layers": 16}
    with torch.device("meta"):
        model = Transformer(config_from_hf(config | widths))
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, view in official_views(model).items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) + 2 * view.numel() > 100_000_000:
            shards.append({})
        shards[-1][name] = torch.zeros(view.shape, dtype=torch.bfloat16)
    for number, shard in enumerate(shards):
        save_file(shard, tmp_path / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config | widths))
    run = subprocess.run(
        [sys.executable, "-c", PEAK_OF_LOADING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    before, after, size = json.loads(run.stdout)
    assert size > 450_000_000 and len(shards) > 4
    assert size <= after - before + 10_000_000 and after - before <= 1.1 * (size + 100_000_000)


def test_a_bar_is_shown_when_it_takes_long_and_only_on_a_terminal():
    def drawn(*, seconds: float, terminal: bool) -> str:
        now = [0.0]
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        with bytes_bar("loading r1", console, clock=lambda: now[0]) as on_bytes:
            for step in range(1, 5):
                now[0] = seconds * step / 4
                on_bytes(step * 500_000_000, 2_000_000_000)
        return console.file.getvalue()

    text = drawn(seconds=8, terminal=True)
    assert "loading r1" in text and "1.0/2.0 GB" in text and "2.0/2.0 GB" in text
    assert drawn(seconds=0.5, terminal=True) == drawn(seconds=8, terminal=False) == ""
