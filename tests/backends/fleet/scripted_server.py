"""Stands in for `sglang.launch_server`: takes its flags, answers /ready, fails on cue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        told = {"pid": os.getpid(), "disaggregation_mode": role_in(sys.argv)}
        self.wfile.write(json.dumps(told).encode())

    def log_message(self, format: str, *args: object) -> None:
        return


def role_in(argv: list[str]) -> str:
    flag = "--disaggregation-mode"
    return argv[argv.index(flag) + 1] if flag in argv else "null"


def main(argv: list[str]) -> None:
    sys.stdout.write("loading weights\n")
    sys.stdout.flush()
    if "--die" in argv or f"--die-as-{role_in(argv)}" in argv:
        raise SystemExit("weights do not fit")
    if "--taken" in argv:
        sys.stdout.write("[Errno 98] error while attempting to bind: address already in use\n")
        sys.stdout.flush()
        time.sleep(600)
    if f"--hang-as-{role_in(argv)}" in argv:
        time.sleep(600)
    if "--hang" in argv or ("--hang-if" in argv and Path(argv[-1]).exists()):
        time.sleep(600)
    subprocess.Popen(SLEEPER)  # a scheduler
    if "--stray" in argv:
        subprocess.Popen(SLEEPER, start_new_session=True)
    address = ("127.0.0.1", int(argv[argv.index("--port") + 1]))
    HTTPServer(address, Answer).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
