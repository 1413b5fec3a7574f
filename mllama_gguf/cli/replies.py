"""The options that say what is asked about images, and how replies are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from ..settings import DEFAULT_PROMPT
from .options import F, read_file

if TYPE_CHECKING:
    from ..batch.captions import CaptionOptions

# Names of options that are options of a reply under the same name.
SAMPLING = (
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
)


@dataclass(frozen=True)
class ReplyChoice:
    """The values of `reply_options`.

    inputs: the files that were read
    values: arguments of `CaptionOptions`
    """

    inputs: tuple[str, ...]
    values: Mapping[str, Any]

    def caption_options(self, prefix: str = "", suffix: str = "") -> CaptionOptions:
        """Checked options of captions. Raises RequestError."""
        from ..batch.captions import CaptionOptions

        return CaptionOptions(prefix=prefix, suffix=suffix, **self.values)


def _pixels(ctx: click.Context, param: click.Parameter, words: str | None) -> int | None:
    """An option's callback: "200000000" or "200M" to a number of pixels."""
    if words is None:
        return None
    from ..vision.decoding import parse_pixels

    try:
        return parse_pixels(words)
    except ValueError as e:
        raise click.BadParameter(str(e)) from None


max_pixels_option = click.option(
    "--max-pixels",
    metavar="N",
    callback=_pixels,
    help="Refuse images of more than N pixels, as in 300M.  [default: $MLLAMA_MAX_PIXELS, or 178956970]",
)
allow_truncated_option = click.option(
    "--allow-truncated",
    is_flag=True,
    help="Accept images whose file ends too early; the missing part is grey or black.",
)

temperature_option = click.option(
    "--temp",
    "temperature",
    metavar="T",
    type=click.FloatRange(min=0),
    help="Temperature; 0: always choose the likeliest token; higher: more variety.  [default: the model's "
    "own, or 0]",
)

_OPTIONS = (
    click.option("-p", "--prompt", help=f"Question about the image.  [default: {DEFAULT_PROMPT}]"),
    click.option("--prompt-file", metavar="FILE", type=click.Path(), help="Read the prompt from FILE."),
    click.option("--system", metavar="TEXT", help="System message; '': none.  [default: the model's own]"),
    click.option(
        "--begin",
        metavar="TEXT",
        default="",
        help="Begin every reply with TEXT, as in 'A photo of'; the model continues from there.",
    ),
    click.option(
        "--json-schema",
        metavar="FILE",
        type=click.Path(),
        help="Write captions as JSON that follows the schema in FILE.",
    ),
    click.option("--regex", metavar="REGEX", help="Write captions that match REGEX (as in Python's re)."),
    click.option(
        "--grammar",
        metavar="FILE",
        type=click.Path(),
        help="Write captions that follow the grammar in FILE: GBNF or *.lark.",
    ),
    click.option(
        "-n",
        "--max-tokens",
        metavar="MAX",
        type=click.IntRange(min=1),
        help="Stop a reply after MAX tokens.  [default: the model's own, or 256]",
    ),
    temperature_option,
    click.option("--seed", metavar="S", type=int, help="Random seed (with --temp above 0)."),
    click.option(
        "--top-k",
        metavar="K",
        type=click.IntRange(min=0),
        help="Choose among the K likeliest tokens; 0: all (with --temp above 0).  [default: the model's "
        "own, or 40]",
    ),
    click.option(
        "--top-p",
        metavar="P",
        type=click.FloatRange(0, 1),
        help="Choose among the likeliest tokens that together have probability P; 1: all (with --temp above "
        "0).  [default: the model's own, or 0.95]",
    ),
    click.option(
        "--min-p",
        metavar="P",
        type=click.FloatRange(0, 1),
        help="Choose among tokens that are at least P times as likely as the likeliest; 0: all (with --temp "
        "above 0).  [default: the model's own, or 0.05]",
    ),
    click.option(
        "--repeat-penalty",
        metavar="X",
        type=click.FloatRange(0.01, 100),
        help="Make a token less likely by this factor if it is among the last 64; 1: off.  [default: 1]",
    ),
    click.option(
        "--presence-penalty",
        metavar="X",
        type=click.FloatRange(-2, 2),
        help="Subtract X from the logit of each token that the reply already has.  [default: 0]",
    ),
    click.option(
        "--frequency-penalty",
        metavar="X",
        type=click.FloatRange(-2, 2),
        help="Subtract X from a token's logit for each time that the reply already has it.  [default: 0]",
    ),
    click.option(
        "--stop",
        metavar="TEXT",
        multiple=True,
        help="End a reply before TEXT; TEXT is not shown. May be given several times.",
    ),
    click.option(
        "--time-limit",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        help="Give up on an image after SECONDS.",
    ),
    max_pixels_option,
    allow_truncated_option,
)


def reply_options(command: F) -> F:
    """The options of a question; the command takes them as `asked`, a ReplyChoice."""

    @wraps(command)
    def run(**values: Any) -> Any:
        names = {option: values.pop(option) for option in _NAMES}
        return command(asked=_choice(**names), **values)

    wrapped: Any = run
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


_NAMES = (
    "prompt",
    "prompt_file",
    "system",
    "begin",
    "json_schema",
    "regex",
    "grammar",
    "max_tokens",
    "temperature",
    "seed",
    *SAMPLING,
    "time_limit",
    "max_pixels",
    "allow_truncated",
)


def _choice(
    *,
    prompt: str | None,
    prompt_file: str | None,
    json_schema: str | None,
    regex: str | None,
    grammar: str | None,
    stop: tuple[str, ...],
    **values: Any,
) -> ReplyChoice:
    """What the options say together. Raises UsageError, RequestError."""
    from ..batch.captions import load_grammar, load_schema

    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    if sum(form is not None for form in (json_schema, regex, grammar)) > 1:
        raise click.UsageError("--json-schema, --regex and --grammar exclude each other")
    if any(not text for text in stop):
        raise click.UsageError("--stop takes a text, which cannot be empty")
    if prompt_file is not None:
        prompt = read_file(prompt_file, "prompt").rstrip("\n")
    form = None if regex is None else {"type": "regex", "regex": regex}
    sampling = {name: values.pop(name) for name in SAMPLING if name in values} | {"stop": stop or None}
    arguments = {
        "prompt": DEFAULT_PROMPT if prompt is None else prompt,
        "schema": None if json_schema is None else load_schema(json_schema),
        "form": form if grammar is None else load_grammar(grammar),
        "sampling": {name: value for name, value in sampling.items() if value is not None},
        **values,
    }
    inputs = (prompt_file, json_schema, grammar)
    return ReplyChoice(tuple(path for path in inputs if path), arguments)
