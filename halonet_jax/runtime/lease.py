"""The lease of a workdir: one run at a time writes there, and a run that died holds nobody up.

`lease.json` names the run that holds the workdir. On the same machine, that run lives where its process does. Of a run on
another machine only the file is seen: it is renewed every minute, and one that nobody renews for three minutes is taken over.
No operating-system lock and no link is needed, so network folders and `gs://` work. On `gs://`, where no file can be created
exclusively, two runs that start within a second of each other are told apart by who wrote last.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging
from etils import epath

from halonet_jax.errors import ConfigError, Stopped, StorageError, WorkdirInUse
from halonet_jax.runtime import distributed, storage

HEARTBEAT = 60.0  # seconds between renewals
STALE = 180.0  # seconds without a renewal after which a run on another machine counts as dead
_POLL = 1.0  # seconds between looks at a lease that may be renewed
_SETTLE = 2.0  # seconds that a lease may take to be written whole

_ours: set[str] = set()  # ids of the leases that this process holds or is about to take


@dataclasses.dataclass(frozen=True)
class _Holder:
    """What `lease.json` says.

    Attributes:
        id: unique to one lease.
        host: name of its machine, for messages.
        machine: what tells machines, their reboots and containers apart.
        pid: of its process.
        process_start: when that process started, in a form of the machine's own; a later process may have the same pid.
        started: when the lease was taken, for messages.
        beat: how often it was renewed.
    """

    id: str
    host: str
    machine: str
    pid: int
    process_start: str
    started: str
    beat: int = 0

    def __str__(self):
        return f"host {self.host}, process {self.pid}, started {self.started}"


_TORN = _Holder("torn", "unknown", "", 0, "", "at an unknown time")


class Lease:
    """The right to write to one workdir. Process 0 holds it for all processes of a run.

    Args:
        workdir: folder of the run, local or `gs://`.
    """

    def __init__(self, workdir: epath.Path):
        self.workdir, self._path = workdir, workdir / "lease.json"
        self._mine = None
        self._lost = None  # the holder that took it over
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = None

    def acquire(self, waiting: Callable[[], object] = lambda: None) -> None:
        """Takes the lease and starts to renew it. All processes of a run must call it.

        Where a run on another machine may hold it, it watches the lease for up to `STALE` seconds.

        Args:
            waiting: called about once a second while it watches.

        Raises:
            WorkdirInUse: another run holds it.
            ConfigError: the workdir cannot be written.
            DistributedError: process 0 could not take it.
        """
        with distributed.together("taking the lease of the workdir"):
            if jax.process_index() == 0:
                try:
                    self._acquire(waiting)
                except OSError as error:
                    raise ConfigError(
                        f"workdir {self.workdir} cannot be written ({storage.reason(error)}); {storage.remedy(error)}, or give "
                        "another --workdir"
                    ) from None

    def _acquire(self, waiting):
        self._mine = _Holder(
            id=uuid.uuid4().hex, host=socket.gethostname(), machine=_machine(), pid=os.getpid(),
            process_start=_process_start(os.getpid()) or "", started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        )  # fmt: skip
        _ours.add(self._mine.id)
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            while not self._take(waiting):
                pass
            with self._lock:
                if self._ended.is_set():  # released while it waited
                    self._path.unlink(missing_ok=True)
                    raise Stopped("released")
                self._renewed = time.time()
                self._thread = threading.Thread(target=self._renew_always, name="halonet_jax lease", daemon=True)
                self._thread.start()
        except BaseException:
            _ours.discard(self._mine.id)
            raise
        self._tidy()

    def _take(self, waiting):
        """Whether this try took the lease. It did not where the lease changed meanwhile: the next try sees more."""
        if self._create(self._path):
            return True
        found = self._read(self._path)
        if found is None or not self._is_dead(found, self._path, waiting):
            return False
        # Of several runs that find a dead lease, the one that creates the claim on it may replace it.
        claim = self._path.with_name(f"{self._path.name}.{found.id}.claim")
        if not self._create(claim):
            other = self._read(claim)
            if other is not None and self._is_dead(other, claim, waiting):
                claim.unlink(missing_ok=True)
            return False
        try:
            if self._read(self._path) != found:
                return False  # it was replaced before the claim was created
            self._write(self._mine)
            logging.info("Took over the lease of a run that died: %s", found)
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _is_dead(self, found, path, waiting):
        """True: nobody holds it. False: it changed. Raises WorkdirInUse where its run lives."""
        if found is _TORN:
            return True
        in_use = WorkdirInUse(
            f"workdir {self.workdir} is in use by another run ({found}); give another --workdir, or wait until that run ends"
        )
        if found.machine == self._mine.machine:
            if found.id in _ours if found.pid == os.getpid() else _lives(found):
                raise in_use
            return True
        self._warn_of_wait(found)
        until = time.monotonic() + STALE
        while time.monotonic() < until:
            waiting()
            if self._ended.wait(_POLL):
                raise Stopped("released")
            now = self._read(path)
            if now is None or now.id != found.id:
                return False
            if now.beat != found.beat:
                raise in_use
        return True

    def _warn_of_wait(self, found):
        logging.warning(
            "Workdir %s was last used by a run on another machine (%s). Waiting up to %.0f s to see whether it lives",
            self.workdir, found, STALE,
        )  # fmt: skip

    def check(self) -> None:
        """Raises StorageError where another run has taken the lease over, as after this machine was suspended."""
        if self._thread and time.time() - self._renewed > 2 * HEARTBEAT:
            self._renew()
        if self._lost:
            raise StorageError(
                f"another run took over workdir {self.workdir} ({self._lost}), since this one gave no sign of life for "
                f"{STALE:.0f} s; this run ends, and its last checkpoint is safe: leave the workdir to the other run"
            )

    def release(self) -> None:
        """Gives the lease back and ends the thread that renews it. Ends a wait in `acquire`, too."""
        with self._lock:
            self._ended.set()
            thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(5)  # no longer, where the storage hangs
        try:
            found = self._read(self._path)
            if found and found.id == self._mine.id:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("%s cannot be deleted (%s)", self._path, storage.reason(error))
        _ours.discard(self._mine.id)

    # --- renewing

    def _renew_always(self):
        while not self._ended.wait(HEARTBEAT):
            self._renew()

    def _renew(self):
        with self._lock:
            if self._lost or self._ended.is_set():
                return
            try:
                found = self._read(self._path)
                if found is None:  # deleted by hand
                    self._create(self._path)
                elif found.id not in (self._mine.id, _TORN.id):
                    self._lost = found
                    return
                self._mine = dataclasses.replace(self._mine, beat=self._mine.beat + 1)
                self._write(self._mine)
                self._renewed = time.time()
            except OSError as error:
                logging.warning("%s cannot be renewed (%s)", self._path, storage.reason(error))

    # --- files

    def _create(self, path):
        """Writes a lease where there is none; False where there is one."""
        text = json.dumps(dataclasses.asdict(self._mine))
        if "://" in str(path):
            if path.exists():
                return False
            path.write_text(text)
            time.sleep(_SETTLE)
        else:
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(text)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return self._read(path) == self._mine

    def _write(self, holder):
        temporary = self._path.with_name(f"{self._path.name}.{holder.id}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(holder)))
        temporary.replace(self._path)

    def _read(self, path):
        """The holder; None where there is no lease; `_TORN` where it stays incomplete."""
        for last in (False, True):
            try:
                fields = json.loads(path.read_bytes())
                types = {field.name: field.type for field in dataclasses.fields(_Holder)}
                if {name: type(value) for name, value in fields.items()} == types:
                    return _Holder(**fields)
            except FileNotFoundError:
                return None
            except (ValueError, RecursionError, AttributeError):
                pass  # it is being written, or a kill left it so
            if not last:
                time.sleep(_SETTLE)
        return _TORN

    def _tidy(self):
        """Deletes what a kill in the middle of a renewal left behind."""
        with contextlib.suppress(OSError):
            for path in self.workdir.iterdir():
                if path.name.startswith("lease.json.") and path.name.endswith(".tmp") and self._mine.id not in path.name:
                    path.unlink(missing_ok=True)


def _machine():
    """This machine since it was booted; a container with processes of its own is another one."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(holder):
    """Whether the process of a holder on this machine runs."""
    start = _process_start(holder.pid)
    if start is not None:
        return start == holder.process_start
    try:
        os.kill(holder.pid, 0)
    except PermissionError:
        return True  # another user's, of which this one may see no more
    except (OSError, OverflowError):
        pass
    return False


def _process_start(pid):
    """When a process of this machine started; None where it has ended or cannot be seen."""
    if os.path.exists("/proc/self/stat"):
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else fields[18]  # man 5 proc: field 22, in clock ticks since boot
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    environment = os.environ | {"LC_ALL": "C", "TZ": "UTC"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    state, _, start = done.stdout.strip().partition(" ")
    return start.strip() if start and "Z" not in state else None
