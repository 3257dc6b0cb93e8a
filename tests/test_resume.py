"""Resuming: the step after a restart has the bits of the step that was not interrupted; nobody else opens trainer/."""

from __future__ import annotations

import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.resume import TrainerState, drop_trainer, has_trainer, load_trainer
from abyssal.checkpoint.save import save_checkpoint
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.stages.state import TrainState, resume_state, save_state
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

STATE = {"step": 2, "tokens": 8, "extra": {}}
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    moe_intermediate_size=16, first_k_dense_replace=1, max_position_embeddings=64,
)


class SignMomentum(torch.optim.Optimizer):
    """The smallest optimizer with the trap in it: BF16 moments of FP32 weights, and a plain counter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, moment=torch.zeros_like(p, dtype=torch.bfloat16))
                state["step"] += 1
                state["moment"].mul_(0.9).add_(p.grad.bfloat16())
                p.sub_(state["moment"].float().sign() * group["lr"] / state["step"])


def optimizers_of(model: Transformer) -> dict[str, torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return {"matrices": SignMomentum(matrices, lr=1e-3), "others": torch.optim.AdamW(others, lr=1e-2)}


def train_step(model: Transformer, optimizers: dict[str, torch.optim.Optimizer], generator: torch.Generator) -> float:
    ids_BT = torch.randint(64, (2, 12), generator=generator)
    logits = model.logits(model.hidden(ids_BT))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    for gate in model.gates():
        gate.update_bias(torch.tensor([3, 1, 0, 0]), 0.001)
    return loss.item()


def trained(n_steps: int = 2) -> tuple[Transformer, dict[str, torch.optim.Optimizer], torch.Generator]:
    model = Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))
    optimizers, generator = optimizers_of(model), torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        train_step(model, optimizers, generator)
    return model, optimizers, generator


def test_the_step_after_resuming_is_bitwise_the_step_not_taken(tmp_path: Path):
    model, optimizers, generator = trained()
    random_state = random.Random(5).getstate()
    state = {"step": 2, "lr": 0.1 + 0.2, "data": {"position": 41, "order": [3, 1]}, "torch": generator.get_state(),
             "python": random_state, "bias": (torch.ones(2), None)}
    save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers=optimizers, state=state))
    want = [train_step(model, optimizers, generator) for _ in range(2)]

    resumed = load_checkpoint(tmp_path).model  # BF16 weights: not yet the masters
    resumed_optimizers = optimizers_of(resumed)
    got_state = load_trainer(tmp_path, model=resumed, optimizers=resumed_optimizers)
    assert all(got_state[key] == state[key] for key in ("step", "lr", "data"))
    assert got_state["python"] == random_state
    assert isinstance(got_state["bias"], tuple) and torch.equal(got_state["bias"][0], torch.ones(2))
    resumed_generator = torch.Generator()
    resumed_generator.set_state(got_state["torch"])
    assert [train_step(resumed, resumed_optimizers, resumed_generator) for _ in range(2)] == want
    for (name, a), b in zip(resumed.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    moment = next(iter(resumed_optimizers["matrices"].state.values()))["moment"]
    assert moment.dtype == torch.bfloat16  # torch's load_state_dict alone would have made it FP32


def test_the_weights_alone_would_not_have_been_enough(tmp_path: Path):
    """The test above can fail: from BF16 weights or fresh optimizers the next losses differ."""
    model, optimizers, generator = trained()
    save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers=optimizers))
    start = generator.get_state()
    want = [train_step(model, optimizers, generator) for _ in range(2)]
    for with_masters in (False, True):
        other = load_checkpoint(tmp_path).model
        fresh = optimizers_of(other)
        if with_masters:
            load_trainer(tmp_path, model=other, optimizers=optimizers_of(other))
        assert [train_step(other, fresh, torch.Generator().set_state(start)) for _ in range(2)] != want


def test_an_optimizer_that_has_not_stepped_and_one_that_is_no_torch_optimizer(tmp_path: Path):
    class Schedule:
        def __init__(self) -> None:
            self.memory: dict[str, Any] = {"seen": torch.zeros(3, dtype=torch.bfloat16), "names": ["a"]}

        def state_dict(self) -> dict[str, Any]:
            return self.memory

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.memory = state_dict

    model = Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))
    schedule, fresh = Schedule(), Schedule()
    schedule.memory["seen"] += 0.5
    adamw = torch.optim.AdamW(model.parameters(), lr=0.25)
    save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers={"s": schedule, "adamw": adamw}))
    resumed = torch.optim.AdamW(model.parameters(), lr=9.0)
    assert load_trainer(tmp_path, model=model, optimizers={"s": fresh, "adamw": resumed}) == {}
    assert resumed.param_groups[0]["lr"] == 0.25 and not resumed.state
    assert torch.equal(fresh.memory["seen"], schedule.memory["seen"]) and fresh.memory["names"] == ["a"]


def test_saving_and_resuming_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model, optimizers, _ = trained(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers=optimizers))
        load_trainer(tmp_path, model=model, optimizers=optimizers)
    assert capfd.readouterr() == ("", "")


def test_nobody_but_a_resuming_run_opens_the_folder(tmp_path: Path):
    model, optimizers, _ = trained(1)
    save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers=optimizers))
    want = load_checkpoint(tmp_path).model.state_dict()
    assert has_trainer(tmp_path)

    def loads_the_same() -> None:
        got: dict[str, Tensor] = load_checkpoint(tmp_path).model.state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())

    for file in (tmp_path / "trainer").iterdir():
        file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # a pickle that would run a command
    loads_the_same()
    drop_trainer(tmp_path)
    assert not has_trainer(tmp_path)
    loads_the_same()
    with pytest.raises(FileNotFoundError, match="not resumed from"):
        load_trainer(tmp_path, model=model, optimizers=optimizers)


def test_a_damaged_folder_is_one_line(tmp_path: Path):
    model, optimizers, _ = trained(1)
    save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers=optimizers))
    for file in (tmp_path / "trainer" / "__0_0.distcp", tmp_path / "trainer" / ".metadata"):
        file.write_bytes(file.read_bytes()[:60])
        with pytest.raises(OSError) as error:
            load_trainer(tmp_path, model=model, optimizers=optimizers)
        assert "is damaged" in str(error.value) and "delete it" in str(error.value) and "\n" not in str(error.value)


def test_another_recipe_cannot_resume(tmp_path: Path):
    model, optimizers, _ = trained(1)
    save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers=optimizers))
    with pytest.raises(ValueError, match="holds the optimizers"):
        load_trainer(tmp_path, model=model, optimizers={"adamw": optimizers["others"]})
    wider = Transformer(ModelConfig(**(vars(CONFIG) | {"intermediate_size": 48})))
    with pytest.raises(ValueError, match="belongs to another model.*mlp"):
        load_trainer(tmp_path, model=wider, optimizers=optimizers)


def test_a_resume_clears_what_a_killed_swap_left(tmp_path: Path):
    """Killed behind the last save, a stage has nothing more to save: the old checkpoint would stay for good."""
    checkpoint, old, new = (tmp_path / f"checkpoint{ending}" for ending in ("", ".old", ".new"))
    model, optimizers, _ = trained(1)
    save_checkpoint(checkpoint, model, None, trainer=TrainerState(optimizers=optimizers, state=STATE))
    for litter in (old, new):
        litter.mkdir()
        (litter / "config.json").write_text("{")
    assert resume_state(checkpoint, TrainState(model, optimizers))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    os.rename(checkpoint, old)  # killed between the two renames
    new.mkdir()
    assert resume_state(checkpoint, TrainState(model, optimizers))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_resume_elsewhere_says_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, optimizers, _ = trained(1)
    state = TrainState(model, optimizers, step=3)
    tokenizer = Tokenizer(train_bpe(["a b"] * 3, vocab_size=280))
    save_state(tmp_path, state, tokenizer)
    assert resume_state(tmp_path, state) and state.remark == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert resume_state(tmp_path, state) and state.step == 3
    assert re.fullmatch(r"resumed elsewhere \(torch .* -> 1.0, threads 1 -> 64\): the last bits .*", state.remark)


def test_a_checkpoint_from_before_that_was_written_down_resumes(tmp_path: Path):
    model, optimizers, _ = trained(1)
    save_checkpoint(tmp_path, model, None, trainer=TrainerState(optimizers=optimizers, state=STATE))
    state = TrainState(model, optimizers)
    assert resume_state(tmp_path, state) and state.remark == "" and state.step == 2
