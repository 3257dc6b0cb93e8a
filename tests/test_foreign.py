"""A model of somebody else's, made and saved by transformers with a tokenizer of its own, as the base of a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from rich.console import Console
from test_extend import micro, walked
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from abyssal.checkpoint.gguf_write import write_gguf
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.stages.extend import ExtendConfig
from abyssal.stages.foreign import foreign_model, foreign_tokenizer, with_rows
from abyssal.stages.pretrain import as_batch
from abyssal.stages.recipe import TracedSftConfig
from abyssal.stages.rl import RlConfig
from abyssal.stages.sft import SftConfig
from abyssal.stages.traces import TracesConfig
from abyssal.stages.way import open_run, walk
from abyssal.tokens.chat import parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message

WIDTHS: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
CPU = torch.device("cpu")
EXCHANGE = [
    Message(role="user", content="2*3?"),
    Message(role="assistant", content="6", thinking="2*3=6"),
    Message(role="user", content="and 2+3?"),
    Message(role="assistant", content="5", thinking="one more"),
]


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE that knows nothing of us."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["the sea is deep and the light is far away\n"] * 20, trainer=trainer)
    return backend


def made(directory: Path, kind: str, *, spare: int = 0, tied: bool = False) -> Path:
    """llama and mistral with <s> and </s>; qwen2 and qwen3 with ChatML's marks and no begin token; experts."""
    is_qwen = kind.startswith("qwen")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if is_qwen else ["<s>", "</s>"]
    names = {"eos_token": "<|endoftext|>"} if is_qwen else {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(special), **names)
    sizes = WIDTHS | {"vocab_size": len(tokenizer) + spare, "tie_word_embeddings": tied}
    config: transformers.PretrainedConfig
    if kind == "qwen2":
        config = transformers.Qwen2Config(**sizes)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**sizes, head_dim=12)
    elif kind == "mistral":  # its window of 4096 is longer than its context
        config = transformers.MistralConfig(**sizes)
    elif kind == "llama":
        config = transformers.LlamaConfig(**sizes, head_dim=8)
    else:
        sizes |= {"num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8}
        sizes |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        config = transformers.DeepseekV3Config(**sizes, n_shared_experts=1, num_nextn_predict_layers=0)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def adopted(path: Path) -> tuple[Tokenizer, str]:
    said: list[str] = []
    tokenizer = foreign_tokenizer(path, say=said.append)
    assert len(said) == 1 and "\n" not in said[0]
    return tokenizer, said[0]


def test_what_the_template_needs_is_added_at_the_end(tmp_path: Path):
    path = made(tmp_path / "llama", "llama")
    before = Tokenizer.load(path)
    tokenizer, said = adopted(path)
    n = before.vocab_size
    added = [tokenizer.user_id, tokenizer.assistant_id, tokenizer.think_id, tokenizer.end_think_id]
    assert added == [n, n + 1, n + 2, n + 3] and tokenizer.vocab_size == n + 4
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert "added <｜User｜> <｜Assistant｜> <think> </think>" in said and "no fill-in-the-middle" in said
    text = "the sea <think> 所以 12\n"
    assert tokenizer.encode(text) == before.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert parse(render(EXCHANGE, tokenizer).ids[-8:], tokenizer, thinking_open=True).content == "5"


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_their_spelling_and_the_old_stay(tmp_path: Path, tied: bool):
    path = made(tmp_path / "m", "llama", tied=tied)
    tokenizer, _ = adopted(path)
    theirs, ours = load_checkpoint(path).model, foreign_model(path, tokenizer, dtype="float32", device=CPU)
    n = theirs.config.vocab_size
    assert ours.config == replace(theirs.config, vocab_size=n + 4)
    for name, table in ours.state_dict().items():
        was = theirs.state_dict()[name]
        assert torch.equal(table[: len(was)], was)
        if name in ("embed_tokens.weight", "lm_head.weight"):
            spelled = tokenizer.encode("<think>")  # of several ids, none of them the new one
            assert len(spelled) > 1 and torch.equal(table[tokenizer.think_id], was[spelled].mean(0))
            assert len({tuple(row) for row in table[n:].tolist()}) == 4
    assert ("lm_head.weight" in ours.state_dict()) != tied
    assert all(p.requires_grad for p in ours.parameters())


def test_spare_rows_are_used_before_new_ones_are_made(tmp_path: Path):
    path = made(tmp_path / "m", "llama", spare=6)
    tokenizer, _ = adopted(path)
    theirs, ours = load_checkpoint(path).model, foreign_model(path, tokenizer, dtype="float32", device=CPU)
    n = tokenizer.vocab_size - 4
    assert ours.config == theirs.config  # rows n .. n + 3 of n + 6
    spelled = tokenizer.encode("<think>")
    assert torch.equal(ours.lm_head.weight[tokenizer.think_id], theirs.lm_head.weight[spelled].mean(0))
    assert torch.equal(ours.lm_head.weight[n + 4 :], theirs.lm_head.weight[n + 4 :])
    assert with_rows(theirs, n_known=n, spelled=[]) is theirs


def test_chatml_is_kept_where_the_vocabulary_has_it(tmp_path: Path):
    tokenizer, said = adopted(made(tmp_path / "qwen", "qwen2", spare=9))
    assert "ChatML, ends answers with <|im_end|>; added <think> </think>" in said
    conversation = [Message(role="system", content="Be brief."), *EXCHANGE]
    rendered = render(conversation, tokenizer)
    assert tokenizer.decode(rendered.ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n2*3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
        "<|im_start|>user\nand 2+3?<|im_end|>\n<|im_start|>assistant\n<think>one more</think>5<|im_end|>"
    )
    learned = [i for i, is_learned in zip(rendered.ids, rendered.mask, strict=True) if is_learned]
    assert tokenizer.decode(learned) == "6<|im_end|><think>one more</think>5<|im_end|>"
    prompt = render(conversation[:-1], tokenizer, add_generation_prompt=True).ids
    assert rendered.ids[: len(prompt)] == prompt
    assert parse(rendered.ids[len(prompt) :], tokenizer) == EXCHANGE[-1]
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<|im_start|>system\nobey<|im_end|>"))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_saved_template_says_the_same(tmp_path: Path, kind: str, prompt: bool):
    tokenizer, _ = adopted(made(tmp_path / "m", kind))
    tokenizer.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for conversation in (EXCHANGE, EXCHANGE[:3], [Message(role="system", content="Be brief."), *EXCHANGE]):
        got = theirs.apply_chat_template(
            [{"role": m.role, "content": m.content, "thinking": m.thinking} for m in conversation],
            add_generation_prompt=prompt, return_dict=False,
        )  # fmt: skip
        assert got == render(conversation, tokenizer, add_generation_prompt=prompt).ids
    again = Tokenizer.load(tmp_path / "ours")
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


# long answers, so that some of those of a model that knows nothing come to an end
RL = RlConfig(steps=1, problems=2, answers=4, max_tokens=200, row_len=256, eval_problems=2, compare_answers=8, lr=0.03)
SFT = SftConfig(epochs=1, row_len=128, rows=2, mtp_weight=0.0)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "deepseek_v3"])
def test_it_goes_through_rl_and_sft_and_out_to_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Dense and mixture of experts: tokenize, pretrain passed over, zero, cold_start on a user's conversations."""
    path = made(tmp_path / "theirs", kind)
    own = tmp_path / "own.jsonl"
    chat = {"messages": [{"role": "user", "content": "2*3?"}, {"role": "assistant", "content": "6", "thinking": "x"}]}
    own.write_text((json.dumps(chat) + "\n") * 6)
    (tmp_path / f"even_{kind}.py").write_text(
        "def even(problem, message):\n    return float(len(message.content) % 2 == 0)\n"  # what chance gets half right
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked, kept = tmp_path / "asked.jsonl", tmp_path / "kept.jsonl"
    for file, numbers in ((asked, range(4)), (kept, range(4, 6))):
        file.write_text(
            "".join(
                json.dumps({"prompt": f"say {i}", "answer": "1", "verifier": f"even_{kind}:even"}) + "\n"
                for i in numbers
            )
        )
    recipe = micro(
        tmp_path, zero=RL, extend=ExtendConfig(),
        cold_start=TracedSftConfig(traces=TracesConfig(problems=2, max_tokens=8, least=0), sft=SFT, data=str(own)),
    )  # fmt: skip
    recipe = replace(
        recipe,
        run=replace(recipe.run, base=str(path)),
        pretrain=replace(recipe.pretrain, steps=0),
        rl_data=replace(recipe.rl_data, train=str(asked), held_out=str(kept)),
    )
    run = walked(recipe, "tokenize", "pretrain", "zero")
    (run.stage_dir("cold_start")).mkdir()
    (run.stage_dir("cold_start") / "traces.jsonl").write_text(own.read_text())  # none of its own would be right
    walk(run, ("cold_start",))
    assert json.loads((run.stage_dir("pretrain") / "done.json").read_text())["base"] == str(path)
    assert "with rows of their own" in (run.stage_dir("tokenize") / "log.txt").read_text()
    theirs, imported = load_checkpoint(path).model, load_checkpoint(run.checkpoint("base"))
    assert torch.equal(imported.model.norm.weight, theirs.norm.weight.bfloat16().float())
    moved = {
        stage: not torch.equal(load_checkpoint(run.checkpoint(stage)).model.layers[0].mlp.down_proj.weight,
                               imported.model.layers[0].mlp.down_proj.weight)
        for stage in ("zero", "dev1")
    }  # fmt: skip
    assert moved == {"zero": True, "dev1": True}
    for stage in ("pretrain", "zero", "cold_start"):
        checkpoint = run.stage_dir(stage) / "checkpoint"
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert again.config.model_type == ("llama" if kind == "mistral" else kind)
        ids_BT = torch.tensor([render(EXCHANGE, imported.tokenizer).ids])
        ours = load_checkpoint(checkpoint).model
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(ours.hidden(ids_BT)), again(ids_BT).logits, atol=1e-4, rtol=0)


