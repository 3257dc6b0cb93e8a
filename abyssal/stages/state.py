"""What a training stage holds, saves and takes up again. Owns optimizers and step counts; no loop and no loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from abyssal.checkpoint.atomic import finish_swap
from abyssal.checkpoint.resume import TrainerState, has_trainer, load_trainer
from abyssal.checkpoint.save import save_checkpoint
from abyssal.model.transformer import Transformer
from abyssal.optim.adamw import AdamW
from abyssal.optim.muon import Muon
from abyssal.tokens.tokenizer import Tokenizer

NOT_MUON = ("embed_tokens", "lm_head", "gate.weight")  # tables and routers are not maps between hidden states


@dataclass
class TrainState:
    """All that a resumed run needs, and nothing it can recompute. `extra` is the stage's own (loader position, ...)."""

    model: Transformer
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0
    tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    remark: str = ""  # on what it was resumed from, to be said once


def build_optimizers(
    model: nn.Module, *, kind: Literal["muon", "adamw"], lr: float, adamw_lr: float, weight_decay: float
) -> dict[str, torch.optim.Optimizer]:
    """ "muon": Muon at `lr` for matrices inside blocks, AdamW at `adamw_lr` for the rest. "adamw": AdamW for all."""
    matrices: list[tuple[str, Tensor]] = []
    vectors: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        inside = kind == "muon" and parameter.ndim >= 2 and not any(part in name for part in NOT_MUON)
        (matrices if inside else vectors).append((name, parameter))
    decayed = [p for name, p in vectors if p.ndim >= 2]
    plain = [p for name, p in vectors if p.ndim < 2]  # norms and biases have no reason to shrink
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: dict[str, torch.optim.Optimizer] = {"adamw": AdamW(groups, lr=adamw_lr)}
    if matrices:  # their products in the type that the model computes in: the one that is fast here
        dtype = model.dtype if isinstance(model, Transformer) else torch.bfloat16
        optimizers["muon"] = Muon([p for _, p in matrices], lr=lr, weight_decay=weight_decay, dtype=dtype)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def apply_step(optimizers: dict[str, torch.optim.Optimizer], lr_fraction: float) -> None:
    """One update at a fraction of the peak learning rates; gradients are gone afterwards."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_fraction
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save_state(
    checkpoint: Path, state: TrainState, tokenizer: Tokenizer, *, generation: dict[str, Any] | None = None
) -> None:
    """The Hugging Face directory and trainer/ beside it, as one atomic swap."""
    device = state.model.embed_tokens.weight.device
    content = {"step": state.step, "tokens": state.tokens, "extra": state.extra, "computed_by": computed_by(device)}
    save_checkpoint(
        checkpoint,
        state.model,
        tokenizer,
        generation=generation,
        trainer=TrainerState(optimizers=dict(state.optimizers), state=content),
    )


def resume_state(checkpoint: Path, state: TrainState) -> bool:
    """Take up where the checkpoint stopped; False when there is none to take up."""
    finish_swap(checkpoint)  # killed behind its last save, a stage saves no more and would leave the old one for good
    if not has_trainer(checkpoint):
        return False
    content = load_trainer(checkpoint, model=state.model, optimizers=dict(state.optimizers))
    state.step, state.tokens, state.extra = content["step"], content["tokens"], content["extra"]
    now, then = computed_by(state.model.embed_tokens.weight.device), content.get("computed_by", {})
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        state.remark = f"resumed elsewhere ({', '.join(changed)}): the last bits may differ from an uninterrupted run's"
    return True


def computed_by(device: torch.device) -> dict[str, Any]:
    """What decides how floating-point sums are ordered."""
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"torch": str(torch.__version__), "device": kind, "threads": torch.get_num_threads()}
