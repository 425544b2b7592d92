"""Random clients and injected faults against a live server for as long as asked: `make soak`.

Knows the server by its sockets, its /metrics and /proc; only launch.py runs inside it.
"""
