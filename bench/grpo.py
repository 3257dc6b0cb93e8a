"""A whole GRPO step beside TRL's GRPOTrainer: draw answers, score them, update the policy. Samples per second.

    pip install trl==1.16.0 datasets==5.2.0
    python bench/grpo.py [--sizes 0.6M 10M] [--pairs 5] [--dtypes float32 bfloat16] [--threads 2]

Both load one Llama-shaped checkpoint with random weights and see the same prompts in the same order: P questions, G
answers each, every answer exactly as long as allowed since the end token is never drawn. Both score the text by the
same function, keep a reference for the KL, and take one AdamW step. TRL generates with transformers (vLLM has no build
for this machine) in its fastest setting, tried first: without gradient checkpointing, attention, number type and
batch split as they are quickest. Ours is what stages/rl.py does, its measurement of the mismatch between engine and
trainer included (on an eighth of the answers, as by default), which TRL's does not have. Set-up, logging and saving
are timed on neither side. With one thread the time is the processor's, which other jobs on the machine hardly
lengthen; with more it is the wall's.
"""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
import trl
import tyro
from common import append_result
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig as TrlConfig
from trl import GRPOTrainer

from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.data.corpus import open_source
from abyssal.data.problems import ProblemSource, problem_at
from abyssal.engine.engine import Engine
from abyssal.loss.grpo import group_advantages
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer, count_parameters
from abyssal.rollout import agreement, sample_answers
from abyssal.stages.policy_update import GrpoConfig, answer_batch, update_policy
from abyssal.stages.rl import RlConfig
from abyssal.stages.state import TrainState, build_optimizers
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message, Problem, SamplingParams

Size = Literal["0.6M", "10M"]
Precision = Literal["float32", "bfloat16"]
WIDTHS: dict[Size, dict[str, int]] = {
    "0.6M": dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
                 intermediate_size=240),
    "10M": dict(hidden_size=320, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=40,
                intermediate_size=880),
}  # fmt: skip
VOCAB, LR, KL, CLIP = 1024, 1e-5, 0.001, 0.2


@dataclass(frozen=True, kw_only=True)
class Options:
    sizes: tuple[Size, ...] = get_args(Size)
    problems: int = 8  # P
    answers: int = 8  # G
    new_tokens: int = 64
    steps: int = 2  # measured in a row, after one that is not
    pairs: int = 5
    dtypes: tuple[Precision, ...] = get_args(Precision)
    threads: int = 2
    save: bool = True  # append the results to results/grpo.jsonl


def clock(options: Options) -> Callable[[], float]:
    return time.process_time if options.threads == 1 else time.perf_counter


