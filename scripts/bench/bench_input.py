"""Times the input pipeline of training against those of tf.data and PyTorch, on the same number of cores.

    python scripts/bench/bench_input.py                                            # 256 px, one core
    python scripts/bench/bench_input.py --image_size=384 --cores=4 --norandaugment

All contestants read the same temporary folder of synthetic JPEGs: 500 x 375, with chroma at half resolution. They make
batches of uint8 [B, S, S, 3]. The steps are decoding, a random resized crop (8 to 100 % of the area, bicubic), a flip,
and optionally RandAugment with two of sixteen operations. Ours is `halonet_jax.data.train_batches`. `rival_tfdata.py`
and `rival_pillow.py` say how the peers differ.

Each contestant is a process; PyTorch's also has worker processes. All are bound to the same cores and have as many
threads or workers as cores. A contestant is stopped while another has its turn. A round is one pass over the images.
Buffers are drained before the first round. CPU time is the time of all threads and workers. Unlike wall time, it hardly
depends on other load. "×" is a case's time over ours: the median of the ratios of all rounds.
"""

import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import bench_timing as timing
import cv2
import numpy as np
import simplejpeg
from absl import app, flags

from halonet_jax import config, data

_IMAGES = flags.DEFINE_integer("images", 512, "Files, and images per round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds. In each, every contestant makes one pass.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Images per batch.", lower_bound=1)
_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images in pixels.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", 1, "Cores for each contestant.", lower_bound=1)
_RANDAUGMENT = flags.DEFINE_bool("randaugment", None, "Run only with RandAugment, or only without; default: both.")
_JSON = flags.DEFINE_string("json", "", "File to write all times to.")

OURS = "halonet_jax"
WIDTH, HEIGHT, QUALITY, NOISE = 500, 375, 89, 9.0  # about 57 kB
LINKS = 64  # names for each file, because drawing the order of a small set would cost too much


def _main(argv):
    timing.check_json(_JSON.value)
    if _IMAGES.value % _BATCH.value:
        raise app.UsageError(f"--images={_IMAGES.value} must be a multiple of --batch={_BATCH.value}")
    # Contestants are killed. Python's resource tracker would warn of the semaphores that they leave.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    allowed = sorted(os.sched_getaffinity(0))
    if _CORES.value > len(allowed):
        raise app.UsageError(f"--cores={_CORES.value} exceeds the {len(allowed)} available cores; use at most {len(allowed)}")
    os.sched_setaffinity(0, allowed[: _CORES.value])  # the contestants inherit it and count their cores by it
    about = timing.machine("tensorflow-cpu", "tensorflow", "pillow", "opencv-python-headless", "simplejpeg", "grain")
    print(about, end="\n\n")
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        size = _write_photos(Path(folder) / "train", _IMAGES.value)
        for randaugment in (False, True) if _RANDAUGMENT.value is None else (_RANDAUGMENT.value,):
            label = f"{'with' if randaugment else 'no'} RandAugment"
            columns |= _race(label, _settings(folder, randaugment))
            if _JSON.value:
                options = dict(images=_IMAGES.value, batch=_BATCH.value, image_size=_SIZE.value, cores=_CORES.value)
                timing.write_json(_JSON.value, timing.records(columns, OURS, benchmark="input", **options), about)
    title = f"**Input**: {_SIZE.value} px from {WIDTH} x {HEIGHT} JPEGs of {size / 1e3:.1f} kB, {_CORES.value} core(s)"
    print(timing.table(title, columns, OURS, unit="images/s", show=lambda seconds: f"{1 / seconds:.0f}"), flush=True)


