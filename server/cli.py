"""The ``secateur`` command: one table of commands, each loaded only when it is called."""

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

import click
import typer

from unlearning.errors import SecateurError

EXPERIMENTS = "simulation.commands"
COMMANDS = {
    "demo": (EXPERIMENTS, "Catch three poisoners among ten clients and forget them."),
    "run": (EXPERIMENTS, "Run one scenario and write its report."),
    "compare": ("simulation.compare_commands", "Let methods forget the same clients, compared."),
    "scenarios": (EXPERIMENTS, "List the scenarios that come with Secateur."),
    "attacks": (EXPERIMENTS, "List the attacks that scenarios can simulate."),
    "unlearn": ("server.unlearn", "Take clients out of a saved model, without a federation."),
    "holdings": ("client.holdings", "Name a client's rows by tokens, and see what it forgot."),
    "local": ("client.local", "Forget a class or samples on one machine with all the data."),
    "methods": ("server.catalogue", "List the unlearning methods."),
    "detectors": ("server.catalogue", "List the detectors."),
}
"""Command -> module that has a Typer app of its commands, and one line of help."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are looked up, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module_name, _ = COMMANDS[cmd_name]
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "simulation":
                raise
            raise SecateurError(
                f"'{cmd_name}' runs experiments, and they are not installed here; install Secateur "
                "from its source tree"
            ) from error
        group = typer.main.get_command(module.commands)
        assert isinstance(group, click.Group)  # noqa: S101  a Typer app with several commands is one
        return group.get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("secateur"), prog_name="secateur")
def secateur() -> None:
    """Federated learning that can forget."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 misuse; errors are one line."""
    try:
        code = secateur.main(args=arguments, prog_name="secateur", standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except SecateurError as error:
        _fail(str(error), error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"secateur: {' '.join(message.split())}\n")
    sys.exit(code)
