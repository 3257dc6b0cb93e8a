from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_files import converted, described, write_file
from small_models import small_model
from test_gguf_file import a_model

from abyssal.checkpoint.gguf_write import write_gguf
from abyssal.checkpoint.own_sampling import own_sampling, said_sampling
from abyssal.checkpoint.packaged import PACKAGED
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint


def a_directory(path: Path, **generation: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_a_directory_says_it_in_generation_config(tmp_path: Path):
    path = a_directory(tmp_path, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=[1, 2])
    assert own_sampling(path) == (0.7, 0.8)
    a_directory(tmp_path, temperature=None, bos_token_id=0)
    assert said_sampling(path) == {} and own_sampling(path) == (0.6, 0.95)  # R1's
    (tmp_path / "generation_config.json").unlink()
    assert own_sampling(path) == (0.6, 0.95)


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5},
                                   {"temperature": True}, {"top_p": [1]}])  # fmt: skip
def test_what_is_no_number_is_one_line(tmp_path: Path, wrong: dict[str, object]):
    with pytest.raises(ValueError, match=r"generation_config.json: \w+=.* is no number up to 10?; correct it"):
        own_sampling(a_directory(tmp_path, **wrong))


def test_a_gguf_file_says_it_too_and_one_that_we_write_says_what_the_checkpoint_said(tmp_path: Path):
    model, arch = a_model("llama")
    metadata = described(model, arch) | {"general.sampling.temp": 0.3, "general.sampling.top_p": 0.5}
    file = write_file(tmp_path / "m.gguf", arch, metadata, converted(model, arch))
    assert own_sampling(file) == own_sampling(tmp_path) == (0.3, 0.5)
    save_checkpoint(tmp_path / "hf", small_model("mla_moe"), None, generation={"temperature": 0.25, "do_sample": True})
    written = write_gguf(open_checkpoint(tmp_path / "hf"), tmp_path / "out.gguf", quant="BF16").file
    assert said_sampling(written) == {"temperature": 0.25}


def test_a_packaged_model_is_asked_as_it_answers_best(tmp_path: Path):
    """SmolLM2 in four bits: the likeliest token each time. The file itself says nothing."""
    model, arch = a_model("llama")
    file = tmp_path / Path(PACKAGED["smollm2"].weights).name
    assert own_sampling(write_file(file, arch, described(model, arch), converted(model, arch))) == (0.0, 0.95)
