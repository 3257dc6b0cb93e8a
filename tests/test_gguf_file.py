from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import converted, described, randomized, small_vocabulary, write_file
from small_models import small_model

from abyssal.checkpoint.gguf_file import GgufFile
from abyssal.checkpoint.load import load_checkpoint, load_config
from abyssal.checkpoint.source import open_checkpoint
from abyssal.checkpoint.tensor_names import official_views
from abyssal.model.config import ModelConfig, RopeScaling
from abyssal.model.rope import rope_frequencies
from abyssal.model.transformer import Transformer

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("gqa_dense", "llama", {"qkv_bias": False, "tie_word_embeddings": False, **WIDE}),
    "llama tied, with biases": ("gqa_dense", "llama", WIDE),
    "qwen2": ("gqa_dense", "qwen2", {"tie_word_embeddings": False, **WIDE}),
    "qwen3": ("gqa_dense", "qwen3", {"qkv_bias": False, "qk_norm": True, **WIDE}),
    "V3": ("mla_moe_query_latent", "deepseek2", {"num_nextn_predict_layers": 0, "n_group": 4, "topk_group": 2,
                                                 "routed_scaling_factor": 2.5}),
    "V2": ("mla_moe", "deepseek2", {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 4,
                                    "topk_group": 2, "norm_topk_prob": False}),
    "V2-Lite": ("mla_moe", "deepseek2", {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}),
    "MLA alone": ("mla_dense", "deepseek2", {"tie_word_embeddings": True}),
}  # fmt: skip


def a_model(shape: str, **changes: Any) -> tuple[Transformer, str]:
    kind, arch, own = SHAPES[shape]
    return randomized(small_model(kind, **own | changes)), arch


def as_read(config: ModelConfig) -> ModelConfig:
    """GGUF does not say how weights began."""
    return replace(config, initializer_range=ModelConfig.initializer_range)


def assert_reads_as(file: Path, model: Transformer) -> None:
    source = open_checkpoint(file)
    views = official_views(model)
    assert source.config == as_read(model.config)
    assert {name: info.shape for name, info in source.tensors.items()} == {n: tuple(v.shape) for n, v in views.items()}
    for name, view in views.items():
        assert torch.equal(source.read(name), view), name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_of_llama_cpps_converter_reads_as_the_model_it_was(tmp_path: Path, shape: str):
    model, arch = a_model(shape)
    file = write_file(tmp_path / "m.gguf", arch, described(model, arch), converted(model, arch))
    assert_reads_as(file, model)
    ids_BT = torch.arange(12).view(2, 6)
    again = load_checkpoint(file).model
    with torch.no_grad():
        assert torch.equal(again.logits(again.hidden(ids_BT)), model.logits(model.hidden(ids_BT)))
    assert load_config(tmp_path) == again.config  # the only GGUF file of a directory is what the directory means


@pytest.mark.parametrize("shape", ["V3", "V2-Lite", "MLA alone"])
def test_older_files_have_keys_and_values_of_mla_in_one(tmp_path: Path, shape: str):
    model, arch = a_model(shape)
    tensors = converted(model, arch, whole_kv_b=True)
    assert "blk.0.attn_kv_b.weight" in tensors
    assert_reads_as(write_file(tmp_path / "m.gguf", arch, described(model, arch, whole_kv_b=True), tensors), model)


def test_a_stack_of_one_expert_is_written_by_llama_cpp_without_its_first_dimension(tmp_path: Path):
    model, arch = a_model("V2-Lite", n_routed_experts=1, num_experts_per_tok=1)
    tensors = converted(model, arch)
    squeezed = {name: array.squeeze(0) if "_exps" in name else array for name, array in tensors.items()}
    assert squeezed.keys() == tensors.keys() and squeezed["blk.1.ffn_up_exps.weight"].ndim == 2
    squeezed["blk.1.ffn_gate_inp.weight"] = squeezed["blk.1.ffn_gate_inp.weight"].squeeze(0)
    assert_reads_as(write_file(tmp_path / "m.gguf", arch, described(model, arch), squeezed), model)


