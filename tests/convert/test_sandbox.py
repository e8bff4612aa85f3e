"""The fences of the reading process, tried from inside: each forbidden act must fail there."""

import subprocess
import sys
import textwrap

import pytest

PREPARE = """
import ctypes, os, socket, subprocess, sys, threading, shutil, urllib.request
from pathlib import Path
from dipole.convert.sandbox import Limits, lock
folder, elsewhere = Path(sys.argv[1]), Path(sys.argv[2])
lock(folder / "input", folder, Limits(memory_bytes=1 << 30, cpu_seconds=20, file_bytes=1 << 20))
try:
    {act}
except BaseException as error:
    os.write(1, f"stopped: {{type(error).__name__}}: {{error}}".encode())
else:
    os.write(1, b"went through")
os._exit(0)
"""


def attempt(act, tmp_path):
    folder, elsewhere = tmp_path / "box", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "input").write_text("input")
    (elsewhere / "secret").write_text("secret")
    script = PREPARE.format(act=textwrap.dedent(act).strip())
    words = [sys.executable, "-I", "-c", script, str(folder), str(elsewhere)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.stdout or f"died: {done.returncode} {done.stderr}"


FORBIDDEN = {
    "socket": "socket.socket()",
    "name look-up": "socket.getaddrinfo('localhost', 80)",
    "web request": "urllib.request.urlopen('http://127.0.0.1:9')",
    "os.system": "os.system(f'touch {elsewhere}/made')",
    "subprocess": "subprocess.run(['touch', str(elsewhere / 'made')])",
    "fork": "os.fork()",
    "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "write elsewhere": "(elsewhere / 'made').write_text('x')",
    "write below": "os.open(folder / 'sub' / 'made', os.O_WRONLY | os.O_CREAT)",
    "write by a detour": "open(f'{folder}/../elsewhere/made', 'w')",
    "overwrite by low-level open": "os.open(elsewhere / 'secret', os.O_TRUNC | os.O_RDWR)",
    "read elsewhere": "(elsewhere / 'secret').read_text()",
    "read passwords": "open('/etc/passwd').read()",
    "open a descriptor": "open(1, 'w')",
    "bytes path": "open(bytes(elsewhere / 'made'), 'wb')",
    "remove": "os.remove(elsewhere / 'secret')",
    "rename": "os.rename(elsewhere / 'secret', folder / 'made')",
    "link": "os.symlink(elsewhere / 'secret', folder / 'made')",
    "make a folder": "os.mkdir(elsewhere / 'made')",
    "remove a tree": "shutil.rmtree(elsewhere)",
    "list a folder": "os.listdir(elsewhere)",
    "change mode": "os.chmod(elsewhere / 'secret', 0)",
    "import": "__import__('antigravity')",
    "exec a text": "exec('1')",
    "eval a text": "eval('1')",
    "compile": "compile('1', 'x', 'eval')",
    "ctypes": "ctypes.CDLL(None)",
    "kill": "os.kill(os.getppid(), 0)",
    "environment": "os.putenv('A', 'B')",
    "trace": "sys.settrace(None)",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_acts_are_stopped_and_do_nothing(name, tmp_path):
    assert "stopped: DipoleError" in attempt(FORBIDDEN[name], tmp_path)
    assert not list(tmp_path.rglob("made"))
    assert (tmp_path / "elsewhere" / "secret").read_text() == "secret"


def test_the_two_allowed_acts_go_through(tmp_path):
    # The control: without it, a fence that stops everything would pass the tests above.
    act = "(folder / 'output').write_text((folder / 'input').read_text())"
    assert attempt(act, tmp_path) == "went through"
    assert (tmp_path / "box" / "output").read_text() == "input"


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by Linux only")
def test_memory_is_limited(tmp_path):
    assert "stopped: MemoryError" in attempt("bytearray(1 << 31)", tmp_path)


def test_file_size_is_limited(tmp_path):
    assert "stopped: OSError" in attempt("(folder / 'output').write_bytes(bytes(1 << 21))", tmp_path)
    assert (tmp_path / "box" / "output").stat().st_size <= 1 << 20
