"""What servers with our plug-in are asked to do by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.settings import bounded, one_of

OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginSettings:
    """Of servers with the plug-in; all others go on without."""

    decode: str = one_of("online-first", dict.fromkeys((OFF, "online-first", "slack")))
    """Who takes each decode step there."""
    displace: bool = True
    """Whether online prompts go before offline ones at chunk boundaries there."""
    reports: bool = True
    """Whether step times are learnt from what each step is told to have taken."""
    hold_steps: int = bounded(4, low=1, high=64)
    """A choice is good for so many steps while nobody comes or goes."""
    most_parked_ms: float = bounded(2_000.0, low=1, high=3_600_000)
    """Nobody waits longer for a decode step."""
    lease_s: float = bounded(30.0, low=1, high=86_400)
    """Without a word from a gateway for so long a server is stock SGLang again."""
