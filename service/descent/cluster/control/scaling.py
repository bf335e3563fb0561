"""How many workers a run may have: what its config says, what `descent scale` asks for, what there is room for."""

from collections.abc import Callable, Mapping

from descent.cluster.clock import Clock
from descent.cluster.control.control_file import ControlFile, ScaleRequest
from descent.cluster.control.policy import WorkerView
from descent.cluster.workers.group import WorkerGroup
from descent.training.plan import Plan

_LOOK_EVERY_S = 1.0
"""Between two looks at the cluster for room: an answer costs a round trip."""


class Scaling:
    """The bounds on the number of workers, which `descent scale` moves, and the room for more of them."""

    def __init__(
        self,
        plan: Plan,
        spares: int,
        group: WorkerGroup,
        control_file: ControlFile,
        notify: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self.low, self.high = plan.min_workers, plan.max_workers
        self.spares = spares
        self._slots = plan.slots
        self._group, self._control_file, self._notify, self._clock = group, control_file, notify, clock
        self._looked_at = 0.0
        self._room = 0

    def start(self, count: int) -> None:
        """Start this many workers; they take the room that was seen."""
        self._group.start(count)
        self._looked_at = self._clock.monotonic()
        self._room = 0

    def startable(self, workers: Mapping[str, WorkerView]) -> int:
        """How many more workers there is room for; 0 where none is wanted."""
        if sum(v.staying for v in workers.values()) >= self.high + self.spares:
            return 0
        now = self._clock.monotonic()
        if now - self._looked_at > _LOOK_EVERY_S:
            self._looked_at, self._room = now, self._group.room()
        return self._room

    def answer_requests(self, num_members: int) -> None:
        """Accept, or refuse, a request for another number of workers."""
        request = self._control_file.next_request()
        if request is None:
            return
        refusal = self._why_not(request)
        if refusal is None:
            self.low, self.high = request.low, request.high
            self._control_file.answer(request, True, f"{num_members} workers now, {request.high} wanted")
            self._notify(f"asked for {request.high} workers, {num_members} now")
        else:
            self._control_file.answer(request, False, refusal)

    def _why_not(self, request: ScaleRequest) -> str | None:
        if not 1 <= request.low <= request.high:
            return f"workers={request.low}…{request.high}: at least 1, and min not above max"
        if request.high > self._slots:
            return (
                f"workers={request.high}: the run's global batch was cut into slots={self._slots} at "
                f"its start, so it can use {self._slots} workers at the most"
            )
        capacity = self._group.capacity()
        if capacity is None:
            return f"workers={request.high}: the cluster doesn't answer; try again"
        if request.high > capacity:
            return f"workers={request.high}: the cluster can place {capacity} of this size"
        return None
