"""The recipes and slices of docs/tpu_sizing.md, and the records of their compiles.

Every compile is stored in docs/tpu_sizing.json as soon as it ends, with a stamp of the code that it depends on.
"""

import hashlib
import json
from importlib import metadata
from pathlib import Path

import ml_collections

from halonet_jax import config as config_lib
from halonet_jax.costs import chips
from halonet_jax.costs.tpu_compile import Settings

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "tpu_sizing.json"
# 128 cores or chips each: a device gets 32 or 64 of the recipe's 4,096 images.
SLICES = {"v5e-128": "v5e:8x16", "v4-128": "v4:4x4x4", "v6e-128": "v6e:8x16", "v5p-128": "v5p:4x4x4", "v3-128": "v3:8x8"}
RECIPES = (
    "h0", "h1", "h2", "h3", "h4", "h5", "h6", "h7", "h4_base128", "h4_base128_conv12", "h7_conv1", "h7_conv12", "h7_conv123",
    "halonet50", "resnet50",
)  # fmt: skip
# Detectors have 64 images a step, as in the paper: 2 on each of 32 devices.
DETECTOR_SLICES = {"v5e-32": "v5e:4x8", "v5e-16": "v5e:4x4"}
DETECTORS = ("coco_r50_se_halo", "coco_r50_se", "coco_r101_se_halo", "coco_r50_se_halo_b32", "coco_r50", "coco_r101_se")
# A compiled step depends on the recipe and on every file in these folders of the package, except LEFT_OUT.
SOURCES = ("config", "models", "ops", "tasks", "training")
LEFT_OUT = (
    "tasks/inputs.py", "training/carry_over.py", "training/checkpoint.py", "training/checkpoint_files.py",
    "training/checkpoint_reader.py", "training/evaluation.py",
    "training/loop.py", "training/progress.py",
)  # fmt: skip
DETECTOR_SOURCES = ("detection",)  # of detectors only


class Store:
    """The records of compiles, in a file that several runs may write to."""

    def __init__(self):
        self.read()

    def code(self, recipe: str) -> str:
        """Returns the stamp of the current code: a hash of everything that the recipe's compiled step depends on.

        Args:
            recipe: a name from `RECIPES` or `DETECTORS`.
        """
        stamp = hashlib.sha256("".join(metadata.version(name) for name in ("jax", "libtpu")).encode())
        stamp.update(config_lib.to_json(load(recipe)).encode())
        package, folders = ROOT / "halonet_jax", SOURCES + DETECTOR_SOURCES * (recipe in DETECTORS)
        for path in sorted(path for folder in folders for path in (package / folder).glob("*.py")):
            if path.relative_to(package).as_posix() not in LEFT_OUT:
                stamp.update(path.read_bytes())
        return stamp.hexdigest()[:12]

    def read(self) -> None:
        """Reads the file again, because other runs may have added records."""
        self.records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}

    def find(self, recipe: str, topology: str, settings: Settings, quick: bool) -> dict | None:
        """Returns a record, whatever code it was compiled from; None if it does not exist.

        Args:
            recipe: a name from `RECIPES` or `DETECTORS`.
            topology: a slice, such as "v5e:8x16".
            settings: those of the compile.
            quick: True for a compile to memory, False for one to machine code.
        """
        return self.records.get(_key(recipe, topology, settings, quick))

    def get(self, recipe: str, topology: str, settings: Settings, quick: bool, code: str = "") -> dict | None:
        """Returns a record of the current code, or of `code`; None if it does not exist.

        Args:
            recipe: as for `find`.
            topology: likewise.
            settings: likewise.
            quick: likewise.
            code: the stamp that the record must have; "": that of the current code.
        """
        record = self.find(recipe, topology, settings, quick)
        return record if record and record["code"] == (code or self.code(recipe)) else None

    def put(self, recipe: str, topology: str, settings: Settings, quick: bool, record: dict) -> None:
        """Adds a record to the file, or replaces the old one.

        Args:
            recipe: as for `find`.
            topology: likewise.
            settings: likewise.
            quick: likewise.
            record: JSON values, with the stamp under "code".
        """
        self.read()
        self.records[_key(recipe, topology, settings, quick)] = record
        new = RECORDS.with_suffix(".new")
        new.write_text(json.dumps(dict(sorted(self.records.items())), indent=1) + "\n")
        new.rename(RECORDS)


def _key(recipe, topology, settings, quick):
    settings = " ".join(f"{key}={value}" for key, value in settings._asdict().items())
    return f"{recipe} | {topology} | {settings} | {'memory' if quick else 'machine code'}"


def load(recipe: str, scan: bool = False) -> ml_collections.ConfigDict:
    """Returns a recipe's config.

    Args:
        recipe: a name from `RECIPES` or `DETECTORS`.
        scan: True turns `model.scan` on; False leaves it as it is.
    """
    config = config_lib.sibling(str(ROOT / "configs" / "recipe.py"), recipe)
    config.model.scan |= scan
    return config


def fits(store: Store, config, recipe: str, topology: str, quick: bool = True, code: str = "") -> list[tuple[Settings, dict]]:
    """Returns the stored compiles that fit, as (settings, record). The one with the least time is first.

    It looks for the config's own settings and for those that `tpu_compile.make_fit` tries.

    Args:
        store: the records.
        config: the recipe's config.
        recipe: its name.
        topology: a slice, such as "v5e:8x16".
        quick: True for compiles to memory, False for those to machine code.
        code: the stamp that records must have; "": that of the current code.
    """
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