def share_of_vowels(text: str) -> float:
    """The reward of both sides: it differs within every group, so that every answer is learnt from."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def make_checkpoint(directory: Path, size: Size) -> tuple[int, int]:
    """Random weights and a tokenizer, as a directory that both read."""
    texts = [document.text for document in itertools.islice(open_source("python", seed=0).documents(), 60)]
    tokenizer = Tokenizer(train_bpe(texts, vocab_size=VOCAB))
    assert tokenizer.vocab_size == VOCAB, "TRL would draw ids that stand for nothing"
    widths: dict[str, Any] = dict(WIDTHS[size])
    config = ModelConfig(
        vocab_size=VOCAB,
        max_position_embeddings=512,
        attention="gqa",
        feed_forward="dense",
        initializer_range=0.02,
        **widths,
    )
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(directory, model, tokenizer)
    return count_parameters(model)


def our_steps(directory: Path, problems: list[Problem], dtype: Precision, options: Options) -> Callable[[], float]:
    """Returns what takes `options.steps` + 1 steps and says the seconds of one, the first left out."""
    loaded = load_checkpoint(directory, dtype=dtype)
    reference = load_checkpoint(directory, dtype=dtype).model.requires_grad_(False)
    model, tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer is not None
    state = TrainState(model, build_optimizers(model, kind="adamw", lr=0.0, adamw_lr=LR, weight_decay=0.0))
    n_answers = options.problems * options.answers
    engine = Engine(model, eos_ids=(), max_batch=n_answers, record_sampling=True, vocab_size=tokenizer.vocab_size)
    params = SamplingParams(max_tokens=options.new_tokens)
    config, rl = GrpoConfig(clip_low=CLIP, clip_high=CLIP, kl_weight=KL), RlConfig()
    n_compared = n_answers * rl.compare_answers // (rl.problems * rl.answers)  # the share of a step by default
    shuffle = torch.Generator().manual_seed(0)

    def step(k: int) -> None:
        asked = problems[k * options.problems : (k + 1) * options.problems]
        rollouts = sample_answers(engine, tokenizer, asked, answers_per_problem=options.answers, params=params, seed=k)
        assert all(len(r.completion.ids) == options.new_tokens for r in rollouts)
        scores = [share_of_vowels((r.message.thinking or "") + r.message.content) for r in rollouts]
        advantages_PG = group_advantages(torch.tensor(scores).view(options.problems, options.answers))
        completions = [r.completion for r in rollouts]
        agreement(model, completions[:n_compared], replay=True, vocab_size=tokenizer.vocab_size)
        answers = answer_batch(
            rollouts,
            advantages_PG.flatten().tolist(),
            row_len=rl.row_len,
            pad_id=tokenizer.pad_id,
            device=torch.device("cpu"),
            vocab_size=tokenizer.vocab_size,
        )
        update_policy(
            state,
            answers,
            reference=reference,
            config=config,
            lr_fraction=1.0,
            rows_per_pass=rl.rows_per_pass,
            shuffle=shuffle,
        )
        engine.load_weights(model)

    def steps() -> float:
        times, now = [], clock(options)
        for k in range(options.steps + 1):
            began = now()
            step(k)
            times.append(now() - began)
        return statistics.mean(times[1:])

    return steps


@dataclass(frozen=True)
class TheirSetting:
    weights: Precision
    autocast: bool  # to BF16
    attention: str
    split: int  # passes of the update
    cache: str | None = None

    def __str__(self) -> str:
        form = f"{self.weights}{'+autocast' if self.autocast else ''}"
        return f"{form}, {self.attention}, {self.split} passes, {self.cache or 'dynamic'} cache"


class StepTimes(TrainerCallback):
    """Seconds from the beginning of each optimizer step, before its rollout, to its end."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.times = now, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(self.now() - self._began)


