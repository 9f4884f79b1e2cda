"""FLOPs of the layers, predicted from their shapes and from the tokens of the batches.

Counted are the matrix products of the layers, those without an adapter included: a layer of N = out x in weights
costs 2N per token for each of: its forward pass, the recomputation of it under gradient checkpointing, the gradient of
its input, and the gradient of its weight. LoRA factors of P elements add 2P to the first three, and the fourth is 2P
alone. A weight that does not train has no fourth. Of a stack of experts, each token passes through the active ones
only.

A layer whose outputs are read from a cache costs nothing, see [`TokenCounter.add_read`].

Not counted: attention scores, norms, embeddings, routers, the output head and the optimizer. Two details are left
out: torch's non-reentrant checkpointing does not recompute the last product of a layer, and without checkpointing the
layers that read frozen embeddings compute no gradient of their input.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grades_trl.model.matrices import WeightMatrix

# What Transformers' configs call the number of experts that a token passes through.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
# What they call the placeholders in `input_ids` that the output of a projector takes the place of.
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")


@dataclass(frozen=True)
class StepCosts:
    """
    What the cost of a step depends on, beside the matrices.

    Attributes:
        tokens (`dict[str, float]` or `None`): tower -> tokens per step; `None` for as many in each.
        checkpointing (`bool`): the forward pass is run again in backward.
        experts_per_token (`float` or `None`): experts that a token passes through; `None` for all.
        others (`tuple[WeightMatrix, ...]`): the weights of the layers that do not train, from `untracked_matrices`.
        language_prefix_can_be_skipped (`bool`): nothing trains in front of the language layers but what is tracked.
        encoder_is_cached (`bool`): later epochs read the outputs of a frozen encoder from memory.
    """

    tokens: dict[str, float] | None = None
    checkpointing: bool = False
    experts_per_token: float | None = None
    others: tuple[WeightMatrix, ...] = ()
    language_prefix_can_be_skipped: bool = False
    encoder_is_cached: bool = False


def step_flops(
    matrices: Iterable[WeightMatrix],
    *,
    frozen: Collection[str] = (),
    skipped_layers: dict[str, int] | None = None,
    tokens: dict[str, float] | None = None,
    checkpointing: bool = False,
    experts_per_token: float | None = None,
) -> float:
    """FLOPs of one training step in the tracked layers, forward and backward.

    Args:
        matrices (`Iterable[WeightMatrix]`): all tracked matrices of the model.
        frozen (`Collection[str]`, *optional*): names of the matrices whose weight gradient is not computed.
        skipped_layers (`dict[str, int]`, *optional*): path of a layer list (`WeightMatrix.stack`) -> number of its
            leading layers that backward does not enter.
        tokens (`dict[str, float]`, *optional*): tower -> tokens per step. By default 1 in every tower; a tower that
            is missing from the dict has 0.
        checkpointing (`bool`, *optional*, defaults to `False`): the forward pass is run again in backward.
        experts_per_token (`float`, *optional*): experts that a token passes through. By default all of them.
    """
    skipped = skipped_layers or {}
    total = 0.0
    for matrix, through, update in _costs(matrices, experts_per_token):
        cost = through
        if not 0 <= matrix.layer < skipped.get(matrix.stack, 0):
            cost += through * (2 if checkpointing else 1)
            cost += 0.0 if matrix.name in frozen else update
        total += cost * _tokens_of(matrix, tokens)
    return total


def forward_flops(
    matrices: Iterable[WeightMatrix], *, tokens: dict[str, float] | None = None, experts_per_token: float | None = None
) -> float:
    """FLOPs of a forward pass in the tracked layers, as in a held-out measurement. Arguments as in [`step_flops`]."""
    return sum(through * _tokens_of(matrix, tokens) for matrix, through, _ in _costs(matrices, experts_per_token))


def read_flops(
    matrices: Iterable[WeightMatrix],
    tokens: dict[str, dict[int, float | Tensor]],
    *,
    experts_per_token: float | None = None,
) -> float:
    """FLOPs of the forward passes that were not computed, because their outputs were read from a cache.

    Args:
        matrices (`Iterable[WeightMatrix]`): all tracked matrices of the model.
        tokens (`dict[str, dict[int, float or Tensor]]`): path of a layer list (`WeightMatrix.stack`) -> number of its
            leading layers that were read -> tokens that did not pass through these, see [`TokenCounter`].
        experts_per_token (`float`, *optional*): experts that a token passes through. By default all of them.
    """
    return sum(
        through * sum(float(n) for layers, n in tokens.get(matrix.stack, {}).items() if 0 <= matrix.layer < layers)
        for matrix, through, _ in _costs(matrices, experts_per_token)
    )


def _costs(
    matrices: Iterable[WeightMatrix], experts_per_token: float | None
) -> Iterable[tuple[WeightMatrix, float, float]]:
    """Each matrix with its FLOPs per token: of one product with the activations, and of its weight gradient."""
    matrices = list(matrices)
    siblings = Counter((matrix.stack, matrix.layer, matrix.role) for matrix in matrices)
    for matrix in matrices:
        weight = math.prod(matrix.shape)
        full = len(matrix.parameters) == 1 and matrix.params == weight
        # Experts are the first dimension of one tensor, or as many matrices of the same role in the same layer.
        experts = matrix.shape[0] if len(matrix.shape) == 3 else siblings[matrix.stack, matrix.layer, matrix.role]
        if len(matrix.shape) == 2 and "expert" not in matrix.name:
            experts = 1
        share = 1.0 if experts_per_token is None or experts == 1 else min(1.0, experts_per_token / experts)
        factors = 0 if full else matrix.params
        yield matrix, 2.0 * share * (weight + factors), 2.0 * share * (factors or weight)


def _tokens_of(matrix: WeightMatrix, tokens: dict[str, float] | None) -> float:
    return 1.0 if tokens is None else tokens.get(matrix.tower, 0.0)


def experts_per_token(config: Any) -> float | None:
    """Experts that a token passes through, from a model's config; `None` if it does not say."""
    if not hasattr(config, "get_text_config"):  # not imported from Transformers: Unsloth must come before it
        return None
    text = config.get_text_config()
    for name in EXPERTS_PER_TOKEN:
        found = getattr(text, name, None)
        if found:
            return float(statistics.fmean(found) if isinstance(found, list) else found)
    return None


