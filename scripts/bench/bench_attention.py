"""Times halo attention layers against other implementations, in turns within one process.

    python scripts/bench/bench_attention.py                                        # H1 stages 1 and 3, H4 stage 1
    python scripts/bench/bench_attention.py --layers=h1s1 --batch=64 --dtype=bfloat16 --operator     # on a GPU or TPU
    python scripts/bench/bench_attention.py --floors=v5e,H100 --layers=h1s1,h1s3   # no timing: lower bounds of the time

A layer projects to queries, keys and values and applies attention. `h4s1` is the layer of H4's first stage. Install the
peers with `pip install -e '.[bench]'`; the tables list missing or failing peers with the reason. "×" is a case's time
over the time of ours (`--implementation`): the median of the ratios of all rounds. Without an accelerator, each core is
a JAX device, and batches are cut over a number of cores that divides them. JAX_NUM_CPU_DEVICES=1 runs one program on
all cores.

The contestants differ:

- timm's layer does not mask the padding and has relative tables of full width.
- lucidrains' layer has such tables too. It masks the padding, its values are as wide as its keys, and it has an output
  projection.
- flex_attention gets windows and position logits like ours, without masks. Its compiled kernel computes softmax and
  products.
- Per-pixel windows are the same layer with b = 1: each query has its own window. The window's side is the largest odd
  number below b + 2h.
- The reference gathers each query's neighbourhood, in float32.
"""

import functools

import bench_timing as timing
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from halonet_jax import models, ops
from halonet_jax.costs import floors
from halonet_jax.training import sharding

_LAYERS = flags.DEFINE_list("layers", ["h1s1", "h1s3", "h4s1"], "Layers, as <model>s<stage>: h0 to h7, stages 1 to 4.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the computation.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Rounds. Each runs every case once; slow cases run at most three times.", 1)
_CASES = flags.DEFINE_list("cases", [], "Cases to run beside ours, by parts of their names; empty: all.")
_OPERATOR = flags.DEFINE_bool("operator", False, "Also time our operators without projections, against the floors.")
_FLOORS = flags.DEFINE_list("floors", [], f"Print the floors on these devices and exit. Known: {', '.join(floors.RATES)}.")
_COMPILE = flags.DEFINE_bool("torch_compile", True, "Also run PyTorch's compiled cases. They take minutes to prepare.")
_JSON = flags.DEFINE_string("json", "", "File to write all times to.")
_OURS = flags.DEFINE_enum("implementation", "auto", ["auto", "xla", "pallas"], "Our implementation, which the ratios compare with.")
_SIZE = flags.DEFINE_integer("map_size", 0, "Side of the maps in pixels; 0: as in the model.", lower_bound=0)

DIRECTIONS = ("forward", "forward + backward")


def _ours():
    return f"halonet_jax {_OURS.value}"


