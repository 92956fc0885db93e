"""GPU types with their makers' figures, and the links between the ranks of a job.

All figures are peaks.  Ranks are numbered node by node; a group of ranks is described by its size and by how many of its members a node holds.
"""

import os
from dataclasses import dataclass

from pydantic import Field

from athanor.config_fields import nearest
from athanor.errors import UserError
from athanor.model_config import Config


@dataclass(frozen=True)
class Gpu:
    memory_gb: float  # 1e9 bytes
    tflops: float  # bf16 tensor cores, dense
    fp32_tflops: float  # without tensor cores
    memory_gbs: float  # GB/s
    intra_gbs: float  # GB/s, one direction, to the other GPUs of the node
    inter_gbs: float  # GB/s, one direction, this GPU's share of the network between nodes
    source: str


NIC = 50.0  # one 400 Gb/s adapter per GPU, as in DGX H100 and in DeepSeek-V3's cluster (arXiv 2412.19437, section 3.1)
GPUS = {
    "a100": Gpu(80, 312, 19.5, 2039, 300, 25, "NVIDIA A100 80GB SXM datasheet; 200 Gb/s per GPU as in DGX A100"),
    "h100": Gpu(80, 989.4, 66.9, 3350, 450, NIC, "NVIDIA H100 SXM datasheet; 400 Gb/s per GPU as in DGX H100"),
    "h800": Gpu(80, 989.4, 66.9, 3350, 160, NIC, "as H100 SXM; NVLink 160 GB/s and InfiniBand 50 GB/s by arXiv 2412.19437, section 3.2.2"),
    "h200": Gpu(141, 989.4, 66.9, 4800, 450, NIC, "NVIDIA H200 SXM datasheet; 400 Gb/s per GPU as in DGX H200"),
    "b200": Gpu(180, 2250, 75, 8000, 900, NIC, "NVIDIA DGX B200 datasheet, per GPU; 400 Gb/s per GPU"),
    "l40s": Gpu(48, 362, 91.6, 864, 32, 25, "NVIDIA L40S datasheet; PCIe 4.0 x16; 200 Gb/s per GPU"),
    "rtx4090": Gpu(24, 165.2, 82.6, 1008, 32, 3, "NVIDIA Ada architecture paper (fp32 accumulation); PCIe 4.0 x16; 25 Gb/s Ethernet"),
    # No maker's figure: one thread of a server core at 3 GHz with two 512-bit FMA, and its share of the memory channels.
    "cpu": Gpu(0, 0.1, 0.1, 10, 5, 1, "nominal: 1 core x 2 x 512-bit FMA at 3 GHz; memory is this machine's, divided by its ranks"),
}


class ClusterConfig(Config):
    """Where the run will be; 0 = by the GPU table, or from torchrun's environment."""

    gpu: str = "cpu"
    """GPU type: a100, h100, h800, h200, b200, l40s, rtx4090, or cpu; its published figures are used where a field below is 0."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs (ranks) of one node; 0 = what torchrun started here."""
    nodes: int = Field(0, ge=0)
    """Nodes; 0 = what torchrun started."""
    memory_gb: float = Field(0, ge=0)
    """Memory of one GPU, 1e9 bytes."""
    tflops: float = Field(0, ge=0)
    """Peak 1e12 operations per second of one GPU in the compute type."""
    memory_gbs: float = Field(0, ge=0)
    """Peak memory bandwidth of one GPU, GB/s."""
    intra_gbs: float = Field(0, ge=0)
    """Bandwidth of one GPU to the others of its node, GB/s in one direction."""
    inter_gbs: float = Field(0, ge=0)
    """Bandwidth of one GPU to other nodes, GB/s in one direction."""


@dataclass(frozen=True)
class Cluster:
    """A ClusterConfig with nothing left open, in bytes and seconds."""

    gpu: str
    source: str
    gpus_per_node: int
    nodes: int
    memory: float  # bytes
    flops: float  # per second
    memory_bandwidth: float  # bytes/s
    intra: float  # bytes/s
    inter: float  # bytes/s

    @property
    def world(self) -> int:
        return self.gpus_per_node * self.nodes

    def members_per_node(self, size: int, stride: int = 1) -> int:
        """How many of a group of `size` ranks, `stride` apart, share a node."""
        return max(1, min(size, self.gpus_per_node // stride))

    def ring(self, size: int, stride: int = 1) -> float:
        """Bytes/s at which a member of the group receives in an all-gather, or sends in a reduce-scatter.

        What crosses a node's border does so once, by the adapters of all members there, and goes on inside.
        """
        members = self.members_per_node(size, stride)
        return self.intra if size <= members else min(self.intra, self.inter * members) if members > 1 else self.inter

    def gather_s(self, total_bytes: float, size: int, stride: int = 1) -> float:
        """Seconds of an all-gather to, or a reduce-scatter of, total_bytes on each member; an all-reduce is two of them."""
        return 0.0 if size == 1 else total_bytes * (size - 1) / size / self.ring(size, stride)

    def all_to_all_s(self, sent_bytes: float, size: int, stride: int = 1) -> float:
        """Seconds until each member has sent sent_bytes, spread evenly over the group; inside and between the nodes at once."""
        members = self.members_per_node(size, stride)
        return max(sent_bytes * (members - 1) / size / self.intra, sent_bytes * (size - members) / size / self.inter)


def resolve_cluster(config: ClusterConfig, compute_bytes: int) -> Cluster:
    """Fill in what the configuration leaves open.  compute_bytes: of the type that products are computed in.  UserError on an unknown GPU."""
    if config.gpu not in GPUS:
        raise UserError(f"plan.cluster.gpu is {config.gpu!r}{nearest(config.gpu, list(GPUS))}; wanted one of {', '.join(GPUS)}")
    gpu = GPUS[config.gpu]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    per_node = config.gpus_per_node or local
    memory = config.memory_gb or gpu.memory_gb
    return Cluster(
        gpu=config.gpu, source=gpu.source, gpus_per_node=per_node,
        nodes=config.nodes or max(1, int(os.environ.get("WORLD_SIZE", 1)) // local),
        memory=memory * 1e9 if memory else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / per_node,
        flops=(config.tflops or (gpu.tflops if compute_bytes == 2 else gpu.fp32_tflops)) * 1e12,
        memory_bandwidth=(config.memory_gbs or gpu.memory_gbs) * 1e9,
        intra=(config.intra_gbs or gpu.intra_gbs) * 1e9, inter=(config.inter_gbs or gpu.inter_gbs) * 1e9,
    )  # fmt: skip
