from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import converted, described, randomized, small_vocabulary, write_file
from oracle import our_logits
from small_models import small_model
from test_gguf_file import SHAPES, a_model, as_read

from abyssal.checkpoint.gguf_config import config_to_gguf
from abyssal.checkpoint.gguf_file import GgufFile
from abyssal.checkpoint.gguf_write import WrittenGguf, write_gguf
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.model.config import RopeScaling
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

CORPUS = ["the sea is deep and the light is far away 2*3=6 所以\n" * 20]


def a_source(directory: Path, shape: str, **changes: Any) -> GgufFile:
    """FP32, as llama.cpp's converter would have written it."""
    model, arch = a_model(shape, **changes)
    metadata = described(model, arch) | (small_vocabulary() if model.config.vocab_size == 262 else {})
    return GgufFile(write_file(directory / "source.gguf", arch, metadata, converted(model, arch)))


def contents(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "biases" not in shape])  # a llama with them: qwen2
def test_fp32_there_and_back_is_bitwise_and_metadata_is_what_the_converter_writes(tmp_path: Path, shape: str):
    source = a_source(tmp_path, shape, vocab_size=262)
    written = write_gguf(source, tmp_path / "out" / "m.gguf", quant="F32", name="Deep")
    assert written.file.stat().st_size == written.n_bytes
    assert [path.name for path in written.file.parent.iterdir()] == ["m.gguf"]
    model, arch = a_model(shape, vocab_size=262)
    theirs = gguf.GGUFReader(written.file)
    want = converted(model, arch)
    assert {tensor.name for tensor in theirs.tensors} == want.keys()
    for tensor in theirs.tensors:
        assert tensor.tensor_type.name == "F32" and np.array_equal(tensor.data, want[tensor.name]), tensor.name
    found = contents(theirs)
    for key, value in (described(model, arch) | small_vocabulary()).items():
        assert found[key] == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
    assert (found["general.architecture"], found["general.name"], found["general.file_type"]) == (arch, "Deep", 0)

    again = GgufFile(written.file)
    assert again.config == source.config and again.tensors == source.tensors
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.tensors)
    second = write_gguf(again, tmp_path / "second.gguf", quant="F32", name="Deep")
    assert second.file.read_bytes() == written.file.read_bytes()


WIDE_V3 = {"hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
           "intermediate_size": 96, "moe_intermediate_size": 32, "num_nextn_predict_layers": 0}  # fmt: skip
STEP = {"BF16": 2**-8, "F16": 2**-11}  # half of the last bit, against the number itself


def across(kv_b: torch.Tensor, *, n_heads: int, n_key: int) -> torch.Tensor:
    rows_HRL = kv_b.unflatten(0, (n_heads, -1))
    return torch.cat((rows_HRL[:, :n_key].mT.flatten(), rows_HRL[:, n_key:].flatten()))


