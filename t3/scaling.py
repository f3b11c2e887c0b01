"""How long a clip takes on many GPUs, before it is tried: bytes moved, time, cost, queues. Pure Python, no torch.

A model of times, not a measurement: compute is shared evenly, what is sent takes bytes over bandwidth and is waited
for, and what else two ranks were seen to take is shared evenly too. `docs/scaling.md` puts what was measured beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of one layer: queries, keys and values to the ranks that attend their heads, and the result back.
EXCHANGES = 4


@dataclass(frozen=True)
class Model:
    """A transformer at a size: `forward` seconds of one prediction on one GPU. latent_bytes: of a prediction. beside:
    seconds of a prediction that ranks spend together on what is neither computed by one nor sent: packing and grouping,
    each other's delays; see `beside`."""

    name: str
    layers: int
    width: int
    heads: int
    tokens: int
    forward: float
    latent_bytes: int
    element: int = 2
    beside: float = 0.0

    @property
    def layer(self) -> float:
        """Seconds of one layer on one GPU; what is outside the layers is a hundredth of a forward, and in them here."""
        return self.forward / self.layers

    @property
    def degrees(self) -> list[int]:
        """Ranks over which a prediction can be spread: as many as share its heads evenly."""
        return [n for n in range(1, self.heads + 1) if self.heads % n == 0]


def tensor_bytes(model: Model, ranks: int) -> float:
    """Bytes that each of so many ranks sends of one tensor of one layer: of its own tokens, all heads but its own."""
    return model.tokens / ranks * model.width * model.element * (ranks - 1) / ranks


def layer_bytes(model: Model, ranks: int) -> float:
    """Bytes that each rank sends in one layer; as many come in. It approaches zero: tokens per rank fall as 1/ranks."""
    return EXCHANGES * tensor_bytes(model, ranks)


def sending(model: Model, ranks: int, bytes_per_second: float) -> float:
    """Seconds of one prediction in which a rank waits for what is sent: all of it, since nothing is hidden."""
    return model.layers * layer_bytes(model, ranks) / bytes_per_second


def forward(model: Model, ranks: int, bytes_per_second: float) -> float:
    """Seconds of one prediction whose tokens so many ranks share."""
    if ranks == 1:
        return model.forward
    return (model.forward + model.beside) / ranks + sending(model, ranks, bytes_per_second)


def beside(model: Model, ranks: int, seconds: float, bytes_per_second: float) -> float:
    """`Model.beside` from the `seconds` that a prediction over so many ranks took. Never negative."""
    return max(0.0, ranks * (seconds - sending(model, ranks, bytes_per_second)) - model.forward)


def step(model: Model, guidance: int, sequence: int, bytes_per_second: float) -> float:
    """Seconds of one step with guidance: two predictions, one after the other or, with guidance 2, at once."""
    one = forward(model, sequence, bytes_per_second)
    return 2 * one if guidance == 1 else one + model.latent_bytes / bytes_per_second


def enough_bandwidth(model: Model, ranks: int) -> float:
    """Bytes a second, each way, at which sending takes as long as computing: below it more ranks hardly help.

    Both fall as 1/ranks, so that it grows by (ranks - 1) / ranks only: a slow link is too slow for two ranks already.
    """
    return layer_bytes(model, ranks) / (model.layer / ranks)


@dataclass(frozen=True)
class Clip:
    """Seconds of the parts of one clip, on `gpus` that make it together."""

    gpus: int
    sampling: float
    decode: float
    write: float

    @property
    def seconds(self) -> float:
        """From the first step to the file."""
        return self.sampling + self.decode + self.write

    @property
    def gpu_seconds(self) -> float:
        """What it occupies: cards wait while a clip is written."""
        return self.gpus * self.seconds

    def per_hour(self, gpus: int) -> float:
        """Clips an hour by as many such teams as there are in `gpus`."""
        return gpus // self.gpus * 3600 / self.seconds

    def cost(self, price: float) -> float:
        """Of one clip, at `price` for a GPU's hour."""
        return self.gpu_seconds / 3600 * price


def busy_share(servers: int, load: float) -> float:
    """Part of the requests that must wait, by Erlang's C formula: `servers`, each busy `load` / `servers` of its time.

    load: requests a second times seconds of each. Raises ValueError unless 0 <= load < servers.
    """
    if not 0 <= load < servers:
        raise ValueError(f"a load of {load:g} needs more than {servers} servers")
    lost = 1.0  # Erlang's B, by its recursion, which does not overflow
    for count in range(1, servers + 1):
        lost = load * lost / (count + load * lost)
    return lost / (1 - load / servers * (1 - lost))


def mean_wait(servers: int, load: float, service: float) -> float:
    """Seconds a request waits on average, where requests come at random and all take `service` seconds.

    Erlang's C is for random durations; equal ones wait about half as long (M/D/c).
    """
    return busy_share(servers, load) * service / (servers - load) / 2


def servers_needed(per_hour: float, service: float, wait: float, most_busy: float = 1.0) -> int:
    """Least number of servers with a mean wait of at most `wait` seconds, for so many requests an hour.

    most_busy: part of its time that a server may be busy at most, whatever the wait: room for peaks and for repairs.
    """
    load = per_hour / 3600 * service
    servers = max(int(load) + 1, math.ceil(load / most_busy))
    while mean_wait(servers, load, service) > wait:
        servers += 1
    return servers
