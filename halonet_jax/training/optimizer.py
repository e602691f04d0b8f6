"""Makes the optax optimizer and the learning-rate schedule of a config."""

import jax
import ml_collections
import optax

from halonet_jax.training.task import Task


def make_schedule(config: ml_collections.ConfigDict, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Returns the schedule: linear warm-up, then a cosine (paper, appendix) or steps (the paper's detectors).

    The peak is `learning_rate * batch_size / learning_rate_batch_size`. The warm-up begins at `warmup_start_factor` of it.
    The cosine ends at `end_factor` of the peak, at `total_steps`. With `milestones`, the rate is multiplied by
    `milestone_factor` at each of them instead.

    Args:
        config: the whole config; `schedule` and `batch_size` are read.
        total_steps: steps of the whole schedule, at least 1.
        steps_per_epoch: converts the warm-up and the milestones from epochs to steps.

    Returns:
        A function from the step to the learning rate.
    """
    s = config.schedule
    peak = s.learning_rate
    if s.learning_rate_batch_size:
        peak *= config.batch_size / s.learning_rate_batch_size
    warmup_steps = min(round(s.warmup_epochs * steps_per_epoch), total_steps - 1)
    start = s.warmup_start_factor * peak
    if s.milestones:
        drops = {round(epoch * steps_per_epoch) - warmup_steps: s.milestone_factor for epoch in s.milestones}
        steps = optax.piecewise_constant_schedule(peak, drops)
        return optax.join_schedules([optax.linear_schedule(start, peak, warmup_steps), steps], [warmup_steps])
    return optax.warmup_cosine_decay_schedule(
        init_value=peak if warmup_steps == 0 else start, peak_value=peak, warmup_steps=warmup_steps, decay_steps=total_steps,
        end_value=peak * s.end_factor,
    )  # fmt: skip


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, task: Task | None = None
) -> optax.GradientTransformation:
    """Returns SGD with momentum, AdamW or LAMB, with gradient clipping if `clip_norm` is above 0.

    Weight decay applies to kernels only. SGD adds it to the gradient, like an L2 penalty. AdamW and LAMB decouple it.

    Args:
        config: the whole config; `optimizer` is read.
        schedule: learning rate by step.
        task: says which parameters are frozen, and how far each is from the output, for `layer_decay`. None: no parameter
            is frozen, and all have the same rate.
    """
    o = config.optimizer
    if o.name == "sgd":
        optimizer = optax.chain(
            optax.add_decayed_weights(o.weight_decay, decay_mask),
            optax.sgd(schedule, momentum=o.momentum, nesterov=o.nesterov),
        )
    else:
        make = {"adamw": optax.adamw, "lamb": optax.lamb}[o.name]
        optimizer = make(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, mask=decay_mask)
    if o.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(o.clip_norm), optimizer)
    if o.layer_decay < 1 and task and task.distances:
        optimizer = optax.chain(optimizer, _scale_by_depth(task.distances, o.layer_decay))
    if task and task.frozen:  # last: weight decay and momentum move parameters without a gradient too
        optimizer = optax.chain(optimizer, optax.masked(optax.set_to_zero(), task.frozen))
    return optimizer


def _scale_by_depth(distances, decay):
    def scale(updates, params):
        return jax.tree.map(lambda update, distance: update * decay**distance, updates, distances(params))

    return optax.stateless(scale)


def decay_mask(params):
    """Returns which parameters weight decay applies to: the kernels of convolutions and dense layers.

    Args:
        params: a tree of parameters.

    Returns:
        The same tree of bools, False for norms, biases and tables of positions.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
