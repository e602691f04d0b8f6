"""The lease of a workdir: one run at a time trains there.

`run.lease` names the process that holds it. The holder rewrites the file every `BEAT` seconds and deletes it at the end. A
killed run leaves it behind, so a newcomer decides whether the holder lives. On the same machine the system's list of processes
says so at once. On another machine the file must change within `EXPIRES` seconds. Only reading, writing and renaming are
needed, so network file systems and buckets will do.
"""

import contextlib
import json
import os
import platform
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging
from etils import epath

from halonet_jax.errors import ConfigError
from halonet_jax.runtime import distributed, storage
from halonet_jax.runtime.stopping import EXIT_STORAGE

BEAT = 30.0  # seconds between signs of life
EXPIRES = 100.0  # seconds without a sign of life after which a run on another machine counts as dead
SETTLE = 0.2  # seconds in which a process that wanted the lease at the same moment has written it too


@contextlib.contextmanager
def hold(workdir: str | epath.Path) -> Iterator[None]:
    """Context in which this run alone trains in a workdir. Process 0 holds the lease for all processes of the run.

    Entering waits up to `EXPIRES` seconds if the lease is that of a process on another machine, which may have been killed.

    Args:
        workdir: an existing folder, local or `gs://`.

    Raises:
        ConfigError: another run trains there, or the lease cannot be written.
        DistributedError: process 0 failed.
    """
    lease = None
    with distributed.together("taking the lease of the workdir"):
        if jax.process_index() == 0:
            lease = _Lease(workdir)
            lease.take()
    try:
        yield
    finally:
        if lease:
            lease.release()


class _Lease:
    def __init__(self, workdir):
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / "run.lease"
        self._content = {
            "host": platform.node(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": _machine(), "process_started": _process_started(os.getpid()), "token": secrets.token_hex(8), "beat": 0,
        }  # fmt: skip
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="halonet_jax lease", daemon=True)

    def take(self):
        try:
            self._wait_for_the_dead()
            self._write()
            time.sleep(SETTLE)
            if (other := self._read()) and other["token"] != self._content["token"]:
                raise self._in_use(other)
        except OSError as error:
            raise ConfigError(
                f"workdir {self._workdir} cannot be written ({storage.reason(error)}); {storage.remedy(error)}, or give another "
                "--workdir"
            ) from None
        self._thread.start()

    def release(self):
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours(self._read()):
                self._path.unlink()

    def _wait_for_the_dead(self):
        """Returns when no living process holds the lease."""
        first = other = self._read()
        if other is None:
            return
        if other.get("machine") == self._content["machine"]:
            if _lives(other):
                raise self._in_use(other)
            return
        last_seen = time.monotonic() - self._age()
        while other and time.monotonic() - last_seen < EXPIRES:
            if other is first:
                message = "Process %s on %s holds the lease of %s. It may be dead: waiting up to %.0f s for a sign of life"
                logging.warning(message, other.get("pid"), other.get("host"), self._workdir, EXPIRES)
            time.sleep(min(1.0, EXPIRES / 10))
            other = self._read()
            if other and other != first:
                raise self._in_use(other)

    def _age(self):
        """Seconds since the lease was written, by the clock of the storage."""
        probe = self._workdir / f"run.lease.{self._content['token']}"
        try:
            probe.write_text("")
            return max(0.0, probe.stat().mtime - self._path.stat().mtime)
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _in_use(self, other):
        return ConfigError(
            f"workdir {self._workdir} is in use by process {other.get('pid')} on {other.get('host')}, started "
            f"{other.get('started')}; stop that run or wait for its end, or give another --workdir"
        )

    def _read(self):
        """Returns the lease's content; None: there is no lease, or the file is damaged."""
        try:
            content = json.loads(self._path.read_bytes())
            return content if isinstance(content, dict) and "token" in content else None
        except (FileNotFoundError, ValueError, RecursionError):
            return None

    def _write(self):
        temporary = self._workdir / f"run.lease.{self._content['token']}"
        temporary.write_text(json.dumps(self._content))
        temporary.replace(self._path)

    def _is_ours(self, content):
        return content is not None and content["token"] == self._content["token"]

    def _beat(self):
        while not self._ended.wait(BEAT):
            try:
                other = self._read()
                if other and not self._is_ours(other):  # this process was suspended for longer than EXPIRES
                    print(f"error: lost the lease: {self._in_use(other)}", file=sys.stderr, flush=True)
                    os._exit(EXIT_STORAGE)  # before it writes among the files of the other
                self._content["beat"] += 1
                self._write()
            except Exception as error:  # of many types, by the storage; the run itself notices whether it can write
                logging.warning("The lease %s cannot be renewed: %s", self._path, storage.reason(error))


def _machine():
    """Names the place where process numbers mean the same: a boot of a machine, and a container in it."""
    parts = []
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join([platform.node(), *parts])


def _lives(lease):
    """Whether the process of a lease of this machine runs. Numbers are used again, so its start counts too."""
    try:
        pid = int(lease.get("pid"))
    except (TypeError, ValueError):
        return False
    started = _process_started(pid)
    return started is not None and started == lease.get("process_started")


def _process_started(pid):
    """Returns when a process started, as text of the system; None: it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            return None
        return None if state in "ZX" else rest[18]  # field 22 of proc(5), in ticks since the machine was started
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None
