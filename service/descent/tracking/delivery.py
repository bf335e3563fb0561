"""The background thread between the spool and a tracking server.

The thread reads records from the spool in order, hands them to a `Sink` in batches, and acknowledges
them; it knows nothing of MLflow. When the sink fails, the thread waits and tries again for as long as
it lives. When the sink refuses a record for good, that record is set aside and the others go on. So is
a record that fails again and again for a reason of its own while the sink accepts another call.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from descent.tracking.spool import Spool

MAX_METRICS = 1000  # MLflow's limits for one log_batch call
MAX_PARAMS = 100
FLUSH_EVERY_S = 0.5  # how long a record waits for others that go out in the same call
SYNC_EVERY_S = 1.0
FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 5.0
TRIES = 4
"""After so many failures in a row a record may be to blame, and not the server."""

Record = dict[str, Any]
Metric = tuple[str, float, int, int]  # key, value, timestamp in ms, step


@dataclass
class Batch:
    """What goes out in one call."""

    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Sink(Protocol):
    """Where records go. Each method is idempotent, blocks, and raises when it fails."""

    def connect(self) -> None:
        """Make sure that there is something to deliver to; does nothing once it has succeeded."""

    def send(self, batch: Batch) -> None:
        """Deliver metrics, params and tags."""

    def perform(self, record: Record) -> None:
        """Deliver one record of any other kind (a file, a data set, the end of the run)."""

    def refuses(self, error: Exception) -> bool:
        """Whether the same call would fail for ever."""

    def is_transient(self, error: Exception) -> bool:
        """Whether the same call may succeed later: no answer, a server in trouble, a missing right, a full disk."""

    def probe(self) -> None:
        """Send something harmless; raises when even that fails."""


@dataclass(frozen=True)
class TrackerStatus:
    """Records delivered, still pending and refused for good; what went wrong last, and for how long it has."""

    delivered: int
    pending: int
    refused: int
    last_error: str | None
    failing_s: float
    """Seconds since the first of the failures in a row that are going on; 0 where none are."""


class DeliveryThread(threading.Thread):
    """Delivers `spool` to `sink` until `finish`; then closes the spool."""

    def __init__(self, spool: Spool, sink: Sink) -> None:
        super().__init__(name="descent-tracking", daemon=True)
        self._spool = spool
        self._sink = sink
        self._wake = threading.Event()
        self._drain = threading.Event()
        self._stopped = threading.Event()
        self._last_sync = 0.0
        self.delivered = self.refused = 0
        self.last_error: str | None = None
        self.failing_since: float | None = None
        """time.monotonic() of the first of the failures that are going on."""
        self._refusal: str | None = None
        self._failures = self._probes = 0
        """In a row: failures that don't look transient, and probes after them that the sink has accepted."""

    def run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        try:
            while not self._stopped.is_set():
                # Read before the records: what was appended before `finish` is still delivered.
                draining = self._drain.is_set()
                try:
                    idle = not self.deliver_some()
                    backoff_s = FIRST_BACKOFF_S
                except Exception as error:  # whatever it is: try again, the training goes on meanwhile
                    self.failing_since = self.failing_since or time.monotonic()
                    self.last_error = str(error).splitlines()[0] if str(error) else repr(error)
                    self._stopped.wait(FIRST_BACKOFF_S if self._drain.is_set() else backoff_s)
                    backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                    continue
                self.last_error, self.failing_since = self._refusal, None
                if idle and draining:
                    return
                if not draining and self._spool.pending_bytes < 2**15:
                    self._wake.wait(FLUSH_EVERY_S)
        finally:
            self._spool.close()

    def finish(self, deadline_s: float) -> bool:
        """Deliver what is there, for at most `deadline_s`; whether all of it went out."""
        self._drain.set()
        self._wake.set()
        if self.is_alive():
            self.join(deadline_s)
        # A call to a silent server may still be under way: it ends on its own time-out, in
        # a daemon thread that nobody waits for.
        self._stopped.set()
        return not self.is_alive()

    def deliver_some(self) -> int:
        """Deliver the oldest records up to one call's worth; returns how many."""
        self._sync_if_due()
        self._sink.connect()
        batch, count, offset = Batch(), 0, 0
        for end, record in self._spool.read():
            if record is None:
                pass
            elif record.get("op") == "batch":
                if count and not _fits(batch, record):
                    break
                _add(batch, record)
            elif count:
                break  # deliver what came before this record first
            else:
                self._perform(record)
                count, offset = 1, end
                break
            count, offset = count + 1, end
        if count:
            self._send(batch)
            self._spool.acknowledge(offset)
            self.delivered += count
            self._failures = self._probes = 0
        return count

    @property
    def in_doubt(self) -> bool:
        """Whether the last failure may be the record's own: some more tries will tell."""
        return self._failures > 0

    def _is_refused(self, error: Exception) -> bool:
        """Whether a record is to be set aside after this error. Raises what a probe raises: then the record isn't to blame."""
        if self._sink.refuses(error):
            return True
        if self._sink.is_transient(error):
            self._failures = self._probes = 0
            return False
        self._failures += 1
        if self._failures <= TRIES:
            return False
        try:
            self._sink.probe()
        except Exception:
            self._failures = self._probes = 0
            raise
        # The server may have come back between the failure and the probe: a second one decides.
        self._probes += 1
        return self._probes > 1

    def _sync_if_due(self) -> None:
        now = time.monotonic()
        if now - self._last_sync >= SYNC_EVERY_S:
            self._last_sync = now
            self._spool.sync()

    def _perform(self, record: Record) -> None:
        try:
            self._sink.perform(record)
        except Exception as error:
            if not self._is_refused(error):
                raise
            self._refuse(record, error)
            return
        if name := record.get("file"):
            self._spool.drop_file(name)

    def _refuse(self, record: Record, error: Exception) -> None:
        reason = str(error) or repr(error)
        self._spool.refuse(record, reason)
        self.refused += 1
        self._refusal = f"the server refused a record, which is kept in {self._spool.refused}: {reason.splitlines()[0]}"

    def _send(self, batch: Batch) -> None:
        for part in _parts(batch):
            self._send_or_split(part)

    def _send_or_split(self, batch: Batch) -> None:
        """Send; if the server refuses the batch, find the culprit by halving."""
        try:
            self._sink.send(batch)
        except Exception as error:
            if not self._is_refused(error):
                raise
            halves = _halves(batch)
            if halves is None:
                self._refuse(_record_of(batch), error)
                return
            for half in halves:
                self._send_or_split(half)


