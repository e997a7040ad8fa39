"""The command line: `slackwater serve`, and a subcommand for each other thing it can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

try:
    from backends.emulator import command as emulator
    from backends.fleet import command as fleet
    from backends.fleet.spec import FleetError
    from backends.words import in_words
    from gateway import calibrate, check, predict, serve, simulate
    from gateway.batch import cli
    from gateway.clock import LiveClock
    from gateway.settings import ConfigError
except KeyboardInterrupt:  # they take a second in which somebody may think better of it
    sys.exit(130)

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]

COMMANDS: dict[str, Command] = {
    "serve": ("run the gateway", serve.add_arguments, serve.run_serve),
    "emulate": (
        "run emulated SGLang servers",
        emulator.add_arguments,
        lambda given: emulator.run_emulator(given, LiveClock),
    ),
    "fleet": (
        "run real SGLang servers on this machine",
        fleet.add_arguments,
        fleet.run_fleet,
    ),
    "predict": (
        "what a model on a GPU will do: times, bottlenecks, capacity",
        predict.add_arguments,
        predict.run_predict,
    ),
    "simulate": (
        "what a fleet would do with a workload, in virtual time",
        simulate.add_arguments,
        simulate.run_simulate,
    ),
    "calibrate": (
        "measure what the cost model needs to know",
        calibrate.add_arguments,
        calibrate.run_calibrate,
    ),
    "batch": (
        "submit, watch and download batches of a running gateway",
        cli.add_arguments,
        cli.run_batch,
    ),
    "check": ("probe every server of a configuration", check.add_arguments, check.run_check),
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """A flag that nobody knows is refused with the usage of its own command."""
    top = argparse.ArgumentParser(
        prog="slackwater",
        description="A reverse proxy for SGLang: online requests keep their latency targets, "
        "offline work fills the rest.",
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=summary, description=summary))
    given, unknown = top.parse_known_args(arguments)
    if unknown:
        command = commands.choices[given.command]
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given


def _version() -> str:
    try:
        return f"slackwater {version('slackwater')}"
    except PackageNotFoundError:
        return "slackwater, not installed"


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    try:
        return COMMANDS[given.command][2](given)
    except (ConfigError, FleetError) as error:
        return _explain(error)
    except BaseExceptionGroup as group:  # what a task of the gateway has found
        known = group.subgroup((ConfigError, FleetError))
        if known is None:
            raise
        return _explain(_first(known))
    except OSError as error:  # an address that is taken, a file that cannot be read
        return _explain(error)
    except KeyboardInterrupt:
        return 130


def _explain(error: BaseException) -> int:
    sys.stderr.write(f"slackwater: {in_words(error)}\n")
    return 2


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


if __name__ == "__main__":
    sys.exit(main())
