"""The loader's law: a batch is a function of its step alone; every example counts; faults are named."""

import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from halonet_jax import data


class Numbered:
    """n images of one gray level each, numbered; those in `broken` don't decode."""

    class_names = tuple("abcde")

    def __init__(self, n, broken=(), label=lambda i: i % 5):
        self.n, self.broken, self.label = n, broken, label

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.broken:
            raise self.broken[index] if isinstance(self.broken, dict) else data.CorruptImage("bad bytes")
        return {"image": np.full((8, 8, 3), index, np.uint8), "label": self.label(index)}

    def name(self, index):
        return f"numbered[{index}]"


def train_batches(source, config, **kwargs):
    transform = data.ClassificationTransform(config, num_classes=len(source.class_names), training=True)
    return data.train_batches(source, transform, config, **kwargs)


def eval_batches(source, config, **kwargs):
    transform = data.ClassificationTransform(config, num_classes=len(source.class_names), training=False)
    return data.eval_batches(source, transform, config, **kwargs)


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def numbers(batches):
    return np.concatenate([b["image"][:, 0, 0, 0] for b in batches])


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture
def plain(data_config):
    """No augmentation: an image's number survives."""
    return lambda **kwargs: data_config(flip=False, randaugment_layers=0, image_size=8, **kwargs)


@pytest.fixture(scope="module")
def digits(data_config):
    return data.open_source(data_config(), "train")


@pytest.fixture(scope="module")
def reference(digits, data_config):
    """Augmented batches of 48: two epochs of 29.9 steps and a little more."""
    return take(train_batches(digits, data_config(), batch_size=48, seed=1), 62)


# --- training


def test_batches_are_plain_arrays(reference):
    for batch in reference:
        assert batch.keys() == {"image", "label"}
        assert type(batch["image"]) is type(batch["label"]) is np.ndarray
        assert batch["image"].shape == (48, 16, 16, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (48,) and batch["label"].dtype == np.int32
        assert batch["image"].flags.c_contiguous


@pytest.mark.parametrize("step", [1, 29, 30, 59])
def test_starting_at_a_step_gives_its_batch(digits, data_config, reference, step):
    loader = train_batches(digits, data_config(), batch_size=48, seed=1, start_step=step)
    assert_same(take(loader, 2), reference[step : step + 2])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_out_the_batch(digits, data_config, reference, count):
    parts = [
        take(train_batches(digits, data_config(), batch_size=48, seed=1, process_index=p, process_count=count), 3)
        for p in range(count)
    ]
    joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in ("image", "label")} for i in range(3)]
    assert_same(joined, reference[:3])


@pytest.mark.parametrize("how", [{"num_threads": 1}, {"num_threads": 7, "prefetch": 1}, {"num_threads": 0}, {"num_workers": 2}])
def test_threads_and_workers_change_nothing(digits, data_config, reference, how):
    loader = train_batches(digits, data_config(**how), batch_size=48, seed=1, start_step=28)
    assert_same(take(loader, 5), reference[28:33])


def test_seeds_differ(digits, data_config, reference):
    other = take(train_batches(digits, data_config(), batch_size=48, seed=2), 1)
    assert not np.array_equal(other[0]["label"], reference[0]["label"])


@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_epochs_are_permutations_without_remainder(plain, n, batch_size):
    loader = train_batches(Numbered(n), plain(), batch_size=batch_size, seed=0)
    order = numbers(take(loader, 6 * n))[: 6 * n].reshape(6, n)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(n), (6, 1)))
    assert n < 7 or len({tuple(epoch) for epoch in order}) == 6


def test_augmentation_differs_between_epochs_and_examples(data_config):
    class Same(Numbered):
        def __getitem__(self, index):
            return {"image": np.arange(3072).astype(np.uint8).reshape(32, 32, 3), "label": 0}

    loader = train_batches(Same(2), data_config(randaugment_layers=0), batch_size=2, seed=0)
    images = np.concatenate([b["image"] for b in take(loader, 4)])
    assert len({image.tobytes() for image in images}) == 8


# --- evaluation