def _add(batch: Batch, record: Record) -> None:
    step, timestamp_ms = record.get("step", 0), record.get("time", 0)
    batch.metrics += [(k, v, timestamp_ms, step) for k, v in record.get("metrics", {}).items()]
    batch.params.update(record.get("params", {}))
    batch.tags.update(record.get("tags", {}))


def _fits(batch: Batch, record: Record) -> bool:
    params = len(batch.params) + len(record.get("params", {}))
    tags = len(batch.tags) + len(record.get("tags", {}))
    metrics = len(batch.metrics) + len(record.get("metrics", {}))
    return params <= MAX_PARAMS and tags <= MAX_PARAMS and metrics + params + tags <= MAX_METRICS


def _parts(batch: Batch) -> list[Batch]:
    """Cut a batch that came from one large record down to MLflow's limits."""
    if _fits(batch, {}):
        return [batch] if batch.metrics or batch.params or batch.tags else []
    params, tags = list(batch.params.items()), list(batch.tags.items())
    cut = range(0, len(batch.metrics), MAX_METRICS)
    return [
        *(Batch(params=dict(params[i : i + 100])) for i in range(0, len(params), MAX_PARAMS)),
        *(Batch(tags=dict(tags[i : i + 100])) for i in range(0, len(tags), MAX_PARAMS)),
        *(Batch(metrics=batch.metrics[i : i + MAX_METRICS]) for i in cut),
    ]


def _halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """Two smaller batches with the same content, or None for a single entry."""
    kinds = [bool(batch.metrics), bool(batch.params), bool(batch.tags)]
    if sum(kinds) > 1:
        return Batch(metrics=batch.metrics), Batch(params=batch.params, tags=batch.tags)
    if len(batch.metrics) > 1:
        middle = len(batch.metrics) // 2
        return Batch(metrics=batch.metrics[:middle]), Batch(metrics=batch.metrics[middle:])
    pairs = list((batch.params or batch.tags).items())
    if len(pairs) <= 1:
        return None
    middle = len(pairs) // 2
    first, second = dict(pairs[:middle]), dict(pairs[middle:])
    if batch.params:
        return Batch(params=first), Batch(params=second)
    return Batch(tags=first), Batch(tags=second)


def _record_of(batch: Batch) -> Record:
    return {"op": "batch", "metrics": batch.metrics, "params": batch.params, "tags": batch.tags}
