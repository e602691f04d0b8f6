"""Digit scenes: reproducible to the byte, labels that have one answer, objects as they are drawn, splits without a common scan."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from halonet_jax import data
from halonet_jax.config import knobs
from halonet_jax.data import scenes

ROOT = Path(__file__).parents[2]
HASHES = {
    "most": "6c756b9ceab78b79d84577212fb95c4658d11d96ca323bcf0e17b64ee0a0450e",
    "left": "a03d54135b8065cd92b621cf89a93b3e36029ab861335ef1129cdc16fdc8c36a",
    "largest": "d50eab5e661cf6b8aa46697c5daccb82341d5cc5e46d5a1c21ed8ca934e3dd5e",
}


@pytest.fixture(scope="module")
def opened():
    """Makes sources once for each set of arguments."""
    cache = {}

    def make(split="train", **options):
        key = (split, *sorted(options.items()))
        if key not in cache:
            cache[key] = data.DigitScenes(split, **{"count": 1000, "size": 48, "difficulty": 0.5} | options)
        return cache[key]

    return make


def digest(source, count):
    result = hashlib.sha256()
    for index in range(count):
        example = source[index]
        result.update(example["image"].tobytes() + bytes([example["label"]]))
    return result.hexdigest()


@pytest.mark.parametrize("label", scenes.LABELS)
def test_examples_are_pinned(opened, label):
    """Published accuracies are of these bytes: they must not depend on platform or versions."""
    assert digest(opened(label=label), 1000) == HASHES[label]


def test_examples_are_those_of_another_process_and_of_a_pickled_source(opened):
    code = (
        "import hashlib; from halonet_jax import data\n"
        "s = data.DigitScenes('test', count=50, size=48, difficulty=1.0)\n"
        "print(hashlib.sha256(b''.join(s[i]['image'].tobytes() + bytes([s[i]['label']]) for i in range(50))).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[
        -1
    ]
    source = opened("test", difficulty=1.0)
    assert other == digest(source, 50) == digest(pickle.loads(pickle.dumps(source)), 50)


def test_examples_differ(opened):
    sources = [opened(), opened("test"), opened(seed=1), opened(label="left"), opened(difficulty=0.6)]
    images = [source[index]["image"].tobytes() for source in sources for index in range(100)]
    assert len(set(images)) == len(images)


def test_worker_processes_make_the_same_batches(data_config):
    settings = dict(num_train_scenes=8, num_eval_scenes=8, scene_size=48, scene_label="most", scene_difficulty=0.5)
    config = data_config(source="digit_scenes", image_size=48, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **settings)
    source = data.open_source(config, "test")
    transform = data.ClassificationTransform(config, num_classes=10, training=False)
    batches = [next(data.eval_batches(source, transform, config, batch_size=8)) for config.num_workers in (0, 1)]
    assert all(np.array_equal(batches[0][key], batches[1][key]) for key in ("image", "label", "mask"))
    np.testing.assert_array_equal(batches[0]["image"][3], source[3]["image"])  # not cropped or resized
    assert len(source) == 8 and source.name(3) == "digit_scenes/test[3]"
    with pytest.raises(data.DataError, match="digit_scenes has no split 'val'; .*: set --config.data.eval_split=test"):
        data.open_source(config, "val")


def test_no_held_out_scan_is_in_a_training_scene(opened):
    used = {}
    for split in ("train", "test"):
        source = opened(split, difficulty=1.0)
        used[split] = {row for index in range(500) for row in source.scene(index)["scans"]}
        assert used[split] <= set(source.rows)
        np.testing.assert_array_equal(source._scans, data.digits.scans(split)[0])  # all it draws digits and clutter with
    assert not used["train"] & used["test"] and len(used["train"] | used["test"]) > 1600


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
@pytest.mark.parametrize("label", scenes.LABELS)
def test_labels_have_one_answer_and_all_classes(opened, label, difficulty):
    source, labels = opened(label=label, difficulty=difficulty), []
    for index in range(500):
        scene = source.scene(index)
        boxes, classes = scene["boxes"], scene["classes"]
        labels.append(scene["label"])
        if label == "most":
            counts = np.bincount(classes, minlength=10)
            assert counts.argmax() == labels[-1] and np.sum(counts == counts.max()) == 1 < counts.max()
        elif label == "left":
            top, left, bottom, _ = boxes[0]  # the framed one
            beside = [n for n, (t, _, b, r) in enumerate(boxes) if n and r <= left + 1 and t < bottom and b > top]
            assert classes[max(beside, key=lambda n: boxes[n][3])] == labels[-1]
        else:
            heights = boxes[:, 2] - boxes[:, 0]
            assert classes[heights.argmax()] == labels[-1] and 1 <= len(boxes) <= 5
    counts = np.bincount(labels, minlength=10)
    assert np.sum((counts - 50) ** 2 / 50) < 27.9  # chi-square, p = 0.001


@pytest.mark.parametrize(
    "label, size, difficulty", [("largest", 128, 0.5), ("largest", 128, 0.0), ("most", 64, 1.0), ("left", 48, 0.3)]
)
def test_objects(opened, label, size, difficulty):
    source = opened("test", label=label, size=size, difficulty=difficulty)
    contrasts, sides = [], []
    for index in range(100):
        scene = source.scene(index)
        masks, boxes = scene["masks"], scene["boxes"]
        np.testing.assert_array_equal(scene["image"], source[index]["image"])
        assert scene["label"] == source[index]["label"] and boxes.dtype == np.float32
        assert len(masks) == len(boxes) == len(scene["classes"]) and masks.sum(0).max() == 1
        for mask, box in zip(masks, boxes):
            y, x = np.nonzero(mask)
            assert box.tolist() == [y.min(), x.min(), y.max() + 1, x.max() + 1]
            around = np.zeros_like(mask)
            around[int(box[0]) : int(box[2]), int(box[1]) : int(box[3])] = True
            gray, around = scene["image"].mean(-1), around & ~masks.any(0)
            if around.any():  # a 1 may fill its box
                contrasts.append(abs(gray[mask].mean() - gray[around].mean()))
            sides.append(box[2] - box[0])
        overlap = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        overlap = np.clip(overlap, 0, None).prod(-1)[~np.eye(len(boxes), dtype=bool)]
        assert overlap.max(initial=0) <= size / 2
    assert np.quantile(contrasts, 0.02) > 10
    if label == "largest":
        assert 0.075 * size < min(sides) and max(sides) <= 0.44 * size and max(sides) > 0.4 * size


def test_left_frames_a_digit(opened):
    """Without noise, a line of one colour is under and above it."""
    for index in range(20):
        same = (np.diff(opened(label="left", difficulty=0.0)[index]["image"].astype(int), axis=1) == 0).all(-1)
        assert np.sum([np.all(same[row, x : x + 8]) for row in range(48) for x in range(40)]) >= 2


@pytest.mark.parametrize("label", scenes.LABELS)
@pytest.mark.parametrize("classes", [("3",), ("7", "3"), ("0", "1", "2", "3", "4")])
def test_classes(opened, label, classes):
    source = opened(label=label, classes=classes, difficulty=1.0)
    assert source.class_names == tuple(sorted(classes)) and source.num_classes == len(classes)
    found = {source.scene(index)["label"] for index in range(60)}
    assert found == set(range(len(classes)))
    digits = data.digits.scans("train")[1][np.searchsorted(data.digits.scans("train")[2], source.scene(0)["scans"])]
    assert [source.class_names[n] for n in source.scene(0)["classes"]] == [str(digit) for digit in digits]


@pytest.mark.parametrize("wrong", [{"classes": ("3", "x")}, {"label": "least"}])
def test_mistakes(wrong):
    with pytest.raises(data.DataError, match="x|3|most, left, largest"):
        data.DigitScenes("train", count=1, **wrong)


def test_config_has_all_labels():
    assert knobs.SCENE_LABELS == scenes.LABELS
