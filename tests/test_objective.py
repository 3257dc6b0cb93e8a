"""What a row teaches: equal to the plain computation over all logits, aligned by hand, and the same in pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import N_VOCAB, small_model
from torch import Tensor

from abyssal.loss.balance import sequence_balance_loss
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer
from abyssal.stages.objective import Batch, language_loss, loss_ahead, mtp_loss
from abyssal.stages.pretrain import PretrainConfig, as_batch, backward, balance

KIND = "mla_moe_query_latent"  # a mixture of experts with one MTP module


def batch_of(rows: int = 4, length: int = 12, *, seed: int = 0) -> Batch:
    """Rows of two examples; the first tokens of each are not to be learned, and unevenly many in each row."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, N_VOCAB, (rows, length), generator=generator)
    segments_BT = torch.ones_like(ids_BT)
    segments_BT[:, 7:] = 2
    mask_BT = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        mask_BT[row, : row + 1] = False
        mask_BT[row, 7 : 8 + row] = False
    return Batch(ids_BT, mask_BT, segments_BT)


def plain_loss(logits_BTV: Tensor, batch: Batch, *, ahead: int) -> float:
    """One place after another, as a reader would do it."""
    losses = []
    for b in range(len(batch.ids_BT)):
        for i in range(logits_BTV.shape[1]):
            j = i + ahead
            if j >= batch.ids_BT.shape[1] or not batch.mask_BT[b, j]:
                continue
            if batch.segments_BT is not None and batch.segments_BT[b, i] != batch.segments_BT[b, j]:
                continue
            losses.append(-float(logits_BTV.detach()[b, i].log_softmax(-1)[batch.ids_BT[b, j]]))
    return sum(losses) / len(losses)


