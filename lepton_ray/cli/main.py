"""The front door: finds the command, runs it, and turns every error into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import NoReturn

import click

from lepton_ray.errors import LeptonError

# command -> "module:attribute"; a module is imported only when its command runs or is asked for help
COMMANDS = {
    "compress": ("lepton_ray.cli.compress:compress", "Make a model version smaller, compared with the original."),
    "data": ("lepton_ray.cli.data:data", "Ingest, query and inspect versioned tables."),
    "demo": ("lepton_ray.cli.demo:demo", "The main job on embedded defaults: data to served, monitored model."),
    "evaluate": ("lepton_ray.cli.evaluate:evaluate", "Metrics of any model version on any table version."),
    "exporter": ("lepton_ray.cli.exporter:exporter", "Serve the metrics of all runs and endpoints to Prometheus."),
    "models": ("lepton_ray.cli.models:models", "List, show, promote and verify model versions."),
    "orchestrate": ("lepton_ray.cli.orchestrate:orchestrate", "Start runs again that lost their driver."),
    "runs": ("lepton_ray.cli.runs:runs", "List, show and report training runs."),
    "serve": ("lepton_ray.cli.serve:serve", "Deploy a model version as an autoscaled endpoint."),
    "train": ("lepton_ray.cli.train:train", "Train from a config, here or on the connected cluster."),
    "tune": ("lepton_ray.cli.tune:tune", "Search for good settings: several trainings from one config."),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported on use, so that `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All command names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command by its exact name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):  # a wrong entry in COMMANDS
            raise TypeError(f"{module}:{attribute} is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name when there is no such command."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"no such command {args[0]!a}.{hint} Commands: {', '.join(sorted(COMMANDS))}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command list from COMMANDS, without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lepton-ray", prog_name="lepton-ray")
@click.option("--debug", is_flag=True, envvar="LEPTON_DEBUG", help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train PyTorch models with Ray, serve them, and see where every worker-second went."""
    ctx.obj = {"debug": debug}


def main() -> NoReturn:
    """Console script: run `cli` and leave with the documented exit code."""
    # SIGTERM (`ray job stop`, a pod that is deleted) ends as an exception does: leases are given back, Ray is left
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    debug = "--debug" in sys.argv or os.environ.get("LEPTON_DEBUG", "") not in ("", "0")
    if "--json" in sys.argv:
        from lepton_ray.cli.output import reserve_stdout

        reserve_stdout()
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        # click's own errors span several lines ("Usage: ..."); the promise is one line
        context = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lepton-ray"
        click.echo(f"{context}: {error.format_message()} (see {context} --help)", err=True)
        sys.exit(error.exit_code)
    except LeptonError as error:
        if debug:
            raise
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output left; point stdout elsewhere so that the interpreter's last flush is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
