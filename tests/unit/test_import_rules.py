"""Who may import whom. The order is the architecture; a module that is not in it has no place yet."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "server" / "expertd_server"
CLIENT = Path(__file__).parents[2] / "client" / "expertd"

# Lower levels first. A module imports from its own level and from those below, never from above.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "__init__",
            "bell",
            "compiled",
            "config",
            "control",
            "errors",
            "event_loop",
            "exits",
            "fp8",
            "garbage",
            "grpc_polling",
            "histograms",
            "logs",
            "malloc",
            "host_memory",
            "memory",
            "message_memory",
            "native",
            "pinning",
            "metrics",
            "metrics_endpoint",
            "promise",
            "ready",
            "region_door",
            "region_handover",
            "ring",
            "ring_pair",
            "server_metrics",
            "threads",
            "timing",
            "types",
            "watchdog",
            "workers",
        }
    ),
    frozenset({"routing", "reference", "tuning", "weights", "checks"}),
    frozenset(
        {
            "accounting",
            "audit",
            "backend",
            "backend_cpu",
            "backend_cuda",
            "backend_noop",
            "calibration",
            "checkpoint",
            "compensation",
            "cpu_experts",
            "cuda_call",
            "cuda_extension",
            "cuda_families",
            "cuda_workspace",
            "demo_model",
            "dialects",
            "export",
            "ops",
            "products",
            "quantization",
            "synthetic",
            "tensor_files",
        }
    ),
    frozenset({"layer", "remote_layer", "store"}),
    frozenset(
        {
            "batch",
            "batcher",
            "bundle",
            "cuda_slot",
            "engine",
            "forward",
            "gather",
            "graphs",
            "layout",
            "running",
            "scatter",
            "spans",
            "staging",
            "waiting",
        }
    ),
    frozenset(
        {
            "calls",
            "codec",
            "interceptor",
            "messages",
            "regions",
            "service",
            "status",
            "stream",
            "stream_rings",
            "stream_writer",
            "wire",
            "wire_answer",
            "wire_check",
            "wire_parse",
        }
    ),
    frozenset({"blocks", "gate", "remote", "remote_codec", "result_blocks"}),
    frozenset(
        {
            "child",
            "admin",
            "admin_endpoint",
            "admin_methods",
            "engine_host",
            "engine_process",
            "frontend",
            "listen",
            "listener",
            "loader",
            "port_sharing",
            "sources",
        }
    ),
    frozenset({"server", "supervisor"}),
    frozenset({"admin_cli", "cluster_policy", "cluster_spec", "demo", "health", "plan_figures", "tether"}),
    frozenset({"cluster_server", "plan"}),
    frozenset({"cluster_replica"}),
    frozenset({"cluster_places"}),
    frozenset({"cluster_actors"}),
    frozenset({"cluster", "cluster_cli", "plan_cli", "plan_report"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)

LEVEL_OF = {name: number for number, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# Third-party packages that only some modules may know.
ONLY_IN = {
    "grpc": {
        "admin",
        "admin_endpoint",
        "admin_methods",
        "cli",
        "cluster_server",
        "health",
        "interceptor",
        "listen",
        "listener",
        "service",
        "stream",
        "stream_writer",
    },
    "grpc_health": {"cluster_server", "health", "listener"},
    "grpc_reflection": {"listener"},
    "grpc_status": {"interceptor"},
    "prometheus_client": {"cluster_server", "histograms", "metrics", "metrics_endpoint", "server_metrics"},
    "ray": {"cluster", "cluster_actors", "cluster_places"},
    "safetensors": {"calibration", "checkpoint", "tensor_files", "demo_model", "export"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def own_imports(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    parts = [name.split(".") for name in imports_of(PACKAGE / f"{module}.py")]
    named = {part[1] for part in parts if part[0] == "expertd_server" and len(part) > 1}
    return {name for name in named if name in MODULES or name == "_cuda"} - {"__init__"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_place(module: str) -> None:
    assert module in LEVEL_OF, f"put {module} into LEVELS"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_from_above(module: str) -> None:
    above = {name for name in own_imports(module) - {"_cuda"} if LEVEL_OF[name] > LEVEL_OF[module]}
    assert not above, f"{module} imports {sorted(above)}, which are above it"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_cuda_backend_knows_the_extension(module: str) -> None:
    """One module imports it, and says what is missing where it was not built; the backend's own take it from there."""
    assert "_cuda" not in own_imports(module) or module == "cuda_extension"
    if "cuda_extension" in own_imports(module):
        assert module in {"backend_cuda", "cuda_families", "cuda_slot", "cuda_workspace"}


@pytest.mark.parametrize("module", MODULES)
def test_only_cpu_experts_knows_its_extension(module: str) -> None:
    """It says what is missing where that was not built or the CPU will not do."""
    assert "expertd_server._cpu_experts" not in imports_of(PACKAGE / f"{module}.py") or module == "cpu_experts"


@pytest.mark.parametrize("module", MODULES)
def test_the_batcher_knows_neither_torch_nor_grpc_and_few_know_the_rest(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports_of(PACKAGE / f"{module}.py")}
    for package, allowed in ONLY_IN.items():
        assert package not in roots or module in allowed, f"{module} imports {package}"
    if module in {"batch", "batcher", "waiting"}:
        assert not roots & {"torch", "numpy", "google", "expertd"}


@pytest.mark.parametrize("module", MODULES)
def test_of_the_sdk_the_server_imports_the_wire_contract_alone(module: str) -> None:
    """Messages and rings. The demo and the admin command are clients: they may import the SDK itself."""
    for name in imports_of(PACKAGE / f"{module}.py"):
        if name.partition(".")[0] == "expertd" and module not in ("admin_cli", "demo"):
            assert name.startswith("expertd.v1"), f"{module} imports {name}"


@pytest.mark.parametrize("path", sorted(CLIENT.glob("*.py")), ids=lambda path: path.stem)
def test_the_sdk_imports_nothing_of_the_server(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports_of(path)}
    assert not roots & {"expertd_server", "safetensors", "prometheus_client"}
