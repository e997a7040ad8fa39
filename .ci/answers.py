"""Waits until the gateway at a port is ready, and asks it for one stream."""

import json
import sys
import time
import urllib.error
import urllib.request

PATIENCE_S = 60


def wait_until_ready(base: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(base + "/readiness", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError) as error:
            if time.monotonic() > until:
                sys.exit(f"not ready after {PATIENCE_S} s: {error}")
            time.sleep(0.2)


def main() -> None:
    base = f"http://127.0.0.1:{sys.argv[1]}"
    wait_until_ready(base)
    body = {"stream": True, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    request = urllib.request.Request(base + "/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    if not text.rstrip().endswith("data: [DONE]"):
        sys.exit(f"no whole stream: {text[-500:]}")
    sys.stdout.write(f"{text.count('data: ') - 1} events, and the end\n")


main()