def _make_module(layer, implementation, window=None):
    """Returns our layer. With `window`, each query has its own window of that side."""
    b, h = (layer.block_size, layer.halo_size) if window is None else (1, window // 2)
    return models.HaloAttention(
        layer.channels, layer.heads, b, h, layer.value_channels, implementation=implementation, dtype=_DTYPE.value
    )


def _jax_case(name, function, arguments, direction):
    """Times `function`, or it and all gradients. `arguments()` returns its arguments on their devices."""

    def both(*arguments):
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(out)

    def call(*arguments):
        with sharding.use(timing.mesh()):
            return (function if direction == "forward" else both)(*arguments)

    def make():
        return functools.partial(jax.jit(call), *arguments())

    return timing.Case(name, make)


def _layer_case(name, layer, direction, **options):
    module = _make_module(layer, **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((layer.batch, layer.height, layer.width, layer.channels)))
    x = x.astype(_DTYPE.value)

    def arguments():
        variables = jax.jit(module.init)(jax.random.key(0), x)
        return timing.place(variables, cut=False), timing.place(x, cut=True)

    return _jax_case(name, module.apply, arguments, direction)


def _torch_case(name, build, layer, direction, compiled=False):
    """Times the PyTorch module that `build(layer)` returns, on maps [B, C, H, W]."""

    def make():
        torch, device, dtype = timing.torch_device(_DTYPE.value)
        torch.manual_seed(0)
        module = build(layer).to(device, dtype)
        x = torch.randn(layer.batch, layer.channels, layer.height, layer.width, device=device, dtype=dtype)
        call = torch.compile(module) if compiled else module
        if direction == "forward":

            def start():
                with torch.no_grad():
                    return call(x)

            return start
        x.requires_grad_()
        inputs = [x, *module.parameters()]
        with torch.no_grad():
            cotangent = torch.randn_like(call(x))
        return lambda: torch.autograd.grad(call(x), inputs, cotangent)

    return timing.Case(name, make, timing.torch_wait)


def _timm_layer(layer):
    from timm.layers.halo_attn import HaloAttn

    return HaloAttn(
        layer.channels, layer.value_channels, num_heads=layer.heads, dim_head=layer.channels // layer.heads,
        block_size=layer.block_size, halo_size=layer.halo_size,
    )  # fmt: skip


def _lucidrains_layer(layer):
    from halonet_pytorch import HaloAttention

    if layer.value_channels != layer.channels:
        raise NotImplementedError("its values are as wide as its keys")
    return HaloAttention(
        dim=layer.channels, block_size=layer.block_size, halo_size=layer.halo_size, dim_head=layer.channels // layer.heads,
        heads=layer.heads,
    )  # fmt: skip


def _flex_layer(layer):
    """Returns halo attention with PyTorch's compiled flex_attention. Windows are in memory, logits are not."""
    import torch
    from torch.nn import functional
    from torch.nn.attention.flex_attention import flex_attention

    b, h, heads = layer.block_size, layer.halo_size, layer.heads
    window, channels, value_channels = b + 2 * h, layer.channels // heads, layer.value_channels // heads
    if layer.height % b or layer.width % b:
        raise NotImplementedError(f"b={b} must divide the map")
    rows, cols = layer.height // b, layer.width // b
    index = torch.arange(window)[None] - torch.arange(b)[:, None] + b - 1
    attend = torch.compile(flex_attention)

    class Flex(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Conv2d(layer.channels, 2 * layer.channels + layer.value_channels, 1, bias=False)
            self.tables = torch.nn.Parameter(torch.randn(2, 2 * b + 2 * h - 1, channels // 2) * channels**-0.5)
            self.register_buffer("index", index)

        def windows(self, x):  # [B, C, H, W] -> [B I J, N, R S, D]
            x = functional.pad(x, [h] * 4).unfold(2, window, b).unfold(3, window, b)  # [B, C, I, J, R, S]
            return x.reshape(len(x), heads, -1, rows, cols, window**2).permute(0, 3, 4, 1, 5, 2).flatten(0, 2).contiguous()

        def forward(self, x):
            q, k, v = self.project(x).split([layer.channels, layer.channels, layer.value_channels], 1)
            q = q.reshape(len(x), heads, channels, rows, b, cols, b).permute(0, 3, 5, 1, 4, 6, 2).flatten(0, 2)
            row_table, col_table = self.tables[:, self.index]  # [Y, R, D / 2]
            row_logits = torch.einsum("bnyxd,yrd->bnyxr", q[..., : channels // 2], row_table).flatten(2, 3) * channels**-0.5
            col_logits = torch.einsum("bnyxd,xsd->bnyxs", q[..., channels // 2 :], col_table).flatten(2, 3) * channels**-0.5

            def position(score, block, head, query, key):
                return score + row_logits[block, head, query, key // window] + col_logits[block, head, query, key % window]

            out = attend(q.flatten(2, 3), self.windows(k), self.windows(v), score_mod=position)  # [B I J, N, Y X, E]
            out = out.reshape(-1, rows, cols, heads, b, b, value_channels).permute(0, 3, 6, 1, 4, 2, 5)
            return out.reshape(len(x), layer.value_channels, layer.height, layer.width)

    return Flex()


def _layer_cases(layer, direction):
    """Returns all contestants, ours first."""
    window = (layer.block_size + 2 * layer.halo_size) // 2 * 2 - 1
    window = max(window, 1)
    known = timing.ours(_OURS.value, reference=True)
    cases = [_layer_case(name, layer, direction, implementation=value) for name, value in known.items()]
    cases += [
        _layer_case(f"per-pixel windows of {window}², JAX", layer, direction, implementation="reference", window=window),
        _torch_case("timm HaloAttn", _timm_layer, layer, direction),
        _torch_case("timm HaloAttn, compiled", _timm_layer, layer, direction, compiled=True),
        _torch_case("lucidrains halonet-pytorch", _lucidrains_layer, layer, direction),
        _torch_case("lucidrains halonet-pytorch, compiled", _lucidrains_layer, layer, direction, compiled=True),
        _torch_case("PyTorch flex_attention", _flex_layer, layer, direction),
    ]
    cases = [case for case in cases if _COMPILE.value or not ("compiled" in case.name or "flex" in case.name)]
    return cases[:1] + [case for case in cases[1:] if not _CASES.value or any(part in case.name for part in _CASES.value)]


def _operator_cases(layer, direction):
    """Returns our implementations of `ops.halo_attention` as contestants."""
    rng, n = np.random.default_rng(0), layer
    shape = n.batch, n.height, n.width, n.heads
    channels, table = n.channels // n.heads, 2 * n.block_size + 2 * n.halo_size - 1
    shapes = [(*shape, channels)] * 2 + [(*shape, n.value_channels // n.heads)]
    arrays = [jnp.asarray(rng.standard_normal(s), _DTYPE.value) for s in shapes]
    tables = [jnp.asarray(rng.standard_normal((table, channels // 2)), jnp.float32)] * 2
    placed = lambda: [*timing.place(arrays, cut=True), *timing.place(tables, cut=False)]
    attend = functools.partial(ops.halo_attention, block_size=n.block_size, halo_size=n.halo_size)
    return [
        _jax_case(name, functools.partial(attend, implementation=value), placed, direction)
        for name, value in timing.ours(_OURS.value, reference=False).items()
    ]


def _floor_table(layer, itemsize, rates):
    """Returns the floors, `{direction: {resource: seconds}}`."""
    work = {"forward": floors.forward(layer, itemsize)}
    work["forward + backward"] = floors.total(work["forward"], floors.backward(layer, itemsize))
    return {direction: work.seconds(rates) for direction, work in work.items()}


def _print_floors(itemsize):
    print(f"Floors in µs at batch {_BATCH.value}, {_DTYPE.value}: bytes / multiply-adds / exponentials. The highest one counts.\n")
    print("| layer | direction |" + "".join(f" {device} |" for device in _FLOORS.value))
    print("|---|---|" + "--:|" * len(_FLOORS.value))
    for name in _LAYERS.value:
        layer = floors.layer(name, _BATCH.value)
        for direction in DIRECTIONS:
            row = [_floor_table(layer, itemsize, floors.RATES[device])[direction].values() for device in _FLOORS.value]
            print(
                f"| {name} | {direction} |" + "".join(" " + " / ".join(f"{1e6 * s:.1f}" for s in cell) + " |" for cell in row)
            )


def _shares(layer, columns):
    """Returns the share of the highest floor that each operator reaches, as notes for its table.

    Returns None if the device's rates are unknown or the dtype is not bfloat16.
    """
    rates = floors.rates(jax.devices()[0].device_kind)
    if rates is None or _DTYPE.value != "bfloat16":
        return None
    least = _floor_table(layer, 2, rates)
    notes = {}
    for direction, timings in columns.items():
        resource, seconds = max(least[direction].items(), key=lambda item: item[1])
        for name, taken in timings.items():
            if taken.seconds:
                notes.setdefault(name, []).append(f"{direction}: {seconds / taken.median:.0%} of the floor by {resource}")
    return {name: "; ".join(parts) for name, parts in notes.items()}


def _main(argv):
    timing.check_json(_JSON.value)
    itemsize = jnp.dtype(_DTYPE.value).itemsize
    for device in _FLOORS.value:
        if device not in floors.RATES:
            raise app.UsageError(f"--floors: {device!r} is unknown; use {', '.join(floors.RATES)}")
    try:
        layers = {name: floors.layer(name, _BATCH.value) for name in _LAYERS.value}
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if _FLOORS.value:
        return _print_floors(itemsize)
    sharding.use_cpu_cores(_BATCH.value)
    about, results = timing.machine(), []
    print(about, end="\n\n")
    for name, layer in layers.items():
        if _SIZE.value:
            layer = layer._replace(height=_SIZE.value, width=_SIZE.value)
        title = (
            f"**{name}**: {layer.batch} maps of {layer.height} × {layer.width} × {layer.channels}, {layer.heads} heads, "
            f"values {layer.value_channels} wide, b {layer.block_size}, h {layer.halo_size}, {_DTYPE.value}"
        )
        columns = {d: timing.measure(_layer_cases(layer, d), _REPEATS.value, f"{name} {d}") for d in DIRECTIONS}
        print(timing.table(title, columns, _ours()), flush=True)
        results += timing.records(columns, _ours(), benchmark="layer", layer=name, **layer._asdict(), dtype=_DTYPE.value)
        if _OPERATOR.value:
            columns = {d: timing.measure(_operator_cases(layer, d), _REPEATS.value, f"{name} {d}") for d in DIRECTIONS}
            print(timing.table(f"**{name}**, operator alone", columns, _ours(), _shares(layer, columns)), flush=True)
            results += timing.records(columns, _ours(), benchmark="operator", layer=name, **layer._asdict(), dtype=_DTYPE.value)
        jax.clear_caches()
        if _JSON.value:
            timing.write_json(_JSON.value, results, about)


if __name__ == "__main__":
    app.run(_main)
