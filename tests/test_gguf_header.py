from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import small_vocabulary, write_file

from abyssal.checkpoint.gguf_header import read_header
from abyssal.checkpoint.source import open_checkpoint


def a_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"n.{kind}", 100 if kind.startswith("u") else -100)
    writer.add_float32("n.float32", 1e-5)
    writer.add_float64("n.float64", 1e-5)
    writer.add_bool("n.bool", True)
    writer.add_string("text", "deep 所以")
    writer.add_array("texts", ["a", "", "é"])
    writer.add_array("numbers", [3, 1, 2])
    writer.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("blocks", gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_value_comes_back(tmp_path: Path):
    metadata, tensors = read_header(a_file(tmp_path / "a.gguf"))
    assert metadata.pop("numbers").tolist() == [3, 1, 2]
    assert metadata == {
        "general.architecture": "llama", "n.uint8": 100, "n.int8": -100, "n.uint16": 100, "n.int16": -100,
        "n.uint32": 100, "n.int32": -100, "n.uint64": 100, "n.int64": -100, "n.float32": 1e-5, "n.float64": 1e-5,
        "n.bool": True, "text": "deep 所以", "texts": ["a", "", "é"],
    }  # fmt: skip
    assert tensors["matrix"].shape == (3, 4) and tensors["matrix"].type.name == "F32"
    assert tensors["blocks"].shape == (2, 64) and tensors["blocks"].n_bytes == 4 * 34  # of 32 numbers and a scale each


def test_the_gguf_package_finds_the_same_tensors_at_the_same_bytes(tmp_path: Path):
    path = a_file(tmp_path / "a.gguf")
    ours = read_header(path).tensors
    theirs = gguf.GGUFReader(path).tensors
    assert {t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset, t.n_bytes) for t in theirs} == {
        name: tuple(tensor[1:]) for name, tensor in ours.items()
    }
    data = path.read_bytes()
    assert np.frombuffer(data, np.float32, 12, ours["matrix"].offset).tolist() == list(range(12))


def head(*, version: int = 3, n_tensors: int = 0, n_keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(shape: list[int], *, kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ROOM = bytes(4096)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "it ends after 0 bytes"),
        (b"PK\x03\x04" + ROOM, "it does not begin with GGUF"),
        (head()[:20], "it ends after 20 bytes"),
        (head(version=1), "version 1 instead of 2 or 3"),
        (head(version=3 << 24), "big-endian"),
        (head(n_tensors=1 << 60), "it promises 1152921504606846976 entries where"),
        (head(n_keys=10**9, rest=ROOM), "it promises 1000000000 entries"),
        (head(n_keys=1, rest=text(b"key", 10 * 2**30) + ROOM), "it ends after"),
        (head(n_keys=1, rest=text(b"key") + struct.pack("<I", 77) + ROOM), "77 is not a valid GGUFValueType"),
        (head(n_keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + ROOM), "an array of arrays"),
        (head(n_keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40) + ROOM), "it promises 1099511627776"),
        (head(n_keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 12, 1 << 61) + ROOM), "it promises"),
        (head(n_keys=1, rest=text(b"\xff\xfe") + ROOM), "can't decode byte"),
        (head(n_keys=2, rest=2 * (text(b"k") + struct.pack("<II", 4, 1)) + ROOM), "'k' stands there twice"),
        (head(n_tensors=1, rest=tensor([4, 4], kind=999) + ROOM), "999 is not a valid GGMLQuantizationType"),
        (head(n_tensors=1, rest=tensor([]) + ROOM), "has 0 dimensions"),
        (head(n_tensors=1, rest=text(b"t") + struct.pack("<I", 2**31) + ROOM), "has 2147483648 dimensions"),
        (head(n_tensors=1, rest=tensor([0, 4]) + ROOM), "of shape (4, 0) does not divide"),
        (head(n_tensors=1, rest=tensor([33, 4], kind=8) + ROOM), "does not divide into blocks of Q8_0"),
        (head(n_tensors=1, rest=tensor([2**33, 2**33]) + ROOM), "reaches beyond its end"),
        (head(n_tensors=1, rest=tensor([4], offset=2**63) + ROOM), "reaches beyond its end"),
        (head(n_tensors=2, rest=2 * tensor([4]) + ROOM), "'t' stands there twice"),
        (head(n_keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 48) + ROOM), "no power of two"),
    ],
)  # fmt: skip
def test_a_damaged_head_is_one_line(tmp_path: Path, data: bytes, said: str):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_header(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_is_said(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is not there: name a .gguf file"):
        read_header(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_header(tmp_path)


def mutated(data: bytes, rng: random.Random, *, n_head: int) -> bytes:
    """Somewhere in the head: some bytes changed, a number made huge, a piece cut out or put in twice, or cut off."""
    out = bytearray(data)
    at = rng.randrange(4, n_head)
    how = rng.randrange(5)
    if how == 0:
        for _ in range(rng.randrange(1, 4)):
            out[rng.randrange(4, n_head)] = rng.randrange(256)
    elif how == 1:
        out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
    elif how == 2:
        del out[at : at + rng.randrange(1, 40)]
    elif how == 3:
        out[at:at] = out[at : at + rng.randrange(1, 40)]
    else:
        del out[at:]
    return bytes(out)


def survive(tmp_path: Path, *, n_files: int, seed: int) -> None:
    """Every mutation is read, or refused in one line; nothing else may come out, and nothing may hang or grow."""
    metadata = small_vocabulary() | {
        "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32, "llama.feed_forward_length":
        32, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    ones = np.ones((32, 32), np.float32)
    tensors = {"token_embd.weight": np.ones((262, 32), np.float32), "output_norm.weight": ones[0], "rope_freqs.weight":
               np.ones(8, np.float32), "blk.0.attn_norm.weight": ones[0], "blk.0.ffn_norm.weight": ones[0]}  # fmt: skip
    tensors |= {f"blk.0.{name}.weight": ones for name in ("attn_q", "attn_output", "ffn_up", "ffn_gate", "ffn_down")}
    tensors |= {f"blk.0.{name}.weight": ones[:16] for name in ("attn_k", "attn_v")}
    whole = write_file(tmp_path / "whole.gguf", "llama", metadata, tensors, kind=gguf.GGMLQuantizationType.Q8_0)
    n_head = min(tensor.offset for tensor in read_header(whole).tensors.values())
    data, path, rng = whole.read_bytes(), tmp_path / "a.gguf", random.Random(seed)
    n_read = 0
    for _ in range(n_files):
        path.write_bytes(mutated(data, rng, n_head=n_head))
        try:
            source = open_checkpoint(path)
            for name in source.tensors:
                source.read(name)
            source.tokenizer()
            n_read += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(path) in str(error)
    assert 0 < n_read < n_files / 2


def test_mutated_files_are_read_or_refused(tmp_path: Path):
    survive(tmp_path, n_files=1000, seed=0)


@pytest.mark.slow
def test_many_more_mutated_files(tmp_path: Path):
    survive(tmp_path, n_files=10_000, seed=1)
