"""Draws ``architecture.svg``: how an image goes through MIMDet. ``make figures`` runs it."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

STYLE = {
    # Text stays text, and ids come from the content: the same script writes the same file everywhere.
    "svg.fonttype": "none",
    "svg.hashsalt": "mimdet",
    "font.family": "sans-serif",
    "font.size": 9,
    "path.simplify": False,
}
CONV, VIT, DECODER, DETECTOR = "#dcecf9", "#fbe3c8", "#e2f0d9", "#ebe1f3"
EDGE, QUIET = "#333333", "#6b6b6b"
SAMPLED = {0, 2, 5, 7, 8, 11, 13, 14}


def box(ax, x, y, width, height, title, text="", color="#ffffff"):
    """A box with a bold title and smaller lines below it."""
    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=EDGE,
            linewidth=1, clip_on=False,
        )
    )  # fmt: skip
    lines = text.split("\n") if text else []
    middle = x + width / 2
    top = y + height / 2 + 0.11 * len(lines)
    ax.text(middle, top, title, ha="center", va="center", weight="bold", clip_on=False)
    for number, line in enumerate(lines, 1):
        ax.text(middle, top - 0.23 * number, line, ha="center", va="center", size=7.5, clip_on=False)


def arrow(ax, start, end, text="", at=None):
    """A straight arrow; its text is above the middle, or ``at`` a place."""
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=EDGE, linewidth=1, shrinkA=0, shrinkB=0,
                        clip_on=False)
    )  # fmt: skip
    if text:
        x, y = at or ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.13)
        ax.text(x, y, text, ha="center", va="center", size=7.5, color=QUIET, clip_on=False)


def tokens(ax, x, y, gap, size=0.17):
    """A grid of 4 x 4 tokens: the sampled ones in the encoder's color, the others in the color ``gap``."""
    for row in range(4):
        for column in range(4):
            fill = VIT if 4 * row + column in SAMPLED else gap
            place = (x + column * size, y + (3 - row) * size)
            ax.add_patch(Rectangle(place, size, size, facecolor=fill, edgecolor=EDGE, linewidth=0.6, clip_on=False))


def draw(path):
    """Write the figure to ``path``."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10.4, 3.5))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, 10.4), ylim=(0, 3.5))
        ax.axis("off")
        ax.add_patch(Rectangle((0, 0), 10.4, 3.5, facecolor="#ffffff", edgecolor="none", clip_on=False))

        box(ax, 0.15, 1.0, 0.9, 1.0, "image", "RGB", "#f4f4f4")
        arrow(ax, (1.05, 1.5), (1.35, 1.5))
        box(ax, 1.35, 1.0, 1.3, 1.0, "ConvStem", "4 stages, trained\nfrom scratch", CONV)
        arrow(ax, (2.65, 1.5), (3.05, 1.5))
        tokens(ax, 3.05, 1.16, "#ffffff")
        ax.text(3.39, 0.93, "tokens, 1/16", ha="center", size=7.5, color=QUIET, clip_on=False)
        ax.text(3.39, 2.0, "keep ratio 0.5", ha="center", size=7.5, color=QUIET, clip_on=False)
        arrow(ax, (3.73, 1.5), (4.1, 1.5))
        box(ax, 4.1, 1.0, 1.45, 1.0, "ViT encoder", "MAE pre-trained,\nsampled tokens only", VIT)
        arrow(ax, (5.55, 1.5), (5.9, 1.5))
        tokens(ax, 5.9, 1.16, CONV)
        ax.text(6.24, 2.0, "gaps filled", ha="center", size=7.5, color=QUIET, clip_on=False)
        arrow(ax, (6.58, 1.5), (6.9, 1.5))
        box(ax, 6.9, 1.0, 1.35, 1.0, "MAE decoder", "4 blocks,\nall tokens", DECODER)

        # The stem's own map of tokens fills the gaps that sampling left.
        ax.plot([2.9, 2.9, 6.24], [1.5, 0.55, 0.55], color=EDGE, linewidth=1, linestyle=(0, (3, 2)), clip_on=False)
        arrow(ax, (6.24, 0.55), (6.24, 1.14))
        text = "ConvStem features of the tokens that were not sampled"
        ax.text(4.57, 0.4, text, ha="center", va="center", size=7.5, color=QUIET, clip_on=False)

        # Features for the pyramid.
        box(ax, 8.75, 1.0, 1.5, 2.25, "detector", "FPN\nRPN\nbox and mask heads\n(or Cascade,\nor RetinaNet)", DETECTOR)
        ax.plot([1.75, 1.75], [2.0, 3.05], color=EDGE, linewidth=1, clip_on=False)
        arrow(ax, (1.75, 3.05), (8.75, 3.05), "c2, stride 4", (3.39, 3.18))
        ax.plot([2.25, 2.25], [2.0, 2.6], color=EDGE, linewidth=1, clip_on=False)
        arrow(ax, (2.25, 2.6), (8.75, 2.6), "c3, stride 8", (3.39, 2.73))
        arrow(ax, (8.25, 1.7), (8.75, 1.7), "c4", (8.5, 1.83))
        arrow(ax, (8.25, 1.3), (8.75, 1.3), "c5", (8.5, 1.43))
        ax.text(8.5, 0.86, "strides", ha="center", size=7.5, color=QUIET, clip_on=False)
        ax.text(8.5, 0.66, "16, 32", ha="center", size=7.5, color=QUIET, clip_on=False)
        arrow(ax, (9.5, 1.0), (9.5, 0.5))
        ax.text(9.5, 0.33, "boxes, classes, masks", ha="center", va="center", size=8, clip_on=False)

        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
