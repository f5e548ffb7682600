"""What is installed, what the machine can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

CORE = ("unolora", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
OPTIONAL = {"plotly": "report", "fastapi": "serve", "uvicorn": "serve"}


def examine() -> dict[str, str]:
    """Describe the installation: name -> what was found, in plain words, in a fixed order."""
    import torch

    from unolora.tasks.download import cache_folder

    found = {name: _version(name) for name in CORE}
    found["python"] = platform.python_version()
    found["platform"] = platform.platform()
    found["device"] = _device()
    found["processor"] = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found["threads"] = str(torch.get_num_threads())
    found["bf16"] = _bf16()
    cache = cache_folder()
    held = sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []
    found["cache"] = f"{cache} ({', '.join(held) if held else 'empty; `unolora train` fills it when asked to'})"
    near = next(folder for folder in [cache, *cache.parents] if folder.exists())
    found["free space"] = f"{shutil.disk_usage(near).free / 2**30:.1f} GiB"
    missing = {name: extra for name, extra in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    found["missing"] = (
        ", ".join(f"{name} (pip install 'unolora[{extra}]')" for name, extra in missing.items()) or "nothing"
    )
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing: pip install unolora"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return "CPU"


def has_bf16() -> bool:
    """Return whether the device has instructions for bf16, so that it is faster than fp32."""
    return _bf16().startswith("native")


def _bf16() -> str:
    """Say whether bf16 is fast here: natively on a GPU, or by AVX512-BF16 or AMX on a processor."""
    import torch

    if torch.cuda.is_available():
        return "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated, slow"
    flags = {name for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if _cpu_has(name)}
    names = {"_is_avx512_bf16_supported": "AVX512-BF16", "_is_amx_tile_supported": "AMX"}
    return f"native ({', '.join(sorted(names[flag] for flag in flags))})" if flags else "emulated, slow"


def _cpu_has(probe: str) -> bool:
    import torch

    function = getattr(torch.cpu, probe, None)  # not public, and not in every release
    return bool(function and function())
