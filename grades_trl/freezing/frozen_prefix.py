"""Skips the backward pass through the leading layers in which nothing trains.

`requires_grad=False` alone does not do that. A gradient still flows down through every frozen layer as long as the
input of the first one requires it, and it does: with gradient checkpointing, Transformers and PEFT make the output of
the embeddings require a gradient, and each frozen layer is then run a second time and propagated through.

So the leading layers in which nothing trains, with nothing that trains upstream of them, run under `no_grad` and
without checkpointing. The gradients of everything else are the same numbers.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from grades_trl.distributed import gathered_objects
from grades_trl.freezing.activation_cache import ActivationCache
from grades_trl.freezing.batch_content import images_of
from grades_trl.freezing.cache_use import CacheUse
from grades_trl.freezing.encoder_cache import EncoderCache
from grades_trl.model.structure import base_path, find_heads, find_layers, is_linear, stacked_weights
from grades_trl.model.towers import TOWERS, find_encoders, towers_of_modules


class FrozenPrefix:
    """
    The frozen prefix of one model. It grows as matrices freeze.

    Which module is upstream of which is not guessed from names. During training passes (the model in training mode,
    gradients enabled) the calls of the layers, and of the other modules that own parameters, are recorded. A pass may
    leave some out (a vision tower, without images) or call some twice (looped models); the recomputation of a
    checkpointed layer in the backward pass is no call. A layer is skipped only in passes in which nothing that trains
    was called before it.

    Nothing is recorded while `torch.compile` runs or traces the model. Run the first step eagerly:
    `with torch.compiler.set_stance("force_eager")`. Each change of the frozen prefix then costs one compilation.

    Copies of the model, by `copy.deepcopy` or `pickle`, run without a frozen prefix.

    Args:
        model (`nn.Module`): the model that trains.
        cache (`ActivationCache`, *optional*): keeps the outputs of the skipped language layers, to be reused when an
            example comes back.
        encoder_cache (`EncoderCache`, *optional*): keeps the outputs of an encoder that is skipped as a whole, to be
            reused when an image comes back.
        before_pass (`Callable[[], None]`, *optional*): called before each training pass.

    What trains may change between two passes, as when a callback unfreezes layers: the next pass skips none of them.

    Attributes:
        compiled (`bool`): passes are compiled; to be set by whoever does that.
        paused (`bool`): no layer is skipped and no cache is read, for as long as it is set.
        has_new_calls (`bool`): a module was called for the first time since the last `update`.
        skipped_layers (`dict[str, int]`): path of a list of layers in the base model -> number of its leading layers
            that the backward pass skips.
        read_layers (`dict[str, int]`): likewise, the layers whose outputs this training pass, or the last, has read
            from a cache: it does not compute them at all.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: ActivationCache | None = None,
        encoder_cache: EncoderCache | None = None,
        before_pass: Callable[[], None] = lambda: None,
    ):
        self.cache, self.encoder_cache = cache, encoder_cache
        self.compiled = self.paused = False
        self.has_new_calls = False
        self.skipped_layers: dict[str, int] = {}
        self.read_layers: dict[str, int] = {}
        self._model = model
        self._layers = find_layers(model)
        self._towers = towers_of_modules(model)
        inside = tuple(layer + "." for layer in self._layers)
        self._units = {
            path: module
            for path, module in model.named_modules()
            if path in self._layers or (not path.startswith(inside) and any(True for _ in _own_parameters(module)))
        }
        for head in find_heads(model):  # called last, or not at all: TRL's chunked loss reads its weight
            for path in [path for path in self._units if f"{path}.".startswith(f"{head}.")]:  # and PEFT's copy of it
                del self._units[path]

        self._before_pass = before_pass
        self._trains: set[str] = set()  # units in which something trained at the last update
        self._resting: list[nn.Parameter] = []  # all parameters of the other units
        self._skipped: set[str] = set()  # layers with our forward
        self._forwards: dict[str, Any] = {}  # the forward that such a layer had of its own, or None
        self._last_cached = ""  # the layer whose output the cache keeps; empty while the cache is unused
        self._orders: dict[tuple[str, ...], None] = {}  # all different sequences of calls seen in a pass
        self._called: set[str] = set()

        self._in_pass = False
        self._skips_nothing = False  # in this pass
        self._order: list[str] = []  # calls in this pass, or the last
        self._trained_towers: set[str] = set()  # towers with a call, in this pass, of something that trains
        self._checkpointed: list[str] = []  # skipped layers whose checkpointing is off during this pass

        self._hooks = [
            model.register_forward_pre_hook(functools.partial(_begin_pass, self), with_kwargs=True),
            *(m.register_forward_pre_hook(functools.partial(_record_call, self, p)) for p, m in self._units.items()),
            model.register_forward_hook(functools.partial(_end_pass, self), always_call=True),
        ]

    def __reduce__(self) -> tuple:
        # What is on the modules refers to this object. Copies of the modules refer to None, and do nothing then.
        return type(None), ()

    def update(self, unreached: Iterable[nn.Parameter] = (), rows_come_back: bool = True) -> bool:
        """Moves the end of the prefix to where it is now. Call it between two passes, after a training pass.

        Args:
            unreached (`Iterable[nn.Parameter]`, *optional*): parameters that no gradient has ever reached. A module
                that trains and was never called could be upstream of everything, and keeps all layers from being
                skipped, unless its parameters are among these. Not so when passes are compiled: a first call would go
                unnoticed then.
            rows_come_back (`bool`, *optional*, defaults to `True`): an epoch or more is to come, so that an encoder
                that is frozen only now is worth caching.

        Returns:
            `bool`: whether the prefix changed.
        """
        self.has_new_calls = False
        self._trains = {path for path in self._units if any(p.requires_grad for p in self._parameters(path))}
        self._resting = [p for path in self._units.keys() - self._trains for p in self._parameters(path)]
        skipped: set[str] = set()
        skipped_layers: dict[str, int] = {}
        free = self._layers_without_anything_trained_before(set() if self.compiled else {id(p) for p in unreached})
        for path, (stack, index) in self._layers.items():  # in the order of their index
            if path in free and skipped_layers.get(base_path(stack), 0) == index:
                skipped_layers[base_path(stack)] = index + 1
                skipped.add(path)
        if skipped == self._skipped:
            return False
        self._restore_forwards()
        self._skipped, self.skipped_layers = skipped, skipped_layers
        for path in skipped:
            self._replace_forward(path)
        if self.cache is not None:
            self._start_cache(self.cache)
        if self.encoder_cache is not None:
            self.encoder_cache.start(self._model, *self._skipped_encoder(), rows_come_back)
        return True

    def _layers_without_anything_trained_before(self, unreached: set[int]) -> set[str]:
        """The layers that were called before any module that trains, with all their calls, in every pass so far.

        Everything that was called before a language layer counts as upstream of it. For a layer of an encoder, the
        modules of its own tower do; for one of a projector (Q-Former, resampler), those of the encoders too.
        """
        before: set[str] = set()
        after: set[str] = set()
        for tower in {self._towers[path] for path in self._layers}:
            relevant = {path for path in self._units if self._towers[path] in _upstream_of(tower)}
            if any(self._may_be_upstream(path, unreached) for path in relevant - self._called):
                continue
            for order in self._orders:
                trained = False
                for path in (path for path in order if path in relevant):
                    trained = trained or path in self._trains
                    if path in self._layers and self._towers[path] == tower:
                        (after if trained else before).add(path)
        return before - after

    def _may_be_upstream(self, path: str, unreached: set[int]) -> bool:
        """Of a module that was never called: its weights may be read directly, as torch's attention reads its own."""
        return any(p.requires_grad and id(p) not in unreached for p in self._parameters(path))

    def _replace_forward(self, path: str) -> None:
        layer, (stack, index) = self._units[path], self._layers[path]
        next_layer = f"{stack}.{index + 1}"
        feeds_live_layer = next_layer in self._layers and next_layer not in self._skipped
        requires_grad = feeds_live_layer and checkpoints_reentrantly(layer)
        self._forwards[path] = vars(layer).get("forward")
        layer.forward = functools.partial(  # type: ignore[method-assign]
            _forward_without_backward, self, layer, path, self._forwards[path], requires_grad
        )

    def _skipped_encoder(self) -> tuple[nn.Module, list[str]]:
        """The first encoder whose layers are all skipped, and their paths."""
        towers = find_encoders(self._model)
        for tower in towers:
            inside = [path for path in self._layers if f"{base_path(path)}.".startswith(f"{tower}.")]
            if inside and self._skipped.issuperset(inside):
                named = self._model.named_modules()
                return next(module for path, module in named if base_path(path) == tower), inside
        return self._model, []

    @property
    def cache_use(self) -> dict[str, tuple[CacheUse, str]]:
        """What the caches did that have been used, and why they are off (empty if they are not)."""
        caches = {"encoder": self.encoder_cache, "frozen_layers": self.cache}
        return {
            name: (cache.use, cache.off)
            for name, cache in caches.items()
            if cache is not None and (cache.use.hits or cache.use.misses or cache.off)
        }

    def forget_outputs(self) -> None:
        """Empties the caches: weights that their outputs come from have other values."""
        for cache in (self.cache, self.encoder_cache):
            if cache is not None:
                cache.clear()

    def _start_cache(self, cache: ActivationCache) -> None:
        cache.reset(self._model)
        layers = [path for path in self._layers if path in self._skipped and self._towers[path] == "language"]
        self._last_cached = layers[-1] if layers else ""
        if len({self._layers[path][0] for path in layers}) > 1:
            cache.turn_off("layers of several lists are skipped")

    @property
    def called(self) -> list[str]:
        """Paths of the layers and other modules that were called in this training pass, or the last."""
        return list(dict.fromkeys(self._order))

    def share_calls(self, called: list[str]) -> list[str]:
        """Takes in which modules the other processes have called, in which order: rows without images call no vision
        tower. What freezes by it then freezes everywhere. All processes call it in the same step.

        Args:
            called (`list[str]`): of the last training pass of this process.

        Returns:
            `list[str]`: what any process has called in it.
        """
        shared = gathered_objects((list(self._orders), called))
        self._orders = {order: None for orders, _ in shared for order in orders}
        self._called.update(path for order in self._orders for path in order)
        return list(dict.fromkeys(path for _, of_process in shared for path in of_process))

    def parameters_without_gradient(
        self, called: Iterable[str], unreached: Iterable[nn.Parameter]
    ) -> list[nn.Parameter]:
        """What trains in layers and modules that were called without a gradient reaching any of it: nothing uses their
        output. So it is with the last layer of LLaVA-1.5's vision tower (`vision_feature_layer=-2`).

        Args:
            called (`Iterable[str]`): of a pass, see `called`.
            unreached (`Iterable[nn.Parameter]`): parameters that no gradient has ever reached.
        """
        nowhere = {id(p) for p in unreached}
        trained = [[p for p in self._parameters(path) if p.requires_grad] for path in called]
        return [p for group in trained if all(id(p) in nowhere for p in group) for p in group]

    def embeddings_before(self, path: str, norms: bool) -> list[nn.Module]:
        """What feeds the layer `path` within its tower: embeddings of tokens, patches and positions, of an encoder
        also the linear layer that reads the patches. Projections are not among them. Empty if the layer was never
        called.

        Args:
            path (`str`): of a layer.
            norms (`bool`): with the norms there.
        """
        order = next((order for order in self._orders if path in order), ())
        before = dict.fromkeys(order[: order.index(path)] if order else ())
        tower = self._towers[path]
        units = [unit for unit in before if self._towers[unit] == tower and unit not in self._layers]
        first_linear = (
            next((unit for unit in units if is_linear(self._units[unit])), "") if tower != "language" else ""
        )
        reads_patches = bool(first_linear) and not any(_is_convolution(self._units[unit]) for unit in units)
        return [
            self._units[unit]
            for unit in units
            if (reads_patches and unit == first_linear)
            or not (is_linear(self._units[unit]) or stacked_weights(self._units[unit]))
            if norms or not _is_norm(self._units[unit])
        ]

    def close(self) -> None:
        """Leaves the model as it was found. Calling it again does nothing."""
        self.end_pass()
        self._restore_forwards()
        self.forget_outputs()
        for hook in self._hooks:
            hook.remove()

    def _restore_forwards(self) -> None:
        for path, forward in self._forwards.items():
            attributes = vars(self._units[path])
            del attributes["forward"]
            if forward is not None:
                attributes["forward"] = forward
        self._forwards, self._skipped, self.skipped_layers = {}, set(), {}
        if self.cache is not None:
            self.cache.clear()

    def _parameters(self, path: str) -> Iterator[nn.Parameter]:
        module = self._units[path]
        return module.parameters() if path in self._layers else _own_parameters(module)

    # ---- in a pass ----

    def begin_pass(self, inputs: dict[str, Any]) -> None:
        self.end_pass()  # of a pass that was interrupted
        if not (self._model.training and torch.is_grad_enabled()):
            return
        self._in_pass, self._order, self._trained_towers, self.read_layers = True, [], set(), {}
        # A soft prompt, or the output of a projector of the user's own, comes as an input and wants a gradient.
        given = (value for value in inputs.values() if isinstance(value, torch.Tensor))
        self._skips_nothing = self.paused or any(value.requires_grad for value in given)
        if self._skips_nothing:
            return
        self._before_pass()
        if self._skipped and any(p.requires_grad for p in self._resting):  # given back by the user, as in a callback
            self.update()
            self.has_new_calls = True  # once more after the pass, when it is known what no gradient reaches
        # Set anew in each pass: `for_training()` of Unsloth turns checkpointing on in all layers.
        self._look_up(inputs)
        learns = self._learns
        self._checkpointed = [
            path
            for path in self._skipped
            if vars(self._units[path]).get("gradient_checkpointing")
            and not (learns and self._towers[path] == "language")
        ]
        for path in self._checkpointed:
            self._units[path].gradient_checkpointing = False  # type: ignore[assignment]

    def _look_up(self, inputs: dict[str, Any]) -> None:
        cache = self.cache if self.cache is not None and self._last_cached and not self.cache.off else None
        encoder_cache = self.encoder_cache if self.encoder_cache is not None and self.encoder_cache.waits else None
        if cache is None and encoder_cache is None:
            return
        images = images_of(inputs)  # hashed once for both
        if cache is not None:
            cache.begin_pass(inputs, images)
        if encoder_cache is not None and images is not None and not (cache is not None and cache.hit):
            pixels = inputs.get("pixel_values")
            device = "cpu" if pixels is None else pixels.device.type
            encoder_cache.begin_pass(images, len(inputs.get("input_ids", images.keys)), device)
            if encoder_cache.learns and cache is not None:
                cache.end_pass()
        if cache is not None and cache.hit:
            self.read_layers = dict(self.skipped_layers)
        elif encoder_cache is not None and encoder_cache.hit:
            self.read_layers = dict(Counter(base_path(self._layers[path][0]) for path in encoder_cache.layers))

    @property
    def _learns(self) -> bool:
        """Whether gradients are to come back to the encoder in this pass: then no language layer is skipped."""
        return self.encoder_cache is not None and self.encoder_cache.learns

    def record_call(self, path: str) -> None:
        if not self._in_pass:
            return
        self._order.append(path)
        if path in self._trains or path not in self._called:  # a tower may wake up in the middle of training
            self._trained_towers.add(self._towers[path])

    def end_pass(self) -> None:
        if not self._in_pass:
            return
        self._in_pass = False
        self._orders[tuple(self._order)] = None
        self.has_new_calls = self.has_new_calls or not self._called.issuperset(self._order)
        self._called.update(self._order)
        for path in self._checkpointed:
            self._units[path].gradient_checkpointing = True  # type: ignore[assignment]
        self._checkpointed = []
        for cache in (self.cache, self.encoder_cache):
            if cache is not None:
                cache.end_pass()

    def run(self, path: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The output of a layer with our forward, and whether the backward pass skips the layer this time."""
        cache = self.cache if self._in_pass and self._last_cached else None
        if cache is not None and cache.hit:
            return cache.read(path, args, kwargs, last=path == self._last_cached), True
        trained = self._trained_towers.intersection(_upstream_of(self._towers[path]))
        if trained or self._skips_nothing or not self._in_pass:
            return forward(*args, **kwargs), False
        if self.encoder_cache is not None and self.encoder_cache.handles(path):
            run = functools.partial(self.encoder_cache.run, path, forward)
            if cache is not None and cache.stores:
                return cache.run_encoder_layer(lambda *a, **k: run(a, k), args, kwargs), True
            return run(args, kwargs), True
        if self._learns and self._towers[path] == "language":
            return forward(*args, **kwargs), False
        if cache is not None and cache.stores:
            first, last = self._layers[path][1] == 0, path == self._last_cached
            return cache.run_and_store(path, forward, args, kwargs, first=first, last=last), True
        with torch.no_grad():
            return forward(*args, **kwargs), True


# What is put on the modules: functions that a copy of a module can carry, with `None` in the place of the prefix.


def _begin_pass(prefix: FrozenPrefix | None, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if prefix is not None and not torch.compiler.is_compiling():
        prefix.begin_pass({} if args else kwargs)


def _record_call(prefix: FrozenPrefix | None, path: str, module: nn.Module, args: tuple) -> None:
    if prefix is not None and not torch.compiler.is_compiling():
        prefix.record_call(path)


def _end_pass(prefix: FrozenPrefix | None, model: nn.Module, args: tuple, output: Any) -> None:
    if prefix is not None and not torch.compiler.is_compiling():
        prefix.end_pass()


def _forward_without_backward(
    prefix: FrozenPrefix | None,
    layer: nn.Module,
    path: str,
    own_forward: Callable | None,
    requires_grad: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    forward = own_forward if own_forward is not None else functools.partial(type(layer).forward, layer)
    if prefix is None:
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # no state of the pass is known here
        if not layer.training:
            return forward(*args, **kwargs)
        with torch.no_grad():
            output = forward(*args, **kwargs)
    else:
        output, skipped = prefix.run(path, forward, args, kwargs)
        if not skipped:
            return output
    if requires_grad:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden.requires_grad_(True)
    return output


def _upstream_of(tower: str) -> tuple[str, ...]:
    """The towers that a layer of `tower` may read, its own included."""
    if tower == "language":
        return TOWERS
    return ("vision", "audio", "projector") if tower == "projector" else (tower,)


def checkpoints_reentrantly(layer: nn.Module) -> bool:
    """Whether a layer is checkpointed reentrantly.

    Reentrant checkpointing of the next layer gives no gradients at all unless its input requires one.

    Only torch's own function can be asked. Unsloth's is always reentrant, also where its caller says
    `use_reentrant=False`; taking another one for reentrant costs the gradient of one input at most.
    """
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if function is None:
        return False
    is_torch_s = getattr(function, "func", function).__module__ == "torch.utils.checkpoint"
    return not is_torch_s or getattr(function, "keywords", {}).get("use_reentrant", True)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _is_norm(module: nn.Module) -> bool:
    """A module without parts that has vectors only."""
    is_leaf = next(module.children(), None) is None and not _is_convolution(module)
    return is_leaf and all(parameter.ndim == 1 for parameter in _own_parameters(module))


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)
