"""Sources: what they hold, and that each mistake gets an error that says what to do."""

import pathlib
import pickle
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from halonet_jax import data
from halonet_jax.data import tfds as records
from halonet_jax.errors import CorruptImage

HERE = pathlib.Path(__file__).parent


def _error(config, split):
    with pytest.raises(data.DataError) as e:
        data.open_source(config, split)
    return str(e.value)


def _transform(config):
    return data.ClassificationTransform(config, num_classes=2, training=False)


def test_unknown_source(data_config):
    assert "tfds, folder, digits, digit_scenes, coco" in _error(data_config(source="hdf5"), "train")


# --- digits


def test_digits_splits_are_disjoint_and_complete(data_config):
    train, test = (data.open_source(data_config(), s) for s in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.num_classes == 10 and train.class_names == tuple("0123456789")
    images = {s[i]["image"].tobytes() for s in (train, test) for i in range(len(s))}
    assert len(images) == 1797


def test_digits_split_is_stratified(data_config):
    def shares(split):
        source = data.open_source(data_config(), split)
        return np.bincount([source[i]["label"] for i in range(len(source))], minlength=10) / len(source)

    np.testing.assert_allclose(shares("train"), shares("test"), atol=0.004)


def test_digits_example(data_config):
    source = data.open_source(data_config(), "test")
    example = source[3]
    assert example["image"].shape == (8, 8, 3) and example["image"].dtype == np.uint8
    assert example["image"].max() == 255 and source.name(3) == "digits/test[3]"


def test_digits_split_is_fixed(data_config):
    source = data.open_source(data_config(), "test")
    assert [source[i]["label"] for i in range(12)] == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2]


def test_digits_unknown_split(data_config):
    assert "'validation'" in (message := _error(data_config(), "validation")) and "train, test" in message


# --- parts of digits and folders


def _subset(config, split="train", **options):
    source = data.open_source(config, split, **options)
    return source, [source[i]["label"] for i in range(len(source))]


def test_classes_are_kept_and_renumbered(data_config, image_folder):
    source, labels = _subset(data_config(classes=("9", "5")))
    whole = np.bincount(_subset(data_config())[1])
    assert source.class_names == ("5", "9") and np.bincount(labels).tolist() == [whole[5], whole[9]]
    root = str(image_folder({"train": ("ant", "bee", "cow"), "val": ("bee", "cow", "ant")}))
    config = data_config(source="folder", dir=root, classes=("cow", "bee"))
    for split in ("train", "val"):
        source, labels = _subset(config, split)
        assert source.class_names == ("bee", "cow") and labels == [0, 0, 0, 1, 1, 1]
        assert pathlib.Path(source.name(3)).parent.name == "cow"
    # As an evaluation opens it, by the classes of the checkpoint, where the train split need not be.
    shutil.rmtree(f"{root}/train")
    assert _subset(config, "val", class_names=("bee", "cow"))[1] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(data.DataError, match="must mean the 1 classes bee, and .* has cow"):
        data.open_source(config, "val", class_names=("bee",))


@pytest.mark.parametrize("classes, message", [(("bea",), "did you mean 'bee'"), (("zebra",), "its classes are ant, bee")])
def test_unknown_classes(data_config, image_folder, classes, message):
    config = data_config(source="folder", dir=str(image_folder()), classes=classes)
    assert f"has {classes[0]!r}" in (found := _error(config, "train")) and message in found
    assert "its classes are 0, 1" in _error(data_config(classes=classes), "train")


def test_tfds_has_no_choice_of_classes(data_config):
    message = _error(data_config(source="tfds", classes=("cat",)), "train")
    assert "data.source=folder, or set data.classes=()" in message and "\n" not in message


@pytest.mark.parametrize("split, count", [
    ("train[:50]", 50), ("train[:10%]", 72), ("train[-10%:]", 72), ("train[700:]", 16), ("train[-13:]", 13), ("train[:]", 716),
    ("train[10%:50%]", 286),
])  # fmt: skip
def test_slices_are_stratified(data_config, split, count):
    classes = ("5", "6", "7", "8", "9")
    source, labels = _subset(data_config(classes=classes), split)
    assert len(labels) == count and source.name(0) == f"digits/{split}[0]"
    assert np.ptp(np.bincount(labels, minlength=5) - count * np.bincount(_subset(data_config(classes=classes))[1]) / 716) < 2
    if split == "train[:50]":
        assert np.bincount(labels).tolist() == [10] * 5


