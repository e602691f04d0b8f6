"""The pictures are drawn, and show what they should."""

import cv2
import numpy as np

from halonet_jax.runtime import plots


def test_halo_attention_diagram(tmp_path):
    plots.halo_attention_diagram(tmp_path / "halo.png", block_size=6, halo_size=1)
    colors = cv2.imread(str(tmp_path / "halo.png")).reshape(-1, 3).astype(int)
    blue, orange = (np.mean((colors[:, a] - colors[:, b]) > 60) for a, b in ((0, 2), (2, 0)))
    assert blue > orange > 0.01  # 36 query pixels to a halo of 28
