"""`import ibp_triton` and the torch backend: without triton, and without asking for a device."""

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
def asked(*_): raise AssertionError("a device was asked for")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "init"):
    setattr(torch.cuda, name, asked)
import ibp_triton as ibp
from ibp_triton.harness import kernel_report
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
x, labels = torch.randn(2, 4), torch.tensor([0, 2])
for method in (ibp.LossIBP(0.1), ibp.PredictionIBP(0.1, semantics="exact")):
    method(ibp.Network(model), x, labels).backward()
try:
    ibp.LossIBP(0.1)(ibp.Network(model, backend="triton"), x, labels)
except ImportError as error:
    print(error)
"""


def test_the_library_does_without_triton_and_asks_for_no_device():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "needs the package triton" in run.stdout


def test_import_leaves_triton_alone():
    script = "import sys, ibp_triton; print('ibp_triton.kernels' in sys.modules, 'ibp_triton.ops' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