def _write_photos(folder: Path, count: int) -> float:
    """Writes JPEGs of smooth colours with noise, in two classes. Returns their mean size in bytes."""
    sizes = []
    for i in range(count):
        rng = np.random.default_rng(i)
        smooth = cv2.resize(rng.uniform(0, 255, (6, 8, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        image = np.clip(smooth + NOISE * rng.standard_normal(smooth.shape, np.float32), 0, 255).astype(np.uint8)
        file = folder / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        sizes.append(file.write_bytes(simplejpeg.encode_jpeg(image, QUALITY, colorsubsampling="420")))
        for link in range(1, LINKS):
            os.link(file, file.with_name(f"{i}_{link}.jpg"))
    return float(np.mean(sizes))


def _settings(folder: str, randaugment: bool) -> SimpleNamespace:
    """Returns the config's `data` block with `batch` and `cores`, for all contestants."""
    block = config.imagenet().data
    block.update(source="folder", dir=folder, image_size=_SIZE.value, num_threads=_CORES.value)
    block.randaugment_layers *= randaugment
    return SimpleNamespace(**block.to_dict(), batch=_BATCH.value, cores=_CORES.value)


def _ours(c):
    source = data.open_source(c, c.train_split)
    transform = data.ClassificationTransform(c, num_classes=len(source.class_names), training=True)
    return data.train_batches(source, transform, c, batch_size=c.batch, seed=0)


def _tf_data(c):
    import rival_tfdata

    return rival_tfdata.batches(c, "bicubic")


def _tf_data_bilinear(c):
    import rival_tfdata

    return rival_tfdata.batches(c, "bilinear")


def _torch_pillow(c):
    import rival_pillow

    return rival_pillow.batches(c)


CONTESTANTS = {
    OURS: _ours, "tf.data": _tf_data, "tf.data, bilinear": _tf_data_bilinear, "torch DataLoader, Pillow": _torch_pillow,
}  # fmt: skip


def _race(label: str, c: SimpleNamespace) -> dict[str, dict[str, timing.Timing]]:
    """Returns seconds per image, CPU and wall, `{column: {contestant: timing}}`."""
    progress = timing.Progress(label, len(CONTESTANTS) * (_ROUNDS.value + 2))
    cpu, wall, ready = {}, {}, {}
    try:
        for name, make in CONTESTANTS.items():
            progress.at(f"starting {name}")
            contestant = _Contestant(make, c, _IMAGES.value // _BATCH.value)
            ready[name] = contestant
            cpu[name], wall[name] = timing.Timing([], contestant.reason), timing.Timing([], contestant.reason)
            if contestant.reason:
                ready.pop(name).end()
            else:
                contestant.round()
            progress.done(2)
        for turn in range(_ROUNDS.value):
            for name in list(ready)[:: -1 if turn % 2 else 1]:
                progress.at(name)
                for times, seconds in zip((cpu, wall), ready[name].round()):
                    times[name].seconds.append(seconds / _IMAGES.value)
                progress.done(1)
    finally:
        for contestant in ready.values():
            contestant.end()
    progress.close()
    return {f"{label}: CPU": cpu, f"{label}: wall": wall}


class _Contestant:
    """A process that makes batches. It is stopped except during `round`.

    Attributes:
        reason: why the contestant failed; empty if it works.
    """

    def __init__(self, make, c, num_batches):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, c, num_batches))
        self._process.start()
        theirs.close()
        try:
            self.reason = self._receive()
        except BaseException:  # Ctrl-C reaches only our own process group
            self._process.kill()
            raise
        if not self.reason:
            self._signal(signal.SIGSTOP)

    def round(self) -> tuple[float, float]:
        """Lets the process make its batches. Returns CPU seconds and wall seconds."""
        self._signal(signal.SIGCONT)
        self._pipe.send("go")
        times = self._receive()
        self._signal(signal.SIGSTOP)
        return times

    def end(self):
        """Kills the process and its workers. They have nothing to save, and some end slowly when asked."""
        self._signal(signal.SIGKILL)
        self._process.join()

    def _receive(self):
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contestant died with exit code {self._process.exitcode}") from None

    def _signal(self, number):
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # it has ended, or has no group yet
            if number == signal.SIGKILL:
                self._process.kill()


def _serve(pipe, make, c, num_batches):
    os.setpgid(0, 0)  # its own group, so that its workers stop with it
    try:
        batches = make(c)
        image = np.asarray(next(batches)["image"])
        assert image.shape == (c.batch, c.image_size, c.image_size, 3) and image.dtype == np.uint8, image
    except Exception as error:  # the table shows why a contestant failed, and the others go on
        pipe.send(timing.first_line(error))
        return
    pipe.send("")
    while pipe.recv() == "go":
        cpu, wall = _cpu_seconds(), time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        pipe.send((_cpu_seconds() - cpu, time.perf_counter() - wall))


def _cpu_seconds() -> float:
    """Returns the CPU seconds of this process and its running workers. Linux has a clock for each process."""
    workers = multiprocessing.active_children()
    return time.process_time() + sum(time.clock_gettime(~worker.pid << 3 | 2) for worker in workers)


if __name__ == "__main__":
    app.run(_main)