def test_slices_of_a_folder_share_nothing(data_config, image_folder):
    root = image_folder({"train": ("ant", "bee")}, per_class=5)
    config = data_config(source="folder", dir=str(root))
    parts = [data.open_source(config, split) for split in ("train[:60%]", "train[60%:]")]
    names = [[source.name(i) for i in range(len(source))] for source in parts]
    assert [len(part) for part in names] == [6, 4] and len(set(sum(names, []))) == 10
    config.train_split = "train[:4]"
    assert _subset(config, "train[:4]")[1] == [0, 0, 1, 1] and len(data.open_source(config, "train")) == 10
    (root / "train[:1]").mkdir()  # a folder of this name goes first
    shutil.copytree(root / "train" / "bee", root / "train[:1]" / "bee")
    assert _subset(config, "train[:1]")[1] == [1] * 5


@pytest.mark.parametrize("split", ["train[:2000]", "train[0:0]", "train[-2000:]", "train[50%:20%]"])
def test_impossible_slices(data_config, split):
    message = _error(data_config(), split)
    assert "of 1437; set --config.data.eval_split to a part of them, such as 'train[:50%]'" in message
    assert "has no split" in _error(data_config(), split.replace(":", ";"))


# --- folder


def test_folder_holds_every_image_once(data_config, image_folder):
    root = image_folder({"train": ("bee", "ant"), "val": ("bee",)})
    (root / "train" / "ant" / "X.JPEG").write_bytes(b"x")
    (root / "train" / "ant" / "notes.txt").write_bytes(b"x")
    (root / "train" / "ant" / "._0.jpg").write_bytes(b"x")
    (root / "train" / "bee" / "more").mkdir()
    (root / "train" / "bee" / "more" / "y.webp").write_bytes(b"y")
    config = data_config(source="folder", dir=str(root))
    source = data.open_source(config, "train")
    assert source.class_names == ("ant", "bee") and source.num_classes == 2
    names = [pathlib.Path(source.name(i)).relative_to(root / "train").as_posix() for i in range(len(source))]
    assert names == ["ant/0.jpg", "ant/1.jpg", "ant/2.jpg", "ant/X.JPEG"] + [
        "bee/0.jpg", "bee/1.jpg", "bee/2.jpg", "bee/more/y.webp"
    ]  # fmt: skip
    assert [source[i]["label"] for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert source[3]["image"] == b"x"
    # A class that only train has keeps its number in the eval split.
    assert {data.open_source(config, "val")[i]["label"] for i in range(3)} == {1}


@pytest.mark.parametrize("have, want", [("val", "validation"), ("validation", "val"), ("test", "validation")])
def test_folder_suggests_the_eval_split_there_is(data_config, image_folder, have, want):
    root = image_folder({"train": ("ant",), have: ("ant",)})
    assert f"--config.data.eval_split={have}" in _error(data_config(source="folder", dir=str(root)), want)


def test_folder_suggests_the_train_split_there_is(data_config, image_folder):
    config = data_config(source="folder", dir=str(image_folder({"training": ("ant",)})))
    assert "--config.data.train_split=training" in _error(config, "train")


@pytest.mark.parametrize("directory", ["", "/no/such/folder"])
def test_folder_missing(data_config, directory):
    assert "--config.data.dir" in _error(data_config(source="folder", dir=directory), "train")


def test_folder_mistakes(data_config, image_folder):
    root = image_folder({"train": ("ant", "bee"), "val": ("ant", "wasp")})
    config = data_config(source="folder", dir=str(root))
    assert "wasp" in _error(config, "val")
    (root / "train" / "cow").mkdir()
    assert "cow" in (message := _error(config, "train")) and "remove the folder" in message
    (root / "empty").mkdir()
    assert "no class folders" in _error(config, "empty")
    (root / "empty" / "ant").mkdir()
    assert "holds an image" in _error(config, "empty")
    (root / "empty" / "ant").rmdir()
    config.train_split = "empty"
    assert "no class folders" in _error(config, "empty")


def _layouts(make):
    """Roots with a mistake, the split asked for, and what the remedy must say."""
    root = make({"train": ("ant", "bee"), "val": ("ant", "bee")})
    nested = root.parent / "nested" / "cat"
    shutil.copytree(root / "train" / "ant", nested / "siamese")
    shutil.copytree(root / "train" / "bee", root.parent / "nested" / "dog" / "poodle")
    (root.parent / "empty").mkdir()
    return [
        (root / "train", "train", f"set FLAG.dir={root}"),
        (root / "train" / "ant", "train", f"set FLAG.dir={root}"),
        (root.parent, "train", f"set FLAG.dir={root}"),
        (root, "Train", "set FLAG.train_split=train"),
        (root, "Train[:90%]", "set FLAG.train_split=train"),
        (root.parent / "nested", "train", f"move them to {root.parent}/nested/train/"),
        (root.parent / "empty", "train", f"{root.parent}/empty/train/<class>/<image>: put images there"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_folder_remedy_works_when_followed(data_config, image_folder, case):
    root, split, remedy = _layouts(image_folder)[case]
    config = data_config(source="folder", dir=str(root), train_split=split)
    with pytest.raises(data.DataError) as e:
        data.open_source(config, split, flag=lambda key: key.replace("data.", "FLAG."))
    message = str(e.value)
    assert remedy in message and "--config" not in message
    if "FLAG.dir=" in remedy:
        config.dir = remedy.split("=")[1]
    elif "train_split=" in remedy:
        config.train_split = remedy.split("=")[1]
    else:
        move = shutil.move if "move" in remedy else shutil.copytree
        sources = list(root.iterdir()) or [image_folder({"other": ("ant",)}) / "other" / "ant"]
        (root / split).mkdir()
        for folder in sources:
            move(folder, root / split / folder.name)
    assert len(data.open_source(config, config.train_split)) >= 3


@pytest.mark.parametrize("images", ["in the root", "in the split"])
def test_folder_images_without_class_folders(data_config, image_folder, images):
    root = image_folder({"train": ("ant",)}) / "train"
    if images == "in the split":
        root = root.rename(root.parent / "elsewhere")
        (root / "ant").rename(root / "train")
    else:
        root = (root / "ant").rename(root.parent.parent / "alone")
    assert f"{root}/train/<class>/" in _error(data_config(source="folder", dir=str(root)), "train")


def test_folder_with_an_eval_split_alone(data_config, image_folder):
    """An evaluation brings the classes; labels are theirs, in their order."""
    root = image_folder({"val": ("bee", "ant")})
    config = data_config(source="folder", dir=str(root))
    source = data.open_source(config, "val", class_names=("cow", "bee", "ant"))
    assert source.class_names == ("cow", "bee", "ant")
    assert [source[i]["label"] for i in range(6)] == [1, 1, 1, 2, 2, 2]
    assert "train" in _error(config, "val")
    for class_names in (("ant", "cow"), ("bee",)):
        with pytest.raises(data.DataError, match=r"classes .* has .*; set --data_dir to data of the same classes"):
            data.open_source(config, "val", class_names=class_names, flag={"data.dir": "--data_dir"}.get)
    shutil.copytree(root / "val", root / "train")
    with pytest.raises(data.DataError, match="lacks cow"):
        data.open_source(config, "val", class_names=("cow", "bee", "ant"))


@pytest.mark.parametrize(
    "link, target, extra",
    [
        ("train/ant/again", ".", 0),
        ("train/ant/up", "../..", 0),
        ("train/loop", ".", 0),
        ("train/up", "../..", 0),
        ("train/ant/other", "../bee", 0),
        ("train/ant/copy.jpg", "0.jpg", 0),
        ("train/ant/copy.jpg", "../bee/0.jpg", 0),
        ("train/ant/self", "self", 0),
        ("train/self", "self", 0),
        ("train/ant/elsewhere", "../../pool", 3),
        ("train/cow", "../pool", 3),
        ("train/ant/one.jpg", "../../pool/1.jpg", 1),
    ],
)
def test_folder_links(data_config, image_folder, link, target, extra):
    root = image_folder({"train": ("ant", "bee")})
    shutil.copytree(root / "train" / "ant", root / "pool")
    (root / "pool" / "back").symlink_to(root)
    (root / link).symlink_to(target)
    (root / f"{link}2").symlink_to(target)  # a second one must not open what the first did not
    if extra == 3 and link == "train/cow":
        assert "remove the link" in _error(data_config(source="folder", dir=str(root)), "train")
    if extra:
        (root / f"{link}2").unlink()
    source = data.open_source(data_config(source="folder", dir=str(root)), "train")
    assert len(source) == 6 + extra and source.class_names == (("ant", "bee", "cow") if "cow" in link else ("ant", "bee"))


@pytest.mark.parametrize("target", ["gone.jpg", "link.jpg"], ids=["dangling", "to itself"])
def test_folder_link_to_nothing_is_a_corrupt_image(data_config, image_folder, target):
    root = image_folder({"train": ("ant", "bee")})
    (root / "train" / "ant" / "link.jpg").symlink_to(target)
    config = data_config(source="folder", dir=str(root))
    source = data.open_source(config, "train")
    with data.eval_batches(source, _transform(config), config, batch_size=7) as loader:
        assert next(loader)["mask"].sum() == 6 and loader.num_corrupt == 1


def test_folder_passes_over_what_tools_leave(data_config, image_folder):
    root = image_folder({"train": ("ant", "bee")})
    for place in (root, root / "train", root / "train" / "ant"):
        for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "lost+found"):
            shutil.copytree(root / "train" / "bee", place / folder / "x")
            shutil.copy(root / "train" / "bee" / "0.jpg", place / folder)
        for file in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.jpg"):
            (place / file).write_bytes(b"x")
    source = data.open_source(data_config(source="folder", dir=str(root)), "train")
    assert len(source) == 6 and source.class_names == ("ant", "bee")


# --- TFDS


PREPARE = """
import sys
import types
import tensorflow_datasets as tfds
from tfds_sets import tiny_images
sets = {"array_record": ("tiny_images", "tiny_taxonomy", "tiny_texts"), "tfrecord": ("tiny_images",)}
for file_format, name in ((file_format, name) for file_format, names in sets.items() for name in names):
    tfds.builder(name, data_dir=f"{sys.argv[1]}/{file_format}", file_format=file_format).download_and_prepare()
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder of sets by file format, made in a process of its own: there TFDS needs TensorFlow, here it must not."""
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", PREPARE, str(folder)], cwd=HERE, check=True)
    return folder


@pytest.fixture
def tiny(data_config, prepared):
    return data_config(source="tfds", name="tiny_images", dir=str(prepared / "array_record"))


@pytest.mark.parametrize("split, count", [("train", 20), ("validation", 7), ("train[:90%]", 18)])
def test_tfds_reads_every_example(tiny, split, count):
    source = data.open_source(tiny, split)
    assert len(source) == count and source.class_names == ("even", "odd")
    numbers = []
    for i in range(count):
        example = source[i]
        number = data.decode(example["image"])[0, 0, 0] // 10
        assert example["label"] == number % 2 and source.name(i) == f"tiny_images/{split}[{i}]"
        numbers.append(number)
    assert len(set(numbers)) == count


def test_tfds_with_the_structure_of_imagenet_21k(tiny):
    """Labels without names are numbers, and one split gives both parts."""
    tiny.name = "tiny_taxonomy"
    train, held_out = (data.open_source(tiny, split) for split in ("train[:90%]", "train[90%:]"))
    assert (len(train), len(held_out), train.num_classes) == (18, 2, 21_841)
    assert train.class_names == held_out.class_names == tuple(map(str, range(21_841)))
    labels = {source[i]["label"] for source in (train, held_out) for i in range(len(source))}
    assert labels == set(range(21_821, 21_841))
    transform = data.ClassificationTransform(tiny, num_classes=train.num_classes, training=True)
    assert transform(train[0], np.random.default_rng(0))["label"] == train[0]["label"]


def test_tfds_source_travels(tiny):
    source = data.open_source(tiny, "train")
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[5] == source[5]


def test_tfds_in_a_worker_process(tiny):
    source = data.open_source(tiny, "validation")
    tiny.on_corrupt = "stop"
    batches = []
    for tiny.num_workers in (0, 1):
        batches.append(list(data.eval_batches(source, _transform(tiny), tiny, batch_size=4)))
    here, there = batches
    assert len(here) == len(there) == 2
    for a, b in zip(here, there):
        np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("damage, lost", [("flip", 1), ("truncate", 20), ("remove", 20)])
def test_tfds_damaged_records_are_corrupt_images(tiny, tmp_path, damage, lost):
    shutil.copytree(f"{tiny.dir}/tiny_images", tmp_path / "tiny_images")
    (path,) = tmp_path.rglob("*-train.array_record*")
    content = bytearray(path.read_bytes())
    content[300:340] = bytes(b ^ 0x55 for b in content[300:340])
    source = data.TfdsSource("tiny_images", str(tmp_path), "train")
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with data.eval_batches(source, _transform(tiny), tiny, batch_size=20) as loader:
        assert 20 - next(loader)["mask"].sum() == lost == loader.num_corrupt


def test_tfds_asks_a_bucket_again(tiny, monkeypatch):
    source = data.open_source(tiny, "train")
    answers = [RuntimeError("503"), RuntimeError("503"), {"image": b"jpeg", "label": 1}]
    flaky = type("Flaky", (), {"__getitem__": lambda self, index: _raise_or_return(answers.pop(0))})()
    monkeypatch.setattr(records, "_REMOTE_PAUSES", (0, 0, 0))
    source._records = flaky
    with pytest.raises(CorruptImage):  # a local file does not get better
        source[0]
    source._arguments = ("tiny_images", "gs://bucket/data", "train")
    assert source[0]["label"] == 1 and not answers


def _raise_or_return(answer):
    if isinstance(answer, Exception):
        raise answer
    return answer


def test_tfds_reads_without_tensorflow(tiny):
    """TensorFlow would take the accelerator's memory, and seconds to import."""
    code = (
        "import sys; from halonet_jax import data\n"
        f"s = data.TfdsSource('tiny_images', {tiny.dir!r}, 'train'); s[0]\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])


def test_tfds_expands_the_home_folder(tiny, monkeypatch):
    monkeypatch.setenv("HOME", tiny.dir)
    assert len(data.TfdsSource("tiny_images", "~", "train")) == 20


def test_tfds_unknown_split(tiny):
    assert "train, validation" in _error(tiny, "test")
    assert "train[:90%]" in _error(tiny, "train[:x%]")


def test_tfds_unknown_name(data_config, tmp_path):
    message = _error(data_config(source="tfds", name="imagenet_2012", dir=str(tmp_path)), "train")
    assert "'imagenet_2012'" in message and "catalog" in message and len(message) < 400


def test_tfds_not_prepared(data_config, tmp_path):
    message = _error(data_config(source="tfds", name="imagenet2012", dir=str(tmp_path)), "train")
    assert "file_format='array_record').download_and_prepare()" in message and "tfds build imagenet2012" in message
    assert f"ILSVRC2012_img_val.tar, from https://image-net.org, into {tmp_path}/downloads/manual" in message


def test_tfds_without_random_access(tiny, prepared):
    tiny.dir = str(prepared / "tfrecord")
    message = _error(tiny, "train")
    folder = f"{tiny.dir}/tiny_images/1.0.0"
    assert f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record" in message


def test_tfds_without_images(tiny):
    tiny.name = "tiny_texts"
    assert "text" in (message := _error(tiny, "train")) and "'image'" in message


def test_tfds_keeps_tensorflow_off_accelerators(tiny, monkeypatch):
    hidden = []
    config = types.SimpleNamespace(set_visible_devices=lambda *args: hidden.append(args))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    data.open_source(tiny, "train")
    assert hidden == [([], "GPU")]
