"""Which curves a stage shows, and in which words. The chapter "How it learned" of the report.

Owns the list of panels and the samples along the way. Does not own drawing (evals/charts.py) nor the page around it.
A panel whose metrics a stage did not record is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from abyssal.evals.charts import Format, Series, line_chart, value_label
from abyssal.evals.run_files import StageFiles
from abyssal.record import human_time


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: (metric, its name in the legend, measured only now and then)."""

    title: str
    lines: tuple[tuple[str, str, bool], ...]
    fmt: Format = "plain"
    log: bool = False


# What a reader looks for first, then what tells whether to trust it, then the machine.
LEARNING = (
    Panel(
        title="Loss (log scale)",
        lines=(("loss", "training", False), ("held_out_loss", "held-out", True), ("mtp_loss", "MTP", False)),
        log=True,
    ),
    Panel(title="Reward", lines=(("reward", "reward", False),)),
    Panel(
        title="Accuracy",
        lines=(("accuracy", "training", False), ("held_out_accuracy", "held-out", True)),
        fmt="percent",
    ),
    Panel(
        title="Share of answers that think",
        lines=(("think_share", "training", False), ("held_out_think_share", "held-out", True)),
        fmt="percent",
    ),
    Panel(
        title="Mean length of an answer, tokens",
        lines=(("length", "all answers", False), ("length_thinking", "given thinking", False)),
    ),
    Panel(
        title="Accuracy given thinking",
        lines=(("accuracy", "all answers", False), ("accuracy_thinking", "given thinking", False)),
        fmt="percent",
    ),
    Panel(
        title="Form and language",
        lines=(("format", "format right", False), ("language", "language kept", False)),
        fmt="percent",
    ),
    Panel(
        title="Mixed-language and cut-off answers",
        lines=(("mixed_share", "mixed language", False), ("truncated_share", "cut off", False)),
        fmt="percent",
    ),
    Panel(
        title="Reward model against hidden truth, deviations",
        lines=(
            ("preference_reward", "reward", False),
            ("preference_truth", "truth", False),
            ("held_out_preference_reward", "held-out reward", True),
            ("held_out_preference_truth", "held-out truth", True),
        ),
    ),
    Panel(
        title="Open requests: the truth",
        lines=(
            ("held_out_helpful_share", "held-out helpful", True),
            ("held_out_safe_share", "held-out safe", True),
            ("preference_agreement", "reward agrees", False),
        ),
        fmt="percent",
    ),
    Panel(
        title="Pairs ordered rightly",
        lines=(
            ("pair_accuracy", "training", False),
            ("held_out_helpfulness_accuracy", "helpfulness", True),
            ("held_out_safety_accuracy", "safety", True),
        ),
        fmt="percent",
    ),
    Panel(
        title="Groups without variance", lines=(("zero_variance_share", "nothing to learn from", False),), fmt="percent"
    ),
    Panel(title="Balance: max violation", lines=(("max_violation", "max violation", False),)),
    Panel(
        title="MTP: second token accepted",
        lines=(("mtp_acceptance", "held-out rows", True), ("held_out_mtp_acceptance", "held-out answers", True)),
        fmt="percent",
    ),
    Panel(
        title="Engine against trainer, |Δ log-prob| (log)",
        lines=(("mismatch_max", "largest", False), ("mismatch_mean", "mean", False)),
        log=True,
    ),
)
TRUST = (
    Panel(title="Entropy, nats a token", lines=(("entropy", "entropy", False),)),
    Panel(title="KL to the reference", lines=(("kl", "KL", False),)),
    Panel(title="Expert flips between engine and trainer", lines=(("flip_share", "flips", False),), fmt="percent"),
    Panel(title="Clipped ratios", lines=(("clip_share", "clipped", False),), fmt="percent"),
    Panel(title="Answers the verifier failed on", lines=(("verifier_errors", "errors", False),)),
)
MACHINE = (
    Panel(title="Gradient norm", lines=(("grad_norm", "gradient norm", False),)),
    Panel(title="Learning rate", lines=(("lr", "learning rate", False),)),
    Panel(title="Balance loss", lines=(("balance_loss", "balance loss", False),)),
    Panel(title="Tokens per second", lines=(("tokens_per_s", "tokens/s", False),)),
    Panel(
        title="Seconds a step",
        lines=(("rollout_s", "rollout", False), ("reward_s", "reward", False), ("update_s", "update", False)),
    ),
    Panel(title="Memory, GB", lines=(("memory_gb", "memory", False),)),
)
STAGE_TITLES = {
    "tokenize": ("Tokenizer", "A byte-level vocabulary, learned from the corpus."),
    "pretrain": ("Pretraining", "Text and problems, most answered at once, some worked out. Leaves base."),
    "extend": (
        "Context extension",
        "YaRN, and pretraining on rows of two, then four times the length. Leaves the base that all later stages take.",
    ),
    "zero": (
        "R1-Zero",
        "GRPO on base with accuracy and format rewards alone, no example of how to think. Leaves zero.",
    ),
    "cold_start": ("Cold start", "Readable traces of zero, filtered, teach base its form. Leaves dev1."),
    "reason": ("Reasoning RL", "GRPO with the reward for staying in the language of the question. Leaves dev2."),
    "reject": ("Rejection sampling and SFT", "The best of dev2, with general data, from base again. Leaves dev3."),
    "align": (
        "RL for all scenarios",
        "Rules where an answer can be checked, in the last part a reward model for the rest. Leaves r1.",
    ),
    "align/reward_model": (
        "Reward model",
        "Which of two answers is better, for helpfulness and for safety: learned from pairs, tried on held-out ones.",
    ),
    "distil": ("Distillation", "Traces of r1 teach a small dense model. Leaves student."),
    "student_rl": ("The student by RL alone", "GRPO on the student's base, for as long as distillation took."),
    "on_policy": (
        "On-policy distillation",
        "The student answers, and at each token learns what r1 would have said there: the loss is the reverse KL, in "
        "nats a token. Leaves student_opd.",
    ),
    "eval": ("Evaluation", "Every checkpoint on problems that no stage could see."),
}