@pytest.mark.parametrize("quant", ["BF16", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("shape", ["llama", "V3"])
def test_fewer_bits_are_as_near_as_their_format_can_be(tmp_path: Path, shape: str, quant: Any):
    source = a_source(tmp_path, shape, **(WIDE_V3 if shape == "V3" else {}))
    written = write_gguf(source, tmp_path / "m.gguf", quant=quant)
    again = GgufFile(written.file)
    head = {"Q4_0": "Q8_0"}.get(quant, quant)
    for name, (_, stored) in again.tensors.items():
        want, got = source.read(name), again.read(name).float()
        if want.ndim == 1 or name.endswith("mlp.gate.weight"):
            assert stored == "F32" and torch.equal(got, want), name
            continue
        assert stored == (head if name == "lm_head.weight" else quant), name
        error = (got - want).abs()
        if quant in STEP:
            assert (error <= want.abs() * STEP[quant] + 1e-7).all(), name
            continue
        if name.endswith("kv_b_proj.weight"):  # k_b is stored across, so its blocks go down the rows of a head
            want, error = (across(w, n_heads=4, n_key=32) for w in (want, error))
        # half a step of largest / 127, or a whole one of largest / 8 since one end is cut off; scales are F16
        largest = want.reshape(-1, 32).abs().amax(-1, keepdim=True)
        bound = largest / 127 * (0.5 + 127 * 2**-11) if stored == "Q8_0" else largest / 8 * (1 + 8 * 2**-11)
        assert (error.reshape(-1, 32) <= bound * 1.001).all(), name
        assert stored == "Q8_0" or error.mean() > want.abs().mean() / 100  # four bits are four bits
    assert written.notes[-1] == "without a tokenizer, since the checkpoint has none"


def test_bf16_from_a_bf16_checkpoint_is_bitwise(tmp_path: Path):
    save_checkpoint(tmp_path / "hf", randomized(small_model("mla_moe_query_latent")), None)
    source = open_checkpoint(tmp_path / "hf")
    written = write_gguf(source, tmp_path / "m.gguf", quant="BF16")
    assert written.notes[0] == "left out: 1 MTP layers, for which deepseek2 has no tensors"
    again = GgufFile(written.file)
    for name in again.tensors:
        assert torch.equal(again.read(name).float(), source.read(name).float()), name
    assert {name for name in source.tensors if name not in again.tensors} == {
        name for name in source.tensors if name.startswith("model.layers.3.")
    }
    assert again.config == as_read(replace(source.config, num_nextn_predict_layers=0))


def test_mla_that_rotates_halves_is_turned_to_pairs(tmp_path: Path):
    """transformers' `rope_interleave=False`: GGUF has no such switch, so rows move, and logits stay."""
    model = randomized(small_model("mla_moe_query_latent", rope_interleave=False, num_nextn_predict_layers=0))
    save_checkpoint(tmp_path / "hf", model, None)
    hf = load_checkpoint(tmp_path / "hf").model
    written = write_gguf(open_checkpoint(tmp_path / "hf"), tmp_path / "m.gguf", quant="F32")
    again = load_checkpoint(written.file).model
    assert again.config.rope_interleave and not hf.config.rope_interleave
    ids_BT = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(again, ids_BT), our_logits(hf, ids_BT), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shape, scaling",
    [
        ("llama", RopeScaling(kind="linear", factor=4.0)),
        ("llama", RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)),
        ("qwen2", RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.0,
                              mscale_all_dim=0.0)),
        ("qwen2", RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.0,
                              mscale_all_dim=0.0, attention_factor=1.25, beta_fast=8.0)),
        ("V3", RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=4096)),
        ("V2-Lite", RopeScaling(kind="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)),
    ],
)  # fmt: skip
def test_scalings_there_and_back(tmp_path: Path, shape: str, scaling: RopeScaling):
    model = randomized(small_model(SHAPES[shape][0], **SHAPES[shape][2], rope_scaling=scaling))
    save_checkpoint(tmp_path / "hf", model, None)
    written = write_gguf(open_checkpoint(tmp_path / "hf"), tmp_path / "m.gguf", quant="F32")
    assert GgufFile(written.file).config.rope_scaling == scaling
    keys = contents(gguf.GGUFReader(written.file))
    kinds = {key.rsplit(".", 1)[1]: value for key, value in keys.items() if ".rope.scaling." in key}
    if scaling.kind == "llama3":  # a factor there would make llama.cpp divide a second time
        assert kinds == {"original_context_length": 64}
    else:
        assert (kinds["type"], kinds["factor"]) == (scaling.kind, scaling.factor)


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("gqa_dense", {"feed_forward": "moe", "n_routed_experts": 4, "num_experts_per_tok": 2,
                       "moe_intermediate_size": 16, "qkv_bias": False}, "experts behind MLA only, not behind GQA"),
        ("gqa_dense", {"head_dim": 16}, "qwen2 has heads of hidden_size / num_attention_heads"),
        ("gqa_dense", {"qk_norm": True}, "no heads with both biases and norms"),
        ("mla_moe", {"n_shared_experts": 0}, "deepseek2 has at least one"),
        ("mla_moe", {"scoring_func": "softmax"}, "no softmax scores with a balance bias"),
        ("mla_dense", {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, mscale=0.5)}, "one number for both"),
        ("mla_dense", {"latent_norm": False}, "no latents without a norm"),
        ("mla_dense", {"rope_inv_freq": (1.0, 0.5, 1.0, 0.5)}, "own frequencies"),
        ("mla_dense", {"qkv_bias": True}, "with biases"),
    ],
)  # fmt: skip
def test_a_shape_without_words_in_gguf_is_one_line(kind: str, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said) as error:
        config_to_gguf(small_model(kind, **changes).config)
    assert "\n" not in str(error.value) and "export to a directory instead" in str(error.value)


