"""Draws the pictures of the documentation: `python docs/images/draw.py`. Their figures are those of the layout table.

They are legible on light and dark pages alike: each stands on a card of its own, and follows the reader's scheme.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

from minimax_jax.layout.specs import specs, total_bytes
from minimax_jax.synthetic import REAL

FOLDER = Path(__file__).parent

STYLE = """
svg{--ink:#1f2328;--soft:#59636e;--card:#fff;--line:#d1d9e0;--gate:#0b6bcb;--up:#1a7f5a;--down:#a15c00;--mark:#c2255c}
@media (prefers-color-scheme:dark){svg{--ink:#e6edf3;--soft:#a2abb5;--card:#161b22;--line:#3d444d;
--gate:#6cb2ff;--up:#5fd3a2;--down:#f0b35e;--mark:#ff7ba8}}
text{font-family:ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;font-size:15px;fill:var(--ink)}
.code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:14px}
.head{font-size:17px;font-weight:600}.soft{fill:var(--soft);font-size:13.5px}.mid{text-anchor:middle}
.end{text-anchor:end}
""".strip()

BLOCK = 128
EXPERTS, INTER, HIDDEN = REAL.num_local_experts, REAL.intermediate_size, REAL.hidden_size


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """An SVG document on a card; `title` is what a screen reader says."""
    card = (
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="14" fill="var(--card)" stroke="var(--line)"/>'
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
    return "\n".join([head, f"<style>{STYLE}</style>", card, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, look: str = "") -> str:
    """Words at a baseline; `look` is classes of the style."""
    return f'<text x="{x:g}" y="{y:g}" class="{look}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, color: str, fill: float = 0.12, round_: float = 4) -> str:
    """A rectangle with its outline in a colour of the style."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}"'
    return f'<rect {place} fill="var(--{color})" fill-opacity="{fill}" stroke="var(--{color})"/>'


def grid(x: float, y: float, rows: int, cols: int, cell: float, color: str) -> list[str]:
    """Lines between the cells of a matrix, and its outline."""
    across = "".join(f"M{x:g} {y + row * cell:g}h{cols * cell:g}" for row in range(1, rows))
    down = "".join(f"M{x + col * cell:g} {y:g}v{rows * cell:g}" for col in range(1, cols))
    lines = f'<path d="{across}{down}" stroke="var(--{color})" stroke-opacity=".45" fill="none"/>'
    return [box(x, y, cols * cell, rows * cell, color, round_=0), lines]


def arrow(x: float, y: float, to_x: float, to_y: float, *, both: bool = False) -> list[str]:
    """A horizontal or vertical arrow, with a head at its end, or at both."""
    line = f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="var(--soft)" stroke-width="1.6" fill="none"/>'
    heads = [_head(x, y, to_x, to_y), *([_head(to_x, to_y, x, y)] if both else [])]
    return [line, *heads]


def _head(x: float, y: float, to_x: float, to_y: float) -> str:
    along_x, along_y = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    sides = [(to_x - 9 * along_x + 5 * side * along_y, to_y - 9 * along_y + 5 * side * along_x) for side in (1, -1)]
    points = " ".join(f"{px:g},{py:g}" for px, py in [(to_x, to_y), *sides])
    return f'<polygon points="{points}" fill="var(--soft)"/>'


def blocks() -> str:
    """An FP8 weight, its grid of scales, and how they make a weight."""
    rows, cols, cell = INTER // BLOCK, HIDDEN // BLOCK, 14
    row, col, left, top, right = 4, 9, 40, 92, 480
    parts = [
        text(left, 46, "w1.weight: codes", "head"),
        text(left, 72, f"float8_e4m3fn [{INTER}, {HIDDEN}], in blocks of {BLOCK} x {BLOCK}", "soft"),
        *grid(left, top, rows, cols, cell, "gate"),
        box(left + col * cell, top + row * cell, cell, cell, "mark", 0.9, 0),
        text(right, 46, "w1.weight_scale_inv", "head"),
        text(right, 72, f"float32 [{rows}, {cols}]: one a block", "soft"),
        *grid(right, top, rows, cols, cell / 2, "down"),
        box(right + col * cell / 2, top + row * cell / 2, cell / 2, cell / 2, "mark", 0.9, 0),
        text(right, 214, "It multiplies: a block has one scale for", "soft"),
        text(right, 234, f"all of its {BLOCK * BLOCK:,} codes.", "soft"),
        text(
            left, 302, f"weight[r, c] = bfloat16(float32(code[r, c]) * scale_inv[r // {BLOCK}, c // {BLOCK}])", "code"
        ),
    ]
    return picture(760, 330, "A weight in FP8: a matrix of codes, and one scale for each block of it", parts)


def _stack(x: float, y: float, width: float, height: float, color: str) -> list[str]:
    behind = [box(x + shift, y - shift, width, height, color, 0.05) for shift in (12, 6)]
    front = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="var(--card)"/>'
    return [*behind, front, box(x, y, width, height, color, 0.16)]


def grouping() -> str:
    """Matrices of experts, and the grouped tensors that they become."""
    short, long = 62, 124
    parts = [
        text(40, 44, "Published: a matrix for each expert", "head"),
        text(430, 44, "Native: grouped and transposed", "head"),
        *_stack(40, 84, long, short, "gate"),
        *_stack(40, 178, long, short, "up"),
        *_stack(40, 296, short, long, "down"),
        text(102, 120, "w1  gate", "mid"),
        text(102, 214, "w3  up", "mid"),
        text(71, 350, "w2", "mid"),
        text(71, 370, "down", "mid"),
        text(194, 112, f"[{INTER}, {HIDDEN}]", "code"),
        text(194, 132, "[inter, hidden]", "soft"),
        text(194, 206, f"[{INTER}, {HIDDEN}]", "code"),
        text(194, 226, "[inter, hidden]", "soft"),
        text(132, 350, f"[{HIDDEN}, {INTER}]", "code"),
        text(132, 370, "[hidden, inter]", "soft"),
        *arrow(330, 168, 412, 168),
        *arrow(330, 356, 412, 356),
        *_stack(430, 96, 2 * short, long, "gate"),
        box(430 + short, 96, short, long, "up", 0.3),
        text(461, 164, "gate", "mid"),
        text(523, 164, "up", "mid"),
        text(576, 122, "gate_and_up_projs", "code"),
        text(576, 146, f"[{EXPERTS}, {HIDDEN}, {2 * INTER}]", "code"),
        text(576, 168, "[experts, hidden, 2*inter]", "soft"),
        text(576, 188, "all of gate, then all of up", "soft"),
        *_stack(430, 324, long, short, "down"),
        text(492, 360, "down", "mid"),
        text(576, 340, "down_projs", "code"),
        text(576, 364, f"[{EXPERTS}, {INTER}, {HIDDEN}]", "code"),
        text(576, 386, "[experts, inter, hidden]", "soft"),
    ]
    return picture(800, 450, "How the matrices of experts become two grouped tensors a layer", parts)


def _world(x: float, color: str, name: str, lines: Iterable[str]) -> list[str]:
    rows = [text(x + 115, 92 + 23 * number, line, "soft mid") for number, line in enumerate(lines)]
    return [box(x, 34, 230, 158, color, 0.1, 12), text(x + 115, 65, name, "head mid"), *rows]


def worlds() -> str:
    """The three worlds and what leads from one to another."""
    published = list(specs(REAL).hf("F8_E4M3"))
    nbytes = total_bytes(published)
    parts = [
        *_world(28, "gate", "Hugging Face", [
            f"{len(published):,} tensors, {nbytes / 1e9:.0f} GB",
            "block-scaled FP8, safetensors",
            "one matrix for each expert",
            "local, hub, S3, HTTP",
        ]),
        *_world(365, "up", "JAX", [
            f"{len(specs(REAL).entries):,} arrays, grouped experts",
            "bf16, f32, or FP8 on the device",
            "pytrees, Flax NNX, Orbax",
            "sharded over any mesh",
        ]),
        *_world(702, "down", "NeMo AutoModel", [
            "the same grouped experts",
            "in torch: tensors, DTensors",
            "safetensors, distributed",
            "checkpoints, LoRA",
        ]),
        *arrow(262, 112, 361, 112, both=True),
        *arrow(599, 112, 698, 112, both=True),
        text(311, 96, "from_hf", "code mid"),
        text(311, 138, "to_hf", "code mid"),
        text(648, 96, "native", "code mid"),
        text(648, 138, "names", "code mid"),
        '<path d="M143 192v34a12 12 0 0 0 12 12h650a12 12 0 0 0 12 -12v-34" stroke="var(--soft)" '
        'stroke-width="1.6" fill="none"/>',
        _head(143, 226, 143, 195),
        _head(817, 226, 817, 195),
        text(480, 264, "MiniMaxM2StateDictAdapter, load_into, save_hf", "code mid"),
        text(480, 226, "minimax-jax convert: any of them to any other, streamed", "mid"),
    ]  # fmt: skip
    return picture(960, 288, "Hugging Face, JAX and NeMo AutoModel, and what leads from one to another", parts)


PICTURES = {"blocks.svg": blocks, "grouping.svg": grouping, "worlds.svg": worlds}


def main() -> None:
    """Write them all."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())


if __name__ == "__main__":
    main()
