"""Makes the optax optimizer and the learning-rate schedule of a config."""

import jax
import ml_collections
import optax


def make_schedule(config: ml_collections.ConfigDict, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Returns the schedule: linear warm-up from 0, then a cosine (paper, appendix).

    The peak is `learning_rate * batch_size / learning_rate_batch_size`. The cosine ends at `end_factor` of the peak, at
    `total_steps`.

    Args:
        config: the whole config; `schedule` and `batch_size` are read.
        total_steps: steps of the whole schedule, at least 1.
        steps_per_epoch: converts the warm-up from epochs to steps.

    Returns:
        A function from the step to the learning rate.
    """
    s = config.schedule
    peak = s.learning_rate
    if s.learning_rate_batch_size:
        peak *= config.batch_size / s.learning_rate_batch_size
    warmup_steps = min(round(s.warmup_epochs * steps_per_epoch), total_steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak if warmup_steps == 0 else 0.0, peak_value=peak, warmup_steps=warmup_steps, decay_steps=total_steps,
        end_value=peak * s.end_factor,
    )  # fmt: skip


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns SGD with Nesterov momentum, AdamW or LAMB, with gradient clipping if `clip_norm` is above 0.

    Weight decay applies to kernels only. SGD adds it to the gradient, like an L2 penalty. AdamW and LAMB decouple it.

    Args:
        config: the whole config; `optimizer` is read.
        schedule: learning rate by step.
    """
    o = config.optimizer
    if o.name == "sgd":
        optimizer = optax.chain(
            optax.add_decayed_weights(o.weight_decay, decay_mask),
            optax.sgd(schedule, momentum=o.momentum, nesterov=True),
        )
    else:
        make = {"adamw": optax.adamw, "lamb": optax.lamb}[o.name]
        optimizer = make(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), optimizer) if o.clip_norm else optimizer


def decay_mask(params):
    """Returns which parameters weight decay applies to: the kernels of convolutions and dense layers.

    Args:
        params: a tree of parameters.

    Returns:
        The same tree of bools, False for norms, biases and relative tables.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