def test_rows_that_do_not_divide_stay_f16_and_it_is_said(tmp_path: Path):
    source = a_source(tmp_path, "V2-Lite")
    written = write_gguf(source, tmp_path / "m.gguf", quant="Q8_0")
    lite, wide, _ = written.notes
    assert "q_lora_rank only with 26 or 27 layers" in lite
    assert wide == "11 tensors stay F16, among them blk.0.attn_k_b.weight: [8, 16, 48] columns do not divide by 32"
    stored = {name: info.stored for name, info in GgufFile(written.file).tensors.items()}
    assert stored["model.layers.1.mlp.experts.3.down_proj.weight"] == "F16"  # 16 columns
    assert stored["model.layers.1.mlp.experts.3.up_proj.weight"] == "Q8_0"  # 32 columns


def test_numbers_beyond_f16_are_an_error_and_nothing_is_left(tmp_path: Path):
    model = randomized(small_model("gqa_dense"))
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    save_checkpoint(tmp_path / "hf", model, None)
    source = open_checkpoint(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has numbers beyond 65,504, .* use BF16"):
        write_gguf(source, tmp_path / "out" / "m.gguf", quant="F16")
    assert not list((tmp_path / "out").iterdir())
    write_gguf(source, tmp_path / "out" / "m.gguf", quant="BF16")
    with pytest.raises(ValueError, match="quant='Q3' is unknown; use one of F32, F16, BF16, Q8_0, Q4_0"):
        write_gguf(source, tmp_path / "m.gguf", quant="Q3")  # type: ignore[arg-type]


def test_a_disk_that_takes_nothing_is_one_line(tmp_path: Path):
    save_checkpoint(tmp_path / "hf", small_model("gqa_dense"), None)
    with pytest.raises(OSError, match="could not write /dev/full/m.gguf: .*; free some space"):
        write_gguf(open_checkpoint(tmp_path / "hf"), Path("/dev/full/m.gguf"), quant="F32")


def test_progress_counts_bytes_to_the_end(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    write_gguf(a_source(tmp_path, "llama"), tmp_path / "m.gguf", quant="Q8_0", on_bytes=lambda *n: seen.append(n))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[WrittenGguf, Tokenizer]]:
    """Small checkpoints with a tokenizer of ours, as FP32 GGUF."""
    out = {}
    tokenizer = Tokenizer(train_bpe(CORPUS, vocab_size=400))
    for shape in ("llama", "qwen2"):
        directory = tmp_path_factory.mktemp(shape)
        model, _ = a_model(shape, vocab_size=tokenizer.vocab_size + 3)
        save_checkpoint(directory / "hf", model, tokenizer)
        source = open_checkpoint(directory / "hf")
        out[shape] = write_gguf(source, directory / "m.gguf", quant="F32"), tokenizer
    return out


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_transformers_reads_the_file_with_equal_logits(exported: dict[str, Any], shape: str):
    file: Path = exported[shape][0].file
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids_BT = torch.arange(60).view(3, 20)
    with torch.no_grad():
        want, got = theirs.eval()(ids_BT).logits, our_logits(load_checkpoint(file).model, ids_BT)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert want.std() > 0.1


def test_transformers_reads_its_tokenizer(tmp_path: Path):
    """With GPT-2's cut, the only one it knows of llama.cpp's; and it reads no token with DeepSeek's low line."""
    file = write_gguf(a_source(tmp_path, "llama", vocab_size=262), tmp_path / "m.gguf", quant="F32").file
    tokenizer = GgufFile(file).tokenizer()
    assert tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "the light is the  furthest, 所以 é 12\n"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert [theirs.bos_token_id, theirs.eos_token_id] == [tokenizer.bos_id, tokenizer.eos_id] == [0, 2]
    assert theirs.chat_template == tokenizer.template


def test_the_whole_checkpoint_answers_alike_from_either_form(exported: dict[str, Any]):
    """Tokenizer and template included: what a directory says, its GGUF says."""
    (file, _, _), tokenizer = exported["llama"]
    one, other = load_checkpoint(file.parent / "hf"), load_checkpoint(file)
    assert other.tokenizer is not None and json.loads(tokenizer.backend.to_str())["model"] is not None
    for text in ("the sea 2*3=6", "所以 <think>\n\n  é"):
        ids = tokenizer.encode(text)
        assert other.tokenizer.encode(text) == ids
        with torch.no_grad():
            assert torch.equal(our_logits(one.model, torch.tensor([ids])), our_logits(other.model, torch.tensor([ids])))
