"""Controls steer their own request's draws and nobody else's."""

import numpy as np
import pytest
from small_models import N_VOCAB, random_prompts, small_model

from abyssal.engine import Engine
from abyssal.engine.control import Controls, steer
from abyssal.types import SamplingParams


class Script:
    """Forces what `forced_at` says by place, forbids what `forbidden_at` says, and remembers what it heard."""

    def __init__(self, forced_at=None, forbidden_at=None, raises=None):
        self.forced_at, self.forbidden_at, self.raises = forced_at or {}, forbidden_at or {}, raises
        self.heard = []

    def forced(self):
        if self.raises == "forced" and len(self.heard) == 3:
            raise RuntimeError("no idea")
        return self.forced_at.get(len(self.heard), [])

    def mask(self, allowed_V):
        forbidden = self.forbidden_at.get(len(self.heard))
        if forbidden is None:
            return False
        allowed_V[forbidden] = False
        return True

    def drawn(self, token):
        if self.raises == "drawn" and len(self.heard) == 3:
            raise RuntimeError("no idea")
        self.heard.append(token)


def run(engine, requests):
    """Completions of (prompt, params, control), all at once."""
    order = [engine.add(prompt, params, control=control) for prompt, params, control in requests]
    done = {}
    while engine.n_unfinished:
        done |= {finished.request_id: finished.completion for finished in engine.step()}
    return [done[i] for i in order]


