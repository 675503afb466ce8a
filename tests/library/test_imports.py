"""What imports what: the library without triton, without a device, without the harness and in one order."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import ibp_triton as ibp

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


BASE = """
import sys
for name in ("yaml", "pydantic", "typer", "rich", "matplotlib", "jinja2", "pooch", "scipy", "safetensors", "PIL"):
    sys.modules[name] = None  # as if it were not installed
import torch, ibp_triton as ibp
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
x, labels = torch.rand(2, 4), torch.tensor([0, 2])
ibp.LossIBP(0.1)(model, x, labels).backward()
print(ibp.robustness(model, (x, labels)).error())
found = ibp.robustness(model, (x, labels))
for call in (lambda: ibp.robustness(model, (x, labels), progress=True), found.plot):
    try:
        call()
    except ImportError as error:
        print(error)
from ibp_triton.__main__ import main
main()
"""


def test_the_base_install_is_torch_and_numpy_and_the_command_says_what_it_needs():
    run = subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "pip install rich" in run.stdout
    assert "pip install matplotlib" in run.stdout
    assert "pip install 'ibp-triton[harness]'" in run.stderr


def test_the_command_without_what_windows_lacks():
    script = """
import os, signal, sys
sys.modules["fcntl"] = None
for name in ("O_NOFOLLOW", "O_CLOEXEC"): delattr(os, name)
del signal.SIGHUP
sys.argv = ["ibp-triton", "--version"]
from ibp_triton.__main__ import main
main()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == f"ibp-triton {ibp.__version__}\n"


WINDOWS = """
import os, pkgutil, signal, sys
from pathlib import Path
sys.modules |= {name: None for name in ("fcntl", "resource", "pwd", "grp", "termios", "posix_ipc")}
for name in ("O_NOFOLLOW", "O_CLOEXEC"): delattr(os, name)
del signal.SIGHUP, os.fork
import ibp_triton.bench, ibp_triton.harness
for package in (ibp_triton.harness, ibp_triton.bench):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        __import__(found.name)
from ibp_triton.harness import store
folder = Path(sys.argv[1])
with store.lock(folder) as first, store.lock(folder) as second:
    print(first, second)
with store.lock(folder) as third:
    print(third)
from ibp_triton.harness.cli import app
data = "data={source: synthetic, size: 16, channels: 1, classes: 4, examples: 32, holdout: 16}"
few = ["--only", "method=bp", "--only", "seed=0", "--set", "training.epochs=1"]
app(["run", "quickstart", "--set", f"output={folder}/out", "--set", data, *few])
"""


def test_the_harness_locks_and_runs_without_what_windows_lacks(tmp_path):
    run = subprocess.run([sys.executable, "-c", WINDOWS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:2] == ["True False", "True"]
    assert "[1/1] bp seed 0: error" in run.stdout


def test_processes_are_spawned_alone():
    """Forking a process that has threads is a trap, and Windows can't."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in MODULES.values())
    assert set(re.findall(r"get_context\((.*?)\)", text)) == {'"spawn"'}
    assert not re.search(r"os\.fork|set_start_method|multiprocessing\.(Process|Pool|Queue)\b", text)


ROOT = pathlib.Path(ibp.__file__).parent
HARNESS_ONLY = {"yaml", "pydantic", "typer", "rich", "matplotlib", "jinja2", "pooch", "ray", "scipy", "safetensors"}


def name_of(path):
    parts = ["ibp_triton", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports(path, everywhere=True):
    """The modules that a file imports; without ``everywhere`` not those imported in functions or for types."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def test_the_library_never_imports_the_harness_and_only_kernels_import_triton():
    for path in MODULES.values():
        place, found = path.relative_to(ROOT).parts, set(imports(path))
        if place[0] not in ("harness", "bench", "__main__.py"):
            at_once = {name.split(".")[0] for name in imports(path, everywhere=False)}  # the rest on call, by name
            assert not at_once & HARNESS_ONLY, path
            assert not any(name.startswith("ibp_triton.harness") for name in found), path
        if place[0] not in ("kernels", "harness"):
            assert not any(name.split(".")[0] == "triton" for name in found), path


def test_modules_can_be_put_in_an_order_in_which_each_imports_only_earlier_ones():
    needs = {
        name: {other for other in imports(path, everywhere=False) if other in MODULES and other != "ibp_triton"}
        - {name}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises for a circle, and names it


def test_the_oracle_knows_nothing_of_the_sweeps():
    parts = ("reference", "reference_modes")
    imported = {name for part in parts for name in imports(MODULES[f"ibp_triton.{part}"])}
    own = {name for name in imported if name.startswith("ibp_triton")}
    shared = (*parts, "adjoint", "attacks", "errors", "recording.calls", "recording.interface")
    assert own <= {"ibp_triton", *(f"ibp_triton.{name}" for name in shared)}
