"""What scripts/compare_sass.py makes of two prints of the disassembler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import compare_sass

KERNEL = """
identifier = {path}/routing.cu
		Function : _ZN7expertd43_GLOBAL__N__{hash}_10_routing_cu_6567159e12route_kernelEv
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                              /* 0x000fe20000000800 */
        /*0010*/                   {second} ;                 /* 0x0000000000087919 */
                                                              /* {schedule} */
		Function : _ZN7expertd8finalizeEv
        /*0000*/                   EXIT ;                     /* 0x000000000000794d */
                                                              /* 0x000fea0003800000 */
"""
ROUTE, FINALIZE = "_ZN7expertd(routing)12route_kernelEv", "_ZN7expertd8finalizeEv"


def kernels(
    path: str = "/a", hashed: str = "ff8d4307", second: str = "S2R R8, SR_TID.X", schedule: str = "0x000e220000002100"
) -> dict[str, list[str]]:
    dump = KERNEL.format(path=path, hash=hashed, second=second, schedule=schedule)
    return compare_sass.kernels_of(dump)


def test_a_kernel_is_its_instructions_with_both_halves_of_their_encodings() -> None:
    assert kernels() == {
        ROUTE: [
            "0000  LDC R1, c[0x0][0x28] ;  0x00000a00ff017b82 0x000fe20000000800",
            "0010  S2R R8, SR_TID.X ;  0x0000000000087919 0x000e220000002100",
        ],
        FINALIZE: ["0000  EXIT ;  0x000000000000794d 0x000fea0003800000"],
    }


def test_where_the_source_lay_makes_no_difference() -> None:
    assert compare_sass.differences(kernels(), kernels(path="/b", hashed="434b4df2")) == []


@pytest.mark.parametrize(
    ("changed", "shown"), [({"second": "NOP"}, "NOP"), ({"schedule": "0x000e240000002100"}, "0x000e240000002100")]
)
def test_an_instruction_or_its_schedule_makes_one(changed: dict[str, str], shown: str) -> None:
    (line,) = compare_sass.differences(kernels(), kernels(**changed))
    assert line.startswith(f"{ROUTE}: 2 -> 2 lines")
    assert "\n  - 0010  S2R" in line
    assert shown in line.split("\n  + ")[1]


def test_code_that_ends_sooner_makes_one() -> None:
    new = kernels()
    new[ROUTE].pop()
    (line,) = compare_sass.differences(kernels(), new)
    assert "2 -> 1 lines" in line
    assert line.endswith("+ (end)")


def test_registers_and_shared_memory_are_found_by_kernel() -> None:
    dump = f" Function {ROUTE}:\n  REG:40 STACK:0 SHARED:31744 LOCAL:0\n Function {FINALIZE}:\n  REG:32 STACK:0\n"
    assert compare_sass.resources_of(dump) == {
        ROUTE: "REG:40 STACK:0 SHARED:31744 LOCAL:0",
        FINALIZE: "REG:32 STACK:0",
    }


def test_a_module_that_lost_a_kernel_is_not_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = {"old.so": kernels(), "new.so": {FINALIZE: kernels()[FINALIZE]}, "one.o": {FINALIZE: kernels()[FINALIZE]}}
    monkeypatch.setattr(compare_sass, "read", lambda _, path: read[path.name])
    monkeypatch.setattr(compare_sass, "find_cuobjdump", lambda: "cuobjdump")
    for new, code, says in (("new.so", 1, f"{ROUTE}: only in old.so"), ("one.o", 0, "1 kernels compared, 0 diff")):
        monkeypatch.setattr(sys, "argv", ["compare_sass.py", "old.so", new])
        assert compare_sass.main() == code
        assert says in capsys.readouterr().out
