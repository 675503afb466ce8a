"""Two processes of one gloo group, for tests of data parallelism."""

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from ibp_triton import world


def of_two(work, folder, smallest=world.SMALLEST):
    """What ``work(rank)`` gives in each of two processes; if one fails the other is ended.

    Args:
        work: a function of a module.
        folder: empty.
        smallest: numbers of a bucket of gradients: few for many buckets.
    """
    multiprocessing.spawn(_worker, (work, folder, smallest), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


def _worker(rank, work, folder, smallest):
    torch.set_num_threads(1)
    world.SMALLEST = smallest
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.save(work(rank), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()
