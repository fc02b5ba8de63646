"""List the chips that a run can be planned for, with what limits a program on each.

Sources: Cloud TPU's pages on each version (docs.cloud.google.com/tpu/docs/v4, ...), the data sheets
of NVIDIA, and "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapters on TPUs and GPUs,
for what links carry in practice. Peaks are in model/flops.py.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A chip is what is rented: a TPU, whose devices may be its two cores, or a GPU.

    kind: what JAX calls its devices. devices: how many JAX has of it. memory: bytes of a device
    that a program may use. memory_speed: of a device, bytes/s. link: bytes/s one way, of a TPU
    along one axis of its torus, of a GPU over NVLink. network: bytes/s of a chip between slices, or
    between nodes. host_link: bytes/s of a chip to its host. axes: of the torus, 0 for GPUs. wraps:
    an axis of this length, or with three axes of a multiple of it, is a ring. largest: chips of a
    slice. name_counts: how many of a chip the 32 in "v4-32" counts, 0 if there are no such names.
    efficiency: the share of the peak that products of wide models reach, an expectation.
    """

    kind: str
    devices: int
    memory: float
    memory_speed: float
    link: float
    network: float
    host_link: float
    chips_of_a_host: int
    axes: int
    wraps: int
    largest: int
    name_counts: int
    efficiency: float


# Memory: what the TPU compiler says that it has, in its message for a program that is too large
# (libtpu 0.0.42.1); of a GPU, the 75 % that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION) of what the
# driver shows. Links of v2 and v3: Norrie et al., "The Design Process for Google's Training Chips",
# and v3's all-reduce bandwidth of a pod (340 TB/s) over 1,024 chips of four links. GPUs: NVLink
# reaches 80 % of its data sheet; the network is a node's InfiniBand (8 x 400 Gbit/s; A100: 200).
# Efficiency: of published runs on v3 (Levanter, 13B: 77 % with recomputation), v5p and v6e (MaxText
# 70B and 8B), H100 (torchtitan 8B); all others are between these, and no run says so.
CHIPS = {
    "v2": Chip("TPU v2", 2, 7.48 * GIB, 350e9, 6.2e10, 0, 16e9, 4, 2, 16, 256, 2, 0.70),
    "v3": Chip("TPU v3", 2, 15.48 * GIB, 450e9, 8.3e10, 0, 16e9, 4, 2, 32, 1024, 2, 0.75),
    "v4": Chip("TPU v4", 1, 30.75 * GIB, 1.2e12, 4.5e10, 6.25e9, 16e9, 4, 3, 4, 4096, 2, 0.65),
    "v5e": Chip("TPU v5 lite", 1, 15.75 * GIB, 8.1e11, 4.5e10, 3.1e9, 16e9, 8, 2, 16, 256, 1, 0.62),
    "v5p": Chip("TPU v5", 1, 95.73 * GIB, 2.77e12, 9e10, 6.25e9, 16e9, 4, 3, 4, 6144, 2, 0.70),
    "v6e": Chip("TPU v6 lite", 1, 31.24 * GIB, 1.6e12, 9e10, 12.5e9, 32e9, 8, 2, 16, 256, 1, 0.50),
    "tpu7x": Chip("TPU7x", 2, 94.74 * GIB, 3.7e12, 9e10, 12.5e9, 32e9, 4, 3, 4, 9216, 0, 0.45),
    "a100": Chip("NVIDIA A100", 1, 59.5 * GIB, 2.0e12, 2.4e11, 25e9, 25e9, 8, 0, 0, 4096, 1, 0.45),
    "h100": Chip("NVIDIA H100", 1, 59.7 * GIB, 3.35e12, 3.7e11, 50e9, 50e9, 8, 0, 0, 4096, 1, 0.37),
    "h200": Chip("NVIDIA H200", 1, 105.3 * GIB, 4.8e12, 3.7e11, 50e9, 50e9, 8, 0, 0, 4096, 1, 0.37),
    "b200": Chip("NVIDIA B200", 1, 134.3 * GIB, 8e12, 7.2e11, 50e9, 50e9, 8, 0, 0, 4096, 1, 0.35),
}

# Cycles/s of a TPU's cores, by what JAX calls them: v2 and v3 Norrie et al.; v4 Jouppi et al., "TPU
# v4"; v5e and v5p the scaling book. For v6e and tpu7x the peak over 524,288 FLOPs a cycle, of which
# the cycles that the compiler expects of a product of 4096 x 4096 show 87 % and 81 %.
CLOCKS = {
    "TPU v2": 0.7e9,
    "TPU v3": 0.94e9,
    "TPU v4": 1.05e9,
    "TPU v5 lite": 1.5e9,
    "TPU v5": 1.75e9,
    "TPU v6 lite": 1.75e9,
    "TPU7x": 2.2e9,
}
