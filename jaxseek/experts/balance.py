"""Expert placement: DeepSeek's expert-parallel load balancer (EPLB), and the load that a placement gives.

Pure functions of expert loads. A slot is a physical expert; there are more slots than experts, and busy
experts have replicas in several. Source: deepseek-ai/EPLB, README on hierarchical and global load balancing;
ties go to the lower index.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.storage import place as places


@dataclass(frozen=True)
class Placement:
    """Placement of experts in slots, per layer.

    `expert_LS` is the expert of every slot, device by device; `slots_LEK` each expert's slots, padded with
    -1; `copies_LE` the number of replicas of each expert.
    """

    expert_LS: np.ndarray
    slots_LEK: np.ndarray
    copies_LE: np.ndarray

    @classmethod
    def of(cls, expert_LS: np.ndarray, experts: int) -> Placement:
        """Build a placement from the expert of every slot."""
        copies_LE = np.stack([np.bincount(row, minlength=experts) for row in expert_LS])
        slots_LEK = np.full((*copies_LE.shape, copies_LE.max()), -1)
        for l, row in enumerate(expert_LS):
            for e in range(experts):
                slots_LEK[l, e, : copies_LE[l, e]] = np.flatnonzero(row == e)
        return cls(expert_LS, slots_LEK, copies_LE)


def pack(weight_N: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items into equally many per pack; return each item's pack and its rank within it.

    The heaviest item goes first, into the lightest pack with room. Raises ValueError if the items do not
    divide.
    """
    room, left = divmod(len(weight_N), packs)
    if left:
        raise ValueError(f"{len(weight_N)} items do not fill {packs} packs equally")
    pack_N, rank_N = np.zeros((2, len(weight_N)), int)
    load, count = np.zeros(packs), np.zeros(packs, int)
    for item in np.argsort(-weight_N, kind="stable"):
        best = int(np.argmin(np.where(count < room, load, np.inf)))
        pack_N[item], rank_N[item] = best, count[best]
        load[best] += weight_N[item]
        count[best] += 1
    return pack_N, rank_N


def replicate(weight_N: np.ndarray, slots: int) -> np.ndarray:
    """Return the item of every slot: each once, then repeatedly the one with the most load per replica."""
    if slots < len(weight_N):
        raise ValueError(f"{slots} slots are fewer than the {len(weight_N)} experts")
    copies_N, item_S = np.ones(len(weight_N), int), list(range(len(weight_N)))
    while len(item_S) < slots:
        best = int(np.argmax(weight_N / copies_N))
        item_S.append(best)
        copies_N[best] += 1
    return np.array(item_S)


def place(load_LE: np.ndarray, slots: int, groups: int, nodes: int, devices: int) -> Placement:
    """Place experts by load into `slots` on `devices` in `nodes`.

    Hierarchical if the expert groups divide among the nodes: a group stays within a node, replicas are made
    within nodes, and slots are packed onto each node's devices. Otherwise global: the same with one group and
    one node. Raises ValueError for numbers that do not divide.
    """
    E = load_LE.shape[1]
    if groups % nodes:
        groups = nodes = 1
    for what, n, by in (("experts", E, groups), ("slots", slots, devices), ("devices", devices, nodes)):
        if n % by:
            raise ValueError(f"{n} {what} are not divisible by {by}")
    expert_LS = np.stack([_place(load_E, slots, groups, nodes, devices) for load_E in load_LE])
    return Placement.of(expert_LS, E)


