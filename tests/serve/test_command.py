"""`armchair serve` as a command: what it refuses, and keys."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from armchair.cli import main
from armchair.serve.keys import Keys


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Any:
    """What the command sets for the process it runs in."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--add-key", "anna"], "--api-key-file"),
        (["--api-key-file", "none.txt"], "none.txt"),
        (["--alias", "dall-e-3"], "NAME=MODEL"),
        (["--alias", "dall-e-3=emojo"], "did you mean 'emoji'"),
        (["--model", "emojy"], "emoji"),
        (["--allow-origin", "*"], "https://example.org"),
        (["--memory", "nan"], "above 0"),
        (["--port", "70000"], "65535"),
        (["--ballot", "none.sqlite"], "no ballot"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--data", "data", "--threads", "1", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_a_port_that_is_taken_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--data", str(tmp_path), "--threads", "1", "--port", port]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "in use" in err and "--port" in err


def test_a_key_is_printed_once_and_known_by_its_hash(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "keys.txt"
    assert main(["serve", "--api-key-file", str(path), "--add-key", "anna"]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys.read(path).owner(key) == "anna" and key not in path.read_text()
