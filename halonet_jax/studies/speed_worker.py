"""Times the steps of a config on this machine. `measuring.py` starts it as a process, which has the device to itself.

    python -m halonet_jax.studies.speed_worker CONFIG.json SPEED.json

The batch is at most 8 images a device on a CPU and 64 on an accelerator, and is halved where memory runs out. Batches of
zeros serve: time does not depend on values.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from halonet_jax import config as config_lib
from halonet_jax import tasks
from halonet_jax.training import programs, sharding

IMAGES = {"cpu": 8}  # a device; others: 64
ROUNDS, SECONDS = 7, 0.2  # rounds of at least so many seconds each; the first call compiles and is not timed


def measure(config, batch_size: int) -> dict:
    """Returns seconds per image of an evaluation step and of a training step, medians over rounds.

    Args:
        config: a valid config.
        batch_size: images, over all devices.
    """
    config.batch_size, config.eval_batch_size, config.optimizer.accumulation_steps, config.mesh.fsdp = batch_size, 0, 1, 1
    if config.model.bn_group_size and batch_size % config.model.bn_group_size:
        config.model.bn_group_size = 0
    definition = tasks.find(config)
    task = definition.make_task(config, definition.expected_metadata(config))
    program = programs.make_programs(config, task, sharding.make_mesh(), total_steps=1000, steps_per_epoch=100.0)
    state = program.create_state()

    def batch(training):
        abstract = program.abstract_batch(task, batch_size, training)
        return {name: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding) for name, x in abstract.items()}

    images, weights = batch(False), state.weights()["eval"]
    inference = _median(lambda: program.eval_step(weights, images))
    images = batch(True)

    def train():
        nonlocal state
        state, metrics = program.train_step(state, images)
        return metrics

    training = _median(train)
    return {"inference_seconds_per_image": inference / batch_size, "train_seconds_per_image": training / batch_size}


def _median(call):
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(1, round(SECONDS / (time.perf_counter() - begin)))
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - begin) / calls)
    return statistics.median(seconds)


def main(spec: str, out: str) -> None:
    """Measures and writes `out`.

    Args:
        spec: file with the config.
        out: file to write.
    """
    config = config_lib.from_json(Path(spec).read_bytes())
    sharding.use_cpu_cores(config.batch_size)
    count = jax.device_count()
    size = max(1, min(config.batch_size // count, IMAGES.get(jax.default_backend(), 64))) * count
    while True:
        try:
            found = measure(config, size)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size // 2 < count:
                raise
            size //= 2
    about = {"device": f"{count} × {jax.devices()[0].device_kind}", "batch_size": size, "rounds": ROUNDS}
    Path(out).write_text(json.dumps(about | found))


if __name__ == "__main__":
    main(*sys.argv[1:])
