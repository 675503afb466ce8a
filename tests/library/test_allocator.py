"""Memory that a process keeps, where it is asked to: in processes of their own."""

import subprocess
import sys

import pytest

import ibp_triton as ibp

FAULTS = """
import resource
import torch
import ibp_triton

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 18)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*[faults() for _ in range(3)], ibp_triton.keep_freed_memory(), *[faults() for _ in range(6)])
"""


def told(code: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.split()


def test_memory_is_kept_once_it_is_asked_for_and_not_before():
    found = told(FAULTS)
    kept = found.pop(3)
    if kept == "False":
        pytest.skip("no glibc")
    faulted = [int(one) > 30 for one in found]  # pages of 2 MiB at most
    assert all(faulted[:3])
    assert sum(faulted[3:]) <= 2  # once, or twice where something small has taken a bit of the first


def test_without_a_glibc_nothing_happens(monkeypatch):
    def nowhere(_: None) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", nowhere)
    assert ibp.keep_freed_memory() is False