class TokenCounter:
    """
    Counts the tokens that pass through each tower, from the batches alone: no hook on the model, which would keep
    torch.compile from compiling it, and no wait for the device.

    - language: all of `input_ids`, padding included, for padding is multiplied too.
    - vision: the patches of `pixel_values` and `pixel_values_videos`, by their shape and the config's `patch_size`,
      and the class token where the config says that the language model does not get it.
    - audio: half of the frames of `input_features`, as in Whisper's encoder.
    - projector: the placeholders in `input_ids` that its output replaces, so after Qwen-VL has merged patches.

    A row counts as one example; packed sequences are told apart by their `position_ids`.

    Attributes:
        batches (`int`): micro-batches seen.
        experts_per_token (`float` or `None`): as the config of the last one says.
        read (`dict[str, dict[int, float or Tensor]]`): path of a layer list -> number of its leading layers whose
            outputs were read from a cache -> tokens of these micro-batches.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.experts_per_token: float | None = None
        self._config: Any = None
        self._sums: dict[str, float | Tensor] = {}  # tensors stay on the device until somebody asks
        self._examples: float | Tensor = 0
        self._last: dict[str, float | Tensor] = {}
        self.read: dict[str, dict[int, float | Tensor]] = {}

    def add(self, inputs: dict[str, Any], config: Any) -> None:
        """Adds one micro-batch.

        Args:
            inputs (`dict`): what the collator made. Entries that are not known count nothing.
            config: the model's; a plain module's is `None`.
        """
        self.batches += 1
        if config is not self._config:  # the same one in every batch
            self._config, self.experts_per_token = config, experts_per_token(config)
        ids = _language_inputs(inputs)
        self._last = _tokens_of_batch(inputs, ids, config)
        for tower, count in self._last.items():
            self._sums[tower] = self._sums.get(tower, 0) + count
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim == 2 and len(positions) == 1:  # packed, without padding
            self._examples = self._examples + (positions == 0).sum()
        else:
            self._examples += max((len(x) for x in ids), default=0)

    def add_read(self, layers: dict[str, int], towers: dict[str, str]) -> None:
        """The pass of the last micro-batch has read outputs of layers from a cache.

        Args:
            layers (`dict[str, int]`): path of a layer list -> number of its leading layers that were not computed.
            towers (`dict[str, str]`): path of a layer list -> tower.
        """
        for stack, count in layers.items():
            if stack in towers:
                of_stack = self.read.setdefault(stack, {})
                of_stack[count] = of_stack.get(count, 0) + self._last.get(towers[stack], 0)

    @property
    def examples(self) -> float:
        """Training examples so far."""
        return float(self._examples)

    def per_batch(self) -> dict[str, float] | None:
        """Tower -> mean tokens of a micro-batch; `None` if nothing was counted."""
        sums = {tower: float(total) for tower, total in self._sums.items()}
        return {tower: total / self.batches for tower, total in sums.items()} if any(sums.values()) else None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        sums = {tower: float(total) for tower, total in self._sums.items()}
        counts = {"batches": self.batches, "examples": self.examples, "experts_per_token": self.experts_per_token}
        read = [[stack, layers, float(n)] for stack, own in self.read.items() for layers, n in own.items()]
        return {"sums": sums, "read": read, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another counter was."""
        self._sums, self._examples, self.batches, self.read = {}, 0, 0, {}
        self.add_state(state)

    def add_state(self, state: dict[str, Any]) -> None:
        """Adds what another counter has counted: that of another process."""
        self.batches += state["batches"]
        self._examples += state["examples"]
        self.experts_per_token = state["experts_per_token"]
        for tower, count in state["sums"].items():
            self._sums[tower] = self._sums.get(tower, 0) + count
        for stack, layers, count in state["read"]:
            of_stack = self.read.setdefault(stack, {})
            of_stack[layers] = of_stack.get(layers, 0) + count


