"""Open requests and pairs of answers: the split, what each fault costs, and who is ranked above whom."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from abyssal.data.families.requests import careless_answer, faults_of, good_answer
from abyssal.data.held_out import is_held_out
from abyssal.data.preferences import Pair, ranked_pair, request_at, spoiled_pair, truth_of
from abyssal.data.problems import ProblemSource, Split
from abyssal.data.worked import WebMix, web_document
from abyssal.reward.form import is_mixed
from abyssal.reward.open_request import HEADS, Truth, heads_of, truth
from abyssal.stages.tokenize import DataConfig, conversations
from abyssal.types import Message, Problem

SOURCE = ProblemSource(held_out=0.2)


def requests(n: int, split: Split = "train") -> list[Problem]:
    return [request_at(SOURCE, 0, i, split) for i in range(n)]


def test_the_stream_is_a_function_of_its_place_and_has_every_kind_in_both_languages():
    assert requests(20) == requests(20)
    kinds = Counter((p.language, p.metadata["request"]["kind"], len(heads_of(p))) for p in requests(400))
    every = [("list", 1), ("secret", 1), ("secret", 2)]  # with the number of heads that judge it
    assert set(kinds) == {(language, *kind) for language in ("en", "zh") for kind in every}
    assert all(n > 20 for n in kinds.values())


def test_the_split_goes_by_the_instance_and_not_by_its_wording():
    train, held_out = ({p.key for p in requests(400, split)} for split in ("train", "held_out"))
    assert not train & held_out
    assert all(is_held_out(key, 0.2) for key in held_out) and not any(is_held_out(key, 0.2) for key in train)
    # a code that may be told and the same code as a secret lie on one side, as do both languages of a list
    assert {key.split()[0] for key in train} == {"list", "code"}
    with pytest.raises(ValueError, match="no held_out request with held_out=0"):
        request_at(replace(SOURCE, held_out=0.0), 0, 0, "held_out")


def test_a_good_answer_has_nothing_said_against_it():
    for problem in requests(200):
        for thinks in (True, False):
            answer = good_answer(problem, random.Random(1), thinks=thinks)
            assert truth(problem, answer) in (Truth(1.0, None), Truth(1.0, 1.0)), (problem.prompt, answer)
            assert (answer.thinking is not None) == thinks
            assert not is_mixed(problem, answer), (problem.prompt, answer)
        assert truth(problem, Message(role="assistant", content=problem.answer)).helpfulness == 1.0


def test_every_fault_costs_and_costs_its_own_head():
    seen: Counter[str] = Counter()
    for problem in requests(200):
        for fault in faults_of(problem):
            seen[fault] += 1
            found = truth(problem, careless_answer(problem, random.Random(2), thinks=True, fault=fault))
            assert found.helpfulness < 1.0 or found.safety == 0.0, (problem.prompt, fault)
            for head in HEADS:
                value = getattr(found, head)
                assert (value is not None and value < 1.0) == (fault in faults_of(problem, head)), (fault, head)
    assert len(seen) == 10 and min(seen.values()) > 10
    with pytest.raises(ValueError, match="fault 'thought' does not fit"):
        careless_answer(next(p for p in requests(9) if len(heads_of(p)) == 1), random.Random(0), thinks=True,
                        fault="thought")  # fmt: skip


def test_spoiled_pairs_are_ordered_by_the_truth():
    for i, problem in enumerate(requests(300)):
        for head in heads_of(problem):
            pair = spoiled_pair(problem, head, random.Random(i))
            assert pair.truths == (truth_of(problem, pair.chosen, head), truth_of(problem, pair.rejected, head))
            assert pair.truths[0] > pair.truths[1] and not pair.flipped and pair.source == "spoiled"


def test_the_length_of_the_thinking_does_not_give_a_leak_away():
    """Or the safety head would learn to count lines instead of reading them."""
    lengths: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for i, problem in enumerate(p for p in requests(600) if len(heads_of(p)) == 2):
        for leaky in (True, False):
            fault = "thought" if leaky else "padded"
            answer = careless_answer(problem, random.Random(i), thinks=True, fault=fault)
            lengths[leaky][(answer.thinking or "").count("\n")] += 1
    assert set(lengths[True]) == set(lengths[False]) == {0, 1}
    assert all(40 < 100 * one[0] / sum(one.values()) < 60 for one in lengths.values())


def test_of_a_policys_answers_two_that_differ_are_ranked():
    problem = next(p for p in requests(50) if p.metadata["request"]["kind"] == "list" and p.language == "en")
    good = good_answer(problem, random.Random(0), thinks=False)
    short = careless_answer(problem, random.Random(0), thinks=False, fault="short")
    pair = ranked_pair(problem, "helpfulness", [short, good, good], random.Random(0))
    assert pair is not None and (pair.chosen, pair.rejected, pair.source) == (good, short, "sampled")
    assert ranked_pair(problem, "helpfulness", [good, good], random.Random(0)) is None
    assert ranked_pair(problem, "helpfulness", [], random.Random(0)) is None


def test_a_turned_pair_has_a_wrong_label_and_its_true_numbers():
    message = Message(role="assistant", content="a")
    pair = Pair(prompt="?", head="safety", chosen=message, rejected=replace(message, content="b"), truths=(1.0, 0.0),
                source="spoiled")  # fmt: skip
    turned = pair.turned()
    assert turned.flipped and (turned.chosen.content, turned.truths) == ("b", (0.0, 1.0)) and turned.turned() == pair


def test_the_web_answers_requests_with_the_share_of_faults_it_was_given():
    mix = WebMix(worked_share=0.5, careless_share=0.4)
    documents = [(p, web_document(p, random.Random(i), mix)[1]) for i, p in enumerate(requests(600))]
    good = [min(t.helpfulness, 1.0 if t.safety is None else t.safety) == 1.0 for t in (truth(*d) for d in documents)]
    assert 0.55 < sum(good) / 600 < 0.65
    assert 0.4 < sum(answer.thinking is not None for _, answer in documents) / 600 < 0.65


def test_without_requests_the_mix_is_what_it_was_and_with_them_they_have_their_share():
    def first(share: float, n: int = 300) -> list[str]:
        stream = conversations(DataConfig(web=WebMix(request_share=share)), split="train", seed=0)
        return [next(stream)[0].content for _ in range(n)]

    without, some = first(0.0), first(0.2)
    ours = ("Name", "The code", "说出", "密码")
    assert not any(question.startswith(ours) for question in without)
    assert 30 < sum(question.startswith(ours) for question in some) < 90
    assert all(a == b for a, b in zip(without, some, strict=True) if not b.startswith(ours))
