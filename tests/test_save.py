"""The checkpoint directory: whole or not there, read shard by shard, every fault one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abyssal.checkpoint import shards
from abyssal.checkpoint.atomic import find_directory, replace_directory
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.resume import TrainerState
from abyssal.checkpoint.save import save_checkpoint
from abyssal.machine import resolve_device, set_threads
from abyssal.model.cache import allocate_cache
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    moe_intermediate_size=16, first_k_dense_replace=1, max_position_embeddings=64, num_nextn_predict_layers=1,
)


def tiny(seed: int = 0) -> Transformer:
    return Transformer(CONFIG).init_weights(torch.Generator().manual_seed(seed))


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


def same(a: Transformer, b: Transformer) -> bool:
    """Equal after BF16 rounding, which is what the directory keeps."""
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def one_line(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def disk_full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rewrite(directory: Path, change: Any) -> None:
    """Change the tensors of a one-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_the_round_trip_keeps_weights_tokenizer_and_generation_defaults(tmp_path: Path):
    tokenizer = Tokenizer(train_bpe(["one two three four five six"] * 20, vocab_size=300))
    model = tiny()
    save_checkpoint(tmp_path / "base", model, tokenizer, generation={"temperature": 0.6, "top_p": 0.95})
    loaded = load_checkpoint(tmp_path / "base", dtype="bfloat16")
    assert same(loaded.model, model) and loaded.model.dtype == torch.bfloat16
    assert loaded.config == CONFIG and loaded.tokenizer is not None
    assert loaded.tokenizer.encode("two three") == tokenizer.encode("two three")
    generation = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert generation == {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
                          "pad_token_id": tokenizer.pad_id, "temperature": 0.6, "top_p": 0.95}
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not (tmp_path / "base" / "trainer").exists()


def test_weights_are_bf16_and_the_gate_bias_fp32(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()}
    fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert fp32 == {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)}
    assert {dtype for name, dtype in dtypes.items() if name not in fp32} == {torch.bfloat16}


def test_shards_have_an_index_and_read_the_same(tmp_path: Path):
    model = tiny()
    save_checkpoint(tmp_path / "base", model, None, max_shard_bytes=4000)
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(tmp_path / "base" / file).values())
    assert same(load_checkpoint(tmp_path / "base").model, model)


