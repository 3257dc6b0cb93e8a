"""Models in few bits: the numbers are those of the rounded weights, in every place where a model is used."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from small_models import random_prompts, small_model
from torch import Tensor

from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.checkpoint.tensor_names import IN_FEW_BITS, official_slots, official_views, plain_views
from abyssal.engine.engine import Engine
from abyssal.kernels.quantize import QuantFormat, dequantize_ref, quantize_ref
from abyssal.model.quantized import QuantizedExperts, QuantizedLinear, QuantizedStack, format_of
from abyssal.model.transformer import Transformer, count_parameters
from abyssal.types import SamplingParams

FORMATS: list[QuantFormat] = ["fp8", "int8", "int4"]
KINDS = ["mla_moe_query_latent", "mla_moe", "gqa_dense"]
# groups of 32 columns everywhere, which the int4 kernel takes; its rows are sixteens but for those of kv_a_proj
WIDTHS = {"intermediate_size": 64, "moe_intermediate_size": 32, "kv_lora_rank": 32}


def small(kind: str) -> Transformer:
    return small_model(kind, **WIDTHS, **({"q_lora_rank": 32} if kind == "mla_moe_query_latent" else {}))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {kind: tmp_path_factory.mktemp("few_bits") / kind for kind in KINDS}
    for kind, path in paths.items():
        save_checkpoint(path, small(kind), None)
    return paths


def rounded(path: Path, format: QuantFormat) -> Transformer:
    """The plain model whose weights were rounded one by one."""
    model = load_checkpoint(path).model.requires_grad_(False)
    group = 128 if format == "fp8" else 32
    for name, weight in official_views(model).items():
        if IN_FEW_BITS.search(name):
            weight.copy_(dequantize_ref(quantize_ref(weight, format, group=group)))
    return model


def logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    """Of the main model and of its MTP module."""
    with torch.inference_mode():
        hidden_BTD = model.hidden(ids_BT)
        parts = [hidden_BTD[:, 1:], *model.mtp_hidden(hidden_BTD, ids_BT)]
        return model.logits(torch.stack(parts))


def some_ids() -> Tensor:
    return torch.tensor(random_prompts([24, 24, 24]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_numbers_are_those_of_the_rounded_weights(format: QuantFormat, kind: str, directories: dict[str, Path]):
    model = load_checkpoint(directories[kind], weights=format).model
    assert format_of(model) == format
    got, want = logits(model, some_ids()), logits(rounded(directories[kind], format), some_ids())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    plain = logits(load_checkpoint(directories[kind]).model, some_ids())
    assert (got - plain).abs().max() > 1e-3  # and not those of the weights before


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_too(kind: str, directories: dict[str, Path]):
    """Where the int4 kernel is: it sums in FP32 what the plain form rounds, so it is nearer to FP32, not farther."""
    exact = logits(rounded(directories[kind], "int4"), some_ids())
    model = load_checkpoint(directories[kind], weights="int4", dtype="auto").model
    assert model.dtype == torch.bfloat16
    assert any(m.packed for m in model.modules() if isinstance(m, QuantizedStack))
    plain = rounded(directories[kind], "int4")
    plain.dtype = torch.bfloat16
    error, of_plain = ((logits(m, some_ids()) - exact).square().mean().sqrt() for m in (model, plain))
    assert error < 1.5 * of_plain < 0.1 * exact.std()


def test_what_is_in_few_bits_and_what_is_not(directories: dict[str, Path]):
    """DeepSeek's choice: all projections of a block; no table, norm, router, nor the MTP module's joining one."""
    model = load_checkpoint(directories["mla_moe_query_latent"], weights="fp8").model
    replaced = (QuantizedLinear, QuantizedExperts)
    in_few_bits = {name for name, module in model.named_modules() if isinstance(module, replaced)}
    attention = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}
    dense, shared = ({f"mlp.{s}{kind}_proj" for kind in ("gate", "up", "down")} for s in ("", "shared_experts."))
    of_moe = attention | shared | {"mlp.experts"}
    blocks = {"layers.0": attention | dense, "layers.1": of_moe, "layers.2": of_moe, "mtp.0.block": of_moe}
    assert in_few_bits == {f"{block}.{name}" for block, names in blocks.items() for name in names}
    # by their names on disk: these, and kv_b_proj, which stays a matrix of rounded numbers
    every_name = set(official_views(small("mla_moe_query_latent")))
    named = {name for name in every_name if IN_FEW_BITS.search(name)}
    assert named - official_slots(model).keys() == {f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in range(4)}
    assert official_slots(model).keys() | plain_views(model).keys() == every_name


def test_parameters_are_counted_as_numbers(directories: dict[str, Path]):
    for kind, path in directories.items():
        assert count_parameters(load_checkpoint(path, weights="int4").model) == count_parameters(small(kind))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_draws_what_the_model_says(dtype: str, format: QuantFormat, directories: dict[str, Path]):
    """Prefill and decode, expanded and absorbed: the log-probs of greedy tokens are those of one forward pass."""
    model = load_checkpoint(directories["mla_moe"], weights=format, dtype=dtype).model
    engine = Engine(model, eos_ids=[], max_batch=4)
    for prompt, found in zip(
        random_prompts([5, 9]),
        engine.generate(random_prompts([5, 9]), SamplingParams(max_tokens=6, temperature=0.0)),
        strict=True,
    ):
        ids_BT = torch.tensor([prompt + found.ids])
        with torch.inference_mode():
            logps_TV = model.logits(model.hidden(ids_BT))[0].log_softmax(-1)
        want = logps_TV[len(prompt) - 1 : -1].gather(-1, torch.tensor(found.ids)[:, None])[:, 0]
        assert found.logps == pytest.approx(want.tolist(), abs=1e-5 if dtype == "float32" else 0.1)


@pytest.mark.parametrize(("format", "dtype"), [("int8", "float32"), ("int4", "bfloat16")])
def test_an_invariant_engine_answers_alike_in_any_company(format, dtype: str, directories: dict[str, Path]):
    model = load_checkpoint(directories["mla_moe"], weights=format, dtype=dtype).model
    params, prompts = SamplingParams(max_tokens=8, seed=3), random_prompts([7, 3, 12, 5, 9])

    def answers(asked: list[list[int]]) -> list:
        engine = Engine(model, eos_ids=[], max_batch=8, invariant=True)
        return [(found.ids, found.logps) for found in engine.generate(asked, [params] * len(asked))]

    assert answers(prompts)[0] == answers(prompts[:1])[0]


def test_a_token_is_the_same_alone_and_with_tokens_of_other_experts(directories: dict[str, Path]):
    model = load_checkpoint(directories["mla_moe"], weights="int4").model
    ids_BT = some_ids()
    torch.testing.assert_close(logits(model, ids_BT)[0, :1], logits(model, ids_BT[:1])[0], atol=1e-5, rtol=1e-5)


def test_a_model_in_few_bits_is_not_saved_as_another(directories: dict[str, Path], tmp_path: Path):
    model = load_checkpoint(directories["gqa_dense"], weights="int8").model
    with pytest.raises(ValueError, match="a model in int8 has no numbers to save .* abyssal export DIR --to int8"):
        save_checkpoint(tmp_path / "saved", model, None)
    assert not (tmp_path / "saved").exists()


def test_the_model_never_stands_in_memory_before_it_is_rounded(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """Each tensor that was read is gone when the next one comes."""
    kind = type(open_checkpoint(directories["mla_moe"]))
    read, alive = kind.read, list[weakref.ref]()

    def watched(self, name: str) -> Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(kind, "read", watched)
    done: list[tuple[int, int]] = []
    load_checkpoint(directories["mla_moe"], weights="int4", on_bytes=lambda *counts: done.append(counts))
    assert len(done) >= len(alive) > 50 and done[-1][0] == done[-1][1]  # norms go straight into their place
