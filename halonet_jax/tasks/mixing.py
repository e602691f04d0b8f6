"""Operations on a batch of images on the device: normalisation, mixup and CutMix. Pure JAX, static shapes.

Mixup and CutMix pair neighbours in the batch. The batch is shuffled, so the partner is random. If the batch is sharded,
both partners are on one device.
"""

import jax
import jax.numpy as jnp


def normalize(images, mean, std, dtype=jnp.float32):
    """Returns (images / 255 - mean) / std, computed in float32.

    Args:
        images: uint8 [B, H, W, 3].
        mean: three floats, for red, green and blue in [0, 1].
        std: three floats, likewise.
        dtype: dtype of the result.

    Returns:
        [B, H, W, 3] of `dtype`.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def mixup(rng, images, label_probabilities, alpha: float):
    """Blends each example with its partner (arXiv 1710.09412, equation 2).

    The weight is drawn from Beta(alpha, alpha), once per batch.

    Args:
        rng: JAX key.
        images: float [B, H, W, 3].
        label_probabilities: float [B, K].
        alpha: static, at least 0. 0 mixes nothing.

    Returns:
        (images, label_probabilities), mixed, with the same shapes and dtypes.
    """
    if not alpha:
        return images, label_probabilities
    share = jax.random.beta(rng, alpha, alpha)
    return _blend(share, images), _blend(share, label_probabilities)


def cutmix(rng, images, label_probabilities, alpha: float):
    """Pastes a rectangle of the partner into each example (arXiv 1905.04899, section 3.1).

    One rectangle is drawn per batch. It has the proportions of the image and a uniform centre. Its share of the area is
    1 - Beta(alpha, alpha). It is clipped to the image. Labels mix by the exact share of pixels that stay.

    Args:
        rng: JAX key.
        images: float [B, H, W, 3].
        label_probabilities: float [B, K].
        alpha: static, at least 0. 0 mixes nothing.

    Returns:
        (images, label_probabilities), mixed, with the same shapes and dtypes.
    """
    if not alpha:
        return images, label_probabilities
    size_rng, y_rng, x_rng = jax.random.split(rng, 3)
    side = jnp.sqrt(1 - jax.random.beta(size_rng, alpha, alpha))  # as a share of the image's side
    h, w = images.shape[1:3]
    pasted = _span(y_rng, h, side)[:, None] & _span(x_rng, w, side)[None, :]  # [H, W]
    images = jnp.where(pasted[None, :, :, None], _partner(images), images)
    return images, _blend(1 - jnp.mean(pasted, dtype=jnp.float32), label_probabilities)


def mix(rng, images, label_probabilities, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0):
    """Applies mixup or CutMix. If both alphas are positive, a fair coin chooses one of the two for each batch.

    Args:
        rng: JAX key.
        images: float [B, H, W, 3].
        label_probabilities: float [B, K].
        mixup_alpha: static, at least 0. 0 turns mixup off.
        cutmix_alpha: static, at least 0. 0 turns CutMix off.

    Returns:
        (images, label_probabilities), mixed, with the same shapes and dtypes.
    """
    if not (mixup_alpha and cutmix_alpha):
        images, label_probabilities = mixup(rng, images, label_probabilities, mixup_alpha)
        return cutmix(rng, images, label_probabilities, cutmix_alpha)
    coin_rng, mix_rng = jax.random.split(rng)
    return jax.lax.cond(
        jax.random.bernoulli(coin_rng),
        lambda: mixup(mix_rng, images, label_probabilities, mixup_alpha),
        lambda: cutmix(mix_rng, images, label_probabilities, cutmix_alpha),
    )


def _partner(x):
    """Swaps neighbours, so that partners are on one device. In an odd batch the partner is the previous example."""
    if len(x) % 2:
        return jnp.roll(x, 1, axis=0)
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _blend(share, x):
    share = share.astype(x.dtype)
    return share * x + (1 - share) * _partner(x)


def _span(rng, length: int, side):
    """Returns bool [length]: True on round(side * length) places around a uniform centre, clipped to the ends."""
    run = jnp.round(side * length).astype(jnp.int32)
    start = jax.random.randint(rng, (), 0, length) - run // 2
    places = jnp.arange(length)
    return (places >= start) & (places < start + run)
