"""The command line: `k2 run`, one command per stage, and what helps to read and reuse results."""

import sys

import click

from k2 import __version__
from k2.commands import (
    config,
    doctor,
    gc,
    images,
    inspect,
    interop,
    model,
    optim,
    pipeline,
    plan,
    run,
    sandbox,
    schedule,
    serve,
    stages,
)
from k2.errors import StageError, UserError
from k2.masking import install, masked


class Commands(click.Group):
    """Turns the project's errors into one line and the documented exit codes."""

    def invoke(self, ctx: click.Context) -> object:
        """Exit with 2 for a user error, 1 for a failure, 130 when interrupted."""
        install()
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {masked(str(error))}", err=True)
            sys.exit(2)
        except StageError as error:
            click.echo(f"error: {masked(str(error))}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; run again to continue", err=True)
            sys.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="k2")
def main() -> None:
    """Train a model by the recipe of Kimi K2: corpus to promoted INT4 model.

    \b
    k2 run                        the whole recipe, minutes on two cores
    k2 run --preset nano          the same DAG in about a minute
    k2 run --set rl.seed=3        change one field; only what depends on it runs again
    k2 config show tiny           every field, explained
    k2 pretrain                   one stage alone, on what was made before
    k2 chat                       talk to the champion
    k2 serve                      the champion behind OpenAI's and Anthropic's APIs
    k2 plan k2-1t --cluster h800-2048   memory, days and money before any is spent

    Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
    """


for group in (
    *(run, stages, config, pipeline, schedule, inspect, optim, model, serve, plan, interop, gc, doctor, images),
    sandbox,
):
    for command in group.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main()
