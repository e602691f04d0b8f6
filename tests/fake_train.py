"""A training that takes a second and needs no JAX: it writes what `halonet_jax.train` writes, saves its step and resumes.

python fake_train.py --study=… runs a study with it; FAULTS in the environment, "ROW:CODE …", makes rows fail.
"""

import fcntl
import json
import os
import re
import signal
import sys
import time
import zlib
from pathlib import Path

STEPS, SECONDS = 10, 0.05


def train(flags):
    workdir = Path(flags["workdir"])
    row, seed = workdir.parent.name, int(flags["config.seed"])
    lock = (workdir / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two at once are a fault of the study
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    for fault in os.environ.get("FAULTS", "").split():
        name, code = fault.split(":")
        if re.fullmatch(name, row):
            print("WARNING: something\nerror: the loss is not finite", file=sys.stderr)
            sys.exit(int(code))
    if "config.init_from" in flags:
        assert (Path(flags["config.init_from"]) / "step").read_text() == str(STEPS)
    about = {"last_step": STEPS, "versions": {"jax": "1"}, "git_revision": "abc", "devices": ["cpu"], "cores": 1}
    (workdir / "run.json").write_text(json.dumps(about))
    step = int((workdir / "step").read_text()) if (workdir / "step").exists() else 0
    if step < STEPS:
        with (workdir / "steps_done").open("a") as log:
            while step < STEPS:
                time.sleep(SECONDS)
                step += 1
                log.write(f"{step}\n")
                log.flush()
                (workdir / "step.new").write_text(str(step))
                (workdir / "step.new").replace(workdir / "step")
                if stopped:
                    sys.exit(75)
    score = zlib.crc32(f"{row} {seed}".encode()) % 1000 / 1000
    reports = [{"step": STEPS, "images_per_second": 100.0 * time.monotonic()}, {"step": STEPS, "eval/top1": score}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    if any(word.startswith("--study") for word in sys.argv):
        from halonet_jax import command_line, study

        study.define_flags()
        command_line.run(
            lambda: study.main((sys.executable, os.environ.get("TRAIN", __file__))), required_flags=("study",), alone=True
        )
    else:
        train(dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:]))
