"""Several nodes on one machine, each in a network namespace of its own, with links that can be cut."""

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests import debian


def ip(*arguments: str) -> None:
    """iproute2's ip. Raises CalledProcessError with its words."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """What keeps this machine from having network namespaces; None where it can."""
    if shutil.which("ip") is None and not debian.install("iproute2"):
        return "needs iproute2: apt-get install iproute2"
    probe = f"descent-{secrets.token_hex(3)}"
    try:
        with network(probe, 1):
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {' '.join(error.stderr.split())}"


@dataclass(frozen=True)
class Node:
    """A namespace with one address, linked to the others through a bridge."""

    namespace: str
    address: str
    link: str
    """The bridge's end of its cable."""

    @property
    def inside(self) -> list[str]:
        """What a command is prefixed with to run there."""
        return ["ip", "netns", "exec", self.namespace]

    def cut(self) -> None:
        """Pull the cable: packets are lost, and nobody is told."""
        ip("link", "set", self.link, "down")

    def mend(self) -> None:
        ip("link", "set", self.link, "up")

    def kill(self) -> None:
        """Power off: every process there."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True)
        if listed.stdout.split():
            subprocess.run(["kill", "-KILL", *listed.stdout.split()], check=False)


@contextlib.contextmanager
def network(name: str, count: int) -> Iterator[list[Node]]:
    """`count` nodes on a bridge; nothing of them, no process either, is left at the end."""
    short = name[-8:]  # an interface's name has 15 characters at the most
    bridge = f"{short}br"
    nodes = [Node(f"{name}-{i}", f"10.213.7.{i + 1}", f"{short}v{i}") for i in range(count)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for node in nodes:
            ip("netns", "add", node.namespace)
            ip("link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
            ip("link", "set", node.link, "master", bridge, "up")
            ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
            ip("-n", node.namespace, "link", "set", "eth0", "up")
            ip("-n", node.namespace, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node in nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                node.kill()
            for command in (["link", "del", node.link], ["netns", "del", node.namespace]):
                with contextlib.suppress(subprocess.CalledProcessError):
                    ip(*command)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", bridge)
