"""A directory from a stranger: everything that can be wrong with one is a line, and nothing in it ever runs."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_model

import abyssal
from abyssal.checkpoint.hf_directory import HfDirectory
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.cli import dispatch

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture()
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in four shards."""
    path = tmp_path / "sharded"
    save_checkpoint(path, small_model(), None, max_shard_bytes=30_000)
    assert len(list(path.glob("*.safetensors"))) == 4
    return path


@pytest.fixture()
def single(tmp_path: Path) -> Path:
    path = tmp_path / "single"
    save_checkpoint(path, small_model(), None)
    return path


def refused(path: Path) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert text.isprintable() and len(text) < 2000, text
    return text


def change_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    content = json.loads((path / INDEX).read_text())
    change(content["weight_map"])
    (path / INDEX).write_text(json.dumps(content))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_every_missing_shard_is_counted(sharded: Path):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    second.unlink()
    os.mkfifo(second)  # reading it would wait for ever
    said = refused(sharded)
    assert f"{first} is missing and so are {second.name}: copy it again" in said


def test_index_and_shards_must_agree_in_both_directions(sharded: Path):
    change_index(sharded, lambda m: m.update({"model.layers.9.ghost.weight": m[NORM]}))
    assert f"1 not in the shard that the index names (model.layers.9.ghost.weight in {name_of(sharded, NORM)})" in (
        refused(sharded)
    )
    change_index(sharded, lambda m: (m.pop("model.layers.9.ghost.weight"), m.pop(NORM)))
    assert f"1 in a shard and not in the index ({NORM} in " in refused(sharded)


def name_of(path: Path, tensor: str) -> str:
    return json.loads((path / INDEX).read_text())["weight_map"][tensor]


def test_a_tensor_in_two_shards_or_named_twice(sharded: Path):
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(last)
    save_file(tensors | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"]}, last)
    assert "repeats 'model.embed_tokens.weight' of another shard" in refused(sharded)
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace(f'"{NORM}"', f'"{NORM}": "{first.name}", "{NORM}"'))
    assert f"{INDEX} is not JSON ('{NORM}' stands there twice)" in refused(sharded)


@pytest.mark.parametrize(("target", "said"), [
    ("../{}", "outside its directory"), ("./{}", "outside its directory"), ("/etc/passwd", "outside its directory"),
    ("..", "outside its directory"), ("", "run code"), ("a\0b", "outside its directory"),
    ("a\nb", "outside its directory"), (5, "something else than names"), ("pytorch_model.bin", "run code"),
    ("gone.safetensors", "is missing")])
def test_an_index_names_safetensors_beside_it_and_nothing_else(target: Any, said: str, sharded: Path):
    name = name_of(sharded, NORM)
    change_index(sharded, lambda m: m.update({NORM: target.format(name) if isinstance(target, str) else target}))
    assert said in refused(sharded)


@pytest.mark.parametrize(("content", "said"), [
    ("{", "is not JSON"), ("[]", "holds no JSON object"), ("{}", "has no weight_map"), ('{"weight_map": []}', "has no"),
    ("[" * 100_000, "nested too deeply"), ('{"weight_map": {"a\\nb": "m.safetensors"}}', "is no name of a tensor")])
def test_a_broken_index(content: str, said: str, sharded: Path):
    (sharded / INDEX).write_text(content)
    assert said in refused(sharded)


