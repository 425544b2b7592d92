"""Asks /health in a process of its own, so that no client's work counts: python -m soak.prober HOST PORT.

A line an answer: when it was asked for (time.monotonic), the seconds it took, its status. Ends with stdin.
"""

import http.client
import sys
import threading
import time

INTERVAL = 0.02
"""Seconds between two questions, if the first is answered by then."""
PATIENCE = 20.0


def ask(host: str, port: int) -> int:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", "/health", headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except OSError:
        return 0
    finally:
        connection.close()


def main() -> None:
    """Ask until standard input ends."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    host, port = sys.argv[1], int(sys.argv[2])
    while not ended.is_set():
        began = time.monotonic()
        status = ask(host, port)
        print(began, time.monotonic() - began, status, flush=True)
        time.sleep(max(0.0, began + INTERVAL - time.monotonic()))


if __name__ == "__main__":
    main()
