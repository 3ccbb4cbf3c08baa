"""Where numbers were measured: machine, packages and the settings of torch that move speed or results."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "scipy")


def environment(device: str) -> dict[str, Any]:
    """The environment as JSON data. It names no user, host or path.

    Args:
        device: the torch device that runs the pipeline.
    """
    return {
        "device": device_name(device),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "revision": _revision(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "attention": _attention(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **(_cuda(device) if device.startswith("cuda") else {}),
    }


def device_name(device: str) -> str:
    """The model of the device, such as ``NVIDIA H200`` or the name of the processor."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _attention() -> dict[str, bool]:
    cuda: Any = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "memory_efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }


def _cuda(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    cudnn: Any = torch.backends.cudnn
    return {
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": cudnn.allow_tf32,
        "cudnn_benchmark": cudnn.benchmark,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        **_nvidia_smi(f"GPU-{properties.uuid}"),
    }


def _nvidia_smi(gpu: str) -> dict[str, str]:
    """Driver, power limit and clock, which torch does not tell; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in output.split(",")), strict=False))


def _revision() -> str | None:
    """The commit of fewstep when it runs from a checkout, with ``+`` when files were changed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