READABLE = [t for t in gguf.GGMLQuantizationType if t.name[0] in "FBQITMN" and t.name not in
            ("Q8_1", "Q8_K", "Q1_0", "F64", "I8", "I16", "I32", "I64")]  # fmt: skip


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_the_package_dequantises_is_read(tmp_path: Path, kind: gguf.GGMLQuantizationType):
    """Random bytes as blocks; scales that come out NaN or infinite are refused, so small ones are put in their place.
    """
    model, arch = a_model("llama", hidden_size=256, intermediate_size=256)
    tensors = converted(model, arch)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (256, 256 // block * n_bytes), np.uint8)
    if kind.name in ("F16", "BF16", "F32"):
        rows = gguf.quantize(rng.standard_normal((256, 256), np.float32), kind).view(np.uint8)
    with np.errstate(all="ignore"):
        while not np.isfinite(want := gguf.dequantize(rows, kind)).all():
            bad = ~np.isfinite(want).all(1)
            rows[bad] = rng.integers(0, 64, (bad.sum(), rows.shape[1]), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    for key, value in described(model, arch).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, array in tensors.items():
        if name == "blk.1.ffn_up.weight":
            writer.add_tensor(name, rows, raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufFile(tmp_path / "m.gguf")
    name = "model.layers.1.mlp.up_proj.weight"
    assert source.tensors[name] == ((256, 256), kind.name)
    got = source.read(name)
    assert got.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    assert np.array_equal(got.float().numpy(), want)


def test_rows_in_pairs_are_put_back_whatever_their_type(tmp_path: Path):
    model, arch = a_model("llama")
    tensors = converted(model, arch)
    file = write_file(tmp_path / "m.gguf", arch, described(model, arch), tensors, kind=gguf.GGMLQuantizationType.Q4_1)
    q = GgufFile(file).read("model.layers.0.self_attn.q_proj.weight")
    in_pairs = gguf.dequantize(gguf.quantize(tensors["blk.0.attn_q.weight"], gguf.GGMLQuantizationType.Q4_1),
                               gguf.GGMLQuantizationType.Q4_1)  # fmt: skip
    # head 0 has rows r0 s0 r1 s1 .. there and r0 r1 .. s0 s1 .. here
    assert torch.equal(q[:16], torch.from_numpy(np.concatenate((in_pairs[0:16:2], in_pairs[1:16:2]))))


@pytest.mark.parametrize(
    "scaling, keys",
    [
        (None, {"rope.scaling.type": "none"}),
        (RopeScaling(kind="linear", factor=4.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (RopeScaling(kind="linear", factor=2.0), {"rope.scaling.factor": 2.0}),  # llama.cpp's default
        (
            RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.0, mscale_all_dim=0.0),
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        ),
        (
            RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.0, mscale_all_dim=0.0,
                        beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
             "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0,
             "rope.scaling.attn_factor": 1.5 / (1 + 0.1 * math.log(4.0))},
        ),
    ],
)  # fmt: skip
def test_scalings_of_gqa(tmp_path: Path, scaling: RopeScaling | None, keys: dict[str, Any]):
    model, arch = a_model("llama")
    metadata = described(model, arch) | {f"llama.{key}": value for key, value in keys.items()}
    file = write_file(tmp_path / "m.gguf", arch, metadata, converted(model, arch))
    assert load_config(file).rope_scaling == scaling


def test_yarn_of_deepseek_scales_scores(tmp_path: Path):
    """V2-Lite's mscale of 0.707 stands there as a tenth of it in 32 bits."""
    model, arch = a_model("V2-Lite")
    keys = {"type": "yarn", "factor": 40.0, "original_context_length": 4096, "yarn_log_multiplier": 0.0707}
    metadata = described(model, arch) | {f"deepseek2.rope.scaling.{key}": value for key, value in keys.items()}
    config = load_config(write_file(tmp_path / "m.gguf", arch, metadata, converted(model, arch)))
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    assert config.softmax_scale * config.qk_head_dim**0.5 == pytest.approx(1.26080**2, abs=1e-5)  # of V2-Lite


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192),
        RopeScaling(kind="llama3", factor=32.0, original_max_position_embeddings=8192),
        RopeScaling(kind="llama3", factor=4.0, original_max_position_embeddings=8192, low_freq_factor=2.0,
                    high_freq_factor=16.0),
    ],
)  # fmt: skip
def test_llama3_scaling_is_found_in_its_factors(tmp_path: Path, scaling: RopeScaling):
    """The factors as llama.cpp's converter works them out, one pair after another."""
    model, arch = a_model("llama", head_dim=64, rope_theta=500000.0)
    factors = []
    for i in range(32):
        wavelength = 2 * np.pi * 500000.0 ** (2 * i / 64)
        low, high, old = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
        smooth = (old / wavelength - low) / (high - low)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(scaling.factor)
        else:
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    tensors = converted(model, arch) | {"rope_freqs.weight": np.array(factors, np.float32)}
    config = load_config(write_file(tmp_path / "m.gguf", arch, described(model, arch), tensors))
    assert config.rope_scaling == scaling
    plain = rope_frequencies(replace(config, rope_scaling=None))
    torch.testing.assert_close(rope_frequencies(config), plain / torch.tensor(factors), rtol=1e-5, atol=0)


def test_factors_of_another_form_are_refused(tmp_path: Path):
    model, arch = a_model("llama")
    tensors = converted(model, arch) | {"rope_freqs.weight": np.array([1, 3, 2, 5, 1, 4, 2, 1], np.float32)}
    with pytest.raises(ValueError, match="rope_freqs.weight is no scaling of Llama 3's form"):
        GgufFile(write_file(tmp_path / "m.gguf", arch, described(model, arch), tensors))


