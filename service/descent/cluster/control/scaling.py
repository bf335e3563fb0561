"""How many workers a run may have: as it was planned, as it is asked for while it runs, as there is room."""

import time
from collections.abc import Callable, Mapping

from descent.cluster.control.control_file import ControlFile, ScaleRequest
from descent.cluster.control.policy import WorkerView
from descent.cluster.workers.group import WorkerGroup
from descent.training.plan import Plan

_LOOK_EVERY_S = 1.0
"""Between two looks at the cluster for room."""


class Scaling:
    """The bounds on the number of workers, which `descent scale` moves, and the room for more of them."""

    def __init__(
        self, plan: Plan, spares: int, group: WorkerGroup, live: ControlFile, tell: Callable[[str], None]
    ) -> None:
        self.low, self.high = plan.min_workers, plan.max_workers
        self._slots, self._spares = plan.slots, spares
        self._group, self._live, self._tell = group, live, tell
        self._room_asked = 0.0
        self._room = 0

    def start(self, count: int) -> None:
        """Start this many workers; they take the room that was seen."""
        self._group.start(count)
        self._room_asked = time.monotonic()
        self._room = 0

    def startable(self, now: float, workers: Mapping[str, WorkerView]) -> int:
        """How many more workers there is room for; 0 where none is wanted."""
        if sum(v.staying for v in workers.values()) >= self.high + self._spares:
            return 0
        if now - self._room_asked > _LOOK_EVERY_S:  # an answer costs a round trip to the cluster
            self._room_asked, self._room = now, self._group.startable()
        return self._room

    def hear(self, num_members: int) -> None:
        """Take up, or refuse, a request for another number of workers."""
        request = self._live.asked()
        if request is None:
            return
        wrong = self._cannot_scale(request)
        if wrong is None:
            self.low, self.high = request.low, request.high
            self._live.answer(request, True, f"{num_members} workers now, {request.high} wanted")
            self._tell(f"asked for {request.high} workers, {num_members} now")
        else:
            self._live.answer(request, False, wrong)

    def _cannot_scale(self, request: ScaleRequest) -> str | None:
        if not 1 <= request.low <= request.high:
            return f"workers={request.low}…{request.high}: at least 1, and min not above max"
        if request.high > self._slots:
            return (
                f"workers={request.high}: the run's global batch was cut into slots={self._slots} at "
                f"its start, so it can use {self._slots} workers at the most"
            )
        room = self._group.placeable()
        if request.high > room:
            return f"workers={request.high}: the cluster can place {room} of this size"
        return None
