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

print(faults(), faults(), ibp_triton.keep_freed_memory(), faults(), faults())
"""


def told(code: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.split()


def test_memory_is_kept_once_it_is_asked_for_and_not_before():
    first, second, kept, third, last = told(FAULTS)
    if kept == "False":
        pytest.skip("no glibc")
    assert min(int(first), int(second), int(third)) > 30  # pages of 2 MiB at most
    assert int(last) <= 2


def test_without_a_glibc_nothing_happens(monkeypatch):
    def nowhere(_: None) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", nowhere)
    assert ibp.keep_freed_memory() is False
