"""Plausible runs and shards of a bench that never ran: simple laws for numbers, noisy garments for images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.samplers.files import write_json, write_tensors

SHARD = 32
MODEL_S, VAE_S = 0.009, 0.012  # seconds of one evaluation, and of the decoder

# name, role, steps, factor on the damage that few steps do
METHODS = (
    ("ddim-50", "reference", 50, 0.0),
    ("ddim-5", "baseline", 5, 3.0),
    ("ddim-10", "baseline", 10, 2.9),
    ("dpmsolver++-5", "baseline", 5, 1.5),
    ("dpmsolver++-10", "baseline", 10, 1.1),
    ("unipc-5", "baseline", 5, 1.4),
    ("unipc-10", "baseline", 10, 1.09),
    ("euler-5", "baseline", 5, 2.6),
    ("euler-10", "baseline", 10, 2.4),
    ("ddim-6", "control", 6, 3.0),
    ("unipc-6", "control", 6, 1.3),
    ("searched-grid-5", "plan", 5, 0.5),
    ("timeshift-5", "plan", 5, 1.0),
    ("dynamic-guidance-6", "plan", 6, 0.4),
)


def garment(seed: int, noise: float, side: int = 32, channels: int = 1) -> np.ndarray:
    """A uint8 (channels, side, side) image: a seeded silhouette on black, with ``noise`` from 0 to 1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    waist, sleeve, hem = rng.uniform(0.12, 0.22), rng.uniform(0.1, 0.25), rng.uniform(-0.1, 0.2)
    body = (np.abs(x) < waist + hem * y) & (np.abs(y) < 0.4)
    arms = (np.abs(x) < waist + sleeve) & (np.abs(y + 0.25) < 0.1 + 0.3 * (sleeve - np.abs(x)))
    cloth = 0.45 + 0.35 * np.sin(rng.uniform(5, 40) * (x + rng.uniform(-1, 1) * y))
    dirt = np.random.default_rng([seed, int(1000 * noise)]).normal(0, 1, (channels, side, side))
    image = np.where(body | arms, cloth, 0.0) + 0.5 * noise * dirt
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def fabricate_run(name: str, role: str, steps: int, damage: float, n: int = 10_000) -> dict[str, Any]:
    """One run JSON; ``damage`` is how much worse than the reference this method gets per 1 / steps."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    rng = np.random.default_rng(int(digest[:8], 16))
    nfe = 2.0 * steps  # classifier-free guidance
    excess = damage * (12 / steps) ** 1.5
    sqrt_n = n**0.5
    net = "9f2c41d07b3e88aa65f0c1d2e3b4a59687706152433425160718293a4b5c6d7e"

    def metric(value: float, spread: float, higher: bool, **more: str) -> dict[str, Any]:
        return {
            "value": value,
            "se": spread / sqrt_n,
            "n": n,
            "higher_is_better": higher,
            "net_fingerprint": net,
        } | more

    real = {"reference": "real training images"}
    metrics = {
        "fd_fashion": metric(3.4 + excess + rng.normal(0, 0.05), 6 + 2 * excess, False, **real),
        "kd_fashion": metric(0.011 + 0.01 * excess, 0.05, False, **real),
        "precision_fashion": metric(0.93 / (1 + 0.05 * excess), 0.4, True, **real),
        "recall_fashion": metric(0.61 / (1 + 0.08 * excess), 0.5, True, **real),
        "density_fashion": metric(1.12 / (1 + 0.07 * excess), 0.9, True, **real),
        "coverage_fashion": metric(0.87 / (1 + 0.06 * excess), 0.5, True, **real),
        "class_accuracy": metric(0.947 / (1 + 0.01 * excess), 0.22, True),
        "vendi_fashion": metric(14.2 / (1 + 0.02 * excess), 8, True),
    }
    latency = MODEL_S * steps + VAE_S
    values = sorted((latency * (1 + abs(rng.normal(0, 0.03)))) for _ in range(12))
    run: dict[str, Any] = {
        "format": 1,
        "name": name,
        "role": role,
        "config": {"pipe": "demo:fashion-dit", "plan": name, "n": n, "dtype": "float32"},
        "config_hash": digest[:32],
        "nfe": nfe,
        "n": n,
        "seeds": [0, n],
        "metrics": metrics,
        "timing": {
            "first_call_s": latency * 2.2,
            "latency_s": {
                "values": values,
                "median": float(np.median(values)),
                "q1": float(np.quantile(values, 0.25)),
                "q3": float(np.quantile(values, 0.75)),
            },
            "throughput": {"batch": 64, "images_per_s": 3.1 / latency},
            "shares_s": {
                "encode_s": 0.0,
                "denoise_s": MODEL_S * steps,
                "decode_s": VAE_S * 0.9,
                "other_s": VAE_S * 0.1,
                "total_s": latency,
            },
            "flops": int(nfe * 6.1e7 + 4.1e8),
            "peak_bytes": 611_000_000 + 1000 * steps,
            "peak_kind": "rss",
            "weights_bytes": 9_412_608,
        },
        "worst": [],
        "env": {
            "python": "3.11.2",
            "packages": {"torch": "2.15.0", "diffusers": "0.42.1"},
            "device": "cpu",
            "cpu": "AMD EPYC 9R14, 2 threads",
        },
        "command": "fewstep bench --pipe demo:fashion-dit --n 10000 --out fewstep-bench",
        "started": "2026-01-31T10:00:00+00:00",
        "finished": "2026-01-31T10:04:41+00:00",
        "warnings": [],
    }
    if role == "reference":
        run["floor"] = {"fd_fashion": {"value": 0.163, "n": 10_000}}
        return run
    reference = fabricate_run("ddim-50", "reference", 50, 0.0, n)["metrics"]
    run["paired"] = {
        "against": "ddim-50",
        "metrics": {
            key: {
                "difference": metrics[key]["value"] - reference[key]["value"],
                "se": 0.6 * float(np.hypot(metrics[key]["se"], reference[key]["se"])),
            }
            for key in reference
        },
    }
    paired = {"reference": "ddim-50"}
    metrics["feature_distance"] = metric(2.1 + 0.3 * excess, 1.4, False, **paired)
    metrics["psnr"] = metric(24 - 2 * np.log1p(excess), 4, True, **paired)
    metrics["ssim"] = metric(0.9 / (1 + 0.1 * excess), 0.1, True, **paired)
    run["worst"] = [
        {"seed": int(seed), "feature_distance": 9.0 - 0.3 * k} for k, seed in enumerate(rng.choice(64, 8, False))
    ]
    return run


def fabricate(
    out: Path, methods: tuple[tuple[str, str, int, float], ...] = METHODS, images: int = 64, side: int = 32
) -> Path:
    """Writes OUT/runs and OUT/shards (``images`` per method, seeds from 0) and returns ``out``."""
    for name, role, steps, damage in methods:
        run = fabricate_run(name, role, steps, damage)
        write_json(out / "runs" / f"{name}.json", run)
        noise = min(1.0, 0.1 * damage * (12 / steps) ** 0.5)
        for start in range(0, images, SHARD):
            seeds = range(start, min(start + SHARD, images))
            write_tensors(
                out / "shards" / run["config_hash"] / f"shard-{start // SHARD:05d}.safetensors",
                {
                    "images": torch.from_numpy(np.stack([garment(seed, noise, side) for seed in seeds])),
                    "seeds": torch.tensor(list(seeds), dtype=torch.int64),
                    "conditions": torch.tensor([seed % 10 for seed in seeds], dtype=torch.int64),
                },
                {"config_hash": run["config_hash"]},
            )
    return out
