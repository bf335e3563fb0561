"""Samples of the machine's load under MLflow's own names (`system/…`).

MLflow's SystemMetricsMonitor writes to the server from its own thread with its own retries;
here the samples go through our spool like everything else.
"""

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil


class SystemMetricsSampler(threading.Thread):
    """Calls `sink(elapsed_s, metrics)` at once and then every `interval_s` until `stop`.

    `started_ms`: the run's start in Unix milliseconds; `elapsed_s` counts from there, so that a
    resumed run goes on where it was. Percentages in %, memory and traffic in MB (1e6 bytes).
    """

    def __init__(self, sink: Callable[[int, dict[str, float]], None], started_ms: int, interval_s: float) -> None:
        super().__init__(name="descent-system-metrics", daemon=True)
        self._sink = sink
        self._started_ms = started_ms
        self._interval_s = interval_s
        self._stop_requested = threading.Event()
        self._network = psutil.net_io_counters()
        self._gpus = _gpu_handles()
        psutil.cpu_percent()  # the first call only sets the reference point

    def run(self) -> None:
        # a short first wait gives the processor's load a span to be measured over
        wait_s = min(0.5, self._interval_s)
        while True:
            stopping = self._stop_requested.wait(wait_s)
            wait_s = self._interval_s
            self._sink(int(time.time() - self._started_ms / 1000), self.sample())
            if stopping:
                return

    def sample(self) -> dict[str, float]:
        """One reading of everything."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage("/")
        network = psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network is not None and self._network is not None:
            received = network.bytes_recv - self._network.bytes_recv
            sent = network.bytes_sent - self._network.bytes_sent
            values["network_receive_megabytes"] = received / 1e6
            values["network_transmit_megabytes"] = sent / 1e6
        for index, (nvml, handle) in enumerate(self._gpus):
            values.update(_gpu_sample(nvml, handle, index))
        return {f"system/{name}": round(float(value), 1) for name, value in values.items()}

    def stop(self) -> None:
        """Take the last sample and end."""
        self._stop_requested.set()


def _gpu_handles() -> list[tuple[Any, Any]]:
    """NVML's handles. Not torch.cuda, which would open a context on every device."""
    try:
        pynvml = importlib.import_module("pynvml")  # comes with the GPU builds only

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    except Exception:  # neither package, nor driver, nor device: NVML has an error for each
        return []


def _gpu_sample(nvml: Any, handle: Any, index: int) -> dict[str, float]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    values = {
        f"gpu_{index}_memory_usage_percentage": memory.used / memory.total * 100,
        f"gpu_{index}_memory_usage_megabytes": memory.used / 1e6,
    }
    try:
        rates = nvml.nvmlDeviceGetUtilizationRates(handle)
        values[f"gpu_{index}_utilization_percentage"] = rates.gpu
        power_w = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        values[f"gpu_{index}_power_usage_watts"] = power_w
    except nvml.NVMLError:  # not offered by every card
        pass
    return values
