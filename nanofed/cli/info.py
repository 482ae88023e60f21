"""`nanofed info`: what this machine has, for a person or (`--json`) for a program."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import threading
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from nanofed import runtime

DATASETS = ("demo", "fineweb-edu")
PACKAGES = (
    *("torch", "lightning", "flwr", "ray", "jsonargparse", "torchmetrics", "tensorboard"),
    *("pyarrow", "numpy", "safetensors", "tiktoken", "rustbpe", "tokenizers"),
)
NETWORK_SECONDS = 2.0


def main(argv: list[str]) -> int:
    """Print what was found; a part that cannot be read says why and leaves the others alone."""
    parser = argparse.ArgumentParser(prog=f"nanofed {argv[0]}", description="Show what this machine has.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(argv[1:])

    online = _ask_network()  # answers while torch loads
    report: dict[str, Any] = {
        "nanofed": _or_why(_software),
        "machine": _or_why(_machine),
        "devices": _or_why(_devices),
        "caches": _or_why(_caches),
        "data": {name: _or_why(partial(_dataset, name)) for name in DATASETS},
        "tokenizers": {name: _or_why(partial(_tokenizer, name)) for name in DATASETS},
        "packages": {name: _version(name) for name in PACKAGES},
        "network": _or_why(online),
    }
    print(json.dumps(report, indent=2) if options.json else _as_text(report))
    return 0


def _or_why(part: Callable[[], Any]) -> Any:
    # This command is what people run on a broken machine: whatever breaks is its output, not its end.
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _software() -> dict[str, str]:
    import nanofed

    return {
        "version": nanofed.__version__,
        "from": str(Path(nanofed.__file__).parent),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def _machine() -> dict[str, Any]:
    memory, why_not = psutil.virtual_memory(), runtime.why_not_compiled()
    return {
        "cores": runtime.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "compiler": why_not is None,
        "why_not_compiled": why_not,
        "nvidia_driver": runtime.nvidia_driver(),
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    def device(name: str, kind: str, **more: Any) -> dict[str, Any]:
        dtype = str(runtime.default_compute_dtype(kind)).removeprefix("torch.")
        return {"device": kind, "name": name, **more, "compute_dtype": dtype}

    found = [device(_cpu_name(), "cpu", threads=torch.get_num_threads())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"cuda:{index}"
        why_not = runtime.why_not_compiled(kind)
        found.append(device(properties.name, kind, memory_bytes=properties.total_memory, why_not_compiled=why_not))
    if torch.backends.mps.is_available():
        found.append(device("Apple GPU", "mps"))
    if why := runtime.why_gpu_is_unused():
        found.append({"device": "gpu", "name": "an NVIDIA GPU", "unused": why})
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caches() -> dict[str, Any]:
    base = runtime.base_dir()
    existing = next(folder for folder in (base, *base.absolute().parents) if folder.is_dir())
    return {"base_dir": str(base), "exists": base.is_dir(), "free_bytes": shutil.disk_usage(existing).free}


def _dataset(name: str) -> dict[str, Any]:
    from nanofed.data.manifest import read_manifest

    folder = runtime.dataset_dir(name)
    shards = sorted(folder.glob("*.parquet"))
    found: dict[str, Any] = {"folder": str(folder), "shards": len(shards)}
    if shards:
        manifest = read_manifest(folder)
        validation = manifest.validation if manifest else shards[-1].name
        found |= {"bytes": sum(shard.stat().st_size for shard in shards), "validation": validation}
    return found


def _tokenizer(dataset: str) -> dict[str, Any]:
    folder = runtime.tokenizer_dir(dataset)
    return {"folder": str(folder), "files": sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _ask_network() -> Callable[[], dict[str, Any]]:
    # In a thread of its own, because the time-out of requests covers neither the look-up of the name nor a slow proxy.
    endpoint = runtime.huggingface_endpoint()
    answer: dict[str, Any] = {}

    def ask() -> None:
        try:
            import requests

            requests.head(endpoint, timeout=NETWORK_SECONDS)  # any status is an answer
            answer["online"] = True
        except Exception as error:
            answer.update(online=False, why=type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()

    def result() -> dict[str, Any]:
        thread.join(NETWORK_SECONDS)
        return {
            "endpoint": endpoint,
            **(dict(answer) or {"online": False, "why": f"no answer in {NETWORK_SECONDS:g} s"}),
        }

    return result


def _as_text(report: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []

    def add(label: str, part: Any, show: Callable[[Any], str]) -> None:
        rows.append((label, part["error"] if isinstance(part, dict) and "error" in part else show(part)))

    add("nanofed", report["nanofed"], lambda p: f"{p['version']} in {p['from']}")
    add("python", report["nanofed"], lambda p: f"{p['python']} on {p['system']}")
    add("machine", report["machine"], _machine_text)
    add(
        "compiler",
        report["machine"],
        lambda p: "found" if p["compiler"] else f"{p['why_not_compiled']}: models run eager",
    )
    for device in [report["devices"]] if isinstance(report["devices"], dict) else report["devices"]:
        add(device.get("device", "devices"), device, _device_text)
    if driver := report["machine"].get("nvidia_driver"):
        rows.append(("driver", f"NVIDIA {driver}"))
    add("network", report["network"], lambda p: f"{'online' if p['online'] else 'offline'}, asked {p['endpoint']}")
    add("cache", report["caches"], lambda p: f"{p['base_dir']}, {_gib(p['free_bytes'])} free on its disk")
    for name, part in report["data"].items():
        add(f"data {name}", part, _dataset_text)
    for name, part in report["tokenizers"].items():
        add(f"tokenizer {name}", part, lambda p: p["folder"] if p["files"] else "none")
    packages = report["packages"]
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)))
    if missing := [name for name, version in packages.items() if not version]:
        rows.append(("not installed", ", ".join(missing)))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _machine_text(part: dict[str, Any]) -> str:
    memory, available = _gib(part["memory_bytes"]), _gib(part["memory_available_bytes"])
    return f"{part['cores']} cores, {memory} memory, {available} of it available"


def _device_text(part: dict[str, Any]) -> str:
    if "unused" in part:
        return f"{part['name']} that is not used: {part['unused']}"
    eager = f", models run eager: {part['why_not_compiled']}" if part.get("why_not_compiled") else ""
    memory = f", {_gib(part['memory_bytes'])}" if "memory_bytes" in part else ""
    threads = f", {part['threads']} threads" if "threads" in part else ""
    return f"{part['name']}{memory}{threads}, computes in {part['compute_dtype']}{eager}"


def _dataset_text(part: dict[str, Any]) -> str:
    if not part["shards"]:
        return "none"
    return f"{part['shards']} shards, {_gib(part['bytes'])}, {part['validation']} for validation, in {part['folder']}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
