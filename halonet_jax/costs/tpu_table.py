"""The table docs/tpu_sizing.md: what each recipe takes on slices of each TPU generation. `compile_for_tpu.py --table` runs it.

Every compile is stored in docs/tpu_sizing.json as soon as it ends, with what it depends on, so that a run goes on where the last
one stopped. Nothing in the table is extrapolated: a row that is not compiled yet says so.
"""

import hashlib
import json
import time
from importlib import metadata
from pathlib import Path

import ml_collections

from halonet_jax import config as config_lib
from halonet_jax.costs import chips, tpu_compile, tpu_table_text
from halonet_jax.costs.tpu_compile import Settings

ROOT = Path(__file__).parents[2]
RECORDS, PAGE = ROOT / "docs" / "tpu_sizing.json", ROOT / "docs" / "tpu_sizing.md"
# 128 cores or chips each, so 32 or 64 of the recipe's 4,096 images on a device.
SLICES = {"v5e-128": "v5e:8x16", "v4-128": "v4:4x4x4", "v6e-128": "v6e:8x16", "v5p-128": "v5p:4x4x4", "v3-128": "v3:8x8"}
RECIPES = (
    "h0", "h1", "h2", "h3", "h4", "h5", "h6", "h7", "h4_base128", "h4_base128_conv12", "h7_conv1", "h7_conv12", "h7_conv123",
    "halonet50", "resnet50",
)  # fmt: skip
FIRST = ("h4", "h0", "h1", "h7")
PUBLISHED = ("h4_base128", "v3-128", True)  # the one step time on a TPU that the paper states
EPOCHS, IMAGES = 350, 1_281_167  # the paper's recipe on ImageNet
# What a program for TPU depends on, with the recipe; reading data, logging, checkpoints, other devices' attention do not count.
SOURCES = (
    "config/__init__.py", "config/knobs.py", "config/recipes.py", "config/derived.py", "models/__init__.py", "models/blocks.py",
    "models/halonet.py", "models/layers.py", "models/variants.py", "ops/halo_attention.py", "ops/tpu_kernels.py", "ops/tpu.py",
    "ops/per_device.py", "ops/selection.py", "ops/einsum.py", "tasks/classification.py", "tasks/mixing.py", "training/step.py",
    "training/optimizer.py", "training/programs.py", "training/sharding.py", "training/state.py",
)  # fmt: skip


def main(minutes: float, quick: bool) -> int:
    """Compiles what is missing, most wanted first, and writes the page after every row. `quick` leaves out machine code."""
    store, begin = Store(), time.monotonic()
    tell = lambda text: print(f"[{(time.monotonic() - begin) / 60:4.0f} min] {text}", flush=True)
    for recipe, name, timed in work():
        if minutes and time.monotonic() - begin > 60 * minutes:
            tell("time is up; the same command goes on")
            break
        if not (quick and timed):
            row(store, recipe, SLICES[name], timed, lambda text, about=f"{recipe} {name}": tell(f"{about}: {text.strip()}"))
            write_page(store)
    write_page(store)
    return 0


def work() -> list[tuple[str, str, bool]]:
    """(recipe, slice, whether its time is wanted too) in the order in which they are wanted."""
    rest = [recipe for recipe in RECIPES if recipe not in FIRST]
    every = lambda recipes, names, timed: [(recipe, name, timed) for name in names for recipe in recipes]
    first, others = ("v5e-128", "v4-128"), ("v6e-128", "v5p-128", "v3-128")
    return [
        *every(FIRST, first, False), ("h4", "v5e-128", True), PUBLISHED, *every(FIRST, first[:1], True), *every(rest, first, False),
        *every(FIRST, others, False), *every(FIRST, first[1:], True), *every(rest, others, False), *every(rest, first, True),
        *every(RECIPES, others, True),
    ]  # fmt: skip


class Store:
    """Records of compiles, kept in a file that several runs may write to."""

    def __init__(self):
        self.read()

    def code(self, recipe: str) -> str:
        """Of what a recipe's programs depend on."""
        code = hashlib.sha256("".join(metadata.version(name) for name in ("jax", "libtpu")).encode())
        for path in (ROOT / "configs" / f"{recipe}.py", *(ROOT / "halonet_jax" / source for source in SOURCES)):
            code.update(path.read_bytes())
        return code.hexdigest()[:12]

    def read(self) -> None:
        self.records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}

    def find(self, recipe: str, topology: str, settings: Settings, quick: bool) -> dict | None:
        """A record, of whatever code."""
        return self.records.get(_key(recipe, topology, settings, quick))

    def get(self, recipe: str, topology: str, settings: Settings, quick: bool, code: str = "") -> dict | None:
        """A record of the code as it is now, or of `code`."""
        record = self.find(recipe, topology, settings, quick)
        return record if record and record["code"] == (code or self.code(recipe)) else None

    def put(self, recipe: str, topology: str, settings: Settings, quick: bool, record: dict) -> None:
        self.read()
        self.records[_key(recipe, topology, settings, quick)] = record
        new = RECORDS.with_suffix(".new")
        new.write_text(json.dumps(dict(sorted(self.records.items())), indent=1) + "\n")
        new.rename(RECORDS)


def _key(recipe, topology, settings, quick):
    settings = " ".join(f"{key}={value}" for key, value in settings._asdict().items())
    return f"{recipe} | {topology} | {settings} | {'memory' if quick else 'machine code'}"


