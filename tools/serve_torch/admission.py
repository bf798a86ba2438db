"""Who may take how much of a server (net/admission.h): sessions, and positions in the KV caches.

On the event loop's thread only.
"""

from dataclasses import dataclass, field

from .body import INVALID_ARGUMENT, RESOURCE_EXHAUSTED, StepError


@dataclass
class Admission:
    max_sessions: int
    max_sessions_per_client: int
    max_positions: int | None  # over all sessions; None: no limit
    sessions: int = 0
    positions: int = 0
    of_client: dict[bytes, int] = field(default_factory=dict)

    def admit(self, client: bytes) -> "Lease":
        if self.sessions >= self.max_sessions:
            raise StepError(RESOURCE_EXHAUSTED, f"the server has all of its {self.max_sessions} "
                                                "sessions in use; try again later")
        own = self.of_client.get(client, 0)
        if own >= self.max_sessions_per_client:
            raise StepError(RESOURCE_EXHAUSTED,
                            f"this client has all of the {self.max_sessions_per_client} sessions "
                            "that the server gives to one; close one first")
        self.of_client[client] = own + 1
        self.sessions += 1
        return Lease(self, client)


class Lease:
    """One session's share. Room is kept until the session ends, as a cache keeps its memory."""

    def __init__(self, admission: Admission, client: bytes):
        self._admission = admission
        self._client = client
        self._positions = 0

    def reserve(self, end: int) -> None:
        """Sets room for positions [0, end) aside; nothing changes when there is none."""
        if end <= self._positions:
            return
        admission, more = self._admission, end - self._positions
        if admission.max_positions is not None and end > admission.max_positions:
            raise StepError(INVALID_ARGUMENT,
                            "the server's memory for KV caches holds "
                            f"{admission.max_positions} positions, not {end}; use a shorter prompt")
        if (admission.max_positions is not None
                and more > admission.max_positions - admission.positions):
            raise StepError(RESOURCE_EXHAUSTED,
                            f"the server's memory for KV caches has no room for {end} positions; "
                            "try again later")
        admission.positions += more
        self._positions = end

    def give_back(self) -> None:
        admission = self._admission
        admission.sessions -= 1
        admission.positions -= self._positions
        admission.of_client[self._client] -= 1
        if admission.of_client[self._client] == 0:
            del admission.of_client[self._client]
