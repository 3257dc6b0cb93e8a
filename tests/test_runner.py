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
    logits_BV = run.prefill([whole(first, tables[0][:3]), whole(second, tables[1][:1])])
    assert torch.allclose(logits_BV, torch.stack([plain_logits(model, p)[-1] for p in (first, second)]), atol=1e-5)
    for new in range(3):
        first, second = [*first, 10 + new], [*second, 20 + new]
        if len(second) > 4:
            tables[1][1] = 6
        positions_B = np.array([len(first) - 1, len(second) - 1])
        logits_BV = run.decode(np.array([first[-1], second[-1]]), positions_B, np.stack(tables)[:, :3])
        assert torch.allclose(logits_BV, torch.stack([plain_logits(model, p)[-1] for p in (first, second)]), atol=1e-5)


def test_a_forked_sequence_continues_on_its_copy():
    model = small_model()
    run = runner(model)
    [prompt] = random_prompts([6])
    run.prefill([whole(prompt, [1, 2])])
    run.copy_blocks([2], [9])
    # the sibling goes on in block 2; the fork, whose last block is 9, does not see it
    run.decode(np.array([11]), np.array([6]), np.array([[1, 2]]))
    logits_BV = run.decode(np.array([12]), np.array([6]), np.array([[1, 9]]))
    assert torch.allclose(logits_BV[0], plain_logits(model, [*prompt, 12])[-1], atol=1e-5)
    assert torch.equal(run.experts_at(np.array([1, 9]), 6), run.experts_at(np.array([1, 2]), 6))


def test_the_context_may_be_wider_than_a_sequence_needs():
    model = small_model()
    run = runner(model)
    [prompt] = random_prompts([6])
    run.prefill([whole(prompt, [4, 8])])
    narrow = run.decode(np.array([5]), np.array([6]), np.array([[4, 8]]))
    wide = run.decode(np.array([5]), np.array([6]), np.array([[4, 8, 0, 0, 0]]))
    assert torch.allclose(narrow, wide, atol=1e-6)


def test_bfloat16_computes_with_a_copy_and_experts_can_be_left_unrecorded():
    model = small_model(dtype=torch.bfloat16)
    run = runner(model, record_experts=False)
    assert run.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert run.model.layers[1].mlp.gate.weight.dtype == torch.float32  # routing stays FP32
    assert run.experts_at(np.array([1]), 2) is None
    assert runner(small_model()).model.dtype == torch.float32
