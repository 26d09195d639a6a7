"""What attention costs: parameters, multiply-adds, and time beside the plain network, measured the same way each time.

The protocol, since the price of a block is a ratio near one: batch norms folded, networks take turns call by call in
one process, so that a slow moment hits all of them; warm-up calls, then the median and the 95 % quantile of at least
200 timed ones; a GPU is synchronised around each. A report carries device, engine, precision, batch, crop and threads.
Eisenbach et al. (arXiv:2302.14574) measure on a robot's computer that is not named; the protocol is ours.

Multiply-adds are those of convolutions, linear layers and matrix products; passes over memory without them are not
counted, which is why time is measured too.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reid_robot.folding import fold_batch_norms
from reid_robot.network import ReidNet
from reid_robot.timm_door import attention_blocks


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds per call. ratio: of the median to the first network's, from calls side by side."""

    median: float
    p95: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """What was measured under which conditions."""

    device: str
    engine: str
    precision: str
    batch: int
    input_size: tuple[int, int]
    threads: int
    runs: int
    results: dict[str, Latency]


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One attention block in its place. share: of the whole network's multiply-adds."""

    place: str
    block: str
    map_size: tuple[int, int, int]
    parameters: int
    macs: int
    seconds: float


def count_macs(model: nn.Module, crops: Tensor) -> int:
    """Multiply-adds of one forward pass over these crops, counted by torch as it runs."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(crops)
    return int(counter.get_total_flops()) // 2


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in model.parameters())


def take_turns(
    networks: Mapping[str, Callable[[], Any]], *, warm_up: int = 50, runs: int = 200, device: str = "cpu"
) -> dict[str, Latency]:
    """Times callables that alternate; the first is what the ratios are to. ValueError without callables or runs."""
    if not networks or runs < 1:
        raise ValueError(f"there must be at least one network and one run, got {len(networks)} and {runs}")
    for _ in range(warm_up):
        for call in networks.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(runs):
        for name, call in networks.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    base = next(iter(seconds.values()))
    return {
        name: Latency(
            median=statistics.median(times),
            p95=sorted(times)[min(len(times) - 1, round(0.95 * len(times)))],
            ratio=statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True)),
        )
        for name, times in seconds.items()
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compare_latency(
    networks: Mapping[str, ReidNet], *, batch: int = 1, warm_up: int = 50, runs: int = 200, compiled: bool = False
) -> LatencyReport:
    """Networks in PyTorch, batch norms folded, on random crops of the first one's size; the first is the plain one."""
    some = next(iter(networks.values()))
    device = some.mean.device
    crops = torch.randn(batch, 3, *some.config.input_size, device=device)
    folded = {name: fold_batch_norms(net, crops) for name, net in networks.items()}
    if compiled:
        folded = {name: torch.compile(net) for name, net in folded.items()}  # type: ignore[misc]
    with torch.inference_mode():
        results = take_turns(
            {name: lambda net=net: net(crops) for name, net in folded.items()},  # type: ignore[misc]
            warm_up=warm_up,
            runs=runs,
            device=device.type,
        )
    return LatencyReport(
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        engine="torch.compile" if compiled else "torch, eager",
        precision=str(some.mean.dtype).removeprefix("torch."),
        batch=batch,
        input_size=some.config.input_size,
        threads=torch.get_num_threads(),
        runs=runs,
        results=results,
    )


def block_costs(net: ReidNet, *, batch: int = 1, runs: int = 50) -> list[BlockCost]:
    """Every attention block of the network on the map that it meets: what it holds, computes, and takes alone."""
    blocks = attention_blocks(net.backbone)
    met: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, name=name: met.setdefault(name, args[0].detach()))
        for name, block in blocks.items()
    ]
    crops = torch.randn(batch, 3, *net.config.input_size, device=net.mean.device)
    try:
        with torch.inference_mode():
            net.eval()(crops)
            times = take_turns(
                {name: lambda b=block, m=met[name]: b(m) for name, block in blocks.items()},  # type: ignore[misc]
                warm_up=5,
                runs=runs,
                device=net.mean.device.type,
            )
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, block in blocks.items():
        _, channels, height, width = met[name].shape
        counter: Any = block
        found.append(
            BlockCost(
                place=name,
                block=type(block).__name__,
                map_size=(channels, height, width),
                parameters=count_parameters(block),
                macs=counter.macs(height, width),
                seconds=times[name].median,
            )
        )
    return found
