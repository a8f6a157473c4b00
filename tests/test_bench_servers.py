"""The bench's server processes: started, suspended, resumed and ended with all that they started."""

import sys
import time
from pathlib import Path

import pytest
from bench.servers import Server, ServerFailed, ask, awake, free_port, running

FAKE = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        reply = json.dumps({"label": text.upper()}).encode()
        self.send_response(400 if text == "fail" else 200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def fake_server(code: str = FAKE) -> Server:
    port = free_port()
    return Server(
        name="fake",
        command=(sys.executable, "-c", code, str(port)),
        port=port,
        path="/",
        body_of=lambda text: {"input": text},
        label_of=lambda reply: str(reply["label"]),
    )


def test_server_process_answers_when_awake_and_not_when_suspended(tmp_path: Path) -> None:
    with running(fake_server(), tmp_path) as process:
        assert ask(process.server, "good") == "GOOD"
        with pytest.raises(ServerFailed, match="status 400"):
            ask(process.server, "fail")
        process.suspend()
        with pytest.raises(ServerFailed, match="timed out"):
            ask(process.server, "good", timeout_s=0.3)
        with awake(process):
            assert ask(process.server, "good") == "GOOD"
        process.suspend()
    with pytest.raises(ServerFailed, match="refused"):
        ask(process.server, "good")


def test_server_that_dies_at_the_start_shows_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailed, match="out of cheese"),
        running(fake_server("raise SystemExit('out of cheese')"), tmp_path),
    ):
        pass


# Starts a child that outlives it unless it is killed too, in a session of its own as some servers' workers are.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
""" + FAKE.replace("text.upper()", "str(child.pid)")


def state_of(pid: int) -> str:
    """The letter of /proc/PID/stat; "gone" when there is no such process or nobody has waited for it yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "gone"
    return "gone" if state == "Z" else state


def test_workers_are_suspended_and_ended_with_their_server(tmp_path: Path) -> None:
    with running(fake_server(PARENT), tmp_path) as process:
        child = int(ask(process.server, "who ?"))
        process.suspend()
        wait_for(child, "T")
        process.resume()
        wait_for(child, "S")
    wait_for(child, "gone")


def wait_for(pid: int, state: str) -> None:
    """Signals take effect a moment after they were sent."""
    for _ in range(3000):
        if state_of(pid) == state:
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} is in state {state_of(pid)}, not {state}")
