"""`mllama pull` and `mllama lock`: fetch a model; pin what it must be."""

from __future__ import annotations

import click

from ..words import show_size
from .progress import transfer_bar
from .terminal import echo
from .verbose import verbose_option


@click.command(
    "pull",
    epilog="\b\nExamples:\n"
    "  mllama pull llama3.2-vision-11b\n"
    "  mllama pull ollama:llama3.2-vision\n"
    "  mllama pull hf:leafspark/Llama-3.2-11B-Vision-Instruct-GGUF/Llama-3.2-11B-Vision-Instruct.Q4_K_M.gguf",
)
@click.argument("name", metavar="NAME")
@verbose_option
def pull_command(name: str) -> None:
    """Download a model: ollama:NAME[:TAG], hf:OWNER/REPO/FILE, or a name in models.lock.

    After an interruption the same command continues the download. Each file is checked against its sha256.
    Models of a registry go to $MLLAMA_DOWNLOADS (by default a folder in the user's cache), models of the
    Hugging Face hub to the hub's own cache. Files that Ollama already has are used where they are.
    """
    from ..store.lockfile import find_locked
    from ..store.pull import pull
    from ..store.resolve import BUNDLED

    locked = None if name.startswith(("ollama:", "hf:")) or name in BUNDLED else find_locked(name)
    if locked and locked.licence:
        echo(f"{locked.licence.name}: {locked.licence.url}\n{locked.licence.notice}", err=True)
    with transfer_bar() as progress:
        files = pull(name, progress)
    for path in files.paths:
        echo(f"{path}  {show_size(path.stat().st_size)}")


@click.command(
    "lock",
    epilog="\b\nExamples:\n"
    "  mllama lock ollama:llama3.2-vision:11b --name my-model\n"
    "  mllama lock llama3.2-vision-11b",
)
@click.argument("reference", metavar="NAME")
@click.option(
    "--file",
    type=click.Path(dir_okay=False),
    default="models.lock",
    show_default=True,
    help="The lock file to write to.",
)
@click.option("--name", metavar="NAME", help="Name of the model in it.  [default: from the reference]")
@click.option("--mmproj", metavar="hf:OWNER/REPO/FILE", help="The vision encoder, for a file of the hub.")
@click.option("--update", is_flag=True, help="Accept that the source has other files than before.")
@verbose_option
def lock_command(reference: str, file: str, name: str | None, mmproj: str | None, update: bool) -> None:
    """Ask a model's source for the sha256 and size of its files, and write them into models.lock.

    NAME is ollama:NAME[:TAG], hf:OWNER/REPO/FILE, or a name in a lock file. The entry of such a name keeps
    its digests and gets the exact sizes. Names are looked up in ./models.lock ($MLLAMA_LOCK), then in the
    lock file of the package. A file that exists keeps its other entries; it must be a lock file.
    """
    from ..store.lockfile import check_lock_output, write_locked
    from ..store.pull import lock

    check_lock_output(file)
    locked = lock(reference, name=name, mmproj=mmproj, update=update)
    write_locked(file, locked)
    for part in locked.files:
        echo(f"{locked.name}  {part.role}  sha256:{part.sha256}  {part.size} bytes")
