"""Headers of safetensors files: what good ones say, and a thousand bad ones that end in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from abyssal.checkpoint.safetensors_header import TORCH_TYPES, read_header, read_tensor


def good_file(path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(4, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.zeros(0, 7),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_every_type_reads_as_the_library_reads_it(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {name: bits.clone().view(kind).reshape(2, -1) for name, kind in TORCH_TYPES.items() if name != "BOOL"}
    save_file(tensors | {"BOOL": torch.tensor([[True], [False]])} | good_file(file), file)
    found, wanted = read_header(file), load_file(file)
    assert found.keys() == wanted.keys()
    for name, place in found.items():
        ours = read_tensor(place)
        assert ours.dtype == wanted[name].dtype and ours.shape == wanted[name].shape == place.shape
        assert torch.equal(ours.flatten().view(torch.uint8), wanted[name].flatten().view(torch.uint8)), name
    assert all(found[name].stored == name for name in TORCH_TYPES)
    begins = [place.begin for place in found.values()]
    assert begins == sorted(begins)  # read in this order, a disk goes forward only


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD: dict[str, tuple[Any, str]] = {
    "unknown type": ({"a": entry(dtype="F33")}, "dtype 'F33'; known are BOOL"),
    "type that is no text": ({"a": entry(dtype=["F32"])}, "dtype ['F32']"),
    "negative size": ({"a": entry(shape=[-2])}, "shape [-2]"),
    "size that is no count": ({"a": entry(shape=[True, 2])}, "shape [True, 2]"),
    "size with a point": ({"a": entry(shape=[2.0])}, "shape [2.0]"),
    "size beyond 64 bits": ({"a": entry(shape=[0, 2**62, 4], offsets=[0, 0])}, "shape [0, 461"),
    "too many axes": ({"a": entry(shape=[1] * 17)}, "shape [1, 1"),
    "size that wraps around to 8 bytes": ({"a": entry(shape=[2**62 + 2])}, "does not have 8 bytes"),
    "fewer bytes than the shape": ({"a": entry(offsets=[0, 4]), "b": entry(shape=[1], offsets=[4, 8])}, "[2] does not"),
    "backwards": ({"a": entry(offsets=[8, 0])}, "data_offsets [8, 0]"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "data_offsets [0, 4, 8]"),
    "a hole": ({"a": entry(shape=[1], offsets=[4, 8])}, "'a' begins at 4 where 0 is next"),
    "an overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "'b' begins at 4 where 8 is next"),
    "beyond the end": ({"a": entry(shape=[4], offsets=[0, 16])}, "16 bytes of tensors announced, 8 are there"),
    "not all of the file": ({"a": entry(shape=[1], offsets=[0, 4])}, "4 bytes of tensors announced, 8 are there"),
    "a field too few": ({"a": {"dtype": "F32", "shape": [2]}}, "instead of dtype, shape and data_offsets"),
    "a field too many": ({"a": entry() | {"device": "cpu"}}, "instead of dtype, shape and data_offsets"),
    "no entry": ({"a": 5}, "'a' is 5 instead of"),
    "no map": ([1, 2], "holds no JSON object"),
    "metadata of numbers": ({"a": entry(), "__metadata__": {"format": 1}}, "__metadata__"),
    "name over two lines": ({"a\nb": entry()}, "'a\\nb' is no name"),
    "name without end": ({"a" * 501: entry()}, "is no name of a tensor"),
    "twice the same": (b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"}}', "'a' stands there twice"),
    "not a number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN is no number"),
    "number of ten thousand digits": (b'{"a":' + b"1" * 10_000 + b"}", "is not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"}", "nested too deeply"),
    "cut": (b'{"a":', "is not JSON"),
    "no UTF-8": (b'{"\xff": 1}', "is not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_header_is_one_line_with_file_value_and_remedy(case: str, tmp_path: Path):
    header, said = BAD[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(joined(header, bytes(8)))
    with pytest.raises(OSError) as error:
        read_header(file)
    text = str(error.value)
    assert said in text and str(file) in text and "copy that file again" in text, text
    assert text.isprintable() and len(text) < 600


def test_a_header_longer_than_its_file_is_never_believed(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    for length in (10_000_000_000, 2**64 - 1, 1017):
        file.write_bytes(length.to_bytes(8, "little") + bytes(1016))
        with pytest.raises(OSError, match=f"a header of {length:,} bytes in a file of 1,024"):
            read_header(file)
    with file.open("wb") as handle:  # a file of holes that could hold it
        handle.write((150_000_000).to_bytes(8, "little"))
        handle.truncate(200_000_000)
    with pytest.raises(OSError, match="100,000,000 is the most"):
        read_header(file)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error_and_no_crash(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    good_file(file)
    place = list(read_header(file).values())[-1]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(OSError, match="ends 3 bytes too early"):
        read_tensor(place)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A good file, damaged in one of the ways that files are."""
    length = int.from_bytes(content[:8], "little")
    kind = rng.randrange(7)
    if kind == 0:  # bytes flipped, in the header or its length
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:  # truncated
        return content[: rng.randrange(len(content))]
    if kind == 2:  # a piece of it put elsewhere
        a, b = sorted((rng.randrange(len(content)), rng.randrange(len(content))))
        at = rng.randrange(len(content))
        return content[:at] + content[a:b] + content[at:]
    if kind == 3:  # another length
        claimed = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)])
        return claimed.to_bytes(8, "little") + content[8:]
    header, data = parts(content)
    name = rng.choice([key for key in header if key != "__metadata__"])
    if kind == 4:  # a field with something else in it
        field = rng.choice(["dtype", "shape", "data_offsets"])
        odd = [None, -1, 2**63, 2**64, 1e300, "F32", "I64", [], [0], [-1, 5], [2**40, 2**40], {}, True, "\x1b[2J",
               [[[]]], [0, 0], [8, 4], ["0", "8"], list(header[name].get("shape", [])), [4] * 40]
        header[name][field] = rng.choice(odd)
    elif kind == 5:  # numbers a little off
        values = header[name][rng.choice(["shape", "data_offsets"])]
        if values:
            values[rng.randrange(len(values))] += rng.choice([-4, -1, 1, 2, 4, 2**32, 2**63])
    else:  # fields or tensors gone, renamed or swapped
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
        if rng.random() < 0.5:
            header.pop(rng.choice(list(header)))
        else:
            header[rng.choice(["", "../../etc", "a" * 3000, "\ud800", name])] = header[name]
    return joined(header, data)


