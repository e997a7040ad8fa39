"""The engine model: what one SGLang scheduler does with requests, memory and time."""

from backends.engine.config import EngineConfig
from backends.engine.engine import Engine
from backends.engine.fabric import Fabric
from backends.engine.loads import MODES
from backends.engine.patched import patched
from backends.engine.prompts import Ids, Prompt, Spans, ids_prompt, named_prompt
from backends.engine.request import (
    FAKE_BOOTSTRAP_HOST,
    Listener,
    Refused,
    Request,
    Resident,
    Stage,
)
from backends.engine.schedule import SCHEDULE

__all__ = [
    "FAKE_BOOTSTRAP_HOST",
    "MODES",
    "SCHEDULE",
    "Engine",
    "EngineConfig",
    "Fabric",
    "Ids",
    "Listener",
    "Prompt",
    "Refused",
    "Request",
    "Resident",
    "Spans",
    "Stage",
    "ids_prompt",
    "named_prompt",
    "patched",
]