def test_one_file_and_an_index_that_does_not_know_it(sharded: Path, single: Path):
    (sharded / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    assert "has both model.safetensors and model.safetensors.index.json" in refused(sharded)
    (sharded / INDEX).unlink()
    load_checkpoint(sharded)  # shards that nobody names are no part of it
    (sharded / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(sharded)


def test_symlinks_are_followed_as_in_the_hub_cache(single: Path, tmp_path: Path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(single.iterdir()):
        os.rename(file, blobs / str(number))
        os.symlink(blobs / str(number), file)
    load_checkpoint(single)
    (single / "model.safetensors").unlink()
    os.symlink(single / "model.safetensors", single / "model.safetensors")
    assert "is missing" in refused(single)


def test_weights_of_another_type_shape_or_size(single: Path):
    change_tensors(single, lambda t: t.update({NORM: t[NORM].long()}))
    assert f"1 of a type that is no weight's ({NORM} I64 instead of F64, F32, F16, BF16)" in refused(single)
    change_tensors(single, lambda t: t.update({NORM: t[NORM].double()}))
    load_checkpoint(single)
    change_tensors(single, lambda t: t.update({NORM: torch.ones(2, 16)}))
    assert f"1 of wrong shape ({NORM} (2, 16) instead of (32,))" in refused(single)


def test_of_few_faults_all_are_listed_and_of_many_the_first(single: Path):
    down = [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(8)]
    up = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(8)]
    change_tensors(single, lambda t: [t.pop(name) for name in down])
    assert f"8 missing ({', '.join(down)})" in refused(single)
    change_tensors(single, lambda t: [t.pop(name) for name in up])
    assert f"16 missing ({', '.join(x for pair in zip(up, down, strict=True) for x in pair)[:60]}" in refused(single)
    assert "and 6 more)" in refused(single)


class Trap:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_and_its_trap_does_not_go_off(single: Path, tmp_path: Path):
    sprung = tmp_path / "sprung"
    (single / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "trainer_state.ckpt", "tokenizer.pkl"):
        (single / name).write_bytes(pickle.dumps(Trap(sprung)))
    ways: list[Callable[[], object]] = [
        lambda: load_checkpoint(single),
        lambda: load_checkpoint(single / "pytorch_model.bin"),
        lambda: abyssal.load(single),
        lambda: dispatch(["chat", str(single)]),
    ]
    for way in ways:
        with pytest.raises((ValueError, OSError), match="never read here: save the checkpoint as safetensors"):
            way()
    save_checkpoint(tmp_path / "good", small_model(), None)
    os.rename(tmp_path / "good" / "model.safetensors", single / "model.safetensors")
    load_checkpoint(single)  # beside safetensors a pickle does no harm: nobody looks at it
    assert not sprung.exists()
    pickle.loads((single / "model.pt").read_bytes())  # noqa: S301 - the trap is real
    assert sprung.exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"rope_scaling": 5, "rope_parameters": None}, "of the wrong type"),
    ({"rope_parameters": [1], "rope_scaling": None}, "config.json"),
    ({"rms_norm_eps": [1]}, "of the wrong type"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 and there are"),
    ({"n_routed_experts": 10**9}, "n_routed_experts=1000000000 and there are"),
    ({"num_nextn_predict_layers": 10**9}, "MTP"),
    ({"vocab_size": 10**18, "hidden_size": 10**18}, "no model that there could be"),
    ({"vocab_size": 10**30}, "no model that there could be"),
    ({"quantization_config": 5}, "quantization_config=5 is no object"),
])
@pytest.mark.filterwarnings("ignore:.*MTP layers:UserWarning")
def test_a_config_that_promises_the_impossible_neither_hangs_nor_crashes(
    change: dict[str, Any], said: str, single: Path
):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | change))
    if said == "MTP":  # the warning that they are not there; the rest loads
        with pytest.warns(UserWarning, match="promises 1000000000 MTP layers"):
            load_checkpoint(single)
    else:
        assert said in refused(single)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*MTP layers:UserWarning")
def test_a_thousand_directories_with_odd_values_in_their_configs(single: Path):
    good, rng = json.loads((single / "config.json").read_text()), random.Random(0)
    odd = [None, True, -1, 0, 1, 3, 2**31, 10**30, 0.5, 1e300, "", "x", [], [1], {}, {"type": "yarn"}, [[]], "float32"]
    for _ in range(1000):
        changed = {rng.choice(list(good)): rng.choice(odd) for _ in range(rng.randint(1, 3))}
        (single / "config.json").write_text(json.dumps(good | changed))
        try:
            load_checkpoint(single)
        except (ValueError, OSError) as error:
            assert str(error).isprintable(), changed


def test_headers_alone_list_the_tensors(sharded: Path):
    source = HfDirectory(sharded)
    assert source.tensors[NORM] == ((32,), "BF16")
    bias = source.tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias == ((8,), "F32") and torch.equal(source.read(NORM), torch.ones(32).bfloat16())
    assert source.read_quantized(NORM) is None
