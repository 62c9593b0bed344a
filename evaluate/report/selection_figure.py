"""The picture of a head selection: which key/value heads of which layers keep every token, and the score of every head."""

import json
from pathlib import Path

from .style import STUDENT_COLOR, drawn, plain


def draw_selection(path: Path) -> Path:
    """
    Draw `selection.json` beside it as `selection.png`: a grid of heads by layers, shaded by the rank of each head, with the
    heads that are kept numbered in their order. Returns the picture's path.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    layers, heads = len(content["scores"]), max(len(row) for row in content["scores"])
    rank = {(layer, head): i for i, (layer, head) in enumerate(content["order"])}
    shades = [[1 - rank.get((layer, head), len(rank)) / len(rank) for layer in range(layers)] for head in range(heads)]
    picture = path.with_suffix(".png")
    with drawn(picture, size=(max(6.0, layers / 4), 1.2 + heads / 3)) as (_, axes):
        axes.imshow(shades, cmap="Blues", aspect="auto", vmin=0, vmax=1.6)
        for i, (layer, head) in enumerate(content["order"][: content["settings"]["heads"]], 1):
            axes.text(layer, head, str(i), ha="center", va="center", color="white", fontsize=8,
                      bbox={"boxstyle": "round,pad=0.2", "color": STUDENT_COLOR})  # fmt: skip
        axes.set_yticks(range(heads))
        plain(axes, x=f"layer (kept by {content['method']}, in order)", y="key/value head", legend=False)
    return picture