def load(recipe: str, scan: bool = False) -> ml_collections.ConfigDict:
    """The recipe's config, with `model.scan` where `scan` asks for it."""
    config = config_lib.sibling(str(ROOT / "configs" / "recipe.py"), recipe)
    config.model.scan |= scan
    return config


def row(store: Store, recipe: str, topology: str, timed: bool, tell) -> None:
    """Compiles a row as far as it is not stored: the recipe as it is, or what makes it fit.

    Where `timed`, machine code besides, with loops over equal blocks, which compile sooner.
    """

    def compile_step(config, topology, step="train", quick=True):
        settings = Settings.of(config)
        store.read()
        record = store.get(recipe, topology, settings, quick)
        if record is None:
            tell(f"compiling {settings.flags(here) or 'the recipe as it is'}{'' if quick else ', machine code'} …")
            code = store.code(recipe)  # now: it may change while the compiler runs
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


def fits(store: Store, config, recipe: str, topology: str, quick: bool = True, code: str = "") -> list[tuple[Settings, dict]]:
    """Of the config's settings and the remedies for them what fits, with records, the one of least time first."""
    here, parsed = Settings.of(config), chips.topology(topology)
    found = []
    for remat in (False, True):
        for steps in (1, 2, 4, 8, 16, 32, 64):
            for fsdp in (1, parsed.num_devices):
                settings = here._replace(accumulation_steps=steps, remat=remat, fsdp=fsdp)
                record = store.get(recipe, topology, settings, quick, code)
                if record and record["fits"]:
                    found.append((settings, record))
    return sorted(found, key=lambda item: chips.roofline_seconds(parsed.chip, item[1]["flops"], item[1]["bytes"]))


def write_page(store: Store) -> None:
    """Writes docs/tpu_sizing.md from the records."""
    lines = [tpu_table_text.HEADER.format(**{name: metadata.version(name) for name in ("jax", "libtpu")})]
    for name, topology in SLICES.items():
        parsed = chips.topology(topology)
        lines.append(_slice_header(name, parsed))
        lines += [_line(store, recipe, parsed) for recipe in RECIPES]
    share = lambda key: ", ".join(f"{getattr(chip, key):.0%} ({chip.name})" for chip in chips.CHIPS.values())
    PAGE.write_text(
        "\n".join(lines) + "\n" + tpu_table_text.FOOTER.format(matmul=share("matmul_share"), add=share("add_share"))
    )


def _slice_header(name, parsed):
    chip = parsed.chip
    kind = "cores (two a chip)" if chip.devices_per_chip == 2 else "chips"
    return (
        f"\n## {name} (`{parsed.name}`)\n\n{parsed.num_devices} {kind} of {chip.memory / chips.GIB:.2f} GiB, "
        f"{chip.flops / 1e12:g} TFLOP/s and {chip.bandwidth / 1e9:g} GB/s, {4096 // parsed.num_devices} images on each.\n\n"
        "| recipe | as it is | what makes it fit | peak GiB | TFLOP | GB moved | least ms | estimated ms | images/s | hours "
        "| chip-hours | estimated with |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )


def _line(store, recipe, parsed):
    config, chip = load(recipe), parsed.chip
    here = Settings.of(config)
    first = store.find(recipe, parsed.name, here, True)
    if first is None:
        return f"| `{recipe}` | not compiled yet |" + " |" * 10
    code = first["code"]  # records of different code do not stand in one row
    cells = [f"`{recipe}`" + ("" if code == store.code(recipe) else " †")]
    cells += ["fits" if first["fits"] else f"needs {first.get('needed_bytes', first.get('peak_bytes')) / chips.GIB:.1f} GiB"]
    if fitting := fits(store, config, recipe, parsed.name, code=code):
        cells += ["" if first["fits"] else "; ".join(_remedy(here, *item) for item in fitting)]
        settings, record = fitting[0]
        least = chips.roofline_seconds(chip, record["flops"], record["bytes"])
        cells += [f"{record['peak_bytes'] / chips.GIB:.2f}", f"{record['flops'] / 1e12:.2f}", f"{record['bytes'] / 1e9:.0f}"]
        cells += [f"{1e3 * least:.0f}"]
    else:
        cells += ["nothing compiled yet", "", "", "", ""]
    if timed := fits(store, load(recipe, scan=True), recipe, parsed.name, False, code):
        settings, record = timed[0]
        seconds = chips.step_seconds(chip, *(record.get(key, 0) for key in ("flops", "bytes", "cycles", "kernel_flops")))
        rate = config.batch_size / seconds
        hours = EPOCHS * IMAGES / rate / 3600
        cells += [f"{1e3 * seconds:.0f}", f"{rate:,.0f}", f"{hours:.1f}", f"{hours * parsed.num_chips:,.0f}"]
        cells += [_short(settings.flags(here))]
    else:
        cells += ["not compiled yet", "", "", "", ""]
    return "| " + " | ".join(cells) + " |"


def _remedy(here, settings, record):
    return f"{_short(settings.flags(here))} ({record['peak_bytes'] / chips.GIB:.1f} GiB)"


def _short(flags):
    return " ".join(f"`{flag.removeprefix('--config.')}`" for flag in flags.split())
