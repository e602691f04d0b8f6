"""Writes docs/tpu_sizing.md, the sizing of each recipe on each TPU generation. `compile_for_tpu.py --table` runs it.

Every compile is stored as soon as it ends (`tpu_records`). The next run continues where the last one stopped. Nothing
in the tables is extrapolated: a row that is not compiled yet says so.
"""

import time
from collections.abc import Callable
from importlib import metadata

from halonet_jax.costs import chips, tpu_compile, tpu_table_text
from halonet_jax.costs.tpu_compile import Settings
from halonet_jax.costs.tpu_records import DETECTOR_SLICES, DETECTORS, RECIPES, ROOT, SLICES, Store, fits, load

PAGE = ROOT / "docs" / "tpu_sizing.md"
FIRST = ("h4", "h0", "h1", "h7")
PUBLISHED = ("h4_base128", "v3-128", True)  # the one step time on a TPU that the paper states
EPOCHS, IMAGES = 350, 1_281_167  # the paper's recipe on ImageNet


def main(minutes: float, quick: bool) -> int:
    """Compiles the missing rows, the most important first, and writes the page after every row.

    Args:
        minutes: no compile starts after this many minutes; 0: no limit.
        quick: leave out machine code and the estimates of time, which need it.

    Returns:
        The exit code, 0.
    """
    store, begin = Store(), time.monotonic()
    tell = lambda text: print(f"[{(time.monotonic() - begin) / 60:4.0f} min] {text}", flush=True)
    for recipe, name, timed in work():
        if minutes and time.monotonic() - begin > 60 * minutes:
            tell("time is up; run the same command to continue")
            break
        if not (quick and timed):
            topology = (SLICES | DETECTOR_SLICES)[name]
            row(store, recipe, topology, timed, lambda text, about=f"{recipe} {name}": tell(f"{about}: {text.strip()}"))
            write_page(store)
    write_page(store)
    return 0


def work() -> list[tuple[str, str, bool]]:
    """Returns (recipe, slice, whether to estimate its time too) for every row. The most important row is first."""
    rest = [recipe for recipe in RECIPES if recipe not in FIRST]
    every = lambda recipes, names, timed: [(recipe, name, timed) for name in names for recipe in recipes]
    first, others = ("v5e-128", "v4-128"), ("v6e-128", "v5p-128", "v3-128")
    return [
        *every(FIRST, first, False), ("h4", "v5e-128", True), PUBLISHED, *every(FIRST, first[:1], True), *every(rest, first, False),
        *every(DETECTORS, DETECTOR_SLICES, False), *every(FIRST, others, False), *every(FIRST, first[1:], True),
        *every(rest, others, False), *every(rest, first, True), *every(RECIPES, others, True),
    ]  # fmt: skip


def row(store: Store, recipe: str, topology: str, timed: bool, tell: Callable[[str], None]) -> None:
    """Compiles the missing parts of a row: the recipe as it is and, if it does not fit, settings that do.

    Args:
        store: receives the records.
        recipe: a name from `RECIPES` or `DETECTORS`.
        topology: a slice, such as "v5e:8x16".
        timed: also compile to machine code, with `model.scan` to save compile time. This gives the estimate of time.
        tell: called with each line of progress.
    """

    def compile_step(config, topology, step="train", quick=True):
        settings = Settings.of(config)
        store.read()
        record = store.get(recipe, topology, settings, quick)
        if record is None:
            tell(f"compiling {settings.flags(here) or 'the recipe as it is'}{'' if quick else ', machine code'} …")
            code = store.code(recipe)  # before compiling: the code may change while the compiler runs
            record = tpu_compile.compile_step(config, topology, step, quick) | {"code": code}
            store.put(recipe, topology, settings, quick, record)
        return record

    here = Settings.of(load(recipe))
    for config in [load(recipe)] + [load(recipe, scan=True)] * timed:
        try:
            record = compile_step(config, topology)
            if not record["fits"] and not fits(store, config, recipe, topology):
                tpu_compile.make_fit(config, topology, record, tell, compile_step)
            fitting = fits(store, config, recipe, topology)
            if timed and config.model.scan and fitting:
                compile_step(fitting[0][0].apply(config), topology, quick=False)
        except tpu_compile.CompileFailed as error:
            tell(f"the compiler failed: {error}")


def write_page(store: Store) -> None:
    """Writes docs/tpu_sizing.md from the records, without compiling.

    Args:
        store: the records.
    """
    lines = [tpu_table_text.HEADER.format(**{name: metadata.version(name) for name in ("jax", "libtpu")})]
    for name, topology in SLICES.items():
        lines += _slice_section(store, name, chips.topology(topology))
    lines += _detector_section(store)
    PAGE.write_text("\n".join(lines) + "\n" + tpu_table_text.FOOTER.format(checks=_checks()))


