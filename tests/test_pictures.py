"""The pictures are drawn, and show what they should."""

import json

import cv2
import numpy as np

from halonet_jax.runtime import confusion_picture, plots


def test_halo_attention_diagram(tmp_path):
    plots.halo_attention_diagram(tmp_path / "halo.png", block_size=6, halo_size=1)
    colors = cv2.imread(str(tmp_path / "halo.png")).reshape(-1, 3).astype(int)
    blue, orange = (np.mean((colors[:, a] - colors[:, b]) > 60) for a, b in ((0, 2), (2, 0)))
    assert blue > orange > 0.01  # 36 query pixels to a halo of 28


def test_learning_curve_draws_the_tasks_metric(tmp_path):
    """Orange is the second run, which has an evaluation of that name only."""
    for name, metric in (("first", "top1"), ("second", "mean_error")):
        (tmp_path / name).mkdir()
        reports = [{"step": step, "train/loss": 3 / step, f"eval/{metric}": 40 / step} for step in (1, 2, 3)]
        lines = [json.dumps(report) for report in [*reports, {"step": 4, f"eval/{metric}": None}]]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    right_half = {}
    for metric in ("top1", "mean_error"):
        plots.learning_curve([tmp_path / "first", tmp_path / "second"], tmp_path / "curve.png", metric)
        picture = cv2.imread(str(tmp_path / "curve.png")).astype(int)
        right_half[metric] = picture[:, picture.shape[1] // 2 :].reshape(-1, 3)
    orange = {metric: np.sum(pixels[:, 2] - pixels[:, 0] > 60) for metric, pixels in right_half.items()}
    assert orange["top1"] == 0 and orange["mean_error"] > 100


def test_confusion_of_few_classes_is_a_matrix(tmp_path):
    """Blue where something is: in two and in three of nine cells."""
    blue = {}
    for count in (0, 5):
        names = ["cat", "dog", "$a very long name that does not fit at all"]
        confusion_picture.draw(np.diag([5, count, 1000]), names, "t", tmp_path / "c.png")
        picture = cv2.imread(str(tmp_path / "c.png")).astype(int)
        blue[count] = np.sum(picture[..., 0] - picture[..., 2] > 60)
    assert blue[0] > 1000 and 1.4 < blue[5] / blue[0] < 1.6


def test_confusion_of_many_classes_names_the_most_frequent_errors(tmp_path):
    confusion = np.zeros((1000, 1000), int)
    confusion[3, 4], confusion[4, 3], confusion[999, 0], confusion[7, 7] = 9, 8, 20, 50
    assert confusion_picture.most_confused(confusion, 30) == [(999, 0, 20), (3, 4, 9), (4, 3, 8)]
    names = [f"class {i}" for i in range(1000)]
    for matrix in (confusion, np.zeros_like(confusion)):
        confusion_picture.draw(matrix, names, "t", tmp_path / "c.png")
        picture = cv2.imread(str(tmp_path / "c.png")).astype(int)
        orange = np.sum(picture[..., 2] - picture[..., 0] > 60)
        assert picture.shape[1] > 1000 and (orange > 1000) == matrix.any()


def test_scenes_show_boxes_and_masks_in_colour(tmp_path):
    """A gray image, so that colour is that of its object."""
    image, mask = np.full((40, 40, 3), 90, np.uint8), np.zeros((1, 40, 40), bool)
    mask[0, 10:30, 5:25] = True
    objects = {"boxes": [(10, 5, 30, 25)], "masks": mask, "classes": [7]}
    colored = []
    for example in ({"image": image, "label": 3}, {"image": image, "label": 3, **objects}):
        plots.scenes([("a row", [example, example])], tmp_path / "scenes.png")
        pixels = cv2.imread(str(tmp_path / "scenes.png")).reshape(-1, 3).astype(int)
        colored.append(np.mean(pixels[:, 0] - pixels[:, 2] > 60))
    assert colored[0] == 0 and 0.1 < colored[1] < 0.4
