"""A detector for the tests, without training: random weights whose classes are certain, in a folder that `halonet_jax.load` reads."""

from pathlib import Path

import jax
import numpy as np
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax import tasks
from halonet_jax.tasks import detection
from halonet_jax.weights import portable

NAMES = [f"digit {n}" for n in range(10)]


def config():
    found = config_lib.sibling(Path(__file__).parents[1] / "configs" / "any.py", "digit_scenes_mask_rcnn")
    found = config_lib.with_argument(found, "smoke")
    found.model.base_width, found.model.stem_width, found.model.stage_sizes = 8, 8, (1, 1, 1, 1)
    found.detection.width, found.detection.box_dense, found.detection.mask_convs = 8, (16,), 0
    found.data.num_eval_scenes = 5
    return found


def variables(task, seed=0):
    """Random, but for norms."""
    rng, scales = np.random.default_rng(seed), {"scale": 1, "var": 1, "bias": 0, "mean": 0}

    def fill(path, x):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in scales:
            return np.full(x.shape, scales[name], x.dtype)
        gain = {"class": 100, "mask": 4}.get(jax.tree_util.keystr(path[-2:-1], simple=True), 1)
        return (gain * rng.normal(size=x.shape) / np.sqrt(max(1, x.size // x.shape[-1]))).astype(x.dtype)

    params, state = jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, {"params": params, "batch_stats": state})


def write(folder):
    """Writes the folder and returns its path."""
    made = config()
    about = {"class_names": NAMES, "preprocessing": detection._preprocessing(made)}
    task = tasks.make_task(made, about)
    portable.write(epath.Path(folder), portable.Portable(made, about, 7, "raw", {"box_ap": 0.25}), variables(task))
    return str(folder)