def _language_inputs(inputs: dict[str, Any]) -> list[Tensor]:
    """The token ids that the model is given: one tensor, or those of TRL's paired ones (`chosen_input_ids`, ...)."""
    if isinstance(inputs.get("input_ids"), Tensor):
        return [inputs["input_ids"]]
    return [x for key, x in inputs.items() if key.endswith("_input_ids") and isinstance(x, Tensor)]


def _tokens_of_batch(inputs: dict[str, Any], ids: list[Tensor], config: Any) -> dict[str, float | Tensor]:
    counts: dict[str, float | Tensor] = {"language": sum(x.numel() for x in ids)}
    placeholders = [getattr(config, name, None) for name in PLACEHOLDERS]
    known = [token for token in placeholders if token is not None]
    if known and ids:
        counts["projector"] = sum((x == token).sum() for x in ids for token in known)
    images = [inputs[key] for key in ("pixel_values", "pixel_values_videos") if isinstance(inputs.get(key), Tensor)]
    if images:
        patches = [_patches(x, config) for x in images]
        # Where the config does not say how an image is divided, the tokens that it becomes are the best guess.
        counts["vision"] = sum(patches) if all(patches) else counts.get("projector", 0)
    features = inputs.get("input_features")
    if isinstance(features, Tensor):
        counts["audio"] = math.prod(features.shape[:-2]) * (features.shape[-1] // 2)
    return counts


def _patches(pixels: Tensor, config: Any) -> int:
    """Tokens in the vision tower; 0 if the config does not say."""
    if pixels.ndim < 4:  # patches already: (all patches, pixels of one), or (images, patches, pixels of one)
        return math.prod(pixels.shape[:-1])
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "patch_size", None)
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        return 0
    # LLaVA's "default" hands the language model all but the class token, so there is one.
    class_token = getattr(config, "vision_feature_select_strategy", None) == "default"
    grid = (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
    return math.prod(pixels.shape[:-3]) * (grid + class_token)