def survives(content: bytes, file: Path) -> bool:
    """Whether it was accepted. Nothing but a one-line OSError may refuse it, and what is accepted must be so."""
    file.write_bytes(content)
    try:
        found = read_header(file)
    except OSError as error:
        text = str(error)
        assert text.isprintable() and str(file) in text and len(text) < 1000, text
        return False
    for name, place in found.items():
        tensor = read_tensor(place)
        assert tensor.shape == place.shape and tensor.dtype == TORCH_TYPES[place.stored], name
    return True


def test_a_thousand_malformed_headers(tmp_path: Path):
    good_file(tmp_path / "good")
    content, rng = (tmp_path / "good").read_bytes(), random.Random(0)
    accepted = [survives(mutated(content, rng), tmp_path / "bad") for _ in range(1000)]
    # a swap of two names or a flipped letter of one leaves a good file: some pass, most do not
    assert 0 < sum(accepted) < 250


@pytest.mark.slow
def test_ten_thousand_malformed_headers_and_the_library_agrees(tmp_path: Path):
    """What we accept, the format's own library accepts with the same tensors."""
    good_file(tmp_path / "good")
    content, rng, file = (tmp_path / "good").read_bytes(), random.Random(1), tmp_path / "bad"
    n_accepted = 0
    for _ in range(10_000):
        if not survives(mutated(content, rng), file):
            continue
        n_accepted += 1
        try:
            with safe_open(file, framework="pt") as theirs:
                shapes = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise AssertionError(f"ours takes what the library refuses: {error}") from error
        assert shapes == {name: place.shape for name, place in read_header(file).items()}
    assert n_accepted > 100
