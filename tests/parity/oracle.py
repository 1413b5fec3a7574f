"""The reference that parity is measured against: transformers 4.52.4 in float32, corrected to Meta's
semantics.

transformers 4.52.4 computes the vision encoder exactly as Meta's reference implementation does (later
versions take the intermediate states one layer too late). In the text decoder one thing is corrected: a token
before the first image gets nothing from a cross-attention layer, where transformers lets its attention see
every key without a mask. A forward hook multiplies the attention's output by zero for those tokens; the MLP
of the layer is masked by transformers itself.

Attention is "eager", plain matrix products and a softmax: the same on every processor up to the order of
sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tiny import new_name
from transformers import MllamaForConditionalGeneration

from mllama_gguf.convert.checkpoint import Checkpoint
from mllama_gguf.convert.shape import read_shape
from mllama_gguf.convert.tensors import FloatType, plan

F32 = npt.NDArray[np.float32]

VERSION = "4.52.4"

# Models this small are slower on several threads, far slower where others use the processor too.
torch.set_num_threads(1)


def visible_images(tokens: Sequence[int], image_token: int) -> list[list[int]]:
    """Which images each token sees: those of the last group of adjacent image tokens up to it, itself
    included."""
    group: list[int] = []
    n_images, seen = 0, []
    for i, token in enumerate(tokens):
        if token == image_token:
            adjacent = i > 0 and tokens[i - 1] == image_token
            group = [*group, n_images] if adjacent else [n_images]
            n_images += 1
        seen.append(group)
    return seen


class Oracle:
    """One checkpoint. ``type`` and ``vision_type`` round the weights that a GGUF of that type would hold
    rounded."""

    def __init__(
        self,
        checkpoint: Path,
        type: FloatType = "f32",
        vision_type: FloatType | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if transformers.__version__ != VERSION:
            raise RuntimeError(f"the oracle needs transformers {VERSION}, not {transformers.__version__}")
        loaded = MllamaForConditionalGeneration.from_pretrained(
            checkpoint, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        model, info = cast("tuple[Any, dict[str, list[str]]]", loaded)
        wrong = {key: names for key, names in info.items() if names}
        if wrong:
            raise RuntimeError(f"{checkpoint}: not loaded in full: {wrong}")
        self.model = model.eval()
        self.text = model.config.text_config
        self.vision = model.config.vision_config
        self.image_token = int(model.config.image_token_index)
        self._round_weights(checkpoint, type, vision_type or type)
        self.model.to(dtype)
        self.dtype = dtype
        self._sees: torch.Tensor | None = None  # [1, tokens, 1]: 1 from the first image on, else 0
        for layer in self.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                layer.cross_attn.register_forward_hook(self._silence)

    def _round_weights(self, path: Path, type: FloatType, vision_type: FloatType) -> None:
        checkpoint = Checkpoint(path)
        weights = self.model.state_dict()
        with torch.no_grad():
            for tensor in plan(checkpoint, read_shape(checkpoint), type, vision_type):
                if tensor.type == "f32" or tensor.source is None:
                    continue
                name = tensor.source.name
                name = name if name in weights else new_name(name)
                half = torch.float16 if tensor.type == "f16" else torch.bfloat16
                weights[name].copy_(weights[name].to(half).to(torch.float32))

    def _silence(self, module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert self._sees is not None
        return (output[0] * self._sees, *output[1:])

    @torch.no_grad()
    def states(self, pixels: F32, aspect_ratio_id: int) -> F32:
        """cross_attention_states of one image, [tiles of its grid, positions, text width].

        pixels: [max_tiles, 3, S, S], zero beyond the tiles of the grid.
        """
        rows, columns = self.vision.supported_aspect_ratios[aspect_ratio_id - 1]
        n_tiles = rows * columns
        mask = (torch.arange(self.vision.max_num_tiles) < n_tiles).long()
        out = self.model.vision_model(
            pixel_values=torch.from_numpy(pixels).to(self.dtype)[None, None],
            aspect_ratio_ids=torch.tensor([[aspect_ratio_id]]),
            aspect_ratio_mask=mask[None, None],
        )
        states = self.model.model.multi_modal_projector(out.last_hidden_state)[0, 0, :n_tiles]
        return np.ascontiguousarray(states.numpy().astype(np.float32))

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], images: Sequence[F32] = ()) -> F32:
        """Logits [tokens, vocab_size]; ``images``: the states of each image token in order."""
        if sum(token == self.image_token for token in tokens) != len(images):
            raise ValueError("one image per image token is needed")
        ids = torch.tensor([list(tokens)])
        if not images:
            return self._run(input_ids=ids)
        n_max = int(self.vision.max_num_tiles)
        states = torch.zeros(len(images), n_max, *images[0].shape[1:], dtype=self.dtype)
        mask = torch.zeros(1, len(tokens), len(images), n_max, dtype=self.dtype)
        for i, image in enumerate(images):
            states[i, : len(image)] = torch.from_numpy(image)
        for position, seen in enumerate(visible_images(tokens, self.image_token)):
            for i in seen:
                mask[0, position, i, : len(images[i])] = 1
        self._sees = mask.flatten(2).any(dim=-1, keepdim=True).to(self.dtype)
        return self._run(
            input_ids=ids, cross_attention_states=states.flatten(0, 1), cross_attention_mask=mask
        )

    def _run(self, **inputs: torch.Tensor) -> F32:
        out = self.model(use_cache=False, **inputs)
        return np.ascontiguousarray(out.logits[0].numpy().astype(np.float32))

    def greedy(self, tokens: Sequence[int], n: int, images: Sequence[F32] = ()) -> tuple[list[int], float]:
        """The next n tokens, each the most likely, and the smallest margin by which one was the most likely.

        Nothing ends the sequence early, and nothing is cached: every token is computed from all before it.
        """
        sequence, margin = list(tokens), float("inf")
        for _ in range(n):
            last = self.logits(sequence, images)[-1]
            best = int(last.argmax())
            margin = min(margin, float(last[best] - np.delete(last, best).max()))
            sequence.append(best)
        return sequence[len(tokens) :], margin
