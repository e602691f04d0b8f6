"""Normalisation, mixup and CutMix on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax.tasks.mixing import cutmix, mix, mixup, normalize

B, H, W, K = 6, 24, 36, 4
PARTNERS = [1, 0, 3, 2, 5, 4]


@pytest.fixture
def batch():
    """Image b is constant b + 1, label b % K: what a pixel came from can be read off."""
    images = jnp.broadcast_to(jnp.arange(1.0, B + 1)[:, None, None, None], (B, H, W, 3))
    return images, jax.nn.one_hot(jnp.arange(B) % K, K)


def _partner_share(images, out):
    """Share of the partner in each pixel, from image values: [B, H, W, 3]."""
    own, partner = np.asarray(images), np.asarray(images)[PARTNERS]
    return (np.asarray(out) - own) / (partner - own)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize(dtype):
    images = np.random.default_rng(0).integers(0, 256, (1, 12, 15, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = jax.jit(normalize, static_argnums=(1, 2, 3))(images, mean, std, dtype)
    assert out.dtype == dtype and out.shape == images.shape
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=1e-5 if dtype == jnp.float32 else 0.01)


@pytest.mark.parametrize("function", [mixup, cutmix, mix])
def test_alpha_zero_is_the_identity(batch, function):
    images, labels = function(jax.random.key(0), *batch, 0.0)
    np.testing.assert_array_equal(images, batch[0])
    np.testing.assert_array_equal(labels, batch[1])


@pytest.mark.parametrize("function", [mixup, cutmix, lambda *a: mix(*a, a[-1])])
def test_labels_mix_by_the_share_of_pixels(batch, function):
    jitted = jax.jit(function, static_argnums=3)
    lambdas = []
    for seed in range(30):
        images, labels = jitted(jax.random.key(seed), *batch, 1.0)
        assert images.shape == batch[0].shape and labels.shape == batch[1].shape
        np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-5)
        share = _partner_share(batch[0], images).mean((1, 2, 3))  # [B]
        expected = (1 - share)[:, None] * batch[1] + share[:, None] * np.asarray(batch[1])[PARTNERS]
        np.testing.assert_allclose(labels, expected, atol=1e-5)
        lambdas.append(share[0])
    assert min(lambdas) < 0.2 and max(lambdas) > 0.6  # Beta(1, 1) is uniform


def test_mixup_blends_and_cutmix_pastes_one_rectangle(batch):
    share = _partner_share(batch[0], mixup(jax.random.key(1), *batch, 1.0)[0])
    np.testing.assert_allclose(share, share.flat[0], atol=1e-5)
    for seed in range(20):
        share = _partner_share(batch[0], cutmix(jax.random.key(seed), *batch, 1.0)[0])
        assert set(np.unique(share)) <= {0, 1}
        pasted = share[0, :, :, 0]
        assert (share == pasted[None, :, :, None]).all()
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, np.outer(rows, columns))
        for line in (rows, columns):
            assert np.abs(np.diff(np.pad(line.astype(int), 1))).sum() in (0, 2)


def test_mix_takes_each_half_the_time(batch):
    jitted = jax.jit(mix, static_argnums=(3, 4))
    pasted = []
    for seed in range(100):
        share = _partner_share(batch[0], jitted(jax.random.key(seed), *batch, 0.4, 1.0)[0])
        pasted.append(np.ptp(share) > 0.5)
    assert 30 < sum(pasted) < 70


def test_odd_batches_are_mixed_too(batch):
    images, labels = (x[:5] for x in batch)
    mixed, mixed_labels = mixup(jax.random.key(0), images, labels, 1.0)
    share = (mixed[1, 0, 0, 0] - 2) / (1 - 2)  # image 1 holds twos, its partner ones
    np.testing.assert_allclose(mixed_labels[1], (1 - share) * labels[1] + share * labels[0], atol=1e-5)


def test_mixing_keeps_bfloat16(batch):
    images, labels = mix(jax.random.key(0), batch[0].astype(jnp.bfloat16), batch[1], 0.4, 1.0)
    assert images.dtype == jnp.bfloat16 and labels.dtype == jnp.float32