def _place(load_E, slots, groups, nodes, devices) -> np.ndarray:
    group_size = len(load_E) // groups
    node_G, _ = pack(load_E.reshape(groups, group_size).sum(axis=1), nodes)
    out = []
    for node in range(nodes):
        experts_of_node = np.concatenate(
            [np.arange(group_size) + g * group_size for g in np.flatnonzero(node_G == node)]
        )
        item_S = replicate(load_E[experts_of_node], slots // nodes)
        each_S = (load_E[experts_of_node] / np.bincount(item_S))[item_S]
        device_S, rank_S = pack(each_S, devices // nodes)
        out.append(experts_of_node[item_S[np.lexsort((rank_S, device_S))]])
    return np.concatenate(out)


def contiguous(layers: int, experts: int, devices: int) -> Placement:
    """Place every expert once, in order, as a mesh does. Raises ValueError if they do not divide."""
    if experts % devices:
        raise ValueError(f"{experts} experts are not divisible by {devices} devices")
    return Placement.of(np.tile(np.arange(experts), (layers, 1)), experts)


def neighbours(layers: int, experts: int, slots: int, devices: int) -> Placement:
    """Place experts without load data: in order, with replicas of the experts after each device's own.

    Raises ValueError for numbers that do not divide.
    """
    per_device, extra = experts // devices, (slots - experts) // devices
    if experts % devices or slots % devices:
        raise ValueError(f"{experts} experts in {slots} slots are not divisible by {devices} devices")
    own_DH = np.arange(experts).reshape(devices, per_device)
    after_DM = (np.arange(1, devices + 1)[:, None] * per_device + np.arange(extra)) % experts
    expert_S = np.concatenate([own_DH, after_DM], axis=1).reshape(-1)
    return Placement.of(np.tile(expert_S, (layers, 1)), experts)


def device_load(load_LE: np.ndarray, placement: Placement, devices: int) -> np.ndarray:
    """Return the tokens per device, [L, devices], if an expert's replicas share its tokens equally."""
    each_LE = load_LE / placement.copies_LE
    each_LS = np.take_along_axis(each_LE, placement.expert_LS, axis=1)
    return each_LS.reshape(len(load_LE), devices, -1).sum(axis=-1)


def imbalance(device_LD: np.ndarray) -> float:
    """Return the largest device load over the mean, summed over layers; 1 is perfect balance."""
    return float(device_LD.max(axis=-1).sum() / device_LD.mean(axis=-1).sum())


def serve(load_TLE: np.ndarray, placement: Placement, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Simulate a trace: return tokens served and slots whose weights are read, each [T, L, devices].

    `load_TLE` counts the tokens per step that chose an expert; they take its replicas round-robin. Weight
    reads dominate decoding of small batches, and a layer ends with its slowest device.
    """
    T, L, _ = load_TLE.shape
    S = placement.expert_LS.shape[1]
    rank_LS = np.zeros((L, S), int)  # index of a slot among its expert's slots
    for l, slots_EK in enumerate(placement.slots_LEK):
        expert_N, k_N = np.nonzero(slots_EK >= 0)
        rank_LS[l, slots_EK[expert_N, k_N]] = k_N
    index_LS = placement.expert_LS
    copies_LS = np.take_along_axis(placement.copies_LE, index_LS, axis=1)
    load_TLS = np.take_along_axis(load_TLE, np.broadcast_to(index_LS, (T, L, S)), axis=2)
    tokens_TLS = (load_TLS + copies_LS - 1 - rank_LS) // copies_LS
    by_device = (T, L, devices, -1)
    return tokens_TLS.reshape(by_device).sum(axis=-1), (tokens_TLS > 0).reshape(by_device).sum(axis=-1)


def write(path: str | Path, placement: Placement) -> None:
    """Write a placement as `.npz`, for a strategy's `[weights] placement`."""
    archive = io.BytesIO()  # numpy would append .npz to a file name
    np.savez_compressed(archive, expert=placement.expert_LS.astype(np.int32))
    places.write_bytes(places.writable(path), archive.getvalue())


def read(path: str | Path, layers: int, experts: int, slots: int) -> np.ndarray:
    """Read the expert of every slot, [L, S], from a placement file.

    Raises ConfigError if the file is unreadable, has other sizes, or lacks an expert.
    """
    try:
        expert_LS = np.load(io.BytesIO(places.place(path).read_bytes()))["expert"]
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such placement; `jaxseek placement ... --place FILE` makes one"
        ) from None
    except Exception as e:  # numpy and zipfile raise many kinds
        raise ConfigError(f"{path}: not a placement that `jaxseek placement` wrote ({e})") from None
    if expert_LS.shape != (layers, slots):
        more = slots - experts
        raise ConfigError(
            f"{path}: is for layers and slots {list(expert_LS.shape)}, but the model has {layers} sparse "
            f"layers and the strategy {slots} slots ({experts} experts and redundant_experts = {more})"
        )
    for l, expert_S in enumerate(expert_LS):
        if not np.array_equal(np.unique(expert_S), np.arange(experts)):
            raise ConfigError(f"{path}: layer {l} does not have each of the {experts} experts in a slot")
    return expert_LS
