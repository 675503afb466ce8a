"""Weak scaling: `torchrun --nproc-per-node=K -m benchmarks.weak_scaling`, 32 images a process, one thread each.

Prints milliseconds a step of Loss IBP on the paper's CIFAR-10 network, the best of 40, by the wall clock and of the
process's CPU, and those of adding up its gradients over the processes once more, apart.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

import ibp_triton as ibp
from ibp_triton.allocator import keep_freed_memory
from ibp_triton.harness import models
from ibp_triton.harness.config import NetworkChoice
from ibp_triton.world import World

STEPS, WARM_UP = 40, 5


def main() -> None:
    """Time the steps of this process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    model = models.build(NetworkChoice(name="paper_cifar10"), (3, 28, 28), 10, 0)
    network = ibp.Network(model, process_group=dist.group.WORLD if size > 1 else None)
    step = ibp.EagerStep(network, ibp.LossIBP(0.03), torch.optim.SGD(model.parameters(), lr=1e-3))
    x, y = torch.rand(32, 3, 28, 28), torch.arange(32) % 10
    own = {name: torch.rand_like(p) for name, p in network.parameters().items()}
    steps, sums, works = [], [], []
    for _ in range(WARM_UP + STEPS):
        dist.barrier()
        begin, work = time.perf_counter(), time.process_time()
        step(x, y)
        steps.append(time.perf_counter() - begin)
        works.append(time.process_time() - work)
        begin = time.perf_counter()
        World(dist.group.WORLD).gradients(own, network.parameters())
        sums.append(time.perf_counter() - begin)
    numbers = sum(p.numel() for p in own.values())
    if dist.get_rank() == 0:
        whole, work, sent = (1e3 * min(times[WARM_UP:]) for times in (steps, works, sums))
        print(f"{size} processes: {whole:.1f} ms a step, {work:.1f} of the CPU; sum of {numbers} gradients {sent:.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