def test_more_than_one_file_in_a_directory_has_to_be_named(tmp_path: Path):
    model, arch = a_model("llama")
    for name in ("a", "b"):
        write_file(tmp_path / f"{name}.gguf", arch, described(model, arch), converted(model, arch))
    with pytest.raises(ValueError, match="holds 2 GGUF files; name one of them: .*a.gguf"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "b.gguf").config == as_read(model.config)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"general.architecture": "mamba"}, "'mamba' is not supported; known are llama, qwen2, qwen3, deepseek2"),
        ({"deepseek2.block_count": 2**31}, "block_count=2147483648 is not between 1 and"),
        ({"deepseek2.block_count": 4}, "block_count=4 is not the number of layers there are tensors of"),
        ({"deepseek2.embedding_length": None}, "lacks deepseek2.embedding_length"),
        ({"deepseek2.embedding_length": "wide"}, "embedding_length='wide' should be of type int"),
        ({"deepseek2.embedding_length": 48}, "token_embd|embed_tokens.weight .61, 32. instead of .61, 48."),
        ({"deepseek2.attention.head_count": 0}, "head_count=0 is not between"),
        ({"deepseek2.expert_count": 4}, "expert_count=4 does not fit blk.1.ffn_gate_exps.weight"),
        ({"deepseek2.expert_gating_func": 4}, "expert_gating_func=4 is not supported"),
        ({"deepseek2.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon=nan is no positive"),
        ({"deepseek2.rope.dimension_count": 16}, "rope.dimension_count=16 leaves nothing of a head of 16"),
        ({"deepseek2.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
        ({"deepseek2.rope.scaling.type": "yarn", "deepseek2.rope.scaling.factor": 4.0}, "yarn_log_multiplier"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_one_line(tmp_path: Path, change: dict[str, Any], said: str):
    model, arch = a_model("V3")
    metadata = {key: value for key, value in (described(model, arch) | change).items() if value is not None}
    arch = metadata.pop("general.architecture", arch)
    file = write_file(tmp_path / "m.gguf", arch, metadata, converted(model, "deepseek2"))
    with pytest.raises(ValueError, match=said) as error:
        load_checkpoint(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    "name, array, said",
    [
        ("blk.0.attn_norm.weight", None, "1 missing .model.layers.0.input_layernorm.weight"),
        ("blk.2.attn_v_b.weight", None, "do not belong together"),
        ("blk.0.attn_sinks.weight", np.ones(4), "1 unexpected .blk.0.attn_sinks.weight"),
        ("model.norm.weight", np.ones(32), "stands there under two names"),
        ("blk.1.ffn_up_exps.weight", np.ones((7, 16, 32)), "should hold 8 experts"),
        ("blk.1.ffn_down_exps.weight", np.ones((8, 32, 32)), "8 of wrong shape"),
        ("output_norm.weight", np.ones((2, 16)), "should have 1 dimensions"),
        ("blk.0.attn_k_b.weight", np.ones((4, 8, 16)), "do not belong together"),
        ("output_norm.weight", np.ones(32, np.float64), "tensors of type F64 cannot be read"),
    ],
)  # fmt: skip
def test_every_tensor_is_accounted_for(tmp_path: Path, name: str, array: Any, said: str):
    model, arch = a_model("V3")
    tensors = converted(model, arch)
    tensors.pop(name, None)
    if array is not None:
        tensors[name] = array if "F64" in said else array.astype(np.float32)
    with pytest.raises(ValueError, match=said) as error:
        load_checkpoint(write_file(tmp_path / "m.gguf", arch, described(model, arch), tensors))
    assert "\n" not in str(error.value)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path):
    model, arch = a_model("llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write_file(tmp_path / "m.gguf", arch, described(model, arch), converted(model, arch), kind=kind)
    place = GgufFile(file)._places["model.layers.2.mlp.up_proj.weight"].pieces[0]
    data = bytearray(file.read_bytes())
    data[place.offset : place.offset + 2] = np.float16("nan").tobytes()
    file.write_bytes(data)
    with pytest.raises(ValueError, match="scales of Q8_0 at byte .* are NaN or infinite"):
        load_checkpoint(file)


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path):
    model, arch = a_model("llama")
    file = write_file(tmp_path / "m.gguf", arch, described(model, arch), converted(model, arch))
    source = GgufFile(file)
    file.write_bytes(file.read_bytes()[:4096])
    with pytest.raises(OSError, match="has become shorter"):
        for name in source.tensors:
            source.read(name)


def test_a_file_without_vocabulary_has_no_tokenizer_and_a_directory_may_not_mix(tmp_path: Path):
    model, arch = a_model("llama", vocab_size=262)
    file = write_file(tmp_path / "m.gguf", arch, described(model, arch), converted(model, arch))
    assert GgufFile(file).tokenizer() is None
    tokenizer = GgufFile(
        write_file(tmp_path / "t.gguf", arch, described(model, arch) | small_vocabulary(), converted(model, arch))
    ).tokenizer()
    assert tokenizer is not None and tokenizer.vocab_size == 262