def test_loading_draws_no_random_number_and_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path / "base", tiny(), None)
    before = torch.get_rng_state()

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was opened")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    load_checkpoint(tmp_path / "base")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_old_checkpoint_is_replaced_and_nothing_else_stays(tmp_path: Path):
    for seed in (1, 2):
        save_checkpoint(tmp_path / "zero" / "checkpoint", tiny(seed), None)
    assert same(load_checkpoint(tmp_path / "zero" / "checkpoint").model, tiny(2))
    assert [path.name for path in (tmp_path / "zero").iterdir()] == ["checkpoint"]


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("three years")
    with pytest.raises(ValueError) as error:
        save_checkpoint(tmp_path / "thesis", tiny(), None)
    one_line(error, "thesis", "no checkpoint")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "three years"


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoint"
    save_checkpoint(path, tiny(1), None)
    real_rename = os.rename

    def killed_after_first(source: Any, target: Any) -> None:
        if str(source).endswith(".new"):
            raise SystemExit("killed")
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", killed_after_first)
    with pytest.raises(SystemExit):
        save_checkpoint(path, tiny(2), None)
    monkeypatch.undo()
    assert not path.exists() and find_directory(path).name == "checkpoint.old"
    assert same(load_checkpoint(path).model, tiny(1))
    monkeypatch.setattr(shards, "save_file", disk_full)  # the next write fails too
    with pytest.raises(OSError):
        save_checkpoint(path, tiny(2), None)
    monkeypatch.undo()
    assert same(load_checkpoint(path).model, tiny(1))
    save_checkpoint(path, tiny(3), None)
    assert same(load_checkpoint(path).model, tiny(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path: Path):
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new" / "half").write_text("...")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "checkpoint")
    with replace_directory(tmp_path / "checkpoint") as new:
        (new / "whole").write_text("yes")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["checkpoint", "checkpoint/whole"]


@pytest.mark.parametrize("with_trainer", [False, True], ids=["weights", "trainer"])
def test_a_write_that_fails_leaves_the_previous_checkpoint_and_nothing_half_written(with_trainer: bool, tmp_path: Path):
    """A real failing write: the kernel refuses files beyond a limit, as a full disk does."""
    path = tmp_path / "checkpoint"
    save_checkpoint(path, tiny(1), None)
    size = (path / "model.safetensors").stat().st_size
    # masters alone are twice the BF16 weights: this limit lets the weights pass and stops trainer/
    limit = size + 1000 if with_trainer else size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(path, tiny(2), None, trainer=TrainerState() if with_trainer else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error, str(path), "File too large", "free some disk space", "previous checkpoint is untouched")
    assert same(load_checkpoint(path).model, tiny(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "save_file", disk_full)
    with pytest.raises(OSError) as error:
        save_checkpoint(tmp_path / "checkpoint", tiny(), None)
    one_line(error, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_a_truncated_shard_names_the_file_and_the_remedy(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)
    file = tmp_path / "base" / "model.safetensors"
    content = file.read_bytes()
    for n_bytes in (len(content) - 10, 100, 4, 0):
        file.write_bytes(content[:n_bytes])
        with pytest.raises(OSError) as error:
            load_checkpoint(tmp_path / "base")
        one_line(error, str(file), "truncated or damaged", "copy")


def test_a_missing_shard_names_the_file_and_the_remedy(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None, max_shard_bytes=4000)
    file = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_checkpoint(tmp_path / "base")
    one_line(error, str(file), "missing", "copy")


def test_every_tensor_is_accounted_for(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
        tensors["model.norm.weight"] = torch.ones(17)

    rewrite(tmp_path / "base", spoil)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "base")
    one_line(error, "1 missing (model.layers.1.mlp.experts.3.up_proj.weight)",
             "1 unexpected (model.layers.0.self_attn.q_norm.weight)", "model.norm.weight (17,) instead of (16,)")


def test_the_rotary_table_of_old_llamas_is_no_stranger(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)
    rewrite(tmp_path / "base", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same(load_checkpoint(tmp_path / "base").model, tiny())


def test_shared_copies_may_be_absent_and_must_be_equal(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)
    rewrite(tmp_path / "base", lambda t: t.pop("model.layers.2.shared_head.head.weight"))
    assert same(load_checkpoint(tmp_path / "base").model, tiny())
    rewrite(tmp_path / "base", lambda t: t["model.layers.2.embed_tokens.weight"][3, 3].add_(1.0))
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "base")
    one_line(error, "model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight")


def test_a_checkpoint_without_its_mtp_layer_loads_and_says_so(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    rewrite(tmp_path / "base", drop)
    with pytest.warns(UserWarning, match="promises 1 MTP layers"):
        loaded = load_checkpoint(tmp_path / "base")
    assert loaded.config.num_nextn_predict_layers == 0 and len(loaded.model.mtp) == 0


@pytest.mark.parametrize(("content", "said"), [
    ("{", "is not JSON"), ("[]", "holds no JSON object"), ("{}", "lacks 'model_type'"), (None, "has no config.json")])
def test_a_broken_config_is_one_line(content: str | None, said: str, tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)
    if content is None:
        (tmp_path / "base" / "config.json").unlink()
    else:
        (tmp_path / "base" / "config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_checkpoint(tmp_path / "base")
    one_line(error, said)


def test_an_index_cannot_point_outside_its_directory(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)
    (tmp_path / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "base")
    one_line(error, "outside its directory")


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    save_checkpoint(tmp_path / "base", tiny(), None)
    for name, said in (("cuda", "is not there"), ("cuda:3", "is not there"), ("gpu", "is unknown"),
                       ("mps", "is not supported")):
        with pytest.raises(ValueError) as error:
            load_checkpoint(tmp_path / "base", device=name)
        one_line(error, f"device={name!r}", said, "use")
    with pytest.raises(ValueError, match="dtype='float16'"):
        load_checkpoint(tmp_path / "base", dtype=torch.float16)


def test_threads_are_set_and_checked():
    before = torch.get_num_threads()
    assert set_threads(1) == torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="threads=0"):
        set_threads(0)
    set_threads(before)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_weights(tmp_path: Path):
    save_checkpoint(tmp_path / "base", tiny(), None)
    model = load_checkpoint(tmp_path / "base", device="cuda").model
    assert model.rope_frequencies.is_cuda
    assert same(model.cpu(), tiny())


def test_the_cache_begins_at_zero_in_either_type():
    for dtype in (torch.float32, torch.bfloat16):
        layers = allocate_cache(CONFIG, 5, dtype=dtype, device=torch.device("cpu"))
        assert len(layers) == 3 and all(layer.dtype == dtype for layer in layers)
        assert all(layer.shape == (5, CONFIG.cache_width) and not layer.any() for layer in layers)
        layers[0][3] = 1.5  # writable, and nobody else's
        assert layers[0].sum() == 1.5 * CONFIG.cache_width and not layers[1].any()