def _slice_section(store, name, parsed):
    chip = parsed.chip
    kind = "cores (two a chip)" if chip.devices_per_chip == 2 else "chips"
    lines = [
        f"## {name} (`{parsed.name}`)\n\n{parsed.num_devices} {kind} of {chip.memory / chips.GIB:.2f} GiB, "
        f"{chip.flops / 1e12:g} TFLOP/s and {chip.bandwidth / 1e9:g} GB/s, {4096 // parsed.num_devices} images on each.\n",
        "| recipe | as it is | settings that fit (GiB) | peak GiB | TFLOP | GB moved | least ms |\n|---|---|---|--:|--:|--:|--:|",
        *(_row([_name(store, recipe, parsed), *_memory_cells(store, recipe, parsed)]) for recipe in RECIPES),
    ]
    timed = [(recipe, cells) for recipe in RECIPES if (cells := _time_cells(store, recipe, parsed))]
    if not timed:
        return [*lines, tpu_table_text.NO_TIMES + "\n"]
    return [
        *lines,
        (tpu_table_text.ALL_TIMES if len(timed) == len(RECIPES) else tpu_table_text.SOME_TIMES) + "\n",
        "| recipe | estimated ms | images/s | hours | chip-hours | estimated with |\n|---|--:|--:|--:|--:|---|",
        *(_row([_name(store, recipe, parsed), *cells]) for recipe, cells in timed),
        "",
    ]


def _detector_section(store):
    lines = [
        tpu_table_text.DETECTORS,
        "| recipe | slice | as it is | settings that fit (GiB) | peak GiB | TFLOP | GB moved | least ms |\n"
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for name, topology in DETECTOR_SLICES.items():
        parsed = chips.topology(topology)
        lines += [_row([_name(store, recipe, parsed), name, *_memory_cells(store, recipe, parsed)]) for recipe in DETECTORS]
    recipe, topology = DETECTORS[0], next(iter(DETECTOR_SLICES.values()))
    record = store.find(recipe, topology, Settings.of(load(recipe)), True)
    if not record or not record["fits"]:
        return [*lines, ""]
    size = record["bytes"]
    parts = [
        _row([part, f"{flops / 1e12:.2f}", f"{moved / 1e9:.1f}", f"{moved / size:.0%}"])
        for part, (flops, moved) in record["parts"].items()
    ]
    moved = "; ".join(f"{count} × {kind}, {total / 1e6:.0f} MB together" for kind, count, total in record["collectives"])
    return [
        *lines, tpu_table_text.DETECTOR_PARTS.format(recipe=recipe, collectives=moved, temp=record["temp_bytes"] / chips.GIB),
        "| part | TFLOP | GB moved | share of GB |\n|---|--:|--:|--:|", *parts, "",
    ]  # fmt: skip


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _stored_code(store, recipe, parsed):
    """Returns the stamp of the recipe's record without changes, None if it is not compiled.

    The records of one row must have the same stamp.
    """
    record = store.find(recipe, parsed.name, Settings.of(load(recipe)), True)
    return record and record["code"]


def _name(store, recipe, parsed):
    return f"`{recipe}`" + (" †" if _stored_code(store, recipe, parsed) not in (None, store.code(recipe)) else "")


def _memory_cells(store, recipe, parsed):
    here, code = Settings.of(load(recipe)), _stored_code(store, recipe, parsed)
    if code is None:
        return ["not compiled yet", "", "", "", "", ""]
    first = store.find(recipe, parsed.name, here, True)
    state = "fits" if first["fits"] else f"needs {first.get('needed_bytes', first.get('peak_bytes')) / chips.GIB:.1f} GiB"
    fitting = fits(store, load(recipe), recipe, parsed.name, code=code)
    if not fitting:
        return [state, "nothing compiled yet", "", "", "", ""]
    settings, record = fitting[0]
    least = chips.roofline_seconds(parsed.chip, record["flops"], record["bytes"])
    return [
        state,
        "" if first["fits"] else "; ".join(_remedy(here, *item) for item in fitting),
        f"{record['peak_bytes'] / chips.GIB:.2f}", f"{record['flops'] / 1e12:.2f}", f"{record['bytes'] / 1e9:.0f}",
        f"{1e3 * least:.0f}",
    ]  # fmt: skip


def _time_cells(store, recipe, parsed):
    """Returns the cells of the table of times, None if no time is compiled."""
    config, code = load(recipe), _stored_code(store, recipe, parsed)
    timed = code and fits(store, load(recipe, scan=True), recipe, parsed.name, False, code)
    if not timed:
        return None
    settings, record = timed[0]
    seconds = chips.step_seconds(parsed.chip, *(record.get(key, 0) for key in ("flops", "bytes", "cycles", "kernel_flops")))
    rate = config.batch_size / seconds
    hours = EPOCHS * IMAGES / rate / 3600
    figures = [f"{1e3 * seconds:.0f}", f"{rate:,.0f}", f"{hours:.1f}", f"{hours * parsed.num_chips:,.0f}"]
    return [*figures, _short(settings.flags(Settings.of(config)))]


def _remedy(here, settings, record):
    return f"{_short(settings.flags(here))} ({record['peak_bytes'] / chips.GIB:.1f})"


def _short(flags):
    """Shortens `--config.model.remat=True` to `remat=True`. The head of the page explains the keys."""
    return " ".join(f"`{flag.removeprefix('--config.').split('.')[-1]}`" for flag in flags.split())


def _checks():
    rows = ["| chip | product, share of the peak | sum, share of the bandwidth |", "|---|--:|--:|"]
    return "\n".join(rows + [f"| {c.name} | {c.matmul_share:.0%} | {c.add_share:.0%} |" for c in chips.CHIPS.values()])
