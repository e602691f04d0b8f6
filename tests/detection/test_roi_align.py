"""RoIAlign: both forms equal a loop over pixels, and onnxruntime; their gradients agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax.detection import roi_align
from halonet_jax.detection.roi_align import Sampling

STRIDES = (4, 8, 16)
SHAPES = ((11, 17), (6, 9), (3, 5))  # of an image of 44 x 68 px
TPU, DETECTRON2 = Sampling(1, False, "clamp"), Sampling(0, True, "zero")
# y0, x0, y1, x1, all on a map of stride 4.
GOLDEN = np.array([
    [2, 3, 14, 19],
    [-30, -30, -10, -10],  # outside
    [2, 2, 6, 10],  # from pixels' middle to pixels' middle
    [5, 5, 5.5, 5.25],  # smaller than a pixel
    [8, 9, 8, 9],  # no area
    [-6, 10, 12, 40],  # partly outside
    [0, 0, 20, 28],  # the whole map
    [2, 2, 2, 18],  # no height
], np.float32)  # fmt: skip
# onnxruntime 1.32, RoiAlign, coordinate_transformation_mode="half_pixel", spatial_scale=0.25, 2 x 2 bins, of the map in
# `test_equals_onnxruntime`; for sampling_ratio 2 and 0.
ONNXRUNTIME = {
    2: [
        [-0.070337, 0.478067, 0.285555, 0.199188], [0, 0, 0, 0], [0.161153, -0.073384, 0.237132, -0.226077],
        [-0.041357, -0.074679, -0.047194, -0.08232], [0.081291, 0.081291, 0.081291, 0.081291],
        [0.225, 0.223838, 0.424968, 0.388531], [0.149423, 0.496686, 0.120377, 0.470896],
        [0.063063, 0.373154, 0.063063, 0.373154],
    ],
    0: [
        [-0.070337, 0.478067, 0.285555, 0.199188], [0, 0, 0, 0], [0.161153, -0.073384, 0.237132, -0.226077],
        [-0.041357, -0.074679, -0.047194, -0.08232], [0, 0, 0, 0],
        [0.259613, 0.149226, 0.388558, 0.19069], [0.185464, 0.532306, 0.110832, 0.457716], [0, 0, 0, 0],
    ],
}  # fmt: skip


def pixel_loop(maps, rois, strides, size, sampling, base_size):
    """RoIAlign one sample at a time, from the definition."""
    found = np.zeros((len(rois), size, size, maps[0].shape[-1]))
    for r, roi in enumerate(rois.astype(float)):
        side = np.sqrt(max(roi[2] - roi[0], 0) * max(roi[3] - roi[1], 0))
        level = int(np.clip(np.floor(np.log2(max(side, 1e-9) / base_size)) + 4 - np.log2(strides[0]), 0, len(maps) - 1))
        x, (y0, x0, y1, x1) = maps[level], roi / strides[level]
        bins = (y1 - y0) / size, (x1 - x0) / size
        counts = [sampling.samples or min(int(np.ceil(b)), roi_align.MOST_SAMPLES) for b in bins]
        for i, j, k, n in np.ndindex(size, size, *counts):
            at = [
                start + (b + (s + 0.5) / count) * length - 0.5 * sampling.half_pixel
                for start, b, s, count, length in zip((y0, x0), (i, j), (k, n), counts, bins)
            ]
            if sampling.outside == "zero" and any(p < -1 or p > length for p, length in zip(at, x.shape)):
                continue
            at = [min(max(p, 0), length - 1) for p, length in zip(at, x.shape)]
            (top, left), total = map(int, at), 0
            for y, wy in ((top, 1 - at[0] + top), (top + 1, at[0] - top)):
                for z, wz in ((left, 1 - at[1] + left), (left + 1, at[1] - left)):
                    if wy * wz:
                        total += wy * wz * x[y, z]
            found[r, i, j] += total / np.prod(counts)
    return found


@functools.cache
def pyramid(channels=3):
    rng = np.random.default_rng(0)
    maps = tuple(rng.standard_normal((*shape, channels)).astype(np.float32) for shape in SHAPES)
    centres, sides = rng.uniform(-8, 72, (60, 2)), np.exp(rng.uniform(0, np.log(90), (60, 2)))
    return maps, np.concatenate([GOLDEN, np.concatenate([centres - sides / 2, centres + sides / 2], 1).astype(np.float32)])


@functools.partial(jax.jit, static_argnums=0)
def both(form, maps, weights):
    """Features, and the gradient of their weighted sum."""
    features, backward = jax.vjp(form, maps)
    return features, backward(weights)[0]


@pytest.mark.parametrize("sampling", (TPU, DETECTRON2), ids=str)
def test_equals_the_loop_over_pixels(sampling, monkeypatch):
    monkeypatch.setattr(roi_align, "CHUNK_ROWS", 75)  # three chunks of 23 regions, the last one padded
    maps, rois = pyramid()
    options = dict(strides=STRIDES, size=3, sampling=sampling, base_size=24.0)
    expected = pixel_loop(maps, rois, **options)
    assert set(roi_align.roi_levels(rois, STRIDES, 24).tolist()) == {0, 1, 2}
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    gradients = []
    for form in (roi_align.by_einsum, roi_align.by_gather):
        features, gradient = both(lambda maps, form=form: form(maps, rois, **options), maps, weights)
        np.testing.assert_allclose(features, expected, atol=1e-5)
        gradients.append(gradient)
    for by_einsum, by_gather in zip(*gradients):
        assert np.abs(by_einsum).max() > 1
        np.testing.assert_allclose(by_einsum, by_gather, atol=2e-5)


@pytest.mark.parametrize("samples", (2, 0))
@pytest.mark.parametrize("form", ("by_einsum", "by_gather"))
def test_equals_onnxruntime(form, samples):
    y, x = np.mgrid[:5, :7]
    features = (np.sin(1.7 * y + 0.3) * np.cos(2.1 * x) + 0.1 * x).astype(np.float32)[..., None]
    run = jax.jit(functools.partial(getattr(roi_align, form), strides=(4,), size=2, sampling=Sampling(samples, True, "zero")))
    np.testing.assert_allclose(run((features,), GOLDEN).reshape(-1, 4), ONNXRUNTIME[samples], atol=1e-5)


@pytest.mark.parametrize("samples", (1, 3, 0))
@pytest.mark.parametrize("half_pixel", (False, True))
def test_coordinates_are_rounded_as_onnxruntimes(samples, half_pixel):
    """Operation by operation in float32: then features agree on large maps too, where steps of float32 are 1.5e-5 px."""
    rng, size, f = np.random.default_rng(2), 7, np.float32
    start = rng.uniform(100, 200, 300).astype(f)
    end = start + rng.uniform(2, 55, 300).astype(f)
    at, _ = jax.jit(lambda *ends: roi_align._points(*ends, size, Sampling(samples, half_pixel)))(start, end)
    at = np.asarray(at)
    start, end = (x - f(0.5 * half_pixel) for x in (start, end))
    side = (end - start) / f(size)
    for r in range(300):
        count = samples or int(np.ceil(side[r]))
        for i, k in np.ndindex(size, count):
            assert at[r, i, k] == start[r] + f(i) * side[r] + f(k + 0.5) * side[r] / f(count)


def test_levels():
    """Those of 224 px are cut from stride 16; the steps lie at exactly 112, 224 and 448 px."""
    below = lambda side: np.nextafter(np.float32(side), np.float32(0))
    sides = [0, 20, below(112), 112, below(224), 224, below(448), 448, below(896), 896, 2000]
    rois = np.array([[0, 0, side, side] for side in sides] + [[0, 0, 28, 448], [5, 5, 3, 3]], np.float32)
    found = roi_align.roi_levels(rois, (4, 8, 16, 32, 64))
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 1, 0])
    assert roi_align.roi_levels(rois, (4, 8)).max() == 1


def test_edges_differ_between_the_conventions():
    features, roi = np.full((6, 6, 1), 2, np.float32), np.array([[-24, 0, 24, 24]], np.float32)
    for outside, above in (("clamp", 2), ("zero", 0)):
        found = roi_align.by_gather((features,), roi, strides=(4,), size=4, sampling=Sampling(2, True, outside))[0, ..., 0]
        np.testing.assert_array_equal(found[2:], 2)
        np.testing.assert_array_equal(found[:1], above)


def test_regions_get_no_gradient_and_maps_keep_their_dtype():
    features, roi = jnp.ones((4, 4, 1), jnp.bfloat16), jnp.array([[1, 2, 9, 8]], jnp.float32)
    run = jax.jit(lambda features, roi: roi_align.roi_align((features,), roi, (4,), 2, TPU))
    found, backward = jax.vjp(run, features, roi)
    assert found.dtype == jnp.bfloat16 and found.shape == (1, 2, 2, 1)
    to_map, to_roi = backward(found)
    assert to_map.any() and not to_roi.any()
