"""Draw docs/way.svg, the picture of the way in the README: python docs/way.py"""

from pathlib import Path

STAGES = [
    ("tokenize", "byte-level BPE", ""), ("pretrain", "MLA, MoE, MTP", "base"), ("zero", "GRPO, rules only", "zero"),
    ("cold_start", "readable traces, SFT", "dev1"), ("reason", "GRPO + language", "dev2"),
    ("reject", "rejection sampling, SFT", "dev3"), ("align", "GRPO, all scenarios", "r1"),
    ("distil", "traces into a dense model", "student"),
]  # fmt: skip
# beside distil, from the same student base and in as many seconds
ARMS = [("student_rl", "GRPO, rules only", "student_rl"), ("on_policy", "r1's reverse KL", "student_opd")]
STYLE = """
  .box { fill: #f6f8fa; stroke: #8c959f } .name { font: 600 15px sans-serif; fill: #1f2328 }
  .what { font: 12px sans-serif; fill: #59636e } .leaves { font: 600 13px monospace; fill: #0969da }
  .arrow { stroke: #8c959f; stroke-width: 1.5; fill: none; marker-end: url(#tip) } .tip { fill: #8c959f }
  .again { stroke: #bf8700; stroke-dasharray: 4 3 } .note { font: italic 11px sans-serif; fill: #9a6700 }
  @media (prefers-color-scheme: dark) {
    .box { fill: #161b22; stroke: #57606a } .name { fill: #e6edf3 } .what { fill: #9198a1 } .leaves { fill: #4493f8 }
    .note { fill: #d29922 } }
"""
WIDTH, HEIGHT, GAP_X, GAP_Y, LEFT, TOP = 190, 76, 34, 62, 12, 30


def place(i: int) -> tuple[int, int]:
    """Two rows of four, read like text."""
    return LEFT + i % 4 * (WIDTH + GAP_X), TOP + i // 4 * (HEIGHT + GAP_Y)


def box(at: tuple[int, int], stage: tuple[str, str, str]) -> str:
    (x, y), (name, what, leaves) = at, stage
    below = y + (24 if len(name) + len(leaves) < 18 else 66)  # where there is no room beside the name
    label = f'<text class="leaves" x="{x + WIDTH - 12}" y="{below}" text-anchor="end">{leaves}</text>'
    return (
        f'<rect class="box" x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
        f'<text class="name" x="{x + 12}" y="{y + 24}">{name}</text>{label}'
        f'<text class="what" x="{x + 12}" y="{y + 50}">{what}</text>'
    )


def arrow(i: int) -> str:
    (x, y), (x2, y2) = place(i), place(i + 1)
    if y == y2:
        return f'<path class="arrow" d="M{x + WIDTH} {y + HEIGHT / 2} H{x2 - 6}"/>'
    middle = y + HEIGHT + GAP_Y / 2
    return f'<path class="arrow" d="M{x + WIDTH / 2} {y + HEIGHT} V{middle} H{x2 + WIDTH / 2} V{y2 - 6}"/>'


def arms() -> list[str]:
    """A third row under align and distil: r1 teaches on_policy, and both share distil's student base."""
    (x2, y), (x, _) = place(6), place(7)
    below = y + HEIGHT + GAP_Y
    rl, opd = (x, below), (x2, below)
    bend = below - GAP_Y / 2
    return [
        box(rl, ARMS[0]),
        box(opd, ARMS[1]),
        f'<path class="arrow" d="M{x2 + 60} {y + HEIGHT} V{below - 6}"/>',
        f'<path class="arrow again" d="M{x + 120} {y + HEIGHT} V{below - 6}"/>',
        f'<path class="arrow again" d="M{x + 120} {bend} H{x2 + 120} V{below - 6}"/>',
        f'<text class="note" x="{x2 + 66}" y="{y + HEIGHT + 18}">teaches</text>',
        f'<text class="note" x="{x - 10}" y="{below + HEIGHT + 20}" text-anchor="middle">'
        "from distil’s own student base, in as many seconds</text>",
    ]


def from_base(i: int, lift: int) -> str:
    """SFT starts from the base again: R1 throws the RL weights away and keeps what they wrote."""
    (x, y), (x2, y2) = place(1), place(i)
    if y == y2:
        return f'<path class="arrow again" d="M{x + 150} {y} V{y - lift} H{x2 + 60} V{y2 - 6}"/>'
    return f'<path class="arrow again" d="M{x + 120} {y + HEIGHT} V{y2 - 6}"/>'


def main() -> None:
    width, height = LEFT * 2 + 4 * WIDTH + 3 * GAP_X, TOP + 3 * HEIGHT + 2 * GAP_Y + 30
    parts = [box(place(i), stage) for i, stage in enumerate(STAGES)] + arms()
    parts += [arrow(i) for i in range(7)] + [from_base(3, 16), from_base(5, 0)]
    x, y = place(1)
    parts.append(f'<text class="note" x="{x + 160}" y="{y - 19}">SFT from base again</text>')
    tip = (
        '<marker id="tip" markerWidth="7" markerHeight="7" refX="5" refY="3" orient="auto">'
        '<path class="tip" d="M0 0L6 3L0 6z"/></marker>'
    )
    Path(__file__).with_name("way.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="The way">'
        f"<style>{STYLE}</style><defs>{tip}</defs>{''.join(parts)}</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
