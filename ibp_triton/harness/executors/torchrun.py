"""By the processes of torchrun: one run after another, each trained by all of them on their shares of every batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ibp_triton.errors import ConfigError, LaunchError
from ibp_triton.harness import team, train
from ibp_triton.harness.executors.desk import Desk, Do
from ibp_triton.harness.grid import Run
from ibp_triton.harness.threads import one_thread


def started() -> bool:
    """Whether this process is one of torchrun's."""
    return dist.is_torchelastic_launched()


def follows(executor: str | None) -> bool:
    """Whether this process of a command only does what process 0 calls for."""
    return executor in (None, "torchrun") and started() and os.environ["RANK"] != "0"


@dataclass(frozen=True)
class Torchrun:
    """What process 0 does: all else of a command, and to call the others for each run that it trains."""

    width: int = 1

    @cached_property
    def _team(self) -> team.Ranks:
        return join()

    def __call__(self, do: Do, desk: Desk) -> None:
        """Do them all."""
        ranks = self._team
        while run := desk.next():
            for one in run.together:
                do(_placed(one), desk.hear, team=ranks)
        ranks.call(None)
        dist.destroy_process_group()


def join() -> team.Ranks:
    """Meet the other processes of torchrun."""
    if not started():
        raise ConfigError(
            "--executor torchrun: start the command by it: torchrun --nproc-per-node=2 -m ibp_triton run …"
        )
    whole, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", whole)  # it outlives a restart
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size)
    return team.Ranks(PrefixStore("runs", store), rank, size)


def follow() -> None:
    """What every process but 0 does: to train its share of each run that process 0 calls for."""
    ranks = join()
    while work := ranks.called():
        _assist(ranks, *work)
    dist.destroy_process_group()


def _assist(ranks: team.Ranks, run: Run, data_dir: str | None) -> None:
    try:
        with one_thread():
            train.assist(_placed(run), ranks, data_dir)
    except LaunchError:
        raise
    except Exception:  # as in every other process: process 0 tells it, and goes on with the next run
        return


def _placed(run: Run) -> Run:
    """The run on this process's own GPU, if it is to be on one."""
    on_gpu = torch.device(run.training.device).type == "cuda"
    return run.on(f"cuda:{os.environ['LOCAL_RANK']}") if on_gpu else run