class Oracle:
    """Stands for a model whose hidden states are logits, so that a test can say what each place predicts."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self.outputs = outputs

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def mtp_hidden(self, hidden_BTD: Tensor, ids_BT: Tensor, **_: object) -> list[Tensor]:
        return self.outputs


def certain_of(tokens: list[int]) -> Tensor:
    return F.one_hot(torch.tensor([tokens]), 10).float() * 100


def test_next_token_mtp_and_balance_equal_the_plain_computation():
    model, batch = small_model(KIND), batch_of()
    losses = language_loss(model, batch, mtp_weight=0.3, balance_weight=0.01)
    routings: list[Routing] = []
    hidden_BTD = model.hidden(batch.ids_BT, segments_BT=batch.segments_BT, routings=routings)
    (mtp_BTD,) = model.mtp_hidden(hidden_BTD, batch.ids_BT, segments_BT=batch.segments_BT, routings=routings)
    next_token = plain_loss(model.logits(hidden_BTD), batch, ahead=1)
    mtp = plain_loss(model.logits(mtp_BTD), batch, ahead=2)
    even = [float(sequence_balance_loss(r.scores_NE.detach(), batch=4, experts_per_tok=2)) for r in routings]
    assert float(losses.next_token) == pytest.approx(next_token, abs=1e-5)
    assert losses.mtp is not None and float(losses.mtp) == pytest.approx(mtp, abs=1e-5)
    assert losses.balance is not None and float(losses.balance) == pytest.approx(sum(even) / len(even), abs=1e-5)
    total = next_token + 0.3 * mtp + 0.01 * sum(even) / len(even)
    assert float(losses.total.detach()) == pytest.approx(total, abs=1e-5)
    assert len(losses.loads) == 3  # two layers of experts and the MTP module's


def test_the_module_of_depth_k_predicts_the_token_k_plus_one_places_on():
    ids_BT = torch.tensor([[1, 2, 3, 4, 5, 6]])
    batch = Batch(ids_BT, torch.ones_like(ids_BT))
    first = certain_of([3, 4, 5, 6, 0])  # depth 1, five places: the last has nothing two places on
    second = certain_of([4, 5, 6, 0])  # depth 2, four places
    right: Transformer = Oracle([first, second])  # type: ignore[assignment]
    assert float(mtp_loss(right, ids_BT, batch, None)) == pytest.approx(0.0, abs=1e-6)
    late: Transformer = Oracle([first, first[:, :4]])  # type: ignore[assignment]
    assert float(mtp_loss(late, ids_BT, batch, None)) == pytest.approx(100 / 2)  # sure of the wrong one at depth 2


def test_the_mask_says_which_tokens_are_learned_by_hand():
    """Place 1 predicts token 2 with probability 1/4; the others would be certain of the wrong token."""
    ids_BT = torch.tensor([[0, 1, 2, 3]])
    logits_BTV = torch.full((1, 4, 4), -50.0)
    logits_BTV[0, 1] = torch.zeros(4)
    oracle: Transformer = Oracle([])  # type: ignore[assignment]
    batch = Batch(ids_BT, torch.tensor([[1, 0, 1, 0]]))
    assert float(loss_ahead(oracle, logits_BTV, batch, batch, ahead=1)) == pytest.approx(torch.tensor(4.0).log().item())


def test_a_mask_without_any_target_is_an_error():
    batch = batch_of()
    with pytest.raises(ValueError, match="no token to learn"):
        language_loss(
            small_model(KIND), batch._replace(mask_BT=torch.zeros_like(batch.mask_BT)), mtp_weight=0, balance_weight=0
        )


def test_what_has_no_weight_is_not_computed():
    losses = language_loss(small_model(KIND), batch_of(), mtp_weight=0.0, balance_weight=0.0)
    assert losses.mtp is None and losses.balance is None and torch.equal(losses.total.detach(), losses.next_token)


def test_padding_does_not_count_as_load():
    model, batch = small_model(KIND), batch_of()
    padded = batch._replace(segments_BT=torch.where(torch.arange(12) < 9, batch.segments_BT, 0))
    loads = language_loss(model, padded, mtp_weight=0.3, balance_weight=0.0).loads
    assert [int(load.sum()) for load in loads] == [4 * 9 * 2, 4 * 9 * 2, 4 * 9 * 2]  # rows x tokens x chosen experts


def gradients_of(micro_rows: int) -> tuple[dict[str, Tensor], list[Tensor], dict[str, float]]:
    model, batch = small_model(KIND), batch_of()
    config = PretrainConfig(rows=4, micro_rows=micro_rows, balance_weight=0.01)
    losses = backward(model, batch, config, step=0)
    assert losses.mtp is not None and losses.balance is not None
    values = {"total": losses.total, "next": losses.next_token, "mtp": losses.mtp, "balance": losses.balance}
    return (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        losses.loads,
        {name: float(value) for name, value in values.items()},
    )


def test_micro_batches_give_the_gradient_losses_and_loads_of_the_whole():
    """Rows differ in how many tokens they teach: a mean of their means would be another number."""
    whole, loads, losses = gradients_of(0)
    for micro_rows in (1, 2):
        pieces, piece_loads, piece_losses = gradients_of(micro_rows)
        assert piece_losses == pytest.approx(losses, abs=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(piece_loads, loads, strict=True))
        assert pieces.keys() == whole.keys()
        for name, gradient in whole.items():
            assert torch.allclose(pieces[name], gradient, atol=1e-5), name


def test_a_micro_batch_may_have_nothing_to_learn():
    model, batch = small_model(KIND), batch_of()
    mask_BT = batch.mask_BT.clone()
    mask_BT[2] = False
    losses = backward(model, batch._replace(mask_BT=mask_BT), PretrainConfig(rows=4, micro_rows=1), step=0)
    whole = backward(model, batch._replace(mask_BT=mask_BT), PretrainConfig(rows=4), step=0)
    assert float(losses.next_token) == pytest.approx(float(whole.next_token), abs=1e-5)


def test_the_bias_moves_once_a_step_by_the_loads_of_the_whole_batch():
    biases = []
    for micro_rows in (0, 1):
        model, config = small_model(KIND), PretrainConfig(rows=4, micro_rows=micro_rows)
        balance(model, backward(model, batch_of(), config, step=0).loads, config, step=0)
        biases.append([gate.e_score_correction_bias.clone() for gate in model.gates()])
    for one, other in zip(*biases, strict=True):
        assert torch.equal(one, other)
        assert float(one.abs().max()) > 0 and float(one.mean()) == pytest.approx(0.0, abs=1e-9)


def test_the_bias_rests_in_the_last_steps():
    model, config = small_model(KIND), PretrainConfig(steps=100, bias_until=0.9)
    loads = backward(model, batch_of(), config, step=0).loads
    balance(model, loads, config, step=90)
    assert all(float(gate.e_score_correction_bias.abs().max()) == 0 for gate in model.gates())


def test_documents_of_a_row_end_at_their_end_token():
    ids_BT = torch.tensor([[7, 8, 1, 9, 1, 1, 5]])  # 1 ends a document
    batch = as_batch(ids_BT, torch.ones_like(ids_BT), eos_id=1, isolate=True, device=torch.device("cpu"))
    assert batch.segments_BT is not None and batch.segments_BT.tolist() == [[1, 1, 1, 2, 2, 3, 4]]
    open_row = as_batch(ids_BT, torch.ones_like(ids_BT), eos_id=1, isolate=False, device=torch.device("cpu"))
    assert open_row.segments_BT is None
