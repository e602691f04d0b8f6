"""What the data tests share: a config, image files, folders of them."""

import cv2
import ml_collections
import numpy as np
import pytest


@pytest.fixture(scope="session")
def data_config():
    """Makes the config's `data` block, as for the digits, with `overrides`."""

    def make(**overrides):
        config = ml_collections.ConfigDict({
            "source": "digits", "name": "digits", "dir": "", "train_split": "train", "eval_split": "test", "classes": (),
            "label_key": "label",
            "image_size": ml_collections.FieldReference(16, object), "eval_crop": 1.0, "interpolation": "area_bicubic",
            "crop_scale": (0.6, 1.0), "crop_ratio": (0.8, 1.25), "flip": True,
            "randaugment_layers": 1, "randaugment_magnitude": 5.0, "randaugment_ops": (),
            "max_pixels": 2**27, "on_corrupt": "skip", "num_threads": 2, "num_workers": 0, "prefetch": 2,
        })  # fmt: skip
        config.update(overrides)
        return config

    return make


@pytest.fixture(scope="session")
def photo():
    """Makes uint8 [height, width, 3]: smooth colours and a little noise."""

    def make(height=75, width=100, seed=0, noise=10.0):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        smooth = np.stack([np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + c) for c in range(3)], -1)
        return np.clip(127 + 100 * smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def encode():
    """Encodes uint8 RGB as a file's bytes."""

    def run(image, extension=".jpg", **kwargs):
        return cv2.imencode(extension, image[..., ::-1], **kwargs)[1].tobytes()

    return run


@pytest.fixture
def image_folder(tmp_path, photo, encode):
    """Writes `per_class` JPEGs for each class of each split; returns the root."""

    def make(splits=None, per_class=3):
        for split, classes in (splits or {"train": ("ant", "bee"), "val": ("ant", "bee")}).items():
            for class_name in classes:
                folder = tmp_path / "images" / split / class_name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    (folder / f"{i}.jpg").write_bytes(encode(photo(20, 30, seed=i)))
        return tmp_path / "images"

    return make
