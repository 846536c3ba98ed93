"""Using what was trained: `k2 chat` in the terminal, `k2 serve` over HTTP."""

from pathlib import Path

import click

from k2.commands.options import Command


def trained_model(command: Command) -> Command:
    """The MODEL argument and `--format`."""
    form = click.option(
        "--format",
        "form",
        type=click.Choice(["int4", "bf16"]),
        default="int4",
        show_default=True,
        help="Which of the exported models.",
    )
    return click.argument("model", default="champion")(form(command))


def model_folder(model: str, form: str) -> Path:
    """MODEL as a folder: one that is there, or a verified copy of the export that an alias or a URI names."""
    from k2.commands.inspect import resolve
    from k2.execution.local import object_store
    from k2.store.artifacts import open_uri
    from k2.store.lease import reading

    if Path(model).is_dir():
        return Path(model)
    with object_store() as store, reading(store, uri := resolve(store, model)):
        return open_uri(store, uri).directory() / form


@click.command()
@trained_model
@click.option("--system", help="What the conversation starts with; nothing by default.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.6, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same answers.")
def chat(model: str, form: str, system: str | None, max_tokens: int, temperature: float, seed: int) -> None:
    """Talk to MODEL: an alias, the s3:// URI of an export, or a folder."""
    from k2.serving.chat import ChatSettings
    from k2.serving.chat import chat as converse

    settings = ChatSettings(system, max_tokens, temperature, seed=seed)
    converse(model_folder(model, form), settings=settings)


@click.command()
@trained_model
@click.option("--name", help="What requests call the model; MODEL by default.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than loopback want K2_SERVE_KEY set.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Where to listen.")
@click.option("--rows", type=click.IntRange(1), default=16, show_default=True, help="Answers generated at a time.")
@click.option("--context", type=click.IntRange(2), help="Longest dialog in tokens; the model's own by default.")
@click.option("--system", help="Said where a dialog has no system message; nothing by default.")
def serve(
    model: str, form: str, name: str | None, host: str, port: int, rows: int, context: int | None, system: str | None
) -> None:
    """Serve MODEL over HTTP, as OpenAI's /v1/chat/completions and Anthropic's /v1/messages.

    MODEL is an alias, the s3:// URI of an export, or a folder. With K2_SERVE_KEY set, every request must send that key.
    K2_METRICS_PORT serves Prometheus metrics.

    \b
    curl http://127.0.0.1:8000/v1/chat/completions -d \\
      '{"model": "champion", "messages": [{"role": "user", "content": "12+34="}]}'
    """
    from k2.model.generate import Engine
    from k2.monitoring.metrics import serve_from_environment
    from k2.serving.chat import load_export, load_tokenizer
    from k2.serving.server import key_for, serve
    from k2.serving.service import Service

    serve_from_environment()
    key, folder = key_for(host), model_folder(model, form)
    engine, tokenizer = Engine(load_export(folder)), load_tokenizer(folder)
    service = Service(name or model, engine, tokenizer, rows=rows, context=context, system=system)
    click.echo(f"{service.name} at http://{host}:{port}/v1, Ctrl-C ends", err=True)
    serve(service, host, port, key)


COMMANDS = (chat, serve)