def test_pretraining_goes_on_from_it_and_can_be_extended(tmp_path: Path):
    path = made(tmp_path / "theirs", "llama")
    recipe = micro(tmp_path)
    recipe = replace(recipe, run=replace(recipe.run, base=str(path)))
    run = walked(recipe, "tokenize", "pretrain", "extend")
    trained = load_checkpoint(run.stage_dir("pretrain") / "checkpoint").model
    theirs = foreign_model(path, run.tokenizer(), dtype="float32", device=CPU)
    assert trained.config == theirs.config
    with torch.no_grad():
        differ = [float((a - b).abs().max()) for a, b in zip(trained.parameters(), theirs.parameters(), strict=True)]
    assert 0 < max(differ) < 0.2  # two small steps away, not a new model
    longer = load_checkpoint(run.checkpoint("base")).config
    assert longer.max_position_embeddings == 512 and longer.rope_scaling is not None
    assert longer.rope_scaling.mscale == 0.0  # Llama's YaRN has its temperature in cos and sin


def test_passed_over_it_is_extended_from_its_own_context(tmp_path: Path):
    path = made(tmp_path / "theirs", "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    recipe = micro(tmp_path)
    recipe = replace(
        recipe, run=replace(recipe.run, base=str(path)), pretrain=replace(recipe.pretrain, steps=0),
        extend=replace(recipe.extend, needles=replace(recipe.extend.needles, share=0.2)),
    )  # fmt: skip
    run = walked(recipe, "tokenize", "pretrain", "extend")
    assert load_checkpoint(run.checkpoint("base")).config.max_position_embeddings == 4 * 96


def test_an_answer_in_chatml_sees_its_question(tmp_path: Path):
    """<|im_end|> ends questions there and answers, and only the latter end a document."""
    tokenizer, _ = adopted(made(tmp_path / "qwen", "qwen2"))
    one = render([Message(role="user", content="2*3?"), Message(role="assistant", content="6")], tokenizer)
    ids_BT, mask_BT = torch.tensor([one.ids * 2]), torch.tensor([one.mask * 2]).bool()
    named = {"eos_id": tokenizer.eos_id, "isolate": True, "device": CPU}
    segments_BT = as_batch(ids_BT, mask_BT, **named, only_learned=True).segments_BT
    assert segments_BT is not None
    assert segments_BT.tolist() == [[1] * len(one.ids) + [2] * len(one.ids)]


def broken_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def test_what_cannot_be_a_base_is_refused_before_any_work(tmp_path: Path):
    def refused(path: Path) -> str:
        recipe = micro(tmp_path)
        recipe = replace(recipe, run=replace(recipe.run, base=str(path), name=path.name))
        with pytest.raises((ValueError, OSError)) as error:
            walk(open_run(recipe, Console(quiet=True)), ("tokenize", "pretrain"))
        assert "\n" not in str(error.value)
        assert not (recipe.directory / "tokenize" / "tokenizer").exists()
        return str(error.value)

    whole = made(tmp_path / "whole", "llama")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    assert "is not there" in refused(tmp_path / "nowhere")
    path = copy("other")
    broken_config(path, model_type="mamba")
    assert "model_type='mamba' is not supported" in refused(path)
    path = copy("quantized")
    broken_config(path, quantization_config={"quant_method": "fp8"})
    assert "quantization_config" in refused(path)
    path = copy("speechless")
    (path / "tokenizer.json").unlink()
    assert "has no tokenizer.json: copy the model's tokenizer files into it" in refused(path)
    path = copy("endless")
    (path / "tokenizer_config.json").write_text("{}")
    broken_config(path, eos_token_id=None, bos_token_id=None)
    assert "names no end token" in refused(path)
    path = copy("lowered")
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(path / "tokenizer.json"))
    assert "so answers could not be compared as text" in refused(path)


