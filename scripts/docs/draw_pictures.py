"""Draws the README's pictures into docs/: the operator, and the learning curves of the given runs.

python scripts/docs/draw_pictures.py [--workdirs=runs/digits,runs/other]
"""

from absl import app, flags

from halonet_jax.runtime import plots

_WORKDIRS = flags.DEFINE_list("workdirs", [], "Workdirs of the runs whose learning curves to draw.")


def _main(argv):
    plots.halo_attention_diagram("docs/halo_attention.png")
    if _WORKDIRS.value:
        plots.learning_curve(_WORKDIRS.value, "docs/learning_curve.png")


if __name__ == "__main__":
    app.run(_main)
