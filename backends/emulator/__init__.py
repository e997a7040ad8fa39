"""Emulated SGLang servers: the engine model behind SGLang's wire protocol, faults included."""

from backends.emulator.command import add_arguments, run_emulator
from backends.emulator.faults import Fault, FaultKind, Faults
from backends.emulator.fleet import EmulatedFleet, EmulatedServer, ServerSpec

__all__ = [
    "EmulatedFleet",
    "EmulatedServer",
    "Fault",
    "FaultKind",
    "Faults",
    "ServerSpec",
    "add_arguments",
    "run_emulator",
]
