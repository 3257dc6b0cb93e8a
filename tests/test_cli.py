"""The command line: what a user can get wrong ends in one line on stderr and a status that is not 0."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import small_model

from abyssal import cli, load
from abyssal.checkpoint.save import save_checkpoint
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.stages.run import STAGES
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
MICRO = Path(__file__).with_name("micro.toml")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several shards."""
    tokenizer = Tokenizer(train_bpe(["one plus two is three"] * 20, vocab_size=300))
    model = small_model("mla_moe_query_latent", vocab_size=tokenizer.vocab_size)
    path = tmp_path_factory.mktemp("made") / "base"
    save_checkpoint(path, model, tokenizer, max_shard_bytes=40_000)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus and problems, where the user stands."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("one plus two is three\n" * 50)
    for name in ("own_train", "own_held_out"):
        line = f'{{"prompt": "{name}?", "answer": "1", "verifier": "exact"}}\n'
        (tmp_path / f"{name}.jsonl").write_text(line)
    (tmp_path / "own_sft.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1"}]}\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run `abyssal ARGUMENTS` in this process; what stands on stderr must be one line, the error."""
    monkeypatch.setattr(sys, "argv", ["abyssal", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capfd.readouterr().err
    assert end.value.code == 1
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n"), said
    return said


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *arguments: error_of(capfd, monkeypatch, *arguments)


def changed(home: Path, old: str, new: str) -> Path:
    """The micro recipe with one change."""
    text = MICRO.read_text(encoding="utf-8")
    assert old in text
    path = home / "changed.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_an_unknown_key_is_named_with_its_neighbours(home, fails):
    said = fails("run", changed(home, "steps = 60", "step = 60"))
    assert "changed.toml" in said and "unknown key pretrain.step" in said and "steps" in said
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (("--pretrain.step", "3"), "--pretrain.step"),
        (("--pretrain.steps", "many"), "--pretrain.steps"),
        (("--pretrain.dtype", "float16"), "--pretrain.dtype"),
        (("--zero.temperature", "-1"), "temperature=-1"),
    ],
)
def test_an_override_that_is_wrong_is_named(home, fails, override, named):
    assert named in fails("run", MICRO, *override)


def test_an_unknown_command_names_those_there_are(fails):
    said = fails("pretrian", "runs/laptop.toml")
    assert "unknown command 'pretrian'" in said and all(stage in said for stage in STAGES)


def test_a_recipe_that_is_not_there(fails):
    assert "nothing.toml does not exist" in fails("run", "nothing.toml")
    assert "name a recipe" in fails("run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must not be there")
def test_a_device_that_is_not_there_writes_nothing(home, fails):
    said = fails("run", MICRO, "--run.device", "cuda")
    assert "device='cuda' is not there" in said and "use 'cpu' or 'auto'" in said
    assert not (home / "out").exists()
    assert "device='tpu'" in fails("run", MICRO, "--run.device", "tpu")


def test_an_empty_corpus_leaves_nothing_half_written_and_can_be_put_right(home, fails):
    (home / "corpus" / "a.txt").unlink()
    said = fails("run", MICRO)
    assert "corpus" in said
    left = {path.name for path in (home / "out" / "micro").rglob("*") if path.is_file()}
    assert left <= {".lock", "recipe.toml", "metrics.jsonl", "samples.jsonl", "log.txt"}
    # another corpus is no change of a run in which nothing has been made yet
    said = fails("run", MICRO, "--data.corpus", "elsewhere")
    assert "elsewhere" in said and "was begun with" not in said


def test_own_files_are_checked_before_the_first_stage(home, fails):
    said = fails("run", changed(home, "own_train.jsonl", "gone.jsonl"))
    assert "gone.jsonl" in said
    (home / "own_sft.jsonl").write_text('{"messages": []}\n')
    assert "own_sft.jsonl" in fails("run", MICRO)
    shutil.copy(home / "own_train.jsonl", home / "own_held_out.jsonl")
    said = fails("run", MICRO)
    assert "1 problems of own_held_out.jsonl stand in own_train.jsonl too" in said
    (home / "own_train.jsonl").write_text('{"prompt": "?", "answer": "1", "verifier": "no_such_module:score"}\n')
    assert "no_such_module" in fails("run", MICRO)
    assert not (home / "out" / "micro" / "tokenize").exists()


def test_a_stage_before_its_turn(home, fails):
    assert "tokenizer.json is missing" in fails("pretrain", MICRO)
    assert "no checkpoint to evaluate yet" in fails("eval", MICRO)
    assert not list((home / "out").rglob("done.json"))


def broken(checkpoint: Path, home: Path) -> Path:
    path = home / "broken"
    shutil.copytree(checkpoint, path)
    return path


def test_a_truncated_shard(checkpoint, home, fails):
    path = broken(checkpoint, home)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    said = fails("chat", path, "--prompt", "hello")
    assert shard.name in said and "truncated or damaged" in said and "copy that file again" in said


def test_a_missing_shard(checkpoint, home, fails):
    path = broken(checkpoint, home)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    said = fails("chat", path, "--prompt", "hello")
    assert shard.name in said and "is missing" in said and "copy it again" in said


def test_a_prompt_longer_than_the_context(checkpoint, fails):
    said = fails("chat", checkpoint, "--prompt", "one plus two " * 100)
    assert "leaves no room for an answer in a context of 64; shorten it" in said


def test_a_folder_that_is_no_checkpoint(home, fails):
    said = fails("chat", home / "out" / "micro" / "r1")
    assert "is no checkpoint" in said and "student" in said
    assert "Missing" in fails("chat")


def test_a_raw_prompt_is_continued_as_it_stands(checkpoint, capfd, fails):
    raw = ["--prompt", "<｜User｜>one<｜Assistant｜>", "--max-tokens", "5", "--raw"]
    assert cli.dispatch(["chat", str(checkpoint), *raw]) == 0
    assert capfd.readouterr().out.strip()
    assert "give the text with --prompt" in fails("chat", checkpoint, "--raw")


def test_sampling_settings_that_make_no_sense(checkpoint, fails):
    said = fails("chat", checkpoint, "--prompt", "x", "--temperature", "-1")
    assert "temperature=-1.0 is no number from 0 up" in said
    said = fails("chat", checkpoint, "--prompt", "x", "--presence-penalty", "3")
    assert "presence_penalty=3.0 is outside [-2, 2]" in said
    assert "a stop string of 0 bytes" in fails("chat", checkpoint, "--prompt", "x", "--stop", "")
    assert "max_tokens=0" in fails("chat", checkpoint, "--prompt", "x", "--max-tokens", "0")


def test_an_answer_by_a_schema_is_that_and_nothing_else(checkpoint, home, capfd, fails):
    schema = home / "schema.json"
    schema.write_text('{"enum": ["red", "所以", 7]}', encoding="utf-8")
    ask = ["chat", str(checkpoint), "--prompt", "one plus", "--thinking", "off", "--max-tokens", "20"]
    assert cli.dispatch([*ask, "--schema", str(schema)]) == 0
    assert json.loads(capfd.readouterr().out) in ("red", "所以", 7)
    assert cli.dispatch([*ask, "--regex", "[ab]{3}"]) == 0
    assert re.fullmatch("[ab]{3}", capfd.readouterr().out.strip())
    assert cli.dispatch([*ask[:-1], "1", "--json"]) == 0
    assert "cut at 1 tokens: a whole answer begins so" in capfd.readouterr().out
    assert "give one of them" in fails(*ask, "--json", "--regex", "a")
    assert "this regex: unclosed character class; change it" in fails(*ask, "--regex", "[a")
    schema.write_text('{"not": {}}')
    assert "has 'not', which cannot be enforced; leave it out" in fails(*ask, "--schema", schema)


@pytest.mark.parametrize("how", [[], ["--weights", "int4"]])
def test_a_prompt_is_answered_and_that_is_all(how, checkpoint, capsys):
    assert cli.dispatch(["chat", str(checkpoint), "--prompt", "one plus", "--max-tokens", "5", *how]) == 0
    said = capsys.readouterr()
    assert said.out.strip() and said.err == ""


@pytest.mark.filterwarnings("default:the disk cache")
def test_what_was_computed_for_a_prompt_is_kept_where_that_is_wanted(fails, tmp_path, monkeypatch, capfd):
    tokenizer = Tokenizer(train_bpe(["one plus two is three"] * 20, vocab_size=300))
    checkpoint = tmp_path / "long" / "base"
    save_checkpoint(checkpoint, small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=256), tokenizer)
    lms, real = [], load
    monkeypatch.setattr("abyssal.talk.load", lambda *path, **how: lms.append(real(*path, **how)) or lms[-1])
    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path / "own"))
    asked = ["chat", str(checkpoint), "--prompt", "0123456789" * 10, "--max-tokens", "5"]
    said = []
    for folder in (None, tmp_path, tmp_path, "auto", "auto"):
        assert cli.dispatch([*asked, *([] if folder is None else ["--cache", str(folder)])]) == 0
        said.append(capfd.readouterr().out)
        lms[-1].engine.close()
    assert [lm.engine.prefix_stats.n_found_on_disk for lm in lms] == [0, 0, 64, 0, 64] and len(set(said)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "own", "prefix_cache"]
    (tmp_path / "taken").write_text("a file")
    assert cli.dispatch([*asked, "--cache", str(tmp_path / "taken")]) == 0
    told = capfd.readouterr()
    assert told.out in said and re.fullmatch("warning: the disk cache in .*; going on without it\n", told.err)
    assert "max_bytes=0 leaves no room" in fails(*asked, "--cache", tmp_path, "--cache-bytes", "0")


def test_a_checkpoint_goes_by_its_path_or_by_run_and_name(checkpoint, home):
    assert resolve_checkpoint(checkpoint) == checkpoint
    stage = home / "out" / "laptop" / "align"
    stage.mkdir(parents=True)
    shutil.copytree(checkpoint, stage / "checkpoint")
    for name in ("r1", "align", "align/checkpoint"):
        assert resolve_checkpoint(home / "out" / "laptop" / name) == stage / "checkpoint"
    os.rename(stage / "checkpoint", stage / "checkpoint.old")  # a swap that was cut in two
    assert (resolve_checkpoint(home / "out" / "laptop" / "r1")).name == "checkpoint"


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", interrupted)
    monkeypatch.setattr(sys, "argv", ["abyssal", "run", "runs/my laptop.toml"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped; go on with: abyssal run 'runs/my laptop.toml'"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_stage(arguments, capsys):
    assert cli.dispatch(arguments) == 0
    said = capsys.readouterr().out
    assert all(stage in said for stage in STAGES)


def test_help_of_a_command_is_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        cli.dispatch(["chat", "--help"])
    assert end.value.code == 0 and "--temperature" in capsys.readouterr().out


def test_a_process_of_its_own_ends_with_one_line_and_status_1(home):
    """Nothing else, no traceback and no warning, reaches the screen."""
    path = changed(home, "[eval]\nproblems = 6", "[eval]\nproblem = 6")
    found = subprocess.run(
        [sys.executable, "-P", "-m", "abyssal.cli", "run", str(path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 1 and found.stdout == ""
    assert re.fullmatch(r"error: \S*changed\.toml: unknown key eval\.problem; .*problems.*\n", found.stderr)


TWO = '{"prompt": "a?", "answer": "1"}\n{"prompt": "b?", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("own_train.jsonl", TWO.replace("}\n{", '\n{', 1), "own_train.jsonl:1: not JSON"),
        ("own_train.jsonl", TWO + '{"prompt": "c?", \n' + TWO, "own_train.jsonl:3: not JSON"),
        ("own_held_out.jsonl", TWO + '\n{"prompt": "a?", "answer": "2"}\n', "'a?' stands already at own_held"),
        ("own_sft.jsonl", '{"messages": [{"role": "teacher", "content": "1"}]}\n',
         "own_sft.jsonl:1: message 1: role 'teacher'; use one of system, user, assistant"),
    ],
)  # fmt: skip
def test_a_line_of_ones_own_data_that_is_wrong_is_named_before_anything_runs(home, fails, file, text, named):
    (home / file).write_text(text)
    assert named in fails("run", MICRO)
    assert not (home / "out" / "micro" / "tokenize").exists()


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("import no_such_package", "No module named 'no_such_package'"),
        ("def other(problem, message): return 1", "module own_reward has no function judge"),
        ("import os; os._exit(2)", "its process died (exit status 2)"),
    ],
)
def test_a_reward_that_cannot_be_used_is_named_before_anything_runs(home, fails, module, why):
    (home / "own_reward.py").write_text(module + "\n")
    (home / "own_train.jsonl").write_text('{"prompt": "a?", "answer": "1", "verifier": "own_reward:judge"}\n')
    said = fails("run", MICRO)
    assert "verifier 'own_reward:judge': " in said and why in said
    assert not (home / "out" / "micro" / "tokenize").exists()
