"""The commands beside serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import draft
from serving import LAYER, running

from expertd_server.cli import main

CERTS = Path(__file__).parent / "certs"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("expertd-server ")


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_inspecting_what_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/no/such/checkpoint"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("expertd-server: ")
    assert "/no/such" in error
    assert error.count("\n") == 1


def test_inspecting_says_by_its_exit_code_whether_every_layer_can_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = draft()
    assert main(["inspect", str(made.write(tmp_path / "good"))]) == 0
    assert "2 layers can be loaded" in capsys.readouterr().out
    del made.tensors[made.name(1, 2, "down")]
    assert main(["inspect", str(made.write(tmp_path / "broken"))]) == 1
    assert "cannot be loaded" in capsys.readouterr().out


class TestHealth:
    def test_of_the_server_and_of_a_layer(self, capsys: pytest.CaptureFixture[str]) -> None:
        with running() as live:
            target = f"127.0.0.1:{live.server.port}"
            assert main(["health", "--target", target]) == 0
            assert main(["health", "--target", target, "--service", LAYER]) == 0
            assert main(["health", "--target", target, "--service", "nowhere"]) == 1
        assert main(["health", "--target", target]) == 1, "the server is gone"
        said = capsys.readouterr()
        assert said.out == f"{target}: SERVING\n" * 2
        assert "NOT_FOUND: the server knows no layer or service 'nowhere'" in said.err

    def test_of_the_server_that_the_environment_describes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with running() as live:
            monkeypatch.setenv("EXPERTD_HOST", "0.0.0.0")
            monkeypatch.setenv("EXPERTD_PORT", str(live.server.port))
            assert main(["health"]) == 0

    @pytest.mark.parametrize("given", [("cert",), ("key",), ("cert", "key"), ("ca", "cert"), ("ca", "key")])
    def test_certificates_that_would_not_be_used_are_an_error(
        self, given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = {"ca": "authority.pem", "cert": "client.pem", "key": "client.key"}
        flags = [each for name in given for each in (f"--{name}-file", str(CERTS / files[name]))]
        assert main(["health", "--target", "localhost:1", *flags]) == 2
        assert "give all three or none of them" in capsys.readouterr().err

    @pytest.mark.parametrize("timeout_s", ["0", "-1", "nan", "inf"])
    def test_a_time_that_cannot_be_waited_for_is_an_error(
        self, timeout_s: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["health", "--target", "localhost:1", f"--timeout-s={timeout_s}"]) == 2
        assert f"--timeout-s is {timeout_s}, expected a positive number" in capsys.readouterr().err

    def test_of_a_server_that_the_environment_gives_tls_asks_for_the_authority(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("EXPERTD_TLS_CERT_FILE", str(CERTS / "server.pem"))
        monkeypatch.setenv("EXPERTD_TLS_KEY_FILE", str(CERTS / "server.key"))
        assert main(["health"]) == 2
        assert "speaks TLS (EXPERTD_TLS_CERT_FILE), expected --ca-file" in capsys.readouterr().err

    def test_over_mutual_tls(self, capsys: pytest.CaptureFixture[str]) -> None:
        authority = CERTS / "authority.pem"
        options = {"tls_cert_file": CERTS / "server.pem", "tls_key_file": CERTS / "server.key"}
        with running(host="localhost", tls_client_ca_file=authority, **options) as live:
            command = ["health", "--target", f"localhost:{live.server.port}", "--ca-file", str(authority)]
            pair = ["--cert-file", str(CERTS / "client.pem"), "--key-file", str(CERTS / "client.key")]
            assert main([*command, *pair]) == 0
            assert main(command) == 1
        assert main([*command, "--ca-file", "/nowhere.pem"]) == 2
        assert "/nowhere.pem: No such file" in capsys.readouterr().err
