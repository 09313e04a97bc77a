"""W10: page and server once more where there is no network but the machine's own loopback."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NAMESPACE = ["unshare", "--map-root-user", "--net"]
# A new namespace has the loopback interface, switched off.
RUN_PYTEST = """
import fcntl, socket, struct, sys
import pytest

GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1
with socket.socket() as any_socket:
    request = struct.pack("16sh14x", b"lo", 0)
    name, flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, GET_FLAGS, request))
    fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", name, flags | UP))
    assert any_socket.connect_ex(("192.0.2.1", 80)) != 0, "there is a network"
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


WANTED = [
    "tests/server/page/test_conversations.py::test_stop_ends_the_answer_in_the_engine",
    "tests/server/page/test_glass_box.py",
    "tests/server/test_bundled_model.py",
]


def test_everything_works_without_a_network() -> None:
    """Stopping an answer, the experts, and the bundled model, in one process."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"]).returncode != 0:
        pytest.skip("this machine gives no network namespace (unshare --map-root-user --net)")
    command = [*NAMESPACE, sys.executable, "-c", RUN_PYTEST, *WANTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if " passed" not in done.stdout:
        pytest.skip(f"nothing was run: {done.stdout.splitlines()[-1]}")
