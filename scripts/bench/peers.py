"""Caches of other packages, switched on as their documentation says, to compare with.

Each is a context manager: on the pipeline within the block, off after it. It gives a function that tells what the cache
holds at the moment. DeepCache and cache-dit come with ``pip install fewstep[bench]``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import diffusers.hooks
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from fewstep.samplers.errors import InputError

Held = Callable[[], Any]
"Gives the objects that hold what a cache keeps now."

_HOST_APPLY = {
    "FirstBlockCacheConfig": "apply_first_block_cache",
    "TaylorSeerCacheConfig": "apply_taylorseer_cache",
    "MagCacheConfig": "apply_mag_cache",
}


@contextmanager
def deepcache(pipe: Any, *, interval: int, branch: int) -> Iterator[Held]:
    """DeepCache (arXiv:2312.00858) by its authors' package.

    Args:
        pipe: a pipeline with a U-Net.
        interval: all is computed in one of so many steps.
        branch: ``cache_branch_id``, three times the level plus the layer.
    """
    helper = _package("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    with _restored(pipe.unet):
        helper.enable()
        try:
            yield lambda: helper.cached_output
        finally:
            helper.disable()


@contextmanager
def cache_dit(pipe: Any, *, steps: int, taylor: int | None = None, **config: Any) -> Iterator[Held]:
    """cache-dit's DBCache with one first block, which fits a network of few blocks as its default of eight does not.

    Args:
        pipe: a pipeline with a transformer.
        steps: of the call.
        taylor: order of its TaylorSeer calibrator, None for none.
        config: further fields of ``DBCacheConfig``.
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    package = _package("cache_dit")
    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "num_inference_steps": steps}
    calibrator = None
    if taylor is not None:
        calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=taylor)
    chosen = package.DBCacheConfig(**settings | config)
    logging.disable(logging.WARNING)
    with _restored(pipe.transformer):
        try:
            package.enable_cache(pipe, cache_config=chosen, calibrator_config=calibrator)
            yield lambda: pipe._context_manager
        finally:
            package.disable_cache(pipe)
            logging.disable(logging.NOTSET)


@contextmanager
def host(pipe: Any, *, config: str, **options: Any) -> Iterator[Held]:
    """A cache of diffusers on a network without ``enable_cache``: its hooks, one context, reset after each call.

    Args:
        pipe: a pipeline with a transformer that evaluates both branches of guidance at once.
        config: class name of its configuration.
        options: fields of the configuration.
    """
    network = pipe.transformer
    if "taylor_factors_dtype" in options:
        options["taylor_factors_dtype"] = getattr(torch, options["taylor_factors_dtype"])
    with _restored(network):
        getattr(diffusers.hooks, _HOST_APPLY[config])(network, getattr(diffusers.hooks, config)(**options))
        registry = HookRegistry.check_if_exists_or_initialize(network)
        registry.invalidate_child_registries_cache()
        with _around_each_call(
            pipe, lambda: _set_cache_context(network, CacheContext("both")), registry.reset_stateful_hooks
        ):
            yield lambda: [vars(hook).get("state_manager") for hook in _hooks(network)]


PEERS: dict[str, Callable[..., AbstractContextManager[Held]]] = {
    "deepcache": deepcache,
    "cache-dit": cache_dit,
    "diffusers": host,
}


def magnitude_ratios(pipe: Any, call: Callable[[], Any], steps: int) -> list[float]:
    """What diffusers' MagCache asks for: how the size of the residual changes, measured as its calibration does.

    Args:
        pipe: a pipeline with a transformer.
        call: calls it.
        steps: of the call.
    """
    found: list[float] = []
    with host(pipe, config="MagCacheConfig", calibrate=True, num_inference_steps=steps + 1):
        tail = pipe.transformer.transformer_blocks[-1]
        states = next(iter(tail._diffusers_hook.hooks.values())).state_manager

        def note(*_: Any) -> None:
            found[:] = states.get_state().calibration_ratios

        watch = tail.register_forward_hook(note)
        call()
        watch.remove()
    return found


def bytes_of(held: Any) -> int:
    """Bytes of all tensors in ``held``, whatever it is made of; a storage that several share counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = [held]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, nn.Module | type | str | bytes | int | float):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list | tuple | set):
            todo.extend(item)
        else:
            todo.extend(getattr(item, "__dict__", {}).values())
    return sum(storages.values())


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"the comparison with {name} needs its package ({error}); install it with: pip install 'fewstep[bench]'"
        ) from None


def _hooks(network: nn.Module) -> Iterator[Any]:
    for module in network.modules():
        if own := vars(module).get("_diffusers_hook"):
            yield from own.hooks.values()


@contextmanager
def _restored(network: nn.Module) -> Iterator[None]:
    """Takes off the modules of ``network``, after the block, what hangs on them only since."""
    before = {module: (dict(vars(module)), set(module._modules)) for module in network.modules()}
    try:
        yield
    finally:
        for module, (own, children) in before.items():
            for name in (vars(module).keys() - own.keys()) | (module._modules.keys() - children):
                delattr(module, name)
            if "forward" in own:
                module.forward = own["forward"]


@contextmanager
def _around_each_call(pipe: Any, before: Callable[[], Any], after: Callable[[], Any]) -> Iterator[None]:
    """Does something before and after each call of ``pipe`` in the block, as pipelines do that know of caches."""
    cls = type(pipe)

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before()
        try:
            return cls.__call__(self, *args, **kwargs)
        finally:
            after()

    pipe.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__call__": call})
    try:
        yield
    finally:
        pipe.__class__ = cls
