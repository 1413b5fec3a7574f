"""`mllama gallery`: a page that shows a batch."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

import click

from ..files import cannot_write, check_output, replacing
from .terminal import echo, is_live, name_on

SIDE = 256  # vision.thumbnail has the same, and imports Pillow


@click.command(
    "gallery",
    epilog="\b\nExamples:\n"
    "  mllama gallery captions.jsonl -o index.html\n"
    "  mllama gallery captions.csv -o index.html --thumbnail 160 --title 'Summer'\n"
    "  mllama gallery photos/ --sidecar .txt -o photos.html",
)
@click.argument("source", metavar="SOURCE")
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="FILE.html", help="Write the page here."
)
@click.option(
    "--thumbnail",
    "side",
    type=click.IntRange(16, 2048),
    default=SIDE,
    show_default=True,
    metavar="N",
    help="Longer side of the small images, in pixels.",
)
@click.option("--title", metavar="TEXT", help="Title of the page.  [default: the name of SOURCE]")
@click.option("--links", is_flag=True, help="Link to the image files, by paths relative to the page.")
@click.option(
    "--sidecar",
    default=".txt",
    show_default=True,
    metavar="SUFFIX",
    help="Suffix of the caption files, if SOURCE is a folder.",
)
@click.option("--sidecar-full-name", is_flag=True, help="Caption files are called photo.jpg.txt.")
@click.option("-r", "--recursive", is_flag=True, help="Include the folders in the folder.")
@click.option("--overwrite", is_flag=True, help="Replace a page of an earlier run.")
def gallery_command(
    source: str,
    output: str,
    side: int,
    title: str | None,
    links: bool,
    sidecar: str,
    sidecar_full_name: bool,
    recursive: bool,
    overwrite: bool,
) -> None:
    """Write one HTML page with the images, captions and failures of a batch.

    SOURCE is a file that `mllama caption --out` wrote, or a folder of images with caption files. The page
    holds small copies of the images and needs no network, so you can send it to others. Names are
    relative to the folder that all images have in common. With --links the page has relative paths too.
    """
    from ..gallery.entries import entries_of
    from ..gallery.page import KIND, write_page
    from .progress import BatchBar

    target = check_output(output, KIND, inputs=[source], overwrite=overwrite)
    entries = entries_of(source, sidecar=sidecar, full_name=sidecar_full_name, recursive=recursive)
    if title is None:
        title = os.path.splitext(os.path.basename(os.path.abspath(source)))[0]
    n_unseen = 0
    with ExitStack() as stack:
        bar = stack.enter_context(BatchBar()) if is_live(sys.stderr) else None
        if bar is not None:
            bar.begin(len(entries), 0)

        def progress(failed: bool) -> None:
            nonlocal n_unseen
            n_unseen += failed
            if bar is not None:
                bar.advance(failed=failed)

        try:
            with replacing(output, overwrite=overwrite, kind=KIND) as file:
                beside = target.parent if links else None
                write_page(file, entries, title=title, side=side, beside=beside, progress=progress)
        except OSError as e:
            raise cannot_write(output, e) from e
    unseen = f", {n_unseen} of them missing or not readable" if n_unseen else ""
    images = f"{len(entries)} image{'s' if len(entries) != 1 else ''}"
    echo(f"{name_on(sys.stderr, output)}: {images}{unseen}", err=True)
