"""`mllama serve`: an HTTP server for programs that speak Ollama's or OpenAI's API."""

from __future__ import annotations

import logging
import os
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import MllamaError, RequestError
from ..settings import MAX_PARALLEL
from ..words import parse_size
from .options import ModelChoice, many_models_options, no_cache_option, no_tuned_option
from .terminal import echo
from .verbose import is_verbose

if TYPE_CHECKING:
    from ..server.settings import ServerSettings

MISSING = "mllama serve needs more packages; install them: pip install 'mllama_gguf[serve]'"


@click.command(
    "serve",
    epilog="\b\nExamples:\n"
    "  mllama serve\n"
    "  mllama serve -m ollama:llama3.2-vision -ngl auto\n"
    "  mllama serve -m llama3.2-vision=text.gguf --mmproj mmproj.gguf\n"
    "  mllama serve --host 0.0.0.0 --api-key-file keys.txt",
)
@click.option("--host", metavar="ADDRESS", help="Listen here.  [default: $OLLAMA_HOST or 127.0.0.1]")
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65535), help="Use this port; 0: any.  [default: 11434]"
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="MLLAMA_API_KEY",
    show_envvar=True,
    help="Answer only with this key. Others on this machine can read it in the list of processes.",
)
@click.option("--api-key-file", metavar="FILE", help="Answer only with one of the keys in FILE, one a line.")
@click.option("--no-auth", is_flag=True, help="Let other machines in without a key.")
@click.option("--allow-host", metavar="NAME", multiple=True, help="Accept this name of the server too.")
@click.option(
    "--allow-origin",
    metavar="ORIGIN",
    multiple=True,
    help="Accept requests of web pages of ORIGIN. [$OLLAMA_ORIGINS]",
)
@click.option(
    "--keep-alive",
    metavar="TIME",
    help="Unload a model that was not used for TIME, as in 5m or 24h; -1: never.  [default: 5m]",
)
@click.option(
    "--max-queue",
    metavar="N",
    type=click.IntRange(1),
    help="Let at most N requests wait; refuse more.  [default: 512]",
)
@click.option(
    "--max-models", metavar="N", type=click.IntRange(1), help="Keep at most N models in memory.  [default: 3]"
)
@click.option(
    "--parallel",
    metavar="N",
    type=click.IntRange(1, MAX_PARALLEL),
    help="Compute up to N requests of a model together.  [default: 1; with 8 CPUs or more 4; on a GPU 16]",
)
@click.option(
    "--memory", metavar="SIZE", help="Let models take SIZE of memory.  [default: 90 % of this machine's]"
)
@click.option(
    "--max-image-pixels",
    metavar="N",
    type=click.IntRange(1),
    help="Refuse images of more than N pixels.  [default: 64 million]",
)
@click.option("--more-image-formats", is_flag=True, help="Accept JPEG 2000, AVIF, HEIF, ICO and PPM too.")
@click.option(
    "--allow-image-host",
    metavar="HOST",
    multiple=True,
    help="Fetch images that a request names by address, from https://HOST or http://HOST.",
)
@click.option(
    "--allow-pull", is_flag=True, help="Let requests fetch models of models.lock and Ollama's library."
)
@click.option("--allow-gbnf", is_flag=True, help="Accept grammars (GBNF, Lark) in requests.")
@click.option(
    "--request-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Stop a request after SECONDS; 0: never.",
)
@click.option(
    "--shutdown-grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="After SIGTERM, wait up to SECONDS for the running replies.",
)
@click.option(
    "--ollama-version",
    metavar="VERSION",
    help="Report this version of Ollama to programs.  [default: 0.24.0]",
)
@no_cache_option
@no_tuned_option
@many_models_options
def serve_command(
    models: tuple[str, ...],
    choice: ModelChoice,
    no_cache: bool,
    no_tuned: bool,
    **options: Any,
) -> int:
    """Serve models over HTTP: Ollama's API at /api, OpenAI's at /v1, a page for people at /ui.

    -m may be given several times, also as NAME=MODEL. Without -m every model on this machine is offered.
    A model is loaded when a request names it.
    """
    try:
        from ..server.app import make_app, make_service
        from ..server.catalog import Catalog, offer_of
        from ..server.life import listen, serve
        from ..server.models import Opening
        from ..server.settings import from_environment, show_address
    except ImportError as e:
        if str(e.name).partition(".")[0] in ("starlette", "uvicorn", "prometheus_client", "anyio"):
            raise MllamaError(MISSING) from e
        raise

    from_ollama = from_environment(os.environ)
    n_ctx = from_ollama.pop("n_ctx", None)
    settings = _server_settings(from_ollama, options)
    given_settings = {**({} if n_ctx is None else {"n_ctx": n_ctx}), **choice.settings}
    opening = Opening(given_settings, not no_cache, choice.verify, not no_tuned)
    if not models and (words := os.environ.get("MLLAMA_MODEL")):
        models = (words,)
    if choice.mmproj and len(models) != 1:
        raise click.UsageError("--mmproj needs exactly one -m")
    offers = [offer_of(name, choice.mmproj) for name in models] or None
    catalog = Catalog(offers)
    if offers:
        catalog.check()
    if not is_verbose(click.get_current_context()):
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    service = make_service(settings, catalog, opening)
    listener = listen(settings)
    port = listener.getsockname()[1]

    def ready() -> None:
        echo(f"Serving at {show_address(settings.host, port)} (Ctrl-C ends it)")
        sys.stdout.flush()

    serve(service, make_app(service), listener, ready)
    return 0


def _server_settings(from_ollama: dict[str, Any], options: dict[str, Any]) -> ServerSettings:
    """The settings of the options, over those of Ollama's variables. Raises RequestError."""
    from ..server.images import ImageLimits
    from ..server.settings import ServerSettings, check_key, check_reach, digest_of, duration_of, read_keys

    keys: tuple[bytes, ...] = ()
    if options["api_key"] is not None:
        keys = (digest_of(check_key(options["api_key"].strip(), "--api-key")),)
    if options["api_key_file"] is not None:
        keys += read_keys(options["api_key_file"])
    chosen: dict[str, Any] = dict(from_ollama)
    for name in ("host", "port", "max_queue", "max_models", "parallel"):
        if options[name] is not None:
            chosen[name] = options[name]
    if options["keep_alive"] is not None:
        chosen["keep_alive"] = duration_of("--keep-alive", options["keep_alive"])
    if options["memory"] is not None:
        chosen["memory"] = parse_size(options["memory"], "--memory")
    if options["ollama_version"] is not None:
        if not re.fullmatch(r"\d+(\.\d+)*(-[\w.]+)?", options["ollama_version"]):
            raise RequestError("--ollama-version: programs read it as numbers with dots, as in 0.24.0")
        chosen["version"] = options["ollama_version"]
    chosen["origins"] = (*chosen.get("origins", ()), *options["allow_origin"])
    images = ImageLimits(any_kind=options["more_image_formats"], hosts=options["allow_image_host"])
    if options["max_image_pixels"] is not None:
        images = replace(images, pixels=options["max_image_pixels"])
    settings = ServerSettings(
        **chosen,
        keys=keys,
        hosts=options["allow_host"],
        time_limit=options["request_timeout"],
        grace=options["shutdown_grace"],
        allow_pull=options["allow_pull"],
        allow_gbnf=options["allow_gbnf"],
        images=images,
    )
    check_reach(settings, options["no_auth"])
    return settings
