"""Fails when ptxas spoiled a GEMM kernel: register spills, or a warning C75xx (wgmma serialised, setmaxnreg ignored).

As a compiler launcher (how CMakeLists.txt uses it):   check_build.py -- nvcc ... -Xptxas=-v
Over the built module or objects, for the machine code:   check_build.py --sass FILE [--cuobjdump PATH]
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

GEMM = "grouped_gemm_kernel"


def complaints(log: str) -> list[str]:
    """What is wrong in a print of ptxas -v."""
    found = [line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)]
    for name, stores, loads in re.findall(
        r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    ):
        if GEMM in name and (int(stores) or int(loads)):
            found.append(f"{name}: {stores} bytes of spill stores, {loads} bytes of spill loads")
    return found


def compile_and_check(command: list[str]) -> int:
    """Run the compiler; hide what ptxas says of kernels that are fine."""
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wrong = complaints(done.stdout)
    quiet = re.compile(r"ptxas info|bytes stack frame|^\s*$")
    sys.stdout.write("".join(line for line in done.stdout.splitlines(True) if not quiet.search(line)))
    for line in wrong:
        print(f"check_build.py: {line}", file=sys.stderr)
    return done.returncode or bool(wrong)


def find_cuobjdump() -> str | None:
    """On the PATH, or in an installed package: nvidia-cuda-cuobjdump, Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    for package, where in (("nvidia", "*/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            for tool in Path(place).glob(where):
                return str(tool)
    return None


def check_sass(file: str, cuobjdump: str | None) -> int:
    """Every GEMM kernel of `file` must use the FP8 tensor core instruction, leave local memory alone, copy legally."""
    cuobjdump = cuobjdump or find_cuobjdump()
    if cuobjdump is None:
        print("check_build.py: no cuobjdump: install the CUDA toolkit or triton, or pass --cuobjdump", file=sys.stderr)
        return 2
    sass = subprocess.run([cuobjdump, "--dump-sass", file], check=True, capture_output=True, text=True).stdout
    kernels = [
        k for k in re.split(r"(?=Function : )", sass) if k.startswith("Function : ") and GEMM in k.split("\n")[0]
    ]
    bad = 0
    for kernel in kernels:
        name = kernel.split("\n")[0].removeprefix("Function : ")
        qgmma, local = len(re.findall(r"\bQGMMA\b", kernel)), len(re.findall(r"\b(?:STL|LDL)\b", kernel))
        # What ptxas 13.0 makes of cp.async with an L2 cache hint: illegal at run time.
        broken = len(re.findall(r"\bLDGSTS\S* \[R\d+\+UR", kernel))
        if qgmma == 0 or local or broken:
            print(
                f"check_build.py: {name}: {qgmma} QGMMA, {local} accesses to local memory, {broken} illegal copies",
                file=sys.stderr,
            )
            bad += 1
    print(f"{file}: {len(kernels)} GEMM kernels, {bad} bad")
    return int(bad > 0 or not kernels)


def main() -> int:
    if "--" in sys.argv:
        return compile_and_check(sys.argv[sys.argv.index("--") + 1 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sass", required=True, metavar="FILE")
    parser.add_argument("--cuobjdump")
    args = parser.parse_args()
    return check_sass(args.sass, args.cuobjdump)


if __name__ == "__main__":
    raise SystemExit(main())
