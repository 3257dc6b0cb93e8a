from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf_files import converted, described
from test_gguf_file import a_model, as_read

from abyssal.checkpoint.gguf_parts import read_parts
from abyssal.checkpoint.source import open_checkpoint
from abyssal.checkpoint.tensor_names import official_views


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """V3's shape in files of 30 tensors, split by the gguf package."""
    model, arch = a_model("V3")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch, split_max_tensors=30)
    for key, value in described(model, arch).items():
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    for name, array in converted(model, arch).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.iterdir())


def test_parts_are_one_model(parts: list[Path]):
    assert [path.name for path in parts] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    model, _ = a_model("V3")
    for path in (parts[0], parts[0].parent):  # the first part, or a directory with no other model
        source = open_checkpoint(path)
        assert source.config == as_read(model.config)
        views = official_views(model)
        assert source.tensors.keys() == views.keys()
        assert all(torch.equal(source.read(name), view) for name, view in views.items())


def test_parts_that_do_not_belong_together_are_one_line(parts: list[Path], tmp_path: Path):
    first, second = parts

    def refused(path: Path) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            read_parts(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is no first part; name m-00001-of-00002.gguf" in refused(second)
    other = tmp_path / "other.gguf"
    shutil.copy(first, other)
    assert "is one of 2 parts, which its name does not say" in refused(other)
    kept = second.read_bytes()
    second.unlink()
    assert f"{second} is not there" in refused(first)
    shutil.copy(first, second)
    assert "is part (0, 2) by its content instead of (1, 2)" in refused(first)
    second.write_bytes(kept[:-100])
    assert "reaches beyond its end" in refused(first)
