"""What docs/tpu_sizing.md says around its tables."""

HEADER = """# What the recipes take on TPUs

Made without a TPU: each recipe's real train step, compiled for the slice by TPU's own compiler on a machine without one (jax
{jax}, libtpu {libtpu}). Nobody has run these yet. `python scripts/tpu/compile_for_tpu.py --table` writes this page and goes on
where it stopped; `--config=configs/h4.py --topology=v5e:8x16` checks one recipe, with any `--config.key=value`.

How to read a row. Recipes stand as their files say, with 4,096 images a step over the slice; figures are of one device.

- **as it is**: whether the recipe fits as it stands, or what its activations would need.
- **what makes it fit**: settings that were compiled and fit, with the memory that they take, the quickest by *least ms*
  first. The figures to the right are of the first. Micro-batches (`accumulation_steps`) keep the batch of 4,096; `remat`
  recomputes each block in the backward pass. The micro-batch is found by halving.
- **peak GiB**: state and temporaries together, of the GiB that a program can have on the device.
- **TFLOP**: of the matrix units in a step, recomputation included. **GB moved**: to and from main memory.
- **least ms**: the larger of TFLOP over peak and GB over bandwidth. No step is quicker.
- **estimated ms**: the compiler's own cycles, see below; **images/s** of the slice, **hours** and **chip-hours** for 350
  epochs of ImageNet (1,281,167 images) come from it. Where its settings differ from the row's, **estimated with** names them.
- † marks a row that was compiled from earlier code.

Rows that say "not compiled yet" have not been compiled; nothing here is extrapolated.
"""

FOOTER = """
## How the figures come about, and their limits

- **Memory is the compiler's own**, and exceeding it is an error of the compile, so "fits" is no estimate. It is had from the
  buffer assignment, before machine code exists (a few MB, not counted): equal to the finished program's within 0.03 % (H0 on
  v5e).
- **Loops are multiplied** by their trip counts, which the compiler's `cost_analysis` does not do.
- **Estimated time** sums the backend's `estimated_cycles`, loops multiplied, at the chip's clock. They were checked against
  two programs: an 8192³ bfloat16 product, which they put at {matmul} of the peak, and the sum of two arrays of 1 GiB, at
  {add} of the bandwidth. For work bound by memory they may thus be too many, by up to the inverse of that. Not in them: time
  between chips, copies between main and on-chip memory that run beside the rest, gathers and scatters of the relative tables,
  and max pooling's gradient. Fused attention kernels, for which there are none, count as their FLOPs at the
  peak. Use the estimate to rank and to budget; the first hundred real steps say what is true.
- **Against the one step time on TPUs that the paper states**, 377 ms for `h4_base128` at 32 images a core of v3 (its table of
  ImageNet-21k models): our step takes at least 736 ms there by its traffic, and 1,533 by the estimate, with the einsum, since
  v3 has no fused attention. So our step moves at least twice what the authors' can have moved; most of that is attention's.
- **`model.scan=True` costs traffic**, 20 to 30 % of it ([performance.md](performance.md)), and saves compile time. Recipes to H4
  leave it off. Machine code, for the estimates of time, is compiled with it all the same.
- **Batch norm over groups of 64** spans devices where one holds fewer images than that: every norm then makes all-reduces.
  `h4` makes 133 a step, of 41.8 MB together, with 32 images on a device (v5e), and 3 of 41.3 MB with 64 (v4), where groups
  lie within: little more data, but as many more waits. Memory and FLOPs are the same. `model.bn_group_size=32` avoids it.
- **v3**: a device is a core, of which a chip has two; v3-128 are 64 chips. **v4** is compiled as it runs by default, two
  cores as one device; v4-128 and v5p-128 are 64 chips. v5e-128 and v6e-128 are 128 chips.
- `h4_base128…` are compiled with 1,000 classes. Their own recipe is 90 epochs of ImageNet-21k, halonet50's and resnet50's is
  150 of ImageNet.
"""
