"""What has to be known of measured choices at every call, without loading what chooses."""

from dataclasses import dataclass


@dataclass
class Pinned:
    """The records in use in this process.

    Attributes:
        changes: How often records were handed in: what was decided before has to be decided again.
        tell_hosts_apart: Whether one has other winners for calls from Python than for those of a graph.
    """

    changes: int = 0
    tell_hosts_apart: bool = False


PINNED = Pinned()
