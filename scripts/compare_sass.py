"""Says which kernels two builds have different machine code for. After a refactoring: none.

    python scripts/compare_sass.py OLD NEW        built modules (_cuda*.so) or objects (*.cu.o)

Compared are the instructions with their encodings, which hold the compiler's schedule too, and the registers and shared
memory of each kernel; not where the code lies, nor lines of the source. Kernels that only one side has are differences
between modules, and are passed over where either side is an object. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))

from check_build import find_cuobjdump

# An unnamed namespace is mangled with hashes of where its source lay.
_UNNAMED = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")
_INSTRUCTION = re.compile(r"^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<text>.*?)\s*/\* (?P<code>0x[0-9a-f]{16}) \*/$")
_SECOND_HALF = re.compile(r"^\s*/\* (?P<code>0x[0-9a-f]{16}) \*/$")


def kernels_of(dump: str) -> dict[str, list[str]]:
    """Instructions of each kernel, by mangled name, in a print of cuobjdump --dump-sass."""
    kernels: dict[str, list[str]] = {}
    own: list[str] = []
    for line in dump.splitlines():
        if "Function : " in line:
            own = kernels.setdefault(plain_name(line.split("Function : ")[1].strip()), [])
        elif found := _INSTRUCTION.match(line):
            own.append(f"{found['at']}  {found['text']}  {found['code']}")
        elif (found := _SECOND_HALF.match(line)) and own:
            own[-1] += f" {found['code']}"
    return kernels


def resources_of(dump: str) -> dict[str, str]:
    """Registers, stack, shared and constant memory of each kernel, in a print of cuobjdump --dump-resource-usage."""
    found = re.findall(r"^\s*Function (\S+):\n\s*(REG:.*)$", dump, re.MULTILINE)
    return {plain_name(name): used.strip() for name, used in found}


def plain_name(mangled: str) -> str:
    """A name that does not depend on where the source lay."""
    return _UNNAMED.sub(r"(\1)", mangled)


def differences(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[str]:
    """One line for each kernel that both have and that differs: where it begins to."""
    lines = []
    for name in sorted(old.keys() & new.keys()):
        if old[name] == new[name]:
            continue
        pairs = enumerate(zip(old[name], new[name], strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(old[name]), len(new[name])))
        was, now = (code[at] if at < len(code) else "(end)" for code in (old[name], new[name]))
        lines.append(f"{name}: {len(old[name])} -> {len(new[name])} lines; first\n  - {was}\n  + {now}")
    return lines


def read(cuobjdump: str, path: Path) -> dict[str, list[str]]:
    """What is compared of each kernel of a module or object, line by line."""

    def dump(what: str) -> str:
        return subprocess.run([cuobjdump, what, str(path)], check=True, capture_output=True, text=True).stdout

    kernels, resources = kernels_of(dump("--dump-sass")), resources_of(dump("--dump-resource-usage"))
    return {name: [resources.get(name, ""), *code] for name, code in kernels.items()}


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--cuobjdump", help="default: on the PATH, or in an installed package")
    args = parser.parse_args()
    cuobjdump = args.cuobjdump or find_cuobjdump()
    if cuobjdump is None:
        parser.error("no cuobjdump: install the CUDA toolkit or nvidia-cuda-cuobjdump, or pass --cuobjdump")
    old, new = read(cuobjdump, args.old), read(cuobjdump, args.new)
    lines = differences(old, new)
    if {args.old.suffix, args.new.suffix} == {".so"}:
        lines += [f"{name}: only in {args.old}" for name in sorted(old.keys() - new.keys())]
        lines += [f"{name}: only in {args.new}" for name in sorted(new.keys() - old.keys())]
    compared = len(old.keys() & new.keys())
    for line in lines:
        print(line)
    print(f"{compared} kernels compared, {len(lines)} differences")
    return int(bool(lines) or not compared)


if __name__ == "__main__":
    raise SystemExit(main())
