"""Engines turn windows of token ids into the teacher's distributions. One file per engine; the choice is here."""

from importlib.util import find_spec

from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Generator
from cache_builder.engines.interface import Engine
from cache_builder.sampling import Sampling
from storage_specs.errors import ConfigError

ENGINES = ("transformers", "vllm", "server")


def choose_engine(name: str) -> str:
    """`auto` is vllm where it can be imported and a GPU is there, else transformers."""
    if name == "auto":
        return "vllm" if find_spec("vllm") and _has_gpu() else "transformers"
    if name not in ENGINES:
        raise ConfigError(f"engine is {name!r}, but must be auto, {', '.join(ENGINES)}")
    return name


def make_engine(name: str, config: EngineConfig) -> Engine:
    """The engine of that name, not loaded yet: its weights are read when it first scores."""
    if name == "vllm":
        from cache_builder.engines.vllm import VllmEngine

        return VllmEngine(config)
    if name == "server":
        from cache_builder.engines.server import ServerEngine

        return ServerEngine(config)
    from cache_builder.engines.transformers import TransformersEngine

    return TransformersEngine(config)


def make_generator(name: str, engine: Engine, sampling: Sampling, words: list[bytes | None]) -> Generator:
    """What writes completions with the engine of that name. words: the bytes of every id, in which stop strings are
    looked for; an endpoint needs none."""
    if name == "vllm":
        from cache_builder.engines.vllm_generate import VllmGenerator

        return VllmGenerator(engine, sampling, words)
    if name == "server":
        from cache_builder.engines.server_generate import ServerGenerator

        return ServerGenerator(engine, sampling)
    from cache_builder.engines.transformers_generate import TransformersGenerator

    return TransformersGenerator(engine, sampling, words)


def gpu_count() -> int:
    """GPUs that torch sees; 0 without torch."""
    if find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_gpu() -> bool:
    return gpu_count() > 0
