"""Context extension: YaRN as transformers reads it, the stage on and off, killed and taken up, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from rich.console import Console
from small_models import small_model

from abyssal.checkpoint.load import load_checkpoint
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.data.loader import TokenShards
from abyssal.evals.charts import heat_map
from abyssal.evals.needle import NeedleEval, needle_accuracy, needle_grid
from abyssal.evals.page import write_report
from abyssal.evals.page_needles import needles_section
from abyssal.model.config import RopeScaling
from abyssal.model.rope import rope_frequencies
from abyssal.stages import extend as stage
from abyssal.stages.extend import ExtendConfig, stretched
from abyssal.stages.recipe import Recipe, RlDataConfig, read_recipe
from abyssal.stages.run import SEED_NUMBER, STAGES, Run
from abyssal.stages.way import check_same, open_run, walk
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.typed_toml import from_dict

MICRO = Path(__file__).with_name("micro.toml")


def micro(home: Path, **sections: Any) -> Recipe:
    """The micro recipe without its user's files, two steps of pretraining, in `home`."""
    recipe = read_recipe(MICRO)
    (home / "corpus").mkdir(exist_ok=True)
    for i in range(40):
        (home / "corpus" / f"{i}.txt").write_text(f"the sea is deep and the light {i * i} is far away {i}\n" * 9)
    recipe = replace(
        recipe,
        run=replace(recipe.run, out=str(home / "out")),
        data=replace(recipe.data, corpus=str(home / "corpus"), tokens=4_000),
        pretrain=replace(recipe.pretrain, steps=2, save_every=0),
        rl_data=RlDataConfig(),
        cold_start=replace(recipe.cold_start, data=""),
    )
    return replace(recipe, **sections)


def walked(recipe: Recipe, *stages: str) -> Run:
    run = open_run(recipe, Console(quiet=True))
    walk(run, stages)
    return run


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return walked(micro(tmp_path_factory.mktemp("home")), "tokenize", "pretrain", "extend")


def test_the_stage_leaves_a_base_of_four_times_the_context(extended: Run):
    base = load_checkpoint(extended.stage_dir("pretrain") / "checkpoint")
    longer = load_checkpoint(extended.checkpoint("base"))
    assert extended.checkpoint("base") == extended.stage_dir("extend") / "checkpoint"
    assert base.config.rope_scaling is None
    want = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=1.0)
    assert longer.config == replace(base.config, rope_scaling=want, max_position_embeddings=512)
    assert json.loads((extended.checkpoint("base") / "config.json").read_text())["model_type"] == "deepseek_v3"
    rows = {
        directory.name: TokenShards(directory / "train").n_tokens
        for directory in (extended.stage_dir("extend") / "phase1", extended.stage_dir("extend"))
    }
    assert rows == {"phase1": 2 * 2 * 256, "extend": 2 * 1 * 512}  # steps x rows x length: as many tokens in each


