"""A detector without training: random weights that are sure of their classes, in a folder that `halonet_jax.load` reads."""

from pathlib import Path

import jax
import numpy as np
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax import tasks
from halonet_jax.tasks import detection
from halonet_jax.weights import portable

NAMES = [str(n) for n in range(10)]


def config():
    """The digit scenes' recipe, shrunk further."""
    found = config_lib.sibling(Path(__file__).parents[1] / "configs" / "any.py", "digit_scenes_mask_rcnn")
    found = config_lib.with_argument(found, "smoke")
    found.data.image_size = found.data.scene_size = 48
    found.data.num_eval_scenes = 5
    found.detection.mask_convs, found.detection.box_dense = 0, (8,)
    return found


def variables(task, seed=0):
    """Random, but for norms. Scores spread over 0 to 1."""
    rng, constants = np.random.default_rng(seed), {"scale": 1, "var": 1, "bias": 0, "mean": 0}

    def fill(path, x):
        *_, layer, name = (jax.tree_util.keystr((key,), simple=True) for key in path)
        if name in constants:
            return np.full(x.shape, constants[name], x.dtype)
        gain = {"class": 30}.get(layer, 1)
        return (gain * rng.normal(size=x.shape) / np.sqrt(max(1, x.size // x.shape[-1]))).astype(x.dtype)

    params, state = jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, {"params": params, "batch_stats": state})


def write(folder):
    """Writes the folder and returns its path."""
    made = config()
    about = {"class_names": NAMES, "preprocessing": detection._preprocessing(made)}
    figures = {"box_ap": 0.25, "box_ap_large": -1.0, "count": 5}
    content = portable.Portable(made, about, 7, "raw", figures)
    portable.write(epath.Path(folder), content, variables(tasks.make_task(made, about)))
    return str(folder)
