"""Times the input pipeline of training against tf.data's and PyTorch's, on equally many cores.

    python scripts/bench/bench_input.py                                            # 256 px, one core
    python scripts/bench/bench_input.py --image_size=384 --cores=4 --norandaugment

All read the same temporary folder of synthetic JPEGs, 500 x 375 with chroma at half resolution, and make batches of uint8
[B, S, S, 3] from them: decoding, random resized crop (8 to 100 % of the area, bicubic), flip, and with RandAugment two of sixteen
ops. Ours is `halonet_jax.data.train_batches`. The heads of `rival_tfdata.py` and `rival_pillow.py` say in what the peers differ.

Each contestant is a process (PyTorch's with worker processes besides), bound to the same cores, with as many threads or workers as
cores, and stopped while it is not its turn. A round is one pass; buffers are drained before the first. CPU time is that of all
threads and workers, which, unlike time on the wall, hardly depends on what else the machine does. "×" is a case's time over ours:
the median of the ratios in each round.
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

_IMAGES = flags.DEFINE_integer("images", 512, "Files, and images a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds, in each of which every contestant makes a pass.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Images a batch.", lower_bound=1)
_SIZE = flags.DEFINE_integer("image_size", 256, "Pixels a side.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", 1, "Cores for each contestant.", lower_bound=1)
_RANDAUGMENT = flags.DEFINE_bool("randaugment", None, "Only with it, or only without it; left out: both.")
_JSON = flags.DEFINE_string("json", "", "A file to write all times to.")

OURS = "halonet_jax"
WIDTH, HEIGHT, QUALITY, NOISE = 500, 375, 89, 9.0  # about 57 kB
LINKS = 64  # names of each file: drawing an order costs most in small sets, which are not what is to be measured


def _main(argv):
    timing.check_json(_JSON.value)
    if _IMAGES.value % _BATCH.value:
        raise app.UsageError(f"--images={_IMAGES.value} must be a multiple of --batch={_BATCH.value}")
    # Contestants are killed, and Python's tracker of semaphores would list those that they leave.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    allowed = sorted(os.sched_getaffinity(0))
    if _CORES.value > len(allowed):
        raise app.UsageError(f"--cores={_CORES.value} are more than the {len(allowed)} there are")
    os.sched_setaffinity(0, allowed[: _CORES.value])  # the contestants inherit it, and count cores by it
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
    """Writes JPEGs of smooth colours with noise, of two classes; returns their mean size in bytes."""
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
    """The config's `data` block, with what all contestants share besides: `batch`, `cores`."""
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
    """Seconds an image, of CPU and on the wall."""
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
    """A process that makes batches, stopped except during `round`.

    Attributes:
        reason: why it cannot; empty if it can.
    """

    def __init__(self, make, c, num_batches):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, c, num_batches))
        self._process.start()
        theirs.close()
        try:
            self.reason = self._receive()
        except BaseException:  # Ctrl-C goes to our own group alone
            self._process.kill()
            raise
        if not self.reason:
            self._signal(signal.SIGSTOP)

    def round(self) -> tuple[float, float]:
        """Lets it make its batches: CPU seconds, and seconds on the wall."""
        self._signal(signal.SIGCONT)
        self._pipe.send("go")
        times = self._receive()
        self._signal(signal.SIGSTOP)
        return times

    def end(self):
        """Kills it with its workers, which have nothing to lose; asked to end, some take their time."""
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
        except ProcessLookupError:  # it ended, or has not come as far as having a group
            if number == signal.SIGKILL:
                self._process.kill()


def _serve(pipe, make, c, num_batches):
    os.setpgid(0, 0)  # a group with its workers, to be stopped with them
    try:
        batches = make(c)
        image = np.asarray(next(batches)["image"])
        assert image.shape == (c.batch, c.image_size, c.image_size, 3) and image.dtype == np.uint8, image
    except Exception as error:  # whatever a peer dies of is to be told, and the rest to go on
        pipe.send(timing.first_line(error))
        return
    pipe.send("")
    while pipe.recv() == "go":
        cpu, wall = _cpu_seconds(), time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        pipe.send((_cpu_seconds() - cpu, time.perf_counter() - wall))


def _cpu_seconds() -> float:
    """Of this process and its workers, which still run: Linux has a clock for each process."""
    workers = multiprocessing.active_children()
    return time.process_time() + sum(time.clock_gettime(~worker.pid << 3 | 2) for worker in workers)


if __name__ == "__main__":
    app.run(_main)
