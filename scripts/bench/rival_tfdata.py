"""A peer of our input pipeline: tf.data, with fused decoding and cropping, and RandAugment of TensorFlow operations.

`decode_and_crop_jpeg` decodes only the crop. Unlike ours, an image is resized in one step, without averaging, however
much it shrinks. That happens in float32, and the result is rounded to uint8. RandAugment has all sixteen operations of
`halonet_jax.data.randaugment` at the same strengths, with nearest pixels and gray fill, and runs only the drawn ones.
Two things differ: blended values are truncated instead of rounded, and random numbers are TensorFlow's.
"""

import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

_GRAY = 128


def batches(c, method):
    """Returns endless batches, `{"image": uint8 [B, S, S, 3], "label": int32 [B]}`.

    Args:
        c: the config's `data` block with `batch` and `cores`, see `bench_input.py`.
        method: of `tf.image.resize`, such as "bicubic".
    """
    names = sorted(os.listdir(os.path.join(c.dir, c.train_split)))
    folders = [os.path.join(c.dir, c.train_split, name) for name in names]
    files, labels = zip(*((os.path.join(folder, f), i) for i, folder in enumerate(folders) for f in os.listdir(folder)))
    options = tf.data.Options()
    options.threading.private_threadpool_size = c.cores
    options.threading.max_intra_op_parallelism = 1
    examples = tf.data.Dataset.from_tensor_slices((list(files), tf.constant(labels, tf.int32))).shuffle(len(files)).repeat()
    rows = examples.map(lambda file, label: {"image": _image(file, c, method), "label": label}, num_parallel_calls=c.cores)
    return rows.batch(c.batch, drop_remainder=True).prefetch(1).with_options(options).as_numpy_iterator()


def _image(file, c, method):
    encoded = tf.io.read_file(file)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(encoded), tf.zeros([1, 0, 4]), min_object_covered=0.0, area_range=c.crop_scale,
        aspect_ratio_range=c.crop_ratio, max_attempts=10, use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    image = tf.image.decode_and_crop_jpeg(encoded, tf.concat([begin[:2], size[:2]], 0), channels=3)
    image = tf.image.resize(image, (c.image_size, c.image_size), method)
    image = tf.saturate_cast(tf.round(image), tf.uint8)
    if c.flip:
        image = tf.image.random_flip_left_right(image)
    for _ in range(c.randaugment_layers):
        branches = [lambda op=op, image=image: op(image, c.randaugment_magnitude) for op in _OPS]
        image = tf.switch_case(tf.random.uniform([], 0, len(_OPS), tf.int32), branches)
    return tf.ensure_shape(image, (c.image_size, c.image_size, 3))


def _auto_contrast(image, m):
    low, high = (tf.cast(f(image, (0, 1)), tf.float32) for f in (tf.reduce_min, tf.reduce_max))
    scale = tf.where(high > low, 255 / tf.maximum(high - low, 1), 1.0)
    return tf.saturate_cast(tf.round((tf.cast(image, tf.float32) - tf.where(high > low, low, 0.0)) * scale), tf.uint8)


def _equalize(image, m):
    return tf.stack([_equalized(channel) for channel in tf.unstack(tf.cast(image, tf.int32), axis=-1)], axis=-1)


def _equalized(channel):
    counts = tf.math.bincount(channel, minlength=256, maxlength=256)
    step = (tf.reduce_sum(counts) - counts[tf.reduce_max(channel)]) // 255
    table = (step // 2 + tf.cumsum(counts, exclusive=True)) // tf.maximum(step, 1)
    table = tf.where(step > 0, tf.clip_by_value(table, 0, 255), tf.range(256))
    return tf.gather(tf.cast(table, tf.uint8), channel)


def _invert(image, m):
    return 255 - image


def _posterize(image, m):
    shift = 8 - min(max(int(0.4 * m), 1), 8)
    return tf.bitwise.bitwise_and(image, tf.constant(256 - (1 << shift) & 255, tf.uint8))


def _solarize(image, m):
    return image if 25.6 * m >= 256 else tf.where(image < int(25.6 * m), image, 255 - image)


def _solarize_add(image, m):
    added = tf.constant(min(int(11 * m), 255), tf.uint8)
    return tf.where(image < 128, image + tf.minimum(added, 255 - image), image)


def _color(image, m):
    return _blend(tf.cast(tf.image.rgb_to_grayscale(image), tf.float32), image, m)


def _contrast(image, m):
    return _blend(tf.round(tf.reduce_mean(tf.cast(tf.image.rgb_to_grayscale(image), tf.float32))), image, m)


def _brightness(image, m):
    return _blend(0.0, image, m)


def _sharpness(image, m):
    kernel = tf.tile(tf.reshape([1.0, 1, 1, 1, 5, 1, 1, 1, 1], (3, 3, 1, 1)) / 13, (1, 1, 3, 1))
    smooth = tf.nn.depthwise_conv2d(tf.cast(image, tf.float32)[None], kernel, (1, 1, 1, 1), "VALID")[0]
    inner = _blend(tf.round(smooth), image[1:-1, 1:-1], m)
    rows = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], 1)  # keep the outermost pixels
    return tf.concat([image[:1], rows, image[-1:]], 0)


def _rotate(image, m):
    angle, x = _sign() * math.radians(3 * m), (image.shape[1] - 1) / 2
    y, cos, sin = (image.shape[0] - 1) / 2, tf.cos(angle), tf.sin(angle)
    return _warp(image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y])


def _shear_x(image, m):
    return _warp(image, [1.0, _sign() * 0.03 * m, 0.0, 0.0, 1.0, 0.0])


def _shear_y(image, m):
    return _warp(image, [1.0, 0.0, 0.0, _sign() * 0.03 * m, 1.0, 0.0])


def _translate_x(image, m):
    return _warp(image, [1.0, 0.0, _sign() * min(10 * m, 0.75 * image.shape[1]), 0.0, 1.0, 0.0])


def _translate_y(image, m):
    return _warp(image, [1.0, 0.0, 0.0, 0.0, 1.0, _sign() * min(10 * m, 0.75 * image.shape[0])])


def _cutout(image, m):
    height, width = image.shape[:2]
    half = round(min(4 * m, 0.5 * min(height, width)))
    covered = [_near(side, half) for side in (height, width)]
    return tf.where((covered[0][:, None] & covered[1][None])[..., None], tf.constant(_GRAY, tf.uint8), image)


def _near(side, half):
    place, centre = tf.range(side), tf.random.uniform([], 0, side, tf.int32)
    return (place >= centre - half) & (place < centre + half)


_OPS = (
    _auto_contrast, _equalize, _invert, _rotate, _posterize, _solarize, _solarize_add, _color, _contrast, _brightness,
    _sharpness, _shear_x, _shear_y, _translate_x, _translate_y, _cutout,
)  # fmt: skip


def _blend(degenerate, image, m):
    factor = 0.1 + 0.18 * m
    return tf.saturate_cast(factor * tf.cast(image, tf.float32) + (1 - factor) * degenerate, tf.uint8)


def _sign():
    return tf.where(tf.random.uniform([]) < 0.5, 1.0, -1.0)


def _warp(image, matrix):
    transformed = tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None], transforms=tf.stack([*matrix, 0.0, 0.0])[None], output_shape=image.shape[:2],
        fill_value=float(_GRAY), interpolation="NEAREST", fill_mode="CONSTANT",
    )  # fmt: skip
    return tf.ensure_shape(transformed[0], image.shape)
