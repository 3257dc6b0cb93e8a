"""transformers as the oracle: the same weights on both sides, and everything that must then be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.model.transformer import Transformer

TOLERANCE = 2e-5  # the promise is 1e-4; what remains is FP32 sums in another order, below 1e-5 where this was written
VOCAB = 97


def randomize(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every part matters: norms off 1, biases off 0, gate biases that change choices."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.empty(like.shape).normal_(0.0, std, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1.0 + normal(p, 0.2))
            elif name.endswith("bias"):
                p.copy_(normal(p, 0.3))
            else:
                p.copy_(normal(p, 0.3 if "embed" in name or "gate.weight" in name else 1.0 / p.shape[-1] ** 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(normal(buffer, 0.3))
    return model.eval()


def some_ids(*, batch: int = 3, length: int = 24) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def our_logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    return model.logits(model.hidden(ids_BT))


def greedy(model: Transformer, ids_BT: Tensor, n_tokens: int) -> Tensor:
    with torch.no_grad():
        for _ in range(n_tokens):
            ids_BT = torch.cat((ids_BT, our_logits(model, ids_BT)[:, -1:].argmax(-1)), dim=1)
    return ids_BT


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def assert_theirs_runs_in_ours(theirs: PreTrainedModel, directory: Path) -> Transformer:
    """Saved by transformers, loaded by us: logits, greedy text and every gradient. Returns our model."""
    theirs.save_pretrained(directory)
    ours = load_checkpoint(directory).model
    ids_BT = some_ids()
    want, got = theirs(ids_BT).logits, our_logits(ours, ids_BT)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)

    prompt = ids_BT[:2, :8]
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32,
                           eos_token_id=None, pad_token_id=0)
    assert torch.equal(greedy(ours, prompt, 32), text)

    next_token_loss(want, ids_BT).backward()
    next_token_loss(got, ids_BT).backward()
    got_grads = {name if name.startswith("lm_head") else f"model.{name}": p.grad for name, p in ours.named_parameters()}
    want_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert grad.abs().max() > 0, f"{name} has no gradient: the example does not test it"
        torch.testing.assert_close(got_grads[name], grad, atol=TOLERANCE, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return ours


def assert_ours_runs_in_theirs(ours: Transformer, directory: Path) -> dict[str, Any]:
    """Saved by us, loaded by transformers: nothing missing, nothing unexpected but MTP, the same logits from the file's
    BF16 weights. Returns transformers' loading report."""
    save_checkpoint(directory, ours, None)
    theirs, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    n_layers = ours.config.num_hidden_layers
    mtp = tuple(f"model.layers.{n_layers + k}." for k in range(ours.config.num_nextn_predict_layers))
    assert not [key for key in report["unexpected_keys"] if not key.startswith(mtp or ("no such",))]
    again = load_checkpoint(directory)
    assert again.config == ours.config
    ids_BT = some_ids()
    with torch.no_grad():
        torch.testing.assert_close(our_logits(again.model, ids_BT), theirs(ids_BT).logits, atol=TOLERANCE, rtol=0)
    return report
