"""Two processes of one group, for tests of data parallelism."""

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from ibp_triton import world


def of_two(work, folder, smallest=world.SMALLEST, backend="gloo"):
    """What ``work(rank)`` gives in each of two processes; if one fails the other is ended.

    Args:
        work: a function of a module.
        folder: empty.
        smallest: numbers of a bucket of gradients: few for many buckets.
        backend: "nccl" gives each process a CUDA device of its own.
    """
    multiprocessing.spawn(_worker, (work, folder, smallest, backend), nprocs=2)
    return [torch.load(folder / str(rank), map_location="cpu") for rank in (0, 1)]


def _worker(rank, work, folder, smallest, backend):
    torch.set_num_threads(1)
    world.SMALLEST = smallest
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.save(work(rank), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()
