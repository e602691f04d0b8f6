"""The step, the optimizer and the sharding, on a linear task small enough to check by hand, and on a tiny HaloNet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halonet_jax import config as config_lib
from halonet_jax import errors, tasks
from halonet_jax.costs import hlo
from halonet_jax.runtime import reporting
from halonet_jax.training import optimizer, programs, sharding, state, step
from halonet_jax.training.task import Task


def linear_task():
    """Regression with a running mean of the inputs as model state."""

    def init(rng):
        return {"kernel": jnp.ones(3), "bias": jnp.zeros(())}, {"mean": jnp.zeros(3)}

    def loss(params, model_state, batch, rng):
        error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
        return (error**2).mean(), ({"mean": 0.9 * model_state["mean"] + 0.1 * batch["x"].mean(0)}, {"error": error.mean()})

    return Task(init, loss, predict=None, metrics=None)


def batch(size=8):
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((size, 3)).astype(np.float32), "y": rng.standard_normal(size).astype(np.float32)}


def test_schedule_is_the_papers():
    """Peak 0.1 per 256 images, 10 epochs of warm-up, cosine to 1/128 of the peak at epoch 350."""
    config = config_lib.imagenet()
    steps_per_epoch = 1_281_167 / 4096
    total = round(350 * steps_per_epoch)
    schedule = optimizer.make_schedule(config, total, steps_per_epoch)
    rates = [float(schedule(s)) for s in (0, round(5 * steps_per_epoch), round(10 * steps_per_epoch), total)]
    np.testing.assert_allclose(rates, [0, 0.8, 1.6, 1.6 / 128], rtol=1e-3)
    middle = float(schedule(round((10 + 170) * steps_per_epoch)))
    np.testing.assert_allclose(middle, 1.6 * (1 + 1 / 128) / 2, rtol=1e-3)


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_weight_decay_is_on_kernels_alone(name):
    config = config_lib.imagenet()
    config.optimizer.name, config.optimizer.weight_decay = name, 0.5
    params = {"conv": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}, "attention": {"rel_rows": jnp.ones((3, 2))}}
    tx = optimizer.make_optimizer(config, lambda step: 0.1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved == {"conv": {"kernel": True}, "norm": {"scale": False}, "attention": {"rel_rows": False}}


def test_sgd_is_nesterov_and_clips():
    config = config_lib.imagenet()
    config.optimizer.weight_decay, config.optimizer.clip_norm = 0.0, 1.0
    tx = optimizer.make_optimizer(config, lambda step: 0.1)
    params, gradient, seen = {"kernel": jnp.zeros(1)}, {"kernel": jnp.full(1, 5.0)}, []
    opt_state = tx.init(params)
    for _ in range(2):
        update, opt_state = tx.update(gradient, opt_state, params)
        seen.append(float(update["kernel"][0]))
    # Gradient clipped to 1; velocity 1, then 1.9; Nesterov steps by g + 0.9 v.
    np.testing.assert_allclose(seen, [-0.1 * 1.9, -0.1 * (1 + 0.9 * 1.9)], rtol=1e-6)


def test_ema_covers_parameters_and_model_state():
    task, tx = linear_task(), optax.sgd(0.1)
    train_step = jax.jit(step.make_train_step(task, tx, seed=0, ema_decay=0.8))
    s = state.create(task, tx, jax.random.key(0), ema=True)
    expected = s.params, s.model_state
    for n in range(30):
        s, _ = train_step(s, batch())
        decay = min(0.8, (n + 1) / (n + 10))
        mix = lambda old, new, decay=decay: decay * old + (1 - decay) * new
        expected = jax.tree.map(mix, expected, (s.params, s.model_state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), (s.ema_params, s.ema_model_state), expected)
    assert set(s.weights()) == {"eval", "eval_ema"}


def test_accumulation_is_the_whole_batch():
    task, tx = linear_task(), optax.sgd(0.1)
    results = []
    for steps in (1, 4):
        train_step = jax.jit(step.make_train_step(task, tx, seed=0, ema_decay=0, accumulation_steps=steps))
        results.append(train_step(state.create(task, tx, jax.random.key(0), ema=False), batch()))
    (whole, whole_metrics), (parts, parts_metrics) = results
    for ours, theirs in ((parts.params, whole.params), (parts.model_state, whole.model_state)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), parts_metrics, whole_metrics)


def smoke_run(devices, fsdp, steps=3):
    """Losses of a tiny HaloNet over a mesh, its last state and its compiled text; statistics over groups of 4."""
    config = config_lib.smoke(config_lib.imagenet())
    config.data.image_size = 32
    config.model.stage_sizes, config.model.bn_group_size = (1, 1, 1, 1), 4
    config.model.stage_kinds = ("attention", "conv", "conv", "attention")  # compiles faster than four of attention
    config.model.stochastic_depth_rate, config.data.mixup_alpha, config.ema_decay = 0.2, 0.2, 0.9
    task = tasks.make_task(config, {"class_names": [str(n) for n in range(10)]})
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    program = programs.make_programs(config, task, mesh, total_steps=9, steps_per_epoch=3)
    s = program.create_state()
    rng = np.random.default_rng(0)
    batches = [
        {"image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8), "label": rng.integers(0, 10, 16).astype(np.int32)}
        for _ in range(steps)
    ]
    compiled = program.train_step.lower(program.abstract_state, program.abstract_batch(task, 16)).compile()
    losses = []
    with sharding.DeviceBatches(iter(batches), mesh) as placed:
        for batch in placed:
            s, metrics = compiled(s, batch)
            losses.append(float(metrics["loss"]))
    return losses, s, compiled.as_text()


def test_meshes_agree_and_move_no_more_than_they_must():
    """Data-parallel and fsdp over four devices give the losses of one. Gradients are summed, shared weights gathered, no more."""
    expected, s, text = smoke_run(devices=1, fsdp=1)
    assert len(set(expected)) == 3 and not hlo.collectives(text)
    parameters = jax.tree.leaves(s.params)
    shared = sum(x.nbytes for x in parameters if x.size >= sharding.MIN_SHARDED_SIZE)
    summed = sum(x.nbytes for x in parameters + jax.tree.leaves(s.model_state))
    for fsdp in (1, 2):
        losses, s, text = smoke_run(devices=4, fsdp=fsdp)
        np.testing.assert_allclose(losses, expected, rtol=1e-3)
        moved = {c.kind: c for c in hlo.collectives(text)}
        assert set(moved) == {"all-reduce"} | ({"all-gather"} if fsdp > 1 else set())
        # Once for all gradients and statistics; metrics and norms are a few scalars more. No activation is ever moved.
        assert moved["all-reduce"].count <= 2 and 0.95 * summed < moved["all-reduce"].bytes < summed + 64
        assert fsdp == 1 or moved["all-gather"].bytes == shared > 0
    for tree in (s.params, s.ema_params):
        big = [x for x in jax.tree.leaves(tree) if x.size >= sharding.MIN_SHARDED_SIZE]
        assert big and all(x.addressable_shards[0].data.size == x.size // 2 for x in big)


def test_evaluation_is_exact_for_any_batch_size():
    """Counts are of the masked-in examples; ties and NaN score nothing."""
    config = config_lib.smoke(config_lib.imagenet())
    metrics = tasks.make_task(config, {"class_names": list("abcdef")}).metrics
    logits = np.zeros((5, 6), np.float32)
    logits[0, 2], logits[1, :3], logits[2] = 1, (3, 2, 1), np.nan
    label, mask = np.array([2, 2, 2, 2, 0]), np.array([True, True, True, True, False])
    sums = jax.device_get(metrics(jnp.asarray(logits), {"label": jnp.asarray(label), "mask": jnp.asarray(mask)}))
    assert (sums["count"], sums["top1"], sums["top5"]) == (4, 1, 2)


def test_reports_after_the_checkpoint_are_dropped(tmp_path):
    lines = ['{"step": 1, "train/loss": 2.0}', '{"step": 2, "train/loss": 1.0}', '{"step": 3, "train/lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    reporting.Reporter(tmp_path, start_step=1, last_step=9, batch_size=4).close()
    assert reporting.read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]
    reporting.Reporter(tmp_path, start_step=0, last_step=9, batch_size=4).close()
    assert reporting.read_metrics(tmp_path) == []
    assert (tmp_path / "metrics.jsonl.bak").read_text() == '{"step": 1, "train/loss": 2.0}\n'


def test_step_metrics_name_the_first_bad_step():
    metrics = reporting.StepMetrics([{"loss": 1.0, "grad_norm": 1.0}])
    for at_step, loss in ((7, 3.0), (8, np.inf), (9, np.nan)):
        metrics.append(at_step, {"loss": jnp.asarray(loss), "grad_norm": jnp.asarray(1.0)})
    with pytest.raises(errors.NonFiniteLoss, match="step 8: loss is inf"):
        metrics.pop_means()
