"""What `benchmark.py`, its stages and `tune.py` measure with, and what they say of the machine they ran on."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from npgpt2.kernels.threads import openblas


def say(what):
    print(f"{Path(sys.argv[0]).stem}: {what} …", file=sys.stderr, flush=True)


def seconds(action, *arguments):
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def start_python(*arguments, checkout=None, **pipes):
    """Start Python, where a checkout is named from there, so that it finds that one's npgpt2 before any other."""
    env = os.environ | ({"PYTHONPATH": str(checkout)} if checkout else {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout, **pipes)


def run(*arguments, checkout=None):
    """Run Python: how many seconds it took, its peak resident memory in bytes (None on Windows), what it printed."""
    start, peak = time.perf_counter(), None
    with start_python(*arguments, checkout=checkout) as process:
        said = process.stdout.read()
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak = resident_bytes(usage)
    if process.returncode:
        sys.exit(f"benchmark: python {' '.join(map(str, arguments[:3]))} failed, see above")
    return time.perf_counter() - start, peak, said


def resident_bytes(usage):
    """The peak memory of `resource`'s usage, which macOS counts in bytes and others in KiB."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy_to_disk(source, target):
    with open(source, "rb") as read, open(target, "wb") as written:
        shutil.copyfileobj(read, written, 2**20)
        written.flush()
        os.fsync(written.fileno())


def processor():
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    names = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(": ")[1] for line in names if line.startswith("model name")), platform.processor())


def describe_machine():
    """What figures depend on, by name."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    about = f"{blas['name']} {blas['version']}"
    if found := openblas():  # which comes with most of NumPy's wheels, and says more of itself
        about += f", {found.kernels} kernels"
    machine = {"processor": f"{processor()}, {os.cpu_count()} cores", "system": f"{sys.platform} {platform.machine()}"}
    return machine | {"Python": platform.python_version(), "numpy": np.__version__, "BLAS": about}
