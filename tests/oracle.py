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
from abyssal.engine import Engine
from abyssal.model.transformer import Transformer
from abyssal.types import SamplingParams

TOLERANCE = 2e-5  # the promise is 1e-4; what remains is FP32 sums in another order, below 1e-5 where this was written
VOCAB = 97
N_GREEDY = 64  # tokens of greedy text; with the prompt's 8 they need max_position_embeddings of 72


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


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def assert_same_function(ours: Transformer, theirs: PreTrainedModel) -> None:
    """Logits, loss and the gradient of every parameter but MTP's, which this loss does not reach."""
    ids_BT = some_ids()
    want, got = theirs(ids_BT).logits, our_logits(ours, ids_BT)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    losses = [next_token_loss(logits_BTV, ids_BT) for logits_BTV in (got, want)]
    torch.testing.assert_close(losses[0], losses[1], atol=TOLERANCE, rtol=0)
    for loss in losses:
        loss.backward()
    got_grads = {
        name if name.startswith("lm_head") else f"model.{name}": p.grad
        for name, p in ours.named_parameters()
        if not name.startswith("mtp.")
    }
    want_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert grad.abs().max() > 0, f"{name} has no gradient: the example does not test it"
        torch.testing.assert_close(got_grads[name], grad, atol=TOLERANCE, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_greedy_text(ours: Transformer, theirs: PreTrainedModel, *, generate: bool = False) -> None:
    """Our engine, from its cache, says what theirs says: by its own `generate`, or, which is the same and quicker, in
    one pass over our text, where each of our tokens must be the most likely one."""
    prompt_BT = some_ids()[:2, :8]
    params = SamplingParams(temperature=0.0, max_tokens=N_GREEDY)
    completions = Engine(ours, eos_ids=[]).generate(prompt_BT.tolist(), params)
    text_BT = torch.tensor([completion.ids for completion in completions])
    assert text_BT.shape[1] == N_GREEDY
    if generate:
        whole_BT = theirs.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False,
                                   max_new_tokens=N_GREEDY, eos_token_id=None, pad_token_id=0)
        assert torch.equal(text_BT, whole_BT[:, prompt_BT.shape[1]:])
    else:
        with torch.no_grad():
            likeliest_BT = theirs(torch.cat((prompt_BT, text_BT), dim=1)).logits.argmax(-1)
        assert torch.equal(text_BT, likeliest_BT[:, prompt_BT.shape[1] - 1 : -1])


def assert_theirs_runs_in_ours(theirs: PreTrainedModel, directory: Path, *, generate: bool = False) -> Transformer:
    """Saved by transformers, loaded by us: the same function, the same text. Returns our model."""
    theirs.save_pretrained(directory)
    ours = load_checkpoint(directory).model
    assert_same_function(ours, theirs)
    assert_same_greedy_text(ours, theirs, generate=generate)
    return ours


def assert_ours_runs_in_theirs(ours: Transformer, directory: Path) -> dict[str, Any]:
    """Saved by us, loaded by transformers: nothing missing, nothing unexpected but MTP. From its BF16 weights the same
    function and text. Returns transformers' loading report."""
    save_checkpoint(directory, ours, None)
    theirs, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    n_layers = ours.config.num_hidden_layers
    mtp = tuple(f"model.layers.{n_layers + k}." for k in range(ours.config.num_nextn_predict_layers))
    assert not [key for key in report["unexpected_keys"] if not key.startswith(mtp or ("no such",))]
    again = load_checkpoint(directory)
    assert again.config == ours.config
    assert_same_function(again.model, theirs)
    assert_same_greedy_text(again.model, theirs)
    return report
