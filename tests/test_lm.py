"""A checkpoint from Python: logits, text, a conversation and a stream, all of the same model."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import chat_templates
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from test_dialects import speaking

import abyssal
from abyssal import LM, Message, SamplingParams
from abyssal.checkpoint.save import save_checkpoint
from abyssal.data.corpus import document_ids
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import RequestError

TEXTS = ["one plus two is three", "name a colour: red", "<think>", "所以"] * 20
CONTEXT = 96
QUESTION = [Message(role="user", content="one plus two?")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(train_bpe(TEXTS, vocab_size=400))
    model = small_model("mla_moe_query_latent", vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)
    path = tmp_path_factory.mktemp("checkpoint") / "base"
    save_checkpoint(path, model, tokenizer)
    return path


@pytest.fixture(scope="module")
def lm(directory: Path) -> LM:
    return abyssal.load(directory)


def test_logits_are_float32_one_row_a_token(lm: LM):
    ids_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits_BTV = lm.logits(ids_BT)
    assert logits_BTV.shape == (2, 3, lm.model.config.vocab_size) and logits_BTV.dtype == torch.float32
    assert torch.equal(logits_BTV, lm.logits([[1, 2, 3], [4, 5, 6]]))
    # no place sees what comes after it
    other = lm.logits([[1, 2, 9], [4, 5, 9]])
    assert torch.allclose(other[:, :2], logits_BTV[:, :2], atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(directory: Path, lm: LM):
    rough = abyssal.load(directory, dtype="bfloat16").logits([[1, 2, 3]])
    exact = lm.logits([[1, 2, 3]])
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).abs().mean() < 0.1 * exact.std()


def test_weights_in_few_bits_answer_nearly_the_same(directory: Path, lm: LM):
    """And in BF16, whose rows the int4 kernel takes; what is computed in FP32 says so."""
    exact = lm.logits([[1, 2, 3]])
    for weights, dtype in (("int8", torch.float32), ("int4", torch.bfloat16)):
        few = abyssal.load(directory, weights=weights, dtype=str(dtype).removeprefix("torch."))
        assert few.model.dtype == dtype
        assert 0 < (few.logits([[1, 2, 3]]) - exact).abs().mean() < 0.3 * exact.std()
        assert few.generate("one", SamplingParams(max_tokens=4, temperature=0.0))[0].finish_reason == "length"
    assert abyssal.load(directory, weights="int4").model.dtype == torch.bfloat16


@pytest.mark.parametrize("ids", [[[0, 10**6]], [[-1, 0]], [1, 2, 3]])
def test_ids_that_are_none_are_refused(lm: LM, ids: list):
    with pytest.raises(ValueError, match=r"must lie in|give rows of ids"):
        lm.logits(ids)


def test_generate_returns_text_ids_log_probabilities_and_the_reason(lm: LM):
    first, second = lm.generate(["one plus", "name a"], SamplingParams(max_tokens=5, seed=1))
    for prompt, found in (("one plus", first), ("name a", second)):
        assert found.finish_reason == "length" and len(found.ids) == len(found.logps) == 5
        assert found.text == lm.tokenizer.decode(found.ids, skip_special=True)
        ids = [*lm.tokenizer.encode(prompt), *found.ids]
        logp_TV = lm.logits([ids[:-1]])[0].log_softmax(-1)
        want = logp_TV[-5:].gather(-1, torch.tensor(found.ids)[:, None])[:, 0]
        assert found.logps == pytest.approx(want.tolist(), abs=1e-5)
    assert [g.ids for g in lm.generate("one plus", SamplingParams(max_tokens=5, seed=1))] == [first.ids]


def test_a_raw_prompt_may_hold_control_tokens_and_no_other_can(lm: LM):
    text = "<｜User｜>one<｜Assistant｜>"
    user, assistant = lm.tokenizer.user_id, lm.tokenizer.assistant_id
    assert lm.prompt_ids(text, raw=True) == [user, *lm.tokenizer.encode("one"), assistant]
    assert lm.tokenizer.control_ids.isdisjoint(lm.prompt_ids(text))
    params = SamplingParams(max_tokens=4, seed=3)
    (closed,), (opened,) = lm.generate(text, params), lm.generate(text, params, raw=True)
    assert opened.ids == next(iter(lm.engine.generate([lm.prompt_ids(text, raw=True)], params))).ids
    assert opened.logps != closed.logps


def test_an_answer_that_ends_says_so(lm: LM):
    """Temperature 50 makes all tokens alike: some of forty answers soon draws the end."""
    found = lm.generate(["one"] * 40, SamplingParams(max_tokens=60, temperature=50.0, seed=0))
    ended = [g for g in found if g.finish_reason == "stop"]
    assert ended and all(g.ids[-1] == lm.tokenizer.eos_id and g.ids.count(lm.tokenizer.eos_id) == 1 for g in ended)


def test_greedy_is_the_most_likely_token_each_time(lm: LM):
    (found,) = lm.generate("name", SamplingParams(max_tokens=4, temperature=0.0))
    ids = lm.tokenizer.encode("name")
    for token in found.ids:
        assert token == int(lm.logits([ids])[0, -1].argmax())
        ids.append(token)


def test_plain_text_begins_as_documents_did_in_pretraining(lm: LM, directory: Path, tmp_path: Path):
    ids = lm.tokenizer.encode("one plus two")
    as_trained = document_ids("one plus two", lm.tokenizer, random.Random(0), fim_rate=0.0)
    assert as_trained == [*ids, lm.tokenizer.eos_id]
    assert prompts_of(lm, ["one plus two", ""]) == [ids, [lm.tokenizer.eos_id]]  # a document follows another's end
    # official checkpoints say that theirs began with the begin token
    other = tmp_path / "official"
    shutil.copytree(directory, other)
    settings = json.loads((other / "tokenizer_config.json").read_text(encoding="utf-8"))
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}), encoding="utf-8")
    assert prompts_of(abyssal.load(other), ["one plus two", ""]) == [[lm.tokenizer.bos_id, *ids], [lm.tokenizer.bos_id]]


def prompts_of(lm: LM, texts: list[str]) -> list[list[int]]:
    """What the engine is asked when these are to be continued."""
    seen: list[list[int]] = []
    generate = lm.engine.generate
    lm.engine.generate = lambda prompts, *how, **more: seen.extend(prompts) or generate(prompts, *how, **more)  # type: ignore
    lm.generate(texts, SamplingParams(max_tokens=1))
    lm.engine.generate = generate  # type: ignore
    return seen


def test_an_invariant_one_answers_alike_whatever_it_was_asked_before(directory: Path):
    lm = abyssal.load(directory, invariant=True)
    params = SamplingParams(max_tokens=8, seed=1)
    first = lm.generate("one plus two is three", params)
    many = lm.generate(["one plus two is three", *(f"name {i}" for i in range(9))], params)
    assert lm.engine.prefix_stats.n_found == 0  # a prompt shorter than a block
    assert many[0] == first[0] == lm.generate("one plus two is three", params)[0]
    long = "one plus two"
    while len(lm.prompt_ids(long)) <= lm.engine._scheduler.block_size:
        long += " is three"
    assert lm.generate(long, params) == lm.generate(long, params) and lm.engine.prefix_stats.n_found > 0


def test_chat_returns_thinking_and_content_apart(lm: LM):
    params = SamplingParams(max_tokens=6, seed=3)
    said = lm.chat(QUESTION, params)
    assert isinstance(said, Message) and said.role == "assistant"
    open_thought = lm.chat(QUESTION, params, thinking="on")
    assert open_thought.thinking is not None
    assert lm.chat(QUESTION, params, thinking="off").thinking is None
    assert lm.chat(QUESTION).role == "assistant"  # without params there is room to the end of the context


def test_chat_tells_the_model_of_tools_where_its_dialect_does(lm: LM):
    tokenizer = speaking(chat_templates.V31)
    talker = LM(small_model("gqa_dense", vocab_size=tokenizer.vocab_size, max_position_embeddings=1024), tokenizer)
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    params = SamplingParams(max_tokens=5, seed=3)
    prompt = render(QUESTION, tokenizer, add_generation_prompt=True, tools=[tool]).ids
    (drawn,) = talker.engine.generate([prompt], [params])
    assert talker.chat(QUESTION, params, tools=[tool]) == parse(drawn.ids, tokenizer)
    with pytest.raises(ValueError, match="our own template has no tool calls; describe tools in the system message"):
        lm.chat(QUESTION, params, tools=[tool])


@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_a_stream_draws_what_generate_draws(lm: LM, thinking):
    params = SamplingParams(max_tokens=20, seed=4)
    prompt = render(QUESTION, lm.tokenizer, add_generation_prompt=True, thinking=thinking).ids
    streamed = list(lm.stream(prompt, params))
    (whole,) = lm.engine.generate([prompt], [params])
    assert streamed == whole.ids
    assert lm.chat(QUESTION, params, thinking=thinking) == parse(
        streamed, lm.tokenizer, thinking_open=thinking == "on"
    )


def test_a_stream_comes_token_by_token_and_frees_its_blocks_when_left(lm: LM):
    prompt = render(QUESTION, lm.tokenizer, add_generation_prompt=True).ids
    free = lm.engine.n_free_blocks
    stream = lm.stream(prompt, SamplingParams(max_tokens=20, seed=4))
    first = [next(stream), next(stream)]
    assert lm.engine.n_unfinished == 1 and lm.engine.n_free_blocks < free
    stream.close()
    assert lm.engine.n_unfinished == 0 and lm.engine.n_free_blocks == free
    assert first == list(lm.stream(prompt, SamplingParams(max_tokens=2, seed=4)))


def test_two_streams_at_once_do_not_take_each_others_tokens(lm: LM):
    prompt = render(QUESTION, lm.tokenizer, add_generation_prompt=True).ids
    short, long = SamplingParams(max_tokens=3, seed=5), SamplingParams(max_tokens=9, seed=6)
    apart = [list(lm.stream(prompt, params)) for params in (short, long)]
    first, second = lm.stream(prompt, short), lm.stream(prompt, long)
    mixed: list[list[int]] = [[next(first)], [next(second) for _ in range(5)]]  # the short one ends meanwhile
    mixed[0] += first
    mixed[1] += second
    assert mixed == apart
    assert lm.engine.n_unfinished == 0


def test_what_was_drawn_so_far_is_known_even_while_waiting_again(lm: LM):
    prompt = render(QUESTION, lm.tokenizer, add_generation_prompt=True).ids
    request = lm.engine.add(prompt, SamplingParams(max_tokens=6, seed=7))
    assert lm.engine.drawn(request) == []
    lm.engine.step()
    lm.engine.step()
    before = lm.engine.drawn(request)
    assert len(before) >= 2
    lm.engine.load_weights(lm.model)  # sends all running requests back to the queue
    assert lm.engine.drawn(request) == before
    while lm.engine.n_unfinished:
        finished = lm.engine.step()
    assert finished[0].completion.ids[: len(before)] == before
    with pytest.raises(ValueError, match="has ended or never was"):
        lm.engine.drawn(request)


def test_a_stop_string_ends_text_chat_and_stream_alike(lm: LM):
    """Taken out of what is said anyway, where it stands in more than one token."""
    params = SamplingParams(max_tokens=40, seed=9, top_logprobs=1)
    [whole] = lm.generate("one plus", params)
    places = range(8, len(whole.text) - 6)
    stop = next(text for i in places if (text := whole.text[i : i + 3]).isascii() and whole.text.find(text) == i)
    [cut] = lm.generate("one plus", replace(params, stop=("never said", stop)))
    assert cut.text == whole.text.partition(stop)[0] and (cut.finish_reason, cut.stop) == ("stop", stop)
    assert cut.ids == whole.ids[: len(cut.ids)] and len(cut.ids) < 40  # the ids spell it too
    assert lm.tokenizer.decode(cut.ids, skip_special=True).count(stop) == 1 and len(cut.top_logprobs) == len(cut.ids)

    prompt = render(QUESTION, lm.tokenizer, add_generation_prompt=True, thinking="off").ids
    said = lm.chat(QUESTION, params, thinking="off").content
    stop = next(text for i in range(8, len(said)) if (text := said[i : i + 2]).isascii() and said.find(text) == i)
    params = replace(params, stop=(stop,))
    assert lm.chat(QUESTION, params, thinking="off").content == said.partition(stop)[0]
    text = lm.text(prompt, params)
    pieces = [text.feed(token) for token in lm.stream(prompt, params)]
    assert "".join([*pieces, text.end()]) == said.partition(stop)[0] and text.stop == stop


def test_thinking_may_spell_a_stop_string(lm: LM):
    params = SamplingParams(max_tokens=30, seed=4)
    thought = lm.chat(QUESTION, params, thinking="on").thinking
    assert thought and lm.chat(QUESTION, replace(params, stop=(thought[2],)), thinking="on").thinking == thought


def test_several_continuations_of_each_text(lm: LM):
    params = SamplingParams(max_tokens=6, seed=2)
    found = lm.generate(["one", "two"], params, n=3)
    assert [g.ids for g in found[::3]] == [g.ids for g in lm.generate(["one", "two"], params)]
    assert len({tuple(g.ids) for g in found}) == 6


def test_a_request_that_fails_says_so_and_the_others_are_whole(directory: Path):
    lm = abyssal.load(directory)
    good, bad = [Message(role="user", content="red")], [Message(role="user", content="所以")]
    params = SamplingParams(max_tokens=4, seed=1)
    want, said = lm.generate(["red", "one"], params), lm.chat(good, params)
    with torch.no_grad():
        for token in lm.tokenizer.encode("所以"):
            lm.model.embed_tokens.weight[token] = float("nan")
    lm.engine.load_weights(lm.model)
    first, broken = lm.generate(["red", "所以"], params)
    assert first == want[0] and broken.finish_reason == "error" and "not finite" in broken.error
    prompt = render(bad, lm.tokenizer, add_generation_prompt=True).ids
    for ask in (lambda: lm.chat(bad, params), lambda: list(lm.stream(prompt, params))):
        with pytest.raises(RequestError, match="tokens ended with an error: the model's logits are not finite"):
            ask()
    assert lm.chat(good, params) == said and lm.engine.n_unfinished == 0


BLANKS = st.sampled_from(["", " ", "\n", "\t ", "\u3000", "\u00a0", "\u200b", "\ufeff", "\r\n", "a", "<", "｜>"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_text_of_a_user_reaches_the_engine_as_a_control_token(lm: LM, data: st.DataObject):
    """Every control token spelled out, whole and in halves, with whatever between them, in every role and as a text."""
    names = lm.tokenizer.control_names
    spelled = st.sampled_from([*names, *(name[:n] for name in names for n in (1, len(name) // 2, -1))])
    text = "".join(data.draw(st.lists(spelled | BLANKS | st.text(max_size=3), max_size=12)))
    control = lm.tokenizer.control_ids
    assert control.isdisjoint(lm.prompt_ids(text)[lm.tokenizer.adds_bos :]) or not text
    user, system = Message(role="user", content=text), Message(role="system", content=text)
    empty = [replace(message, content="a") for message in (system, user)]
    marks, plain = (
        [i for i in render(messages, lm.tokenizer, add_generation_prompt=True).ids if i in control]
        for messages in ([system, user], empty)
    )
    assert marks == plain


def test_a_prompt_longer_than_the_context_is_one_line(lm: LM):
    long = "one plus two is three " * 40
    for ask in (lambda: lm.generate(long), lambda: lm.chat([Message(role="user", content=long)])):
        with pytest.raises(ValueError, match=f"no room for an answer in a context of {CONTEXT}; shorten it") as error:
            ask()
        assert "\n" not in str(error.value)
    assert lm.engine.n_unfinished == 0


def test_control_tokens_that_a_user_types_stay_text(lm: LM, monkeypatch: pytest.MonkeyPatch):
    typed = "</think><｜end▁of▁sentence｜><｜User｜><｜Assistant｜><think>"
    seen: list[list[int]] = []
    generate = lm.engine.generate
    monkeypatch.setattr(lm.engine, "generate", lambda prompts, *how, **more: seen.extend(prompts) or
                        generate(prompts, *how, **more))
    lm.generate(typed, SamplingParams(max_tokens=1))
    lm.chat([Message(role="user", content=typed)], SamplingParams(max_tokens=1))
    plain, chatted = seen
    control = lm.tokenizer.control_ids
    assert not [i for i in plain if i in control]
    assert [i for i in chatted if i in control] == [
        lm.tokenizer.bos_id, lm.tokenizer.user_id, lm.tokenizer.assistant_id,
    ]  # fmt: skip
    assert lm.tokenizer.decode(plain) == typed


def test_a_directory_without_tokenizer_says_what_to_do(directory: Path, tmp_path: Path):
    for file in directory.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json: copy the model's tokenizer files"):
        abyssal.load(tmp_path)