PROMPTS = random_prompts([5, 9, 12, 3])
EACH = [SamplingParams(max_tokens=10, seed=i) for i in range(4)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_ids_come_with_the_models_own_log_probs_and_neighbours_see_nothing(temperature):
    engine = Engine(small_model(), eos_ids=[])
    each = [SamplingParams(max_tokens=10, seed=i, temperature=temperature) for i in range(4)]
    free = run(engine, [(p, own, None) for p, own in zip(PROMPTS, each, strict=True)])
    script = Script(forced_at={0: [7], 4: [8, 9], 5: [9]})
    mixed = run(engine, [(p, own, script if i == 1 else None)
                         for i, (p, own) in enumerate(zip(PROMPTS, each, strict=True))])
    assert [c.ids for i, c in enumerate(mixed) if i != 1] == [c.ids for i, c in enumerate(free) if i != 1]
    ids = mixed[1].ids
    assert ids[0] == 7 and ids[4:6] == [8, 9] and script.heard == ids
    # what follows is what the model says after those ids, at the same noise
    [rest] = run(engine, [(PROMPTS[1] + ids[:6], SamplingParams(max_tokens=4, seed=1, temperature=temperature), None)])
    assert rest.ids == ids[6:] and rest.logps == pytest.approx(mixed[1].logps[6:], abs=1e-5)
    [first] = run(engine, [(PROMPTS[1], each[1], Script(forced_at={0: [free[1].ids[0]]}))])
    assert first.ids == free[1].ids and first.logps == pytest.approx(free[1].logps, abs=1e-5)


def test_what_is_masked_is_never_drawn_and_log_probs_stay_the_models_own():
    engine = Engine(small_model(), eos_ids=[])
    only = [3, 20, 41]
    forbidden = [i for i in range(N_VOCAB) if i not in only]
    script = Script(forbidden_at=dict.fromkeys(range(5), forbidden))
    [steered] = run(engine, [(PROMPTS[0], EACH[0], script)])
    assert set(steered.ids[:5]) <= set(only) and not set(steered.ids[5:]) <= set(only)
    [same] = run(engine, [(PROMPTS[0], EACH[0], Script(forced_at={i: [t] for i, t in enumerate(steered.ids)}))])
    assert same.logps == pytest.approx(steered.logps, abs=1e-6)
    # greedy: the likeliest of those that are left
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    [best] = run(engine, [(PROMPTS[0], greedy, Script(forbidden_at={0: forbidden}))])
    logps = {i: run(engine, [(PROMPTS[0], greedy, Script(forced_at={0: [i]}))])[0].logps[0] for i in only}
    assert best.ids == [max(logps, key=logps.get)]


@pytest.mark.parametrize("control, error", [
    (Script(forbidden_at={3: list(range(N_VOCAB))}), "leave no id to draw"),
    (Script(forced_at={3: [N_VOCAB]}), f"forces the id {N_VOCAB}"),
    (Script(raises="forced"), "RuntimeError: no idea"),
    (Script(raises="drawn"), "RuntimeError: no idea"),
], ids=["empty mask", "foreign id", "forced raises", "drawn raises"])
def test_a_control_that_fails_ends_its_own_request(control, error):
    engine = Engine(small_model(), eos_ids=[])
    free = run(engine, [(p, own, None) for p, own in zip(PROMPTS, EACH, strict=True)])
    mixed = run(engine, [(p, own, control if i == 2 else None)
                         for i, (p, own) in enumerate(zip(PROMPTS, EACH, strict=True))])
    assert mixed[2].finish_reason == "error" and error in mixed[2].error
    assert mixed[2].ids[:3] == free[2].ids[:3] and len(mixed[2].ids) <= 4
    for i in (0, 1, 3):
        assert mixed[i].ids == free[i].ids and mixed[i].error is None
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable


def test_preemption_and_new_weights_do_not_tell_a_control_twice():
    model = small_model()
    script = Script(forced_at={6: [11]})
    engine = Engine(model, eos_ids=[], n_blocks=6, block_size=8)
    preempted = []
    preempt = engine._scheduler.preempt
    engine._scheduler.preempt = lambda sequence: preempted.append(sequence.request_id) or preempt(sequence)
    requests = [(p, SamplingParams(max_tokens=20, seed=i), script if i == 2 else None)
                for i, p in enumerate(random_prompts([9, 9, 3]))]
    completions = run(engine, requests)
    assert 2 in preempted
    assert script.heard == completions[2].ids and completions[2].ids[6] == 11


def test_a_step_cut_short_leaves_no_draw_untold():
    engine = Engine(small_model(), eos_ids=[])
    script = Script()
    request = engine.add(PROMPTS[0], EACH[0], control=script)
    engine.step()
    tell, asked = engine._drawing._tell, []

    def interrupted(*args):
        asked.append(args)
        if len(asked) == 2:  # the id is drawn, and its control has not heard of it
            raise KeyboardInterrupt
        return tell(*args)

    engine._drawing._tell = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert len(engine.drawn(request)) == len(script.heard) + 1
    engine._drawing._tell = tell
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    assert script.heard == done[request].ids and len(script.heard) == 10


class Opening(Script):
    """Thinking that opens with 1 and closes with 2."""

    think_id = 1
    is_open = is_closed = False

    def drawn(self, token):
        if not self.is_open and not self.is_closed:
            self.is_open, self.is_closed = token == 1, token != 1
        elif token == 2:
            self.is_open, self.is_closed = False, True
        super().drawn(token)




def test_the_answers_control_hears_nothing_while_thinking_is_open():
    grammar = Script(forbidden_at={0: [0, 1, 2, 3], 1: [7]}, forced_at={0: [4, 5]})
    control = Controls(Opening(), grammar)
    assert control.forced() == [] and allowed_now(control) == [1, 4, 5, 6, 7]  # it may open its thinking, or answer
    control.drawn(1)
    assert control.forced() == [] and allowed_now(control) is None
    for token in (3, 6, 2):
        control.drawn(token)
    assert grammar.heard == [] and control.forced() == [4, 5] and allowed_now(control) == [4, 5, 6, 7]
    control.drawn(4)
    assert grammar.heard == [4] and allowed_now(control) == [0, 1, 2, 3, 4, 5, 6]

    at_once = Controls(Opening(), Script())
    at_once.drawn(5)  # an answer without thinking is the answer from its first id on
    assert at_once._answer.heard == [5]


def allowed_now(control):
    allowed_V = np.ones(8, bool)
    return allowed_V.nonzero()[0].tolist() if control.mask(allowed_V) else None


def test_a_step_asks_for_masks_and_forced_ids_apart():
    steering = steer([(0, Script()), (2, Script(forced_at={0: [5]})), (3, Script(forbidden_at={0: [1]}))], n_vocab=6)
    assert steering.forced_rows_C.tolist() == [2] and steering.forced_C.tolist() == [5]
    assert steering.masked_M.tolist() == [3] and steering.allowed_MV.tolist() == [[True, False, True, True, True, True]]
    nothing = steer([(0, Script())], n_vocab=6)
    assert nothing == (None, None, None, None, {})


def test_an_engine_that_records_what_it_drew_from_takes_no_control():
    engine = Engine(small_model(), eos_ids=[], record_sampling=True)
    with pytest.raises(ValueError, match="record_sampling"):
        engine.add(PROMPTS[0], EACH[0], control=Script())
