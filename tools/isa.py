"""The instruction sets that engines are measured with, and the kernels that each says it computes with.

native is what the processor has. avx2 is what most laptops and many servers have, on any processor: each engine, and
each library that it takes, is told by a variable of its own, and llama.cpp is a build of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from npgpt2.kernels.threads import openblas

ISAS = ["native", "avx2"]
# Where `make bench ISA=avx2` puts a llama.cpp that was compiled without AVX-512.
LLAMA_AVX2 = Path(sys.prefix) / "llama-avx2"
TOOLS = Path(__file__).parent
# What says, in the environment, that it is as one of them wants it.
CHOSEN = "NPGPT2_BENCHMARK_ISA"


def avx2_variables():
    """What keeps everything to AVX2. PYTHONPATH leads to that llama.cpp before any other."""
    features = np.show_config(mode="dicts")["SIMD Extensions"]["found"]  # of others, NumPy would say that it has none
    wide = [name for name in features if name.startswith("AVX512") or name == "X86_V4"]
    return {
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": ",".join(wide),
        "CT2_FORCE_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(LLAMA_AVX2), os.environ.get("PYTHONPATH")])),
    }


def run_again(isa):
    """Run this program once more with the variables of an instruction set, or with none of them, and end as that ends.

    Libraries read them when they are loaded, as some are by now. What the environment says of itself doesn't count.
    """
    if os.environ.get(CHOSEN) == isa:
        return
    wanted = avx2_variables()
    env = {name: value for name, value in os.environ.items() if name == "PYTHONPATH" or name not in wanted}
    env |= {CHOSEN: isa} | (wanted if isa == "avx2" else {})
    sys.exit(subprocess.call([sys.executable, *sys.argv], env=env))


# ---- What an engine says of itself, asked in a process that has its variables


def numpy_kernels(_):
    blas, features = openblas(), np.show_config(mode="dicts")["SIMD Extensions"]
    chosen = [*features.get("baseline", []), *features.get("found", [])]
    return f"{blas.kernels if blas else 'unknown'} (OpenBLAS), {chosen[-1] if chosen else 'no SIMD'} (NumPy)"


def ctranslate2_kernels(folder):
    """It writes a log when it reads a model, and so does oneDNN, with which it multiplies on most processors."""
    words = [TOOLS / "engines.py", "once", "CTranslate2", "float32", folder, "1"]
    said = listen(*words, CT2_VERBOSE="1", ONEDNN_VERBOSE="1")
    about = {"its own": "Selected ISA: (.*)", "products": "SGEMM backend: (.*)", "oneDNN": "cpu,isa:(.*)"}
    found = {what: re.search(pattern, said) for what, pattern in about.items()}
    return ", ".join(f"{match[1]} ({what})" for what, match in found.items() if match)


def llama_kernels(_):
    said = listen("-c", "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())")
    return " ".join(re.findall(r"(\w+) = 1", said))


def transformers_kernels(_):
    program = "import torch; torch.ones(9, 9) @ torch.ones(9, 9); print(torch.backends.cpu.get_cpu_capability())"
    *_, capability = (said := listen("-c", program, MKL_VERBOSE="1")).split()
    mkl = re.search(r"oneMKL .*architecture (.*processors)", said)
    return f"{capability} (ATen)" + (f", for {mkl[1]} (MKL)" if mkl else "")


KERNELS = {
    "limit": numpy_kernels,
    "npgpt2": numpy_kernels,
    "CTranslate2": ctranslate2_kernels,
    "llama.cpp": llama_kernels,
    "transformers": transformers_kernels,
}


def listen(*arguments, **variables):
    """What Python says on both ways out."""
    command = [sys.executable, *map(str, arguments)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, env=os.environ | variables, text=True, check=True, **both).stdout


def describe_kernels(isa, engines, folder):
    """What each engine computes with, by its name; ends the program where that is more than the instruction set has."""
    said = {engine: KERNELS[engine](folder) for engine in engines}
    for engine, kernels in said.items():
        if isa == "avx2" and re.search("avx-?512|x86_v4|skylakex|cooperlake|sapphire", kernels, re.IGNORECASE):
            sys.exit(f"benchmark: {engine} doesn't keep to AVX2 ({kernels}); leave it out of --engines")
    return said
