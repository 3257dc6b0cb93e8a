import json

import pytest

from abyssal.data.user_examples import read_conversations, read_user_problems
from abyssal.types import Message, Problem


def file_of(tmp_path, *records):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records))
    return path


def exchange(**answer):
    return {"messages": [{"role": "user", "content": "2*3?"}, {"role": "assistant", "content": "6"} | answer]}


@pytest.mark.parametrize(
    "answer",
    [
        {"thinking": "2*3=6"},
        {"reasoning_content": "2*3=6"},
        {"thinking": "2*3=6", "reasoning_content": "2*3=6"},
        {"content": "<think>2*3=6</think>6"},
        {"thinking": "2*3=6", "reasoning_content": None},
    ],
)
def test_thinking_is_read_in_every_usual_spelling(tmp_path, answer):
    path = file_of(tmp_path, exchange(**answer))
    want = [Message(role="user", content="2*3?"), Message(role="assistant", content="6", thinking="2*3=6")]
    assert read_conversations(path) == [want]


def test_conversations_keep_their_order_and_blank_lines_do_not_count(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    path = file_of(tmp_path, exchange(content="one") | {"id": 7}, "", {"messages": [system, *exchange()["messages"]]})
    first, second = read_conversations(path)
    assert first[1] == Message(role="assistant", content="one")
    assert [message.role for message in second] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r'no "messages"; write'),
        ({"messages": []}, r'no "messages"; write'),
        ({"messages": ["hi"]}, r"message 1: not an object"),
        ({"messages": [{"role": "human", "content": "hi"}]}, r"message 1: role 'human'; use one of system, user"),
        ({"messages": [{"role": "user"}]}, r'message 1: "content" is missing; write a string'),
        ({"messages": [{"role": "user", "content": [1]}]}, r'message 1: "content" is list; write a string'),
        ({"messages": [{"role": "user", "content": "hi"}]}, r"last message is the user's; end with the assistant's"),
        (exchange(tool_calls=[]), r"message 2: unknown key 'tool_calls'; .* take it out"),
        (exchange(thinking="a", reasoning_content="b"), r"message 2: thinking and reasoning_content differ"),
        (exchange(thinking="a", content="<think>b</think>6"), r"message 2: thinking both inside the content"),
        (exchange(content="<think>6"), r"message 2: 1 <think> and 0 </think> in one answer"),
        ({"messages": [{"role": "user", "content": "hi", "thinking": "a"}]}, r"thinking in a user message"),
        ('{"messages": ', r"not JSON"),
    ],
)
def test_a_broken_conversation_names_file_line_and_remedy(tmp_path, record, message):
    path = file_of(tmp_path, exchange(), record)
    with pytest.raises(ValueError, match=r"mine.jsonl:2: .*" + message.removeprefix(".*")) as raised:
        read_conversations(path)
    assert "\n" not in str(raised.value)


def test_a_problem_needs_a_prompt_and_an_answer_only(tmp_path):
    path = file_of(tmp_path, {"prompt": "2*3?", "answer": "6"}, {"prompt": "1/2?", "answer": 0.5})
    assert read_user_problems(path) == [
        Problem(prompt="2*3?", answer="6", key="2*3?"),
        Problem(prompt="1/2?", answer="0.5", key="1/2?"),
    ]


def test_a_problem_may_say_more(tmp_path):
    record = {
        "prompt": "二乘三？", "answer": "6", "language": "zh", "verifier": "mine:check", "family": "sums",
        "level": 2, "key": "2*3", "metadata": {"source": "school"},
    }  # fmt: skip
    assert read_user_problems(file_of(tmp_path, record)) == [Problem(**record)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "6"}, r'"prompt" is missing; write a string'),
        ({"prompt": " ", "answer": "6"}, r"the prompt is empty"),
        ({"prompt": "2*3?"}, r'"answer" is missing'),
        ({"prompt": "2*3?", "answer": True}, r'"answer" is bool'),
        ({"prompt": "2*3?", "answer": "6", "verifer": "a:b"}, r"unknown key 'verifer'; correct it, or move it into"),
        ({"prompt": "2*3?", "answer": "6", "language": "fr"}, r"language 'fr'; use one of en, zh"),
        ({"prompt": "2*3?", "answer": "6", "verifier": "same"}, r"verifier 'same'; use exact, answer, instruction or"),
        ({"prompt": "2*3?", "answer": "6", "verifier": "mine:"}, r"verifier 'mine:'"),
        ({"prompt": "2*3?", "answer": "6", "level": "hard"}, r"level 'hard'; write a whole number"),
        ({"prompt": "2*3?", "answer": "6", "metadata": []}, r"metadata is list"),
        ([1], r"list instead of an object"),
    ],
)
def test_a_broken_problem_names_file_line_and_remedy(tmp_path, record, message):
    path = file_of(tmp_path, {"prompt": "1+1?", "answer": "2"}, record)
    with pytest.raises(ValueError, match=r"mine.jsonl:2: " + message):
        read_user_problems(path)


@pytest.mark.parametrize("read", [read_conversations, read_user_problems])
def test_a_missing_or_empty_file_is_an_error(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="mine.jsonl does not exist; name a file"):
        read(tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match="mine.jsonl holds no"):
        read(file_of(tmp_path, ""))


def test_a_problem_that_stands_twice_is_named_with_both_lines_where_it_must_not(tmp_path):
    again = {"prompt": "two and two?", "answer": "4", "key": "2+2?"}
    path = file_of(tmp_path, {"prompt": "2+2?", "answer": "4"}, "", {"prompt": "1+1?", "answer": "2"}, again)
    assert len(read_user_problems(path)) == 3
    with pytest.raises(ValueError, match=r"mine.jsonl:4: '2\+2\?' stands already at .*mine.jsonl:1; take"):
        read_user_problems(path, distinct=True)
