"""The text around the tables of docs/tpu_sizing.md. `tpu_table.write_page` fills in the names in braces."""

HEADER = """# What the recipes take on TPUs

The memory, the work and the estimated time of each recipe on slices of five TPU generations.

We made these figures without a TPU. For each row, TPU's own compiler compiled the recipe's real train step for the
slice, on a machine without one (jax {jax}, libtpu {libtpu}). Nobody has run these steps on a TPU yet.

```bash
pip install -e ".[compile_check]"
python scripts/tpu/compile_for_tpu.py --config=configs/h4.py --topology=v5e:8x16   # one recipe
python scripts/tpu/compile_for_tpu.py --table   # writes this page; continues where it stopped
```

The first command takes any `--config.KEY=VALUE`.

## How to read the tables

Classifiers have the settings of their files, with 4,096 images a step over the slice. [Detectors](#detectors) have 64.
Figures are of one device.

| column | meaning |
|---|---|
| as it is | whether the recipe fits without changes, or the memory that its activations need |
| settings that fit (GiB) | settings that were compiled and fit, with their memory; lowest *least ms* first |
| peak GiB | state and temporaries together |
| TFLOP | work of the matrix units in a step, with recomputation |
| GB moved | traffic to and from main memory in a step |
| least ms | the larger of TFLOP over peak and GB over bandwidth; no step is faster |
| estimated ms | by the compiler's own cycles, see [the limits](#how-we-get-the-figures-and-their-limits) |
| images/s | of the slice, by the estimate |
| hours, chip-hours | for 350 epochs of ImageNet (1,281,167 images), by the estimate |
| estimated with | settings of the estimate that the recipe does not have |

- The figures of a row are of the recipe as it is, or else of the first of the settings that fit.
- `accumulation_steps` (`optimizer.accumulation_steps`) splits a step into micro-batches and keeps the batch of 4,096.
  The number is found by doubling. `remat` (`model.remat`) recomputes each block in the backward pass. `scan` is
  `model.scan`.
- † marks a row that was compiled from earlier code.
- "not compiled yet" means just that. No figure is extrapolated.
"""

NO_TIMES = "\nNo estimate of time is compiled yet."
SOME_TIMES = "\nEstimates of time. For the other recipes, none is compiled yet."
ALL_TIMES = "\nEstimates of time:"

DETECTORS = """\
## Detectors

Mask R-CNN on COCO at 1024 px, with the settings of the recipes: 64 images a step, 2 on each chip of v5e-32, 4 on each of
v5e-16. The columns are those above.
"""

DETECTOR_PARTS = """
The parts of a step of `{recipe}` on v5e-32, with their gradients. Temporaries take {temp:.2f} GiB.
Chips exchange gradients, batch statistics and sums of losses alone: {collectives}.

"other" is the optimizer and copies that the compiler makes, most of them between main and on-chip memory. Their names do
not tell the part, so that the traffic of the parts is a lower bound. A fusion counts for the part that it is named after.
The rounds of NMS are counted once; a picture takes four to eight.
"""

FOOTER = """\
## How we get the figures, and their limits

- **Memory is the compiler's own.** Exceeding it is a compile error, so "fits" is not an estimate. The figure is from
  the buffer assignment, before machine code exists. Machine code (a few MB) is not counted. For H0 on v5e, the figure
  is within 0.03 % of the finished program's.
- **Loops are multiplied** by their trip counts. The compiler's `cost_analysis` does not do this.
- **Estimated time** is the sum of the backend's `estimated_cycles`, loops multiplied, at the chip's clock. Fused
  attention kernels have no estimate; they count as their FLOPs at the peak. The estimate leaves out time between chips,
  copies between main and on-chip memory that run beside other work, gathers and scatters of the relative tables, and
  the gradient of max pooling.
- **How good the estimate is.** We checked the cycles with two programs: an 8192³ bfloat16 product, and the sum of two
  arrays of 1 GiB. The table has the speed that the cycles give. For work bound by memory, the estimate may therefore be
  too long, by up to the inverse of the second figure. Use it to rank and to budget. The first hundred real steps give
  the true time.

{checks}

- **The paper states one step time on TPUs**: 377 ms for `h4_base128` with 32 images on a core of v3 (its table of
  ImageNet-21k models). Our step takes at least 736 ms there by its traffic, and 1,533 ms by the estimate. It uses the
  einsum, because v3 has no fused attention. Our step therefore moves at least twice what the authors' step can have
  moved. Most of it is attention's.
- **`model.scan=True` costs traffic**, 20 to 30 % of it ([performance.md](performance.md)), and saves compile time.
  Recipes up to H4 do not use it. The estimates of time use it for all recipes.
- **Batch-norm groups of 64** span devices if a device holds fewer images. Every norm then needs all-reduces. With 32
  images on a device (v5e), `h4` makes 133 of them a step, of 41.8 MB together. With 64 images on a device (v4), groups
  stay within a device, and it makes 3, of 41.3 MB: little less data, but many fewer waits. Memory and FLOPs are the
  same. `model.bn_group_size=32` avoids it.
- **Devices.** On v3 a device is a core, and a chip has two: v3-128 has 64 chips. v4 is compiled as it runs by default,
  with two cores as one device. v4-128 and v5p-128 have 64 chips. v5e-128 and v6e-128 have 128 chips.
- **Recipes.** `h4_base128…` are compiled with 1,000 classes. Their own recipe is 90 epochs of ImageNet-21k.
  halonet50's and resnet50's recipe is 150 epochs of ImageNet.
"""
