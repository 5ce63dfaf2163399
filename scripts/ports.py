"""Ports for servers that bind theirs only after minutes of loading."""

import random
import socket

# Systems hand out higher ones by themselves (Linux from 32768): another program would get the port meanwhile.
# From 22000 on SGLang takes ports for its ranks.
PORTS = range(10000, 20000)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing has, and that no program gets without naming it."""
    # Not from the module's generator, which whoever seeds it makes repeat itself.
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        try:
            check_free(port)
        except OSError:
            continue
        return port
    raise OSError(f"none of the ports {PORTS.start} to {PORTS.stop - 1} is free; name one with --port")


def check_free(port: int) -> None:
    """OSError or OverflowError if nothing can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As the engines do: a port just left is free.
        probe.bind(("127.0.0.1", port))