def test_transformers_reads_the_same_yarn(extended: Run):
    from transformers import AutoModelForCausalLM

    path = extended.checkpoint("base")
    ours = load_checkpoint(path).model
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(theirs.model.rotary_emb.inv_freq, ours.rope_frequencies)
    assert theirs.model.rotary_emb.attention_scaling == 1.0
    assert theirs.model.layers[0].self_attn.scaling == pytest.approx(ours.config.softmax_scale)
    assert theirs.config.max_position_embeddings == 512
    ids_BT = torch.randint(300, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(oracle.our_logits(ours, ids_BT), theirs(ids_BT).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mla_moe", "gqa_dense"])
def test_a_stretched_model_of_either_kind_runs_in_transformers(kind: str, tmp_path: Path):
    model = small_model(kind, vocab_size=oracle.VOCAB, qkv_bias=False)
    longer = stretched(model, ExtendConfig(steps=1).scaling(model.config, 32))
    assert longer.config.max_position_embeddings == 128 and all(p.requires_grad for p in longer.parameters())
    assert not torch.equal(longer.rope_frequencies, model.rope_frequencies)
    assert torch.equal(longer.rope_frequencies, rope_frequencies(longer.config))
    assert all(torch.equal(a, b) for a, b in zip(longer.parameters(), model.parameters(), strict=True))
    oracle.assert_ours_runs_in_theirs(longer, tmp_path)


def test_a_base_that_is_stretched_already_is_refused():
    longer = stretched(small_model(), ExtendConfig(steps=1).scaling(small_model().config, 16))
    with pytest.raises(ValueError, match="stretched already .rope_scaling yarn by 4.; extend a base without"):
        stretched(longer, ExtendConfig(steps=1).scaling(longer.config, 16))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"times": (4, 2)}, r"times=\(4, 2\)"),
        ({"times": (1, 4)}, r"times=\(1, 4\)"),
        ({"rows": 3}, "extend.rows=3 of 2 lengths are no whole rows of 4"),
        ({"factor": 3.0}, "extend.factor=3.0 stretches positions less"),
        ({"grid": {"documents": 0}}, "documents=0"),
    ],
)
def test_settings_that_make_no_sense_are_named(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        if "grid" in wrong:
            NeedleEval(**wrong["grid"])
        ExtendConfig(**wrong)


def test_phases_have_as_many_tokens_a_step_and_the_last_small_rate():
    base = read_recipe(MICRO).pretrain
    config = ExtendConfig(steps=1000, times=(8, 32), rows=1920, factor=40.0)  # V3's own
    first, second = (config.phase(k, replace(base, micro_rows=0), 4096) for k in (0, 1))
    assert (first.row_len, first.rows, second.row_len, second.rows) == (32768, 1920, 131072, 480)
    assert first.learning_rate_at(500, 0) * first.lr == pytest.approx(base.lr * 7.3 / 220)
    scaling = config.scaling(read_recipe(MICRO).model, 4096)
    assert (scaling.factor, scaling.original_max_position_embeddings, scaling.mscale) == (40.0, 4096, 1.0)


def test_needles_are_looked_for_before_and_after(extended: Run):
    found = json.loads((extended.stage_dir("extend") / "needle.json").read_text())
    assert found["lengths"] == [128, 256, 384, 512] and found["depths"] == [0.0, 1.0]
    assert list(found["accuracy"]) == [stage.BEFORE, stage.UNTRAINED, stage.AFTER]
    assert all(len(rows) == 4 and {len(row) for row in rows} == {2} for rows in found["accuracy"].values())
    assert found["trained"] == {stage.BEFORE: 128, stage.UNTRAINED: 128, stage.AFTER: 512}
    page = write_report(extended.directory).read_text(encoding="utf-8")
    assert 'id="needles"' in page and "Extended, % found" in page and page.count("tokens; depth downwards") == 3


def test_a_grid_that_cannot_be_asked_is_refused_before_any_training(extended: Run):
    grid = NeedleEval(lengths=16)  # 32 tokens hold no line and no question
    recipe = replace(extended.recipe, extend=replace(extended.recipe.extend, grid=grid))
    run = replace(extended, recipe=recipe, directory=extended.directory.with_name("short"))
    for name in ("tokenize", "pretrain"):
        shutil.copytree(extended.stage_dir(name), run.stage_dir(name))
    with pytest.raises(ValueError, match="a needle document of 32 tokens has no room for 1 lines and 1 questions"):
        walk(run, ("extend",))
    assert not (run.stage_dir("extend") / "phase1").exists()


def test_a_model_that_knows_the_answers_finds_all_and_another_none():
    tokenizer = Tokenizer(train_bpe(["The code of amber is 12.\n"] * 9, vocab_size=300))
    grid = needle_grid(
        NeedleEval(depths=3, documents=2), lengths=[80, 90], hay_of=lambda n: tokenizer.encode("x") * n,
        tokenizer=tokenizer, seed=0,
    )  # fmt: skip

    class Knowing(torch.nn.Module):
        """Says the next id of whatever it is shown, or always the same."""

        def __init__(self, knows: bool) -> None:
            super().__init__()
            self.knows, self.embed_tokens = knows, torch.nn.Embedding(300, 1)

        def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
            ids_BT = ids_BT.roll(-1, 1) if self.knows else torch.full_like(ids_BT, 7)
            return torch.nn.functional.one_hot(ids_BT, 300)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.float()

    assert needle_accuracy(Knowing(True), grid) == [[1.0] * 3] * 2
    assert needle_accuracy(Knowing(False), grid) == [[0.0] * 3] * 2


def test_the_heat_map_says_each_number_and_marks_the_trained_length():
    named = {"title": "t", "x_label": "x", "y_label": "y"}
    drawn = heat_map([[1.0, 0.25]], columns=["8", "16"], rows=["0 %"], mark_after=1, **named)
    assert ">100<" in drawn and ">25<" in drawn and drawn.count("<rect") == 2 and 'class="reference"' in drawn
    assert "fill-opacity:0.78" in drawn and "fill-opacity:0.24" in drawn
    assert heat_map([], columns=[], rows=[], **named) == ""
    assert needles_section({}) == "" and needles_section({"accuracy": "?", "lengths": 3}) == ""


def test_interrupted_in_the_second_phase_it_ends_in_the_same_bits(extended: Run, tmp_path: Path, monkeypatch):
    recipe = replace(extended.recipe, run=replace(extended.recipe.run, name="again"))
    again = replace(extended, recipe=recipe, directory=recipe.directory)
    for name in ("tokenize", "pretrain"):
        shutil.copytree(extended.stage_dir(name), again.stage_dir(name))

    def stopped(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        if named["config"].row_len == 512:
            raise KeyboardInterrupt

    real = stage.pretrain
    monkeypatch.setattr(stage, "pretrain", stopped)
    with pytest.raises(KeyboardInterrupt):
        walk(again, ("extend",))
    assert not (again.stage_dir("extend") / "needle.json").exists()
    first = again.stage_dir("extend") / "phase1" / "checkpoint" / "model.safetensors"
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(stage, "pretrain", real)
    walk(again, ("extend",))
    assert first.stat().st_mtime_ns == before  # the first phase was not walked again
    for name in ("checkpoint/model.safetensors", "needle.json"):
        assert (again.stage_dir("extend") / name).read_bytes() == (extended.stage_dir("extend") / name).read_bytes()


def test_off_it_is_passed_over_and_the_base_is_pretrainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = micro(tmp_path, extend=ExtendConfig())
    run = open_run(recipe, Console(width=200))
    walk(run, ("extend",))
    assert "off in this recipe" in capsys.readouterr().out
    assert not run.stage_dir("extend").exists()
    assert run.checkpoint("base") == run.stage_dir("pretrain") / "checkpoint"


def test_base_by_its_name_is_the_longer_one_once_it_is_done(extended: Run):
    assert resolve_checkpoint(extended.directory / "base") == extended.stage_dir("extend") / "checkpoint"
    assert resolve_checkpoint(extended.directory / "pretrain") == extended.stage_dir("pretrain") / "checkpoint"


def test_extending_under_a_stage_that_began_from_the_base_is_refused(tmp_path: Path):
    off, on = micro(tmp_path, extend=ExtendConfig()), micro(tmp_path)
    run = open_run(off, Console(quiet=True))
    check_same(asdict(off), asdict(on), run)  # nothing began yet
    (run.stage_dir("zero") / "checkpoint").mkdir(parents=True)
    other = asdict(replace(off, extend=ExtendConfig(rows=16)))
    check_same(asdict(off), other, run)  # off before and after, whatever else it says
    with pytest.raises(ValueError, match=r"was begun with another \[extend\]"):
        check_same(asdict(off), asdict(on), run)


def test_a_run_directory_from_before_the_stage_opens(tmp_path: Path):
    recipe = micro(tmp_path, extend=ExtendConfig())
    old = asdict(recipe)
    del old["extend"], old["run"]["base"], old["data"]["needles"]
    for section in ("pretrain", "student_pretrain"):
        for key in ("rows_start", "ramp_tokens", "shape", "fall_until", "last_from", "last"):
            del old[section][key]
    assert from_dict(Recipe, old, "") == recipe


def test_a_stage_that_joined_later_moves_no_others_noise():
    assert set(SEED_NUMBER) == set(STAGES)
    assert sorted(SEED_NUMBER.values()) == list(range(1, len(STAGES) + 1))
    assert [SEED_NUMBER[name] for name in ("tokenize", "pretrain", "zero", "report")] == [1, 2, 3, 10]