@pytest.mark.parametrize("n, batch_size", [(20, 4), (21, 4), (3, 8), (8, 8)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_eval_counts_every_example_once(plain, n, batch_size, count):
    seen = []
    for p in range(count):
        loader = eval_batches(Numbered(n), plain(), batch_size=batch_size, process_index=p, process_count=count)
        batches = list(loader)
        assert len(batches) == len(loader) == -(-n // batch_size)
        for batch in batches:
            assert batch["image"].shape == (batch_size // count, 8, 8, 3) and batch["mask"].dtype == bool
            assert not batch["image"][~batch["mask"]].any() and not batch["label"][~batch["mask"]].any()
        seen.append(np.stack([np.where(b["mask"], b["image"][:, 0, 0, 0].astype(int), -1) for b in batches]))
    order = np.concatenate(seen, axis=1).ravel()
    np.testing.assert_array_equal(order, np.r_[np.arange(n), np.full(len(order) - n, -1)])


def test_eval_with_workers(data_config):
    source = data.open_source(data_config(), "test")
    loaders = (eval_batches(source, data_config(num_workers=w), batch_size=80) for w in (0, 2))
    first, second = map(list, loaders)
    assert len(first) == 5 and sum(b["mask"].sum() for b in first) == 360
    assert_same(first, second)


# --- corrupt images


@pytest.fixture
def broken_folder(data_config, image_folder):
    """Twelve images, of which three, in different ways, are none."""
    root = image_folder({"train": ("ant", "bee")}, per_class=6)
    whole = (root / "train" / "ant" / "1.jpg").read_bytes()
    (root / "train" / "ant" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "bee" / "0.jpg").write_bytes(b"")
    (root / "train" / "bee" / "5.jpg").write_text("<html>not found</html>")
    return lambda **kwargs: data_config(source="folder", dir=str(root), **kwargs)


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr("absl.logging.warning", lambda message, *args: lines.append(message % args))
    return lines


@pytest.mark.parametrize("workers", [0, 1])
def test_train_replaces_and_names_corrupt_images(broken_folder, warnings, workers):
    config = broken_folder(num_workers=workers)
    source = data.open_source(config, "train")
    loader = train_batches(source, config, batch_size=12, seed=0)
    labels = [sorted(b["label"]) for b in take(loader, 3)]
    # 1 -> 2 (ant), 6 -> 7 (bee), 11 -> 0 (ant)
    assert labels == [[0] * 7 + [1] * 5] * 3
    assert loader.num_corrupt == 9
    assert len(warnings) == 3
    assert [sum(f in line for line in warnings) for f in ("ant/1.jpg", "bee/0.jpg", "bee/5.jpg")] == [1, 1, 1]


def test_count_is_of_batches_handed_out(broken_folder, warnings):
    config = broken_folder()
    loader = train_batches(data.open_source(config, "train"), config, batch_size=12, seed=0)
    assert loader.num_corrupt == 0
    take(loader, 1)
    assert loader.num_corrupt == 3


def test_replacement_obeys_the_law(plain, warnings):
    """Number 3 is corrupt: 4 stands in for it, whatever the processes."""
    source = Numbered(6, broken=(3,))
    whole = numbers(take(train_batches(source, plain(), batch_size=6, seed=0), 2))
    assert sorted(whole[:6]) == [0, 1, 2, 4, 4, 5]
    halves = [
        numbers(take(train_batches(source, plain(), batch_size=6, seed=0, process_index=p, process_count=2), 1))
        for p in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), whole[:6])


def test_eval_masks_corrupt_images(broken_folder, warnings):
    config = broken_folder()
    loader = eval_batches(data.open_source(config, "train"), config, batch_size=8)
    mask = np.concatenate([b["mask"] for b in loader])
    assert np.flatnonzero(~mask).tolist() == [1, 6, 11, 12, 13, 14, 15]
    assert loader.num_corrupt == 3 and len(warnings) == 3


@pytest.mark.parametrize("start", [eval_batches, lambda *a, **k: train_batches(*a, seed=0, **k)])
@pytest.mark.parametrize("workers", [0, 1])
def test_stop_names_the_file_and_the_remedy(broken_folder, start, workers):
    config = broken_folder(on_corrupt="stop", num_workers=workers)
    loader = start(data.open_source(config, "train"), config, batch_size=12)
    with pytest.raises(data.DataError, match=r"(ant/1|bee/0|bee/5)\.jpg: .*--config\.data\.on_corrupt=skip"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_vanished_files_count_as_corrupt(broken_folder, warnings):
    config = broken_folder()
    source = data.open_source(config, "train")
    gone = source.name(3)
    os.remove(gone)
    loader = eval_batches(source, config, batch_size=12)
    assert not next(loader)["mask"][3] and any(gone in line for line in warnings)
    loader.close()


def test_too_many_corrupt_images_stop_the_run(plain, warnings):
    loader = train_batches(Numbered(40, broken=range(40)), plain(), batch_size=2, seed=0)
    with pytest.raises(data.DataError, match="16 images in a row"):
        next(loader)


@pytest.mark.parametrize("label", [-1, 5])
@pytest.mark.parametrize("start", [eval_batches, lambda *a, **k: train_batches(*a, seed=0, **k)])
def test_labels_out_of_range_stop_the_run(plain, label, start):
    loader = start(Numbered(4, label=lambda i: label if i == 2 else 0), plain(), batch_size=4)
    with pytest.raises(data.DataError, match=rf"numbered\[2\]: label {label} is not between 0 and 4"):
        next(loader)


# --- arguments and life


@pytest.mark.parametrize(
    "arguments, config, message",
    [
        ({"batch_size": 6, "process_count": 4}, {}, "batch_size 6 .* 4 processes; use 4"),
        ({"batch_size": 0}, {}, "batch_size 0"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, {}, "process_index 2"),
        ({"batch_size": 4}, {"on_corrupt": "ignore"}, "'ignore'.*skip, stop"),
        ({"batch_size": 4}, {"randaugment_ops": ("rotat",)}, "'rotat'.*rotate"),
    ],
)
@pytest.mark.parametrize("start", [eval_batches, lambda *a, **k: train_batches(*a, seed=0, **k)])
def test_wrong_arguments(data_config, arguments, config, message, start):
    with pytest.raises(data.DataError, match=message):
        start(Numbered(4), data_config(**config), **arguments)


def test_wrong_seed_and_empty_source(data_config):
    with pytest.raises(data.DataError, match="seed -1"):
        train_batches(Numbered(4), data_config(), batch_size=2, seed=-1)
    with pytest.raises(data.DataError, match="no example"):
        eval_batches(Numbered(0), data_config(), batch_size=2)


def test_train_has_no_length(data_config):
    with train_batches(Numbered(4), data_config(), batch_size=2, seed=0) as loader, pytest.raises(TypeError):
        len(loader)


def test_close_ends_the_threads(data_config, digits):
    before = set(threading.enumerate())
    loader = train_batches(digits, data_config(num_threads=3), batch_size=8, seed=0)
    next(loader)
    assert len(set(threading.enumerate()) - before) >= 3
    loader.close()
    loader.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    with pytest.raises(StopIteration):
        next(loader)


class Slow(Numbered):
    """Every read after the first eight takes a minute."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 8:
            time.sleep(60)
        return super().__getitem__(index)


def test_close_ends_workers_that_are_blocked(plain):
    loader = train_batches(Slow(64), plain(num_workers=2), batch_size=4, seed=0)
    next(loader)
    workers = multiprocessing.active_children()
    waiting = threading.Thread(target=lambda: list(loader), daemon=True)
    waiting.start()
    loader.close()
    waiting.join(5)
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers) and not waiting.is_alive()
    assert "halonet_jax loader" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("size", [0, 10**6], ids=["little to read", "more than a pipe holds"])
@pytest.mark.parametrize("when", ["starting", "working"])
def test_a_killed_worker_ends_the_run(plain, size, when):
    source = Numbered(64)
    source.ballast = bytes(size)
    loader = train_batches(source, plain(num_workers=1), batch_size=4, seed=0)

    def kill():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.001)
        workers[0].kill()

    if when == "working":
        next(loader)
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(data.DataError, match="worker process died.*--config.data.num_workers"):
        for _ in range(1000):
            next(loader)
    killer.join()
    loader.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_leaves_without_an_error_ends_the_run(plain):
    class Leaves(Numbered):
        def __getitem__(self, index):
            os._exit(0)

    loader = eval_batches(Leaves(8), plain(num_workers=1), batch_size=4, flag=lambda key: "")
    with pytest.raises(data.DataError, match="worker process died.*free memory") as e:
        next(loader)
    assert "data.num_workers" not in str(e.value)


WITHOUT_JAX = """
import sys
import jax
import numpy as np
import ml_collections
from halonet_jax import data

class Modules:
    class_names = ("absent", "imported")
    __len__ = lambda self: 4
    name = lambda self, index: "modules"
    __getitem__ = lambda self, index: {"image": np.zeros((8, 8, 3), np.uint8), "label": int("jax" in sys.modules)}

if __name__ == "__main__":
    config = ml_collections.ConfigDict(CONFIG)
    transform = data.ClassificationTransform(config, num_classes=2, training=False)
    for config.num_workers in (0, 1):
        print([batch["label"].tolist() for batch in data.eval_batches(Modules(), transform, config, batch_size=4)])
"""


def test_workers_do_not_import_jax(data_config, tmp_path):
    """Even where the program does: it would cost each worker seconds and memory."""
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_JAX.replace("CONFIG", repr(data_config().to_dict())))
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(data.__file__).parents[2])}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60)
    assert result.stdout == "[[1, 1, 1, 1]]\n[[0, 0, 0, 0]]\n", result.stderr


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyError("x"), RuntimeError("terminated unexpectedly"), SystemExit(1)], ids=repr
)
@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_source_raises_is_a_corrupt_image(plain, warnings, error, workers):
    with eval_batches(Numbered(4, broken={2: error}), plain(num_workers=workers), batch_size=4) as loader:
        assert next(loader)["mask"].tolist() == [True, True, False, True] and loader.num_corrupt == 1
    assert type(error).__name__ in warnings[0] and "numbered[2]" in warnings[0]


OPEN_AT_EXIT = """
import ml_collections
from halonet_jax import data
config = ml_collections.ConfigDict({config})
if __name__ == "__main__":
    transform = data.ClassificationTransform(config, num_classes=10, training=True)
    loader = data.train_batches(data.open_source(config, "train"), transform, config, batch_size=4, seed=0)
    next(loader)
    print("handed out")
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_open_loader_ends_quietly_with_its_program(data_config, tmp_path, workers):
    script = tmp_path / "script.py"
    script.write_text(OPEN_AT_EXIT.format(config=data_config(num_workers=workers).to_dict()))
    root = pathlib.Path(data.__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "handed out\n")
    assert "Traceback" not in result.stderr
