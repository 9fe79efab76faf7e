"""Options: declared once, given as flags or in the environment, refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from expertd_server.config import Config, add_flags, config_from, markdown_table
from expertd_server.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


def parsed(*arguments: str, **environment: str) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return config_from(vars(parser.parse_args(arguments)), environment)


def test_the_documentation_is_generated() -> None:
    """`python -m expertd_server.config > table` and paste it below the first paragraphs of docs/configuration.md."""
    assert DOCS.read_text().endswith(markdown_table())


def test_the_module_prints_the_table() -> None:
    result = subprocess.run([sys.executable, "-m", "expertd_server.config"], capture_output=True, text=True, check=True)
    assert result.stdout == markdown_table()


def test_every_option_is_documented() -> None:
    table = markdown_table()
    for option in dataclasses.fields(Config):
        row = next(line for line in table.splitlines() if f"`EXPERTD_{option.name.upper()}`" in line)
        meaning = row.split(" | ")[3].removesuffix(" |")
        assert meaning.endswith("."), f"{option.name} has no docstring: {row}"


def test_defaults() -> None:
    assert parsed() == Config()
    assert Config().host == "127.0.0.1", "nobody else gets in unless told otherwise"


def test_a_flag_wins_over_the_environment_which_wins_over_the_default() -> None:
    environment = {"EXPERTD_PORT": "7", "EXPERTD_MAX_STREAMS": "9", "PORT": "1", "EXPERTD_CUDA": "off"}
    config = parsed("--port", "8", **environment)
    assert (config.port, config.max_streams, config.max_batch_tokens) == (8, 9, Config().max_batch_tokens)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("checkpoint", "/some/where", Path("/some/where")),
        ("port", "0", 0),
        ("metrics_port", "9090", 9090),
        ("request_timeout_s", "1.5", 1.5),
        ("memory_budget_bytes", "1000000", 1_000_000),
        ("log_format", "json", "json"),
        ("host", "::", "::"),
    ],
)
def test_flags_and_variables_are_parsed_alike(name: str, text: str, value: Any) -> None:
    assert getattr(parsed(f"--{name.replace('_', '-')}", text), name) == value
    assert getattr(parsed(**{f"EXPERTD_{name.upper()}": text}), name) == value


def test_lists() -> None:
    config = parsed("--checkpoint", "x", "--layers", "model.layers.0, model.layers.1?,")
    assert config.layers == ("model.layers.0", "model.layers.1?")


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("true", True), ("1", True), ("OFF", False), ("no", False), ("0", False)]
)
def test_switches(text: str, value: bool) -> None:
    assert parsed(EXPERTD_REFLECTION=text).reflection is value
    assert parsed("--reflection" if value else "--no-reflection").reflection is value


@pytest.mark.parametrize(("text", "experts"), [("0-63", range(64)), ("5-5", range(5, 6)), (None, None)])
def test_experts(text: str | None, experts: range | None) -> None:
    assert Config(experts=text).expert_range == experts


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": -1}, "port is -1, expected 0 to 65535"),
        ({"metrics_port": 65536}, "metrics_port is 65536"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0, expected 1 to"),
        ({"max_batch_tokens": 100, "max_queue_tokens": 99}, "max_queue_tokens is 99, expected 100 to"),
        ({"max_message_bytes": 2**31}, "max_message_bytes is 2147483648"),
        ({"max_queue_delay_us": -1}, "max_queue_delay_us is -1"),
        ({"request_timeout_s": 0.0}, "request_timeout_s is 0.0, expected a positive number"),
        ({"shutdown_grace_s": float("inf")}, "shutdown_grace_s is inf"),
        ({"shutdown_grace_s": float("nan")}, "shutdown_grace_s is nan"),
        ({"shutdown_grace_s": 1e12}, r"shutdown_grace_s is 1000000000000.0, expected .* at most 1000000000"),
        ({"engine_hang_timeout_s": 1e12}, "engine_hang_timeout_s is 1000000000000.0, expected .* at most"),
        ({"log_level": "loud"}, "log_level is 'loud', expected one of debug, info, warning, error"),
        ({"log_format": "xml"}, "log_format is 'xml'"),
        ({"host": ""}, "host is ''"),
        ({"device": "gpu"}, "device is 'gpu', expected cpu, cuda, cuda:N or auto"),
        ({"tls_cert_file": Path("c")}, "tls_key_file is None"),
        ({"tls_key_file": Path("k")}, "tls_cert_file is None"),
        ({"tls_client_ca_file": Path("a")}, "tls_cert_file is None"),
        ({"admin_client_ca_file": Path("a")}, "tls_cert_file is None, .*admin_client_ca_file needs"),
        ({"admin": True, "admin_host": "10.0.0.1"}, "admin_host is '10.0.0.1', .*mutual TLS .admin_client_ca_file"),
        ({"layers": ("a",)}, "layers is .*expected nothing unless checkpoint is given"),
        ({"calibration": Path("c")}, "calibration is .*expected nothing unless checkpoint"),
        ({"experts": "3"}, "experts is '3', expected two global ids"),
        ({"experts": "4-3"}, "experts is '4-3'"),
        ({"experts": "a-b"}, "experts is 'a-b'"),
        ({"weights_version": 0}, "weights_version is 0"),
    ],
)
def test_values_that_cannot_be_used_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config(**options)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"EXPERTD_MAX_STREAMS": "many"}, "EXPERTD_MAX_STREAMS is 'many', expected a whole number$"),
        ({"EXPERTD_REQUEST_TIMEOUT_S": "1s"}, "EXPERTD_REQUEST_TIMEOUT_S is '1s', expected a number"),
        ({"EXPERTD_REFLECTION": "maybe"}, "EXPERTD_REFLECTION is 'maybe', expected on or off"),
        ({"EXPERTD_PORT": "tcp://10.0.0.1:80"}, "enableServiceLinks: false"),
    ],
)
def test_text_that_is_no_value_names_its_source(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parsed(**environment)


def test_help_teaches() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "expertd_server", "serve", "--help"], capture_output=True, text=True, check=True
    )
    for option in dataclasses.fields(Config):
        assert f"--{option.name.replace('_', '-')}" in result.stdout
        assert f"EXPERTD_{option.name.upper()}" in result.stdout
    assert "examples:" in result.stdout


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, expertd_server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