def curves_section(stages: list[StageFiles]) -> Markup:
    """Per stage: what it is, its curves, samples along the way. Empty when nothing was measured yet."""
    parts = [part for part in map(_stage_part, stages) if part]
    if not parts:
        return Markup("")
    note = (
        "Faint lines are the single steps, firm lines a fit over their neighbours, dots are measurements "
        "made now and then. Point at a chart to read its values."
    )
    return Markup('<section id="curves"><h2>How it learned</h2><p class="note">{}</p>{}</section>').format(
        note, Markup("").join(parts)
    )


def stage_title(name: str) -> str:
    if name in STAGE_TITLES:
        return STAGE_TITLES[name][0]
    head, _, branch = name.partition("/")
    title = STAGE_TITLES.get(head, (head.replace("_", " ").capitalize(), ""))[0]
    return f"{title}: {branch.replace('_', ' ')}" if branch else title


def trace_card(
    *, who: str, thinking: Any, content: Any, correct: bool | None = None, note: str = "", asked: str = ""
) -> Markup:
    """One answer: thinking dimmed, the answer bright, right or wrong said in words and not by colour alone."""
    mark = Markup("") if not note else Markup('<span class="mark">{}</span>').format(note)
    if correct is not None:
        kind, words = ("right", "✓ right") if correct else ("wrong", "✗ wrong")
        mark = Markup('<span class="mark {}">{}</span>').format(kind, words)
    question = Markup('<div class="body asked">{}</div>').format(asked.strip()) if asked else Markup("")
    thought = (
        Markup('<div class="think">{}</div>').format(str(thinking).strip("\n"))
        if thinking
        else Markup('<div class="at-once">answered at once</div>')
    )
    answer = str(content or "").strip("\n") or "(no answer)"
    return Markup(
        '<div class="trace"><div class="head"><span>{}</span>{}</div>{}'
        '<div class="body">{}<div class="answer">{}</div></div></div>'
    ).format(who, mark, question, thought, answer)


def _stage_part(stage: StageFiles) -> Markup:
    learning, trust, machine = (_figures(stage, panels) for panels in (LEARNING, TRUST, MACHINE))
    if not (learning or trust or machine):
        return Markup("")
    if len(learning) < 3:  # a short stage has little to show: leave nothing folded
        learning, machine = learning + machine, []
    head = stage.name.split("/")[0]
    parts = [
        Markup('<h3 id="stage-{}">{}</h3>').format(stage.name.replace("/", "-"), stage_title(stage.name)),
        Markup('<p class="note" style="margin-bottom:4px">{}</p>').format(
            STAGE_TITLES.get(stage.name, STAGE_TITLES.get(head, ("", "")))[1]
        ),
        Markup('<p class="stage-facts">{}</p>').format(_facts(stage)),
        Markup('<div class="charts">{}</div>').format(Markup("").join(learning)),
        _folded("Can it be trusted: entropy, KL, clipping, expert flips, the verifier", trust),
        _folded("The machine: gradient norm, learning rate, speed, memory", machine),
        _samples(stage),
    ]
    return Markup("").join(part for part in parts if part)


def _figures(stage: StageFiles, panels: tuple[Panel, ...]) -> list[Markup]:
    figures = []
    for panel in panels:
        lines = [
            Series(name=label, points=stage.series(key), colour=colour, sparse=sparse)
            for colour, (key, label, sparse) in enumerate(panel.lines)
        ]
        if chart := line_chart(lines, title=panel.title, fmt=panel.fmt, log=panel.log):
            figures.append(Markup("<figure>{}</figure>").format(Markup(chart)))
    return figures


def _folded(title: str, charts: list[Markup]) -> Markup:
    if not charts:
        return Markup("")
    return Markup('<details><summary>{}</summary><div class="charts">{}</div></details>').format(
        title, Markup("").join(charts)
    )


def _facts(stage: StageFiles) -> str:
    time_s, tokens = stage.total("time_s"), stage.total("tokens")
    facts = [f"{len(stage.metrics):,} steps"]
    facts += [f"{value_label(tokens, 'plain')} tokens"] if tokens else []
    facts += [human_time(time_s)] if time_s else []
    facts += [] if stage.done is not None else ["not finished"]
    return " · ".join(facts)


def _samples(stage: StageFiles) -> Markup:
    """The first, the middle and the last sample of the stage."""
    samples = [sample for sample in stage.samples if sample.get("content") or sample.get("thinking")]
    if not samples:
        return Markup("")
    chosen = [samples[place] for place in sorted({0, len(samples) // 2, len(samples) - 1})]
    cards = Markup("").join(_sample_card(sample) for sample in chosen)
    return Markup('<details><summary>Samples along the way</summary><div class="traces">{}</div></details>').format(
        cards
    )


def _sample_card(sample: dict[str, Any]) -> Markup:
    reward, correct = sample.get("reward"), sample.get("correct")
    return trace_card(
        who=f"step {sample.get('step', '?')}",
        asked=str(sample.get("problem") or sample.get("prompt") or ""),
        thinking=sample.get("thinking"),
        content=sample.get("content"),
        correct=bool(correct) if isinstance(correct, bool | int | float) else None,
        note=f"reward {reward:.2f}" if isinstance(reward, int | float) else "",
    )
