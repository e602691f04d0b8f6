"""The contract of checkpoints: what is saved comes back, or its damage is noticed and an earlier one comes back."""

import errno
import json
import logging
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from halonet_jax.errors import CheckpointError, ConfigError, NonFiniteLoss, SaveError
from halonet_jax.runtime import storage
from halonet_jax.training import checkpoint_files as files
from halonet_jax.training import state
from halonet_jax.training.checkpoint import Checkpointer
from halonet_jax.training.task import Task

SGD = optax.sgd(0.1, momentum=0.9)
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def creator(tx=SGD, ema=True, width=4):
    init = lambda rng: ({"kernel": jax.random.normal(rng, (3, width)), "bias": jnp.zeros(width)}, {"mean": jnp.zeros(3)})
    task = Task(init, loss=None, predict=None, metrics=None)
    return lambda: state.create(task, tx, jax.random.key(0), ema=ema)


def at(step, create=None):
    """A state of this step, whose every number tells the step."""
    return jax.tree.map(lambda x: jnp.full_like(x, step), (create or creator())())


def abstract(create=None):
    shapes = jax.eval_shape(create or creator())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE), shapes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_threads_end(before):
    """Orbax closes its event loops without waiting for their threads, which are about to end."""
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), thread


def save(directory, *steps, scores=(), create=None, **options):
    checkpointer = Checkpointer(directory, **options)
    for step in steps:
        checkpointer.save(at(step, create), {"step": step})
        if step in dict(scores):
            checkpointer.set_score(step, dict(scores)[step])
    checkpointer.close()


@pytest.fixture
def directory(tmp_path):
    """Checkpoints 1, 2 and 3; the first is the best."""
    save(tmp_path / "checkpoints", 1, 2, 3, scores={1: 0.9, 2: 0.5, 3: 0.7}.items())
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", ["plain", "lr=[0.1,0.2]", "[a-z]*?{b}", "a b 'ü' \"%20\"#$HOME"])
def test_what_is_saved_comes_back(tmp_path, name):
    """Also from a path that a library could take for a pattern, beside a folder that the pattern matches."""
    (tmp_path / "ab" / "checkpoints" / "5").mkdir(parents=True)
    directory = tmp_path / name / "checkpoints"
    record, saved = {"metadata": {"class_names": ["ü"]}, "step_metrics": [{"loss": 0.1}]}, at(7)
    before = set(threading.enumerate())
    writer = Checkpointer(directory)
    writer.save(saved, record)
    record["step_metrics"].append("changed after the call")
    writer.close()
    for read_only in (True, False):
        checkpointer = Checkpointer(directory, read_only=read_only)
        assert checkpointer.all_steps() == [7] and checkpointer.best_step() is None
        assert checkpointer.read_record() == {"metadata": {"class_names": ["ü"]}, "step_metrics": [{"loss": 0.1}]}
        for ema in (False, True):
            step, weights = checkpointer.restore_weights((abstract().params, abstract().model_state), ema=ema)
            assert step == 7
            assert_same(weights, (saved.params, saved.model_state))
        assert_same(checkpointer.restore(abstract())[0], saved)
        checkpointer.close()
    assert_threads_end(before)


def test_the_newest_and_the_best_are_kept(directory):
    assert [path.name for path in sorted(directory.iterdir())] == ["1", "2", "3"]
    save(directory, 4, 5, scores=[(4, float("nan")), (5, 0.8)])
    checkpointer = Checkpointer(directory, keep=1)
    assert (checkpointer.all_steps(), checkpointer.best_step()) == ([1, 4, 5], 1)
    checkpointer.save(at(6), {})
    checkpointer.set_score(6, 0.9)  # of equals, the newer is the best
    with pytest.raises(ValueError, match="no checkpoint of step 5 to score"):
        checkpointer.set_score(5, 1.0)
    checkpointer.close()
    assert [path.name for path in directory.iterdir()] == ["6"] and checkpointer.best_step() == 6


def test_nothing_is_saved_twice_or_not_finite(directory):
    checkpointer = Checkpointer(directory)
    checkpointer.save(at(3).replace(params=at(9).params), {"step": "other"})
    with pytest.raises(NonFiniteLoss, match="step 4: "):
        checkpointer.save(at(4).replace(ema_params={"kernel": jnp.full((3, 4), jnp.nan), "bias": jnp.zeros(4)}), {})
    checkpointer.close()
    assert checkpointer.read_record() == {"step": 3} and checkpointer.latest_step() == 3


# --- damage


