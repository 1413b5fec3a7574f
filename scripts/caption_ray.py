#!/usr/bin/env python3
"""Caption a folder of images on a Ray cluster, or on this machine as a cluster of one.

    pip install '.[ray]'
    python scripts/caption_ray.py photos --out captions --actors 2
    python scripts/caption_ray.py s3://bucket/photos --out s3://bucket/captions --model text.gguf \\
        --mmproj mmproj.gguf --actors 8 --gpus 1 -ngl -1

Writes JSON lines with path, caption and error to the folder --out, one file or more. Every machine needs the
model's files under the same path. The exit code is 3 if an image failed.
"""

from __future__ import annotations

import argparse
import sys

from mllama_gguf.errors import MllamaError
from mllama_gguf.files import check_folder
from mllama_gguf.ray import MllamaCaptioner


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", nargs="+", help="folders or files, local or as Ray Data takes them")
    parser.add_argument("--out", required=True, help="folder for the captions")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmproj")
    parser.add_argument("--prompt", default="Describe this image.")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--actors", type=int, default=1, help="number of models that work at the same time")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of an actor")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an actor")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4, help="images in one batch of an actor")
    args = parser.parse_args()
    if "://" not in args.out:  # Ray adds files of names of its own; it replaces none
        try:
            check_folder(args.out)
        except MllamaError as e:
            parser.error(str(e))
    import ray.data  # it takes seconds

    images = ray.data.read_binary_files(args.images, include_paths=True)
    captions = images.map_batches(
        MllamaCaptioner,
        fn_constructor_args=(args.model, args.mmproj),
        fn_constructor_kwargs={
            "image_column": "bytes",
            "options": {"prompt": args.prompt, "max_tokens": args.max_tokens},
            "n_gpu_layers": args.n_gpu_layers,
        },
        batch_size=args.batch_size,
        num_cpus=args.cpus,
        num_gpus=args.gpus or None,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
    ).select_columns(["path", "caption", "error"])
    captions = captions.materialize()  # the writer below and the count read it
    captions.write_json(args.out)
    total, failed = captions.count(), captions.filter(lambda row: row["error"] != "").count()
    print(f"{total} images, {failed} failed", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