def their_steps(
    directory: Path, problems: list[Problem], setting: TheirSetting, options: Options, scratch: Path
) -> Callable[[], float]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    n_answers = options.problems * options.answers
    lengths: set[int] = set()
    scored: list[str] = []

    def reward(completions: list[list[dict[str, str]]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.update(map(len, completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        scored.extend(texts)
        return [share_of_vowels(text) for text in texts]

    prompts = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, setting.weights), attn_implementation=setting.attention
    )
    config = TrlConfig(
        output_dir=str(scratch),
        use_cpu=True,
        bf16=setting.autocast,
        gradient_checkpointing=False,
        per_device_train_batch_size=n_answers // setting.split,
        gradient_accumulation_steps=setting.split,
        num_generations=options.answers,
        max_completion_length=options.new_tokens,
        generation_kwargs={"min_new_tokens": options.new_tokens},
        cache_implementation=setting.cache,
        shuffle_dataset=False,
        max_steps=options.steps + 1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=KL,
        epsilon=CLIP,
        loss_type="grpo",
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    timer = StepTimes(clock(options))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[timer],
    )
    trainer.remove_callback(PrinterCallback)

    def steps() -> float:
        timer.times.clear()
        scored.clear()
        trainer.train()
        assert lengths == {options.new_tokens}, f"TRL drew answers of {lengths} tokens"
        assert len(scored) == n_answers * (options.steps + 1), "TRL drew another number of answers"
        return statistics.mean(timer.times[1:])

    return steps


def check_prompts(directory: Path, problems: list[Problem]) -> None:
    """Both sides must begin with the same ids."""
    theirs, ours = AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
    for problem in problems:
        a = theirs.apply_chat_template([{"role": "user", "content": problem.prompt}], add_generation_prompt=True)
        b = render([Message(role="user", content=problem.prompt)], ours, add_generation_prompt=True).ids
        assert list(a["input_ids"]) == b, "the prompts differ"


def settings_to_try(dtype: Precision) -> list[TheirSetting]:
    """In `dtype`: FP32 throughout, or BF16 as weights, by autocast, or both.

    transformers' continuous batching is not among them: on a CPU it had not ended one step after 20 minutes.
    """
    forms = [(dtype, False)] if dtype == "float32" else [(dtype, False), (dtype, True), ("float32", True)]
    found = [TheirSetting(weights, autocast, "sdpa", 1) for weights, autocast in forms]  # type: ignore[arg-type]
    first = found[0]
    return [
        *found,
        TheirSetting(first.weights, first.autocast, "eager", 1),
        TheirSetting(first.weights, first.autocast, "sdpa", 4),
        TheirSetting(first.weights, first.autocast, "eager", 4),
        TheirSetting(first.weights, first.autocast, "sdpa", 1, cache="static"),
    ]


def fastest_setting(directory: Path, problems: list[Problem], dtype: Precision, options: Options) -> TheirSetting:
    times: dict[TheirSetting, float] = {}
    for setting in settings_to_try(dtype):
        try:
            with tempfile.TemporaryDirectory() as scratch:
                times[setting] = their_steps(directory, problems, setting, options, Path(scratch))()
            print(f"  TRL {setting}: {1000 * times[setting]:.0f} ms a step", flush=True)
        except Exception as error:  # whatever a setting raises, it is no candidate here, and says why
            said = str(error).strip().splitlines() or [""]
            print(f"  TRL {setting}: not possible here ({type(error).__name__}: {said[0][:100]})", flush=True)
    return min(times, key=times.__getitem__)


def measure(size: Size, dtype: Precision, options: Options) -> dict[str, object]:
    n_answers = options.problems * options.answers
    source = ProblemSource(families={"chain": 1.0}, levels=(4, 4), languages={"en": 1.0})
    problems = [problem_at(source, 0, i) for i in range(options.problems * (options.steps + 1))]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        total, active = make_checkpoint(directory, size)
        print(f"{size}: {total / 1e6:.2f}M parameters, {dtype}", flush=True)
        check_prompts(directory, problems)
        setting = fastest_setting(directory, problems, dtype, options)
        ours = our_steps(directory, problems, dtype, options)
        theirs = their_steps(directory, problems, setting, options, Path(folder) / "trl")
        ours()
        theirs()
        pairs = []
        for pair in range(options.pairs):
            pairs.append((n_answers / ours(), n_answers / theirs()))
            a, b = pairs[-1]
            print(f"  pair {pair + 1} of {options.pairs}: {a:.1f} and {b:.1f} samples/s, {a / b:.2f} times", flush=True)
    ratios = [a / b for a, b in pairs]
    return {
        "size": size,
        "parameters": total,
        "active": active,
        "dtype": dtype,
        "problems": options.problems,
        "answers": options.answers,
        "new_tokens": options.new_tokens,
        "pairs": options.pairs,
        "clock": "processor" if options.threads == 1 else "wall",
        "cores": len(os.sched_getaffinity(0)),
        "trl": trl.__version__,
        "theirs_setting": str(setting),
        "ours_samples_per_s": [a for a, _ in pairs],
        "theirs_samples_per_s": [b for _, b in pairs],
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()  # as our commands do; it helps both sides, which share this process
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results = [measure(size, dtype, options) for size in options.sizes for dtype in options.dtypes]
    print(
        f"\nGRPO step, {options.problems} x {options.answers} answers of {options.new_tokens} tokens, "
        f"{options.threads} threads: samples/s"
    )
    print(f"{'size':>6} {'dtype':>9} {'ours':>8} {'TRL':>8} {'ratio':>6}   range        TRL's setting")
    for r in results:
        ours, theirs = r["ours_samples_per_s"], r["theirs_samples_per_s"]
        print(
            f"{r['size']:>6} {r['dtype']:>9} {max(ours):8.1f} {max(theirs):8.1f} {r['ratio']:6.2f}"  # type: ignore[call-overload]
            f"   {r['ratio_min']:.2f}..{r['ratio_max']:.2f}   {r['theirs_setting']}"
        )
        if options.save:
            append_result("grpo", r)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
