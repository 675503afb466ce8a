"""The card at hand: what it is, how long something takes on it, what its memory and its matrix units really give."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ibp_triton.bench.measure import interleave, machine
from ibp_triton.kernels.workbench.cases import allowing_tf32

Run = Callable[[], Any]


class Cuda:
    """The current CUDA device; a rehearsal on the CPU overrides what a CPU can't."""

    name = "cuda"
    copied = 1 << 30  # bytes of the copy that measures bandwidth
    side = 8192  # of the square matrices that measure the peaks

    def environment(self) -> dict[str, Any]:
        """What figures are measured on."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return machine() | {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or torch.version.hip,
        }

    def graphed(self, run: Run) -> Run:
        """The same work as one CUDA graph, after three warm-up calls beside the current stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()

        def replay() -> Any:
            graph.replay()
            return kept

        return replay

    def seconds(self, candidates: Mapping[str, Run], rounds: int) -> dict[str, float]:
        """The median of each on the device, in turn, the cache emptied before each call."""
        found = interleave(candidates, rounds, warmup=3, clock="device")
        return {name: times.median for name, times in found.items()}

    def milliseconds(self, run: Run) -> float:
        """Of one call in a CUDA graph: the autotuner's clock."""
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(run))

    def bandwidth(self) -> float:
        """Bytes/s of a copy, those read and those written."""
        a = torch.zeros(self.copied, dtype=torch.int8, device=self.name)
        b = torch.empty_like(a)
        return 2 * self.copied / self.seconds({"copy": lambda: b.copy_(a)}, 10)["copy"]

    def peak(self, precision: str) -> float:
        """FLOP/s of a square matrix product in fp32, tf32 or bf16."""
        a = torch.randn(self.side, self.side, device=self.name)
        a = a.bfloat16() if precision == "bf16" else a
        with allowing_tf32(precision == "tf32"):
            return 2 * self.side**3 / self.seconds({"product": lambda: a @ a}, 10)["product"]


def slug(card: str) -> str:
    """A card's name for a file: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "unnamed"
