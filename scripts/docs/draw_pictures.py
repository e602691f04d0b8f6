"""Draws the pictures of the documentation into docs/: the operator, digit scenes, and the learning curves of the given runs.

python scripts/docs/draw_pictures.py [--workdirs=runs/digits,runs/other]
"""

from absl import app, flags

from halonet_jax import data
from halonet_jax.runtime import plots

_WORKDIRS = flags.DEFINE_list("workdirs", [], "Workdirs of the runs whose learning curves to draw.")


def _main(argv):
    plots.halo_attention_diagram("docs/halo_attention.png")
    plots.scenes(_scenes(), "docs/digit_scenes.png")
    if _WORKDIRS.value:
        plots.learning_curve(_WORKDIRS.value, "docs/learning_curve.png")


def _scenes(columns=8):
    """Rows of `plots.scenes`: both kinds of label, two difficulties, and objects."""
    rows = []
    for label, words in (("most", "most frequent"), ("left", "left of the frame")):
        for difficulty in (0.0, 0.5, 1.0):
            source = data.DigitScenes("train", count=columns, label=label, difficulty=difficulty)
            rows.append((f"{words}\ndifficulty {difficulty:g}", [source[index] for index in range(columns)]))
    source = data.DigitScenes("train", count=columns, size=128, label="largest", difficulty=0.5)
    return [*rows, ("boxes, masks", [source.scene(index) for index in range(columns)])]


if __name__ == "__main__":
    app.run(_main)