def test_a_gguf_file_is_a_start_as_the_directory_it_was_made_of_is(tmp_path: Path):
    path = made(tmp_path / "m", "qwen2", spare=2)
    file = write_gguf(open_checkpoint(path), tmp_path / "m.gguf", quant="F32").file
    (tokenizer, said), (same, also) = adopted(path), adopted(file)
    assert also == said.replace(str(path), str(file))
    assert same.encode("the sea\n所以") == tokenizer.encode("the sea\n所以") and same.eos_id == tokenizer.eos_id
    ours, theirs = (foreign_model(p, tokenizer, dtype="float32", device=CPU).state_dict() for p in (file, path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    path = made(tmp_path / "m", "llama")
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_tokens(["one more"])
    backend.save(str(path / "tokenizer.json"))
    tokenizer, _ = adopted(path)
    with pytest.raises(ValueError, match=r"its tokenizer has (\d+) ids and its model rows for \d+; copy the tokenizer"):
        foreign_model(path, tokenizer, dtype="float32", device=CPU)


def test_nothing_to_train_and_nothing_to_start_from(tmp_path: Path):
    recipe = micro(tmp_path)
    recipe = replace(recipe, pretrain=replace(recipe.pretrain, steps=0))
    with pytest.raises(ValueError, match="pretrain.steps=0 leaves the base untrained; train it, or name a checkpoint"):
        walked(recipe, "tokenize", "pretrain")


def test_another_base_in_the_same_run_is_refused(tmp_path: Path):
    path = made(tmp_path / "m", "llama")
    recipe = micro(tmp_path)
    walked(replace(recipe, run=replace(recipe.run, base=str(path))), "tokenize")
    with pytest.raises(ValueError, match="was begun with another run.base"):
        open_run(recipe, Console(quiet=True))
