"""Times whole models against timm's, in turns within one process: forward (evaluation mode) and training step.

    python scripts/bench/bench_model.py                                            # H1 at 256 px, batch 4
    python scripts/bench/bench_model.py --batch=128 --dtype=bfloat16               # on a GPU

On both sides a training step computes the loss with label smoothing and the gradients, and updates float32 parameters
by SGD with Nesterov momentum and weight decay. PyTorch's bfloat16 is autocast. "×" is a case's time over the time of
ours (`--implementation`): the median of the ratios of all rounds.

Without an accelerator, each core is a JAX device, and the batch is cut over a number of cores that divides it. This
cuts the one batch-norm group too. Training cuts only between groups; `--bn_group_size` does so here.
JAX_NUM_CPU_DEVICES=1 runs one program on all cores.

timm's `halonet_h1` differs: ReLU instead of SiLU, zero padding instead of masks, and 8.10 M parameters instead of 8.08
M.
"""

import functools

import bench_timing as timing
import jax
import numpy as np
import optax
from absl import app, flags

from halonet_jax import models
from halonet_jax.costs import floors
from halonet_jax.training import sharding, state, step
from halonet_jax.training.task import Task

_MODEL = flags.DEFINE_enum("model", "h1", list(models.names()), "Our model; only h1 has a peer.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images.", lower_bound=1)
_SIZE = flags.DEFINE_integer("image_size", 0, "Side of the images in pixels; 0: as the recipe.", lower_bound=0)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the computation.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Rounds. Each runs every case once; slow cases run at most three times.", 1)
_CASES = flags.DEFINE_list("cases", [], "Cases to run beside ours, by parts of their names; empty: all.")
_STAGES = flags.DEFINE_list("stage_sizes", [], "Blocks in each of the four stages; empty: as in the model.")
_GROUP = flags.DEFINE_integer("bn_group_size", 0, "Images per batch-norm group; 0: all.", lower_bound=0)
_SCAN = flags.DEFINE_bool("scan", False, "Loop over the equal blocks of a stage. This compiles faster.")
_REMAT = flags.DEFINE_bool("remat", False, "Recompute each block in the backward pass. This takes less memory.")
_OURS = flags.DEFINE_enum("implementation", "auto", ["auto", "xla", "pallas"], "Our implementation, which the ratios compare with.")
_COMPILE = flags.DEFINE_bool("torch_compile", True, "Also run PyTorch's compiled cases. They take minutes to prepare.")
_JSON = flags.DEFINE_string("json", "", "File to write all times to.")

CLASSES = 1000
SMOOTHING, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.01, 0.9, 2e-5
FORWARD, STEP = "forward", "training step"


def _images_and_labels():
    size = _SIZE.value or floors.IMAGE_SIZES.get(_MODEL.value, 256)
    rng = np.random.default_rng(0)
    return rng.standard_normal((_BATCH.value, size, size, 3)).astype(np.float32), rng.integers(0, CLASSES, _BATCH.value)


def _make_task(model, images):
    def init(rng):
        variables = model.init(rng, images[:1], train=False)
        return variables["params"], variables["batch_stats"]

    def loss(params, model_state, batch, rng):
        variables = {"params": params, "batch_stats": model_state}
        logits, updates = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"], rngs={"dropout": rng})
        labels = optax.smooth_labels(jax.nn.one_hot(batch["label"], CLASSES), SMOOTHING)
        return optax.softmax_cross_entropy(logits, labels).mean(), (updates["batch_stats"], {})

    def predict(params, model_state, batch):
        return model.apply({"params": params, "batch_stats": model_state}, batch["image"], train=False)

    return Task(init, loss, predict, metrics=None)


def _our_case(name, implementation, direction):
    def make():
        options = dict(
            dtype=_DTYPE.value, attention_impl=implementation, bn_group_size=_GROUP.value, scan=_SCAN.value, remat=_REMAT.value
        )
        if _STAGES.value:
            options["stage_sizes"] = tuple(map(int, _STAGES.value))
        images, labels = _images_and_labels()
        mesh, batch = timing.mesh(), timing.place({"image": images, "label": labels}, cut=True)
        task = _make_task(models.create(_MODEL.value, CLASSES, **options), images[:1])
        optimizer = optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, momentum=MOMENTUM, nesterov=True)
        )
        everywhere = jax.NamedSharding(mesh, jax.P())
        train_state = jax.jit(lambda: state.create(task, optimizer, jax.random.key(0), ema=False), out_shardings=everywhere)()
        if direction == FORWARD:

            def predict(params, model_state, batch):
                with sharding.use(mesh):
                    return task.predict(params, model_state, batch)

            return functools.partial(jax.jit(predict), train_state.params, train_state.model_state, batch)
        train_step = jax.jit(
            step.make_train_step(task, optimizer, seed=0, ema_decay=0.0, mesh=mesh), donate_argnums=0, out_shardings=everywhere
        )

        def start():
            nonlocal train_state
            train_state, metrics = train_step(train_state, batch)
            return train_state, metrics

        return start

    return timing.Case(name, make)


def _timm_case(direction, compiled):
    def make():
        torch, device, dtype = timing.torch_device(_DTYPE.value)
        import timm

        if _MODEL.value != "h1" or _STAGES.value:
            raise NotImplementedError("timm has only H1")
        images, labels = _images_and_labels()
        torch.manual_seed(0)
        # Each device's faster layout for convolutions.
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        model = timm.create_model("halonet_h1", num_classes=CLASSES).to(device, memory_format=layout)
        images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device, memory_format=layout)
        labels = torch.from_numpy(labels).to(device)
        model.train(direction == STEP)
        call = torch.compile(model) if compiled else model
        autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
        if direction == FORWARD:

            def forward():
                with torch.no_grad(), autocast():
                    return call(images)

            return forward
        optimizer = torch.optim.SGD(
            model.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        entropy = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

        def train():
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = entropy(call(images), labels)
            loss.backward()
            optimizer.step()

        return train

    return timing.Case(f"timm halonet_h1{', compiled' if compiled else ''}", make, timing.torch_wait)


def _cases(direction):
    """Returns all contestants, ours first. The reference is too slow and too large for a whole model."""
    all_cases = [_our_case(name, value, direction) for name, value in timing.ours(_OURS.value, reference=False).items()]
    all_cases += [_timm_case(direction, compiled) for compiled in (False, True)[: 1 + _COMPILE.value]]
    rivals = [case for case in all_cases[1:] if not _CASES.value or any(part in case.name for part in _CASES.value)]
    return all_cases[:1] + rivals


def _main(argv):
    timing.check_json(_JSON.value)
    sharding.use_cpu_cores(_BATCH.value // (_GROUP.value or 1))
    about = timing.machine()
    print(about, end="\n\n")
    size, ours = _images_and_labels()[0].shape[1], f"halonet_jax {_OURS.value}"
    options = dict(model=_MODEL.value, batch=_BATCH.value, image_size=size, dtype=_DTYPE.value, scan=_SCAN.value)
    columns = {}
    for direction in (FORWARD, STEP):
        columns[direction] = timing.measure(_cases(direction), _REPEATS.value, f"{_MODEL.value} {direction}")
        if _JSON.value:
            timing.write_json(_JSON.value, timing.records(columns, ours, benchmark="model", **options), about)
    print(timing.table(f"**{_MODEL.value}**: {_BATCH.value} images of {size} px, {_DTYPE.value}", columns, ours), flush=True)


if __name__ == "__main__":
    app.run(_main)
