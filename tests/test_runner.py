import numpy as np
import pytest
import torch
from small_models import KINDS, random_prompts, small_model

from abyssal.engine.runner import Runner
from abyssal.engine.sequence import Chunk


def runner(model, **changes):
    return Runner(model, **{"n_blocks": 20, "block_size": 4, "record_experts": True} | changes)


def whole(prompt, blocks):
    return Chunk(np.array(prompt), 0, np.array(blocks))


def plain_logits(model, ids):
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([ids]))[0])


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_then_decode_equal_a_forward_without_a_cache(kind):
    model = small_model(kind)
    run = runner(model)
    first, second = random_prompts([9, 3])
    tables = [np.array([7, 2, 5, 0]), np.array([3, 0, 0, 0])]
    logits_BV, _ = run.prefill([whole(first, tables[0][:3]), whole(second, tables[1][:1])])
    assert torch.allclose(logits_BV, torch.stack([plain_logits(model, p)[-1] for p in (first, second)]), atol=1e-5)
    for new in range(3):
        first, second = [*first, 10 + new], [*second, 20 + new]
        if len(second) > 4:
            tables[1][1] = 6
        positions_BT = np.array([[len(first) - 1], [len(second) - 1]])
        logits_BV, _ = run.decode(np.array([[first[-1]], [second[-1]]]), positions_BT, np.stack(tables)[:, :3])
        assert torch.allclose(logits_BV, torch.stack([plain_logits(model, p)[-1] for p in (first, second)]), atol=1e-5)


def test_a_forked_sequence_continues_on_its_copy():
    model = small_model()
    run = runner(model)
    [prompt] = random_prompts([6])
    run.prefill([whole(prompt, [1, 2])])
    run.copy_blocks([2], [9])
    # the sibling goes on in block 2; the fork, whose last block is 9, does not see it
    run.decode(np.array([[11]]), np.array([[6]]), np.array([[1, 2]]))
    logits_BV, _ = run.decode(np.array([[12]]), np.array([[6]]), np.array([[1, 9]]))
    assert torch.allclose(logits_BV[0], plain_logits(model, [*prompt, 12])[-1], atol=1e-5)
    assert torch.equal(run.experts_at(np.array([1, 9]), 6), run.experts_at(np.array([1, 2]), 6))


def test_the_context_may_be_wider_than_a_sequence_needs():
    model = small_model()
    run = runner(model)
    [prompt] = random_prompts([6])
    run.prefill([whole(prompt, [4, 8])])
    narrow, _ = run.decode(np.array([[5]]), np.array([[6]]), np.array([[4, 8]]))
    wide, _ = run.decode(np.array([[5]]), np.array([[6]]), np.array([[4, 8, 0, 0, 0]]))
    assert torch.allclose(narrow, wide, atol=1e-6)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_of_a_row_equal_one_after_another(kind, invariant):
    """Rows of 4, 1 and 2 tokens; what pads a row is nobody's: neither it nor a rejected draft leaves a trace."""
    model = small_model(kind)
    prompts, more = random_prompts([5, 3, 8]), random_prompts([4, 1, 2], seed=1)
    tables = np.array([[1, 2, 3], [4, 5, 0], [6, 7, 8]])
    counts_B = np.array([4, 1, 2])
    starts_B = np.array([len(prompt) for prompt in prompts])
    ids_BT = np.full((3, 4), 60)
    for row, ids in enumerate(more):
        ids_BT[row, : len(ids)] = ids
    filled = [whole(p, blocks[: -(-len(p) // 4)]) for p, blocks in zip(prompts, tables, strict=True)]
    together, single = runner(model, invariant=invariant), runner(model, invariant=invariant)
    together.prefill(filled)
    single.prefill(filled)
    drafts_BT = (ids_BT + 1) % 61
    together.decode(drafts_BT, starts_B[:, None] + np.arange(4), tables, counts_B)  # all rejected
    got_XV, hidden_XD = together.decode(ids_BT, starts_B[:, None] + np.arange(4), tables, counts_B)
    assert len(got_XV) == 7 and torch.equal(model.logits(hidden_XD).argmax(-1), got_XV.argmax(-1))
    want = [[] for _ in prompts]
    for column in range(4):
        rows = np.flatnonzero(counts_B > column)
        at = (starts_B[rows] + column)[:, None]
        logits_BV, _ = single.decode(ids_BT[rows, column][:, None], at, tables[rows])
        for row, logits_V in zip(rows, logits_BV, strict=True):
            want[row].append(logits_V)
    want_XV = torch.cat([torch.stack(logits) for logits in want])
    assert torch.equal(got_XV, want_XV) if invariant else torch.allclose(got_XV, want_XV, atol=1e-5)
    for row, (prompt, ids) in enumerate(zip(prompts, more, strict=True)):
        n = len(prompt) + len(ids)
        record = [run.experts_at(tables[row], n) for run in (together, single)]
        assert (record[0] is None) == (model.config.feed_forward == "dense")
        assert record[0] is None or torch.equal(record[0].sort(-1).values, record[1].sort(-1).values)


@pytest.mark.parametrize("invariant", [False, True])
def test_mtp_modules_on_the_cache_equal_the_models_own_way(invariant):
    """Entries of a prompt come with its chunks, those of drawn tokens from `look_ahead`, several of a row at a time."""
    model = small_model("mla_moe_query_latent", num_nextn_predict_layers=2)
    ids = random_prompts([14])[0]
    with torch.no_grad():
        hidden_BTD = model.hidden(torch.tensor([ids]))
        wanted = [model.logits(h_BTD[0]) for h_BTD in model.mtp_hidden(hidden_BTD, torch.tensor([ids]))]
    run = runner(model, invariant=invariant, looks_ahead=True)
    table = np.array([[3, 1, 7, 9]])
    run.prefill([Chunk(np.array(ids[:5]), 0, table[0], np.array(ids[5:8]))])
    run.prefill([Chunk(np.array(ids[5:9]), 5, table[0])])  # its last id is not followed by any that is known
    _, hidden_XD = run.decode(np.array([ids[9:12]]), np.arange(9, 12)[None], table)
    # module 1 again at 8, of which the prompt did not know what follows, and at 9 .. 11; module 2 after it at 8 .. 10
    known_XD = torch.cat((hidden_BTD[0, 8:9], hidden_XD))
    counts_B = np.array([4])
    first_XD = run.look_ahead(0, known_XD, np.array([ids[9:13]]), np.arange(8, 12)[None], table, counts_B)
    assert torch.allclose(run.logits(first_XD), wanted[0][8:12], atol=1e-5)
    # at 7 and 8 module 2 wrote what it could not know: those entries are given again before they are read
    again_XD = torch.cat((run.look_ahead(0, hidden_BTD[0, 7:8], np.array([[ids[8]]]), np.array([[7]]), table,
                                         np.array([1])), first_XD))
    second_XD = run.look_ahead(1, again_XD, np.array([[*ids[9:14], 0]]), np.arange(7, 13)[None], table, np.array([5]))
    assert torch.allclose(run.logits(second_XD), wanted[1][7:12], atol=1e-5)


def test_bfloat16_computes_with_a_copy_and_experts_can_be_left_unrecorded():
    model = small_model(dtype=torch.bfloat16)
    run = runner(model, record_experts=False)
    assert run.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert run.model.layers[1].mlp.gate.weight.dtype == torch.float32  # routing stays FP32
    assert run.experts_at(np.array([1]), 2) is None
    assert runner(small_model()).model.dtype == torch.float32
