"""The first process of a sandbox's pod, as a process here."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2.sandbox import inside
from k2.sandbox.contract import Exceeded
from tests.e2e_containers.daemons import wait


def supervised(code: str, seconds: float = 20.0, output_bytes: int = 1000) -> tuple[int, Exceeded, bytes]:
    target = io.BytesIO()
    return *inside.supervise([sys.executable, "-c", code], seconds, output_bytes, target), target.getvalue()


def test_both_outputs_come_in_the_order_of_writing() -> None:
    code = "import os, sys; os.write(1, b'a'); os.write(2, b'b'); os.write(1, b'c'); sys.exit(3)"
    assert supervised(code) == (3, "", b"abc")


def test_too_long_is_ended() -> None:
    assert supervised("import time; print('x', flush=True); time.sleep(60)", seconds=1) == (137, "time", b"x\n")


def test_too_much_output_is_ended_and_cut() -> None:
    assert supervised("while True: print('y' * 99)") == (137, "output", (b"y" * 99 + b"\n") * 10)


def test_as_much_output_as_allowed_is_whole() -> None:
    assert supervised("print('z' * 999)") == (0, "", b"z" * 999 + b"\n")


def test_a_program_that_closed_its_output_is_waited_for() -> None:
    assert supervised("import os, sys, time; os.close(1); os.close(2); time.sleep(0.5); os._exit(7)") == (7, "", b"")


def test_what_it_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """A child that keeps the output open does not keep the sandbox."""
    code = (
        f"import subprocess, sys; p = subprocess.Popen(['sleep', '77']); open('{tmp_path}/pid', 'w').write(str(p.pid))"
    )
    assert supervised(code) == (0, "", b"")
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    wait(lambda: not state.exists() or "State:\tZ" in state.read_text(), 10, state.read_text)


def test_it_sees_no_variable_of_the_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_S3_SECRET_KEY", "not-for-programs")
    _, _, output = supervised("import os; print(sorted(set(os.environ) - {'LC_CTYPE'}))")
    assert output.decode().strip() == "['HOME', 'LANG', 'PATH']"


def test_the_command_line(tmp_path: Path) -> None:
    """Files are copied without the mount's own links; the verdict says why it ended."""
    given, work = tmp_path / "given", tmp_path / "work"
    (given / "..data" / "lib").mkdir(parents=True)
    (given / "..data" / "lib" / "word.py").write_text("WORD = 'read'")
    (given / "..data" / "main.py").write_text("from lib.word import WORD; print(WORD); open('made', 'w'); print(1 / 0)")
    (given / "lib").symlink_to("..data/lib")
    (given / "main.py").symlink_to("..data/main.py")
    work.mkdir()
    code = "import sys; from pathlib import Path; from k2.sandbox import inside\n"
    code += "inside.GIVEN, inside.VERDICT = map(Path, sys.argv[1:3]); sys.exit(inside.main(sys.argv[3:]))"
    limits = ["5", str(10**6), "1000", sys.executable, "main.py"]
    command = [sys.executable, "-c", code, str(given), str(tmp_path / "verdict"), *limits]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (done.returncode, (tmp_path / "verdict").read_text()) == (1, "")
    assert done.stdout.startswith("read\n")
    assert "ZeroDivisionError" in done.stdout
    assert sorted(path.name for path in work.iterdir()) == ["lib", "made", "main.py"]