def edit(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def flip_bits(step):
    for path in (step / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


RECORD = "position/metadata"
DAMAGES = {
    "arrays lost": lambda step: shutil.rmtree(step / "state" / "d"),
    "arrays changed": flip_bits,
    "metadata torn": lambda step: (step / "state/_METADATA").write_text("{"),
    "metadata lost": lambda step: (step / "state/_METADATA").unlink(),
    "record torn": lambda step: (step / RECORD).write_text((step / RECORD).read_text()[:50]),
    "record empty": lambda step: (step / RECORD).write_bytes(b""),
    "record of bytes": lambda step: (step / RECORD).write_bytes(b"\xff\x00"),
    "record nested": lambda step: (step / RECORD).write_text("[" * 100_000),
    "record a list": lambda step: (step / RECORD).write_text("[3]"),
    "record lost": lambda step: (step / RECORD).unlink(),
    "value changed": lambda step: edit(step / RECORD, lambda x: x["record"].update(step=5)),
    "value lost": lambda step: edit(step / RECORD, lambda x: x["record"].clear()),
    "checksum changed": lambda step: edit(step / RECORD, lambda x: x["arrays"].update({"params/bias": 1})),
    "checksums lost": lambda step: edit(step / RECORD, lambda x: x["record"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(directory, damage, caplog):
    DAMAGES[damage](directory / "3")
    reader = Checkpointer(directory, read_only=True)
    with pytest.raises(CheckpointError, match="3 is damaged .*; give another --step: 1, 2"):
        reader.read_record(), reader.restore_weights((abstract().params, abstract().model_state))
    assert reader.read_record(2) == {"step": 2}
    checkpointer = Checkpointer(directory)
    restored, record = checkpointer.restore(abstract())
    assert_same(restored, at(2))
    assert record == {"step": 2} and checkpointer.all_steps() == [1, 2]
    assert [path.name for path in (directory.parent / "damaged_checkpoints").iterdir()] == ["3"]
    assert "Checkpoint 3 is damaged (" in caplog.text and "Going back to checkpoint 2" in caplog.text
    checkpointer.save(at(3), {})  # the number is free again
    checkpointer.close()
    assert checkpointer.latest_step() == 3


def test_where_all_are_damaged_the_run_ends(tmp_path):
    directory = tmp_path / "checkpoints"
    for name in ("4", "4.1"):
        save(directory, 4)
        flip_bits(directory / "4")
        checkpointer = Checkpointer(directory)
        with pytest.raises(CheckpointError, match="there is none before it; it was set aside in .* starts from the beginning"):
            checkpointer.restore(abstract())
        checkpointer.close()
        assert (tmp_path / "damaged_checkpoints" / name).is_dir() and not list(directory.iterdir())


SCORES = [
    b"",
    b"{",
    b"[]",
    b'"x"',
    b"null",
    b"3",
    b"\xff",
    b"{" * 100_000,
    b'{"top1": "a"}',
    b'{"top1": [1]}',
    b'{"top1": NaN}',
]


@pytest.mark.parametrize("content", [*SCORES, b'{"step": 1, "score": 0.95, "checksum": 1}'])
@pytest.mark.parametrize("name", ["score.json", "metrics/metrics"])
def test_a_damaged_score_counts_as_none(directory, name, content):
    if name == "metrics/metrics":  # where earlier versions kept it
        (directory / "1" / "score.json").unlink()
        (directory / "1" / "metrics").mkdir()
    (directory / "1" / name).write_bytes(content)
    assert Checkpointer(directory, read_only=True).best_step() == 3
    save(directory, 4)
    assert sorted(path.name for path in directory.iterdir()) == ["3", "4"]


def test_checkpoints_of_version_0_1_0(tmp_path, caplog):
    """Their record is open, with the checksums in it, and their score stands under a metric's name."""
    saved, record = at(5), {"class_names": ["ant", "bee"], "step_metrics": []}
    _, sums = state.fingerprint(jax.tree.leaves(saved))
    sums = dict(zip(files.names(saved), map(int, sums)))
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["top1"])
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(saved), position=ocp.args.JsonSave(record | {"checksums": sums}))
    with ocp.CheckpointManager(tmp_path / "c", options=options, item_names=("state", "position")) as manager:
        manager.save(5, args=items, metrics={"top1": 0.25})
    checkpointer = Checkpointer(tmp_path / "c")
    restored, found = checkpointer.restore(abstract(), creator())
    assert_same(restored, saved)
    assert (found, checkpointer.best_step()) == (record, 5)
    checkpointer.save(at(6), {})
    checkpointer.set_score(6, 0.2)
    checkpointer.close()
    assert (checkpointer.best_step(), caplog.text) == (5, "")
    edit(tmp_path / "c/5" / RECORD, lambda x: x["checksums"].update({"params/bias": 1}))
    with pytest.raises(CheckpointError, match="checksum of params/bias is wrong"):
        Checkpointer(tmp_path / "c", read_only=True).restore_weights((abstract().params, abstract().model_state), 5)


# --- another state


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), SGD)
ADAMW = optax.adamw(0.1)


@pytest.mark.parametrize("before, after, new, left_out", [
    (creator(ema=False), creator(), "ema_model_state, ema_params (2 arrays)", None),
    (creator(), creator(ema=False), None, "ema_model_state, ema_params (2 arrays)"),
    (creator(), creator(CLIPPED), None, None),
    (creator(CLIPPED), creator(), None, None),
    (creator(), creator(ADAMW), "opt_state/count, opt_state/mu (2 arrays), opt_state/nu (2 arrays)",
     "opt_state/trace (2 arrays)"),
])  # fmt: skip
def test_options_that_change_the_state(tmp_path, caplog, before, after, new, left_out):
    """What both have goes on; a new average starts from the weights; the rest starts anew, and the warning names it."""
    save(tmp_path / "c", 3, create=before)
    checkpointer = Checkpointer(tmp_path / "c", read_only=True)
    restored, _ = checkpointer.restore(abstract(after), after)
    expected = at(3, after)
    assert_same(restored, expected.replace(opt_state=after().opt_state) if "mu" in str(new) else expected)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == (
        [f"New in the state, because checkpoint 3 lacks it: {new}"] * bool(new)
        + [f"Left out of checkpoint 3, because the state lacks it: {left_out}"] * bool(left_out)
    )
    if new or left_out:
        with pytest.raises(CheckpointError, match="does not fit the config"):
            checkpointer.restore(abstract(after))


def test_another_model_is_refused(directory):
    other = creator(width=5)
    message = r"3 does not fit the config: .*float32\[4\] there and float32\[5\] by the config .* or another workdir"
    checkpointer = Checkpointer(directory, read_only=True)
    with pytest.raises(CheckpointError, match=message):
        checkpointer.restore(abstract(other), other)
    with pytest.raises(CheckpointError, match=message):
        checkpointer.restore_weights((abstract(other).params, abstract(other).model_state))
    with pytest.raises(CheckpointError, match="no checkpoint of step 9 in .*; give one of: 1, 2, 3"):
        checkpointer.read_record(9)


def test_an_average_that_was_not_kept(tmp_path):
    save(tmp_path, 1, create=creator(ema=False))
    with pytest.raises(CheckpointError, match="has no EMA"):
        Checkpointer(tmp_path, read_only=True).restore_weights((abstract().params, abstract().model_state), ema=True)


# --- files in the way, full disks, other processes


def test_reading_goes_on_with_a_newer_one_where_another_process_deletes(directory):
    reader = Checkpointer(directory, read_only=True)
    save(directory, 5, 6, scores=[(5, 1.0)])
    assert [path.name for path in sorted(directory.iterdir())] == ["5", "6"]
    assert reader.latest_step() == 3 and reader.read_record() == {"step": 6}
    assert reader.restore_weights((abstract().params, abstract().model_state))[0] == 6
    reader = Checkpointer(directory, read_only=True)
    for path in directory.iterdir():
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        reader.read_record()


def test_what_a_killed_save_leaves_is_not_listed_and_goes(directory):
    for name in ("4.orbax-checkpoint-tmp", "1.orbax-checkpoint-tmp-deleted", "notes"):
        shutil.copytree(directory / "1", directory / name)
    (directory / "5").write_text("a file")
    assert Checkpointer(directory, read_only=True).all_steps() == [1, 2, 3]
    assert (directory / "4.orbax-checkpoint-tmp").exists()
    assert Checkpointer(directory).all_steps() == [1, 2, 3]
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "3", "5", "notes"]


@pytest.mark.parametrize("place, error, message", [
    (lambda path: path.write_text(""), ConfigError, "is a file, but must be a folder; move it away"),
    (lambda path: path.symlink_to("nowhere"), ConfigError, "is a link to nowhere, which does not exist; make that folder"),
])  # fmt: skip
def test_something_else_in_place_of_the_folder(tmp_path, place, error, message):
    place(tmp_path / "checkpoints")
    for read_only in (True, False):
        with pytest.raises(error, match=message):
            Checkpointer(tmp_path / "checkpoints", read_only=read_only)


def test_a_backslash_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has a backslash"):
        Checkpointer(tmp_path / "a\\b")
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_damaged_checkpoints(directory):
    (directory.parent / "damaged_checkpoints").write_text("")
    flip_bits(directory / "3")
    with pytest.raises(CheckpointError, match="3 is damaged .*cannot be set aside .*; move that file or link away, then"):
        Checkpointer(directory).restore(abstract())
    (directory.parent / "damaged_checkpoints").unlink()
    assert int(Checkpointer(directory).restore(abstract())[0].step) == 2


def test_a_save_that_fails_names_the_cause_and_leaves_no_thread(directory):
    before = set(threading.enumerate())
    checkpointer = Checkpointer(directory)
    directory.rename(directory.with_name("moved"))
    directory.write_text("")
    with pytest.raises(SaveError, match=f"The last good one is {directory}/3; move away what is in its place, then the same"):
        checkpointer.save(at(4), {})
        checkpointer.wait()
    checkpointer.close()
    assert_threads_end(before)


@pytest.mark.parametrize("error, remedy", [
    (OSError(errno.ENAMETOOLONG, "File name too long"), "give a workdir with a shorter path"),
    (ValueError("INVALID_ARGUMENT: File name too long"), "give a workdir with a shorter path"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
    (ValueError("something new"), "see that the storage works"),
])  # fmt: skip
def test_the_remedy_fits_the_cause_of_the_cause(error, remedy):
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert storage.remedy(error) == storage.remedy(wrapped) == remedy
