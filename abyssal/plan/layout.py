"""How a model is laid over devices: the ways it is cut, what each rank keeps and what it computes again. Owns no sizes.

It is the recipe's section `[parallel]`. Everything left out is training as `abyssal pretrain` does it on one device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from abyssal.model.config import ModelConfig
from abyssal.plan.machine_file import MachineSpec, Precision

Schedule = Literal["none", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"]
Recompute = Literal["none", "selective", "full"]
Kernels = Literal["eager", "fused"]

# scales of FP8 included: one FP32 for 128 numbers (DeepSeek-V3 section 3.3.2)
NUMBER_BYTES: dict[Precision, float] = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0 + 4 / 128}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes are in ranks. dp is what is left of the devices; ep ranks are found among those of dp, cp and tp."""

    pp: int = 1  # pipeline ranks
    ep: int = 1  # ranks that share out the routed experts
    tp: int = 1  # ranks that share each matrix, and, between matrices, the tokens (sequence parallel)
    cp: int = 1  # ranks that share each row's tokens
    dp: int = 0  # ranks with rows of their own; 0: as many as devices are left
    zero: int = 0  # what dp ranks share out: 1 optimizer state, 2 gradients too, 3 weights too (ZeRO)
    schedule: Schedule = "none"
    chunks: int = 1  # model chunks a pipeline rank holds under "interleaved"
    micro_rows: int = 0  # rows of a micro-batch; 0: all of a dp rank's rows at once
    recompute: Recompute = "none"  # selective: norms, MLA up-projections, SwiGLU outputs (DeepSeek-V3 section 3.2.3)
    experts_nodes: int = 0  # nodes that a token's experts may be on; 0: topk_group nodes where groups are nodes
    expert_imbalance: float = 0.0  # how much more than the mean the fullest expert rank gets, for which all others wait
    precision: Literal["auto", "fp8", "bfloat16", "float32"] = "auto"  # of products; auto: BF16 where it is fast
    weights: Precision = "float32"  # what products read; as `master`, it is the same copy
    master: Precision = "float32"
    moments: Precision = "float32"
    gradients: Precision = "float32"
    overlap_expert_communication: bool = False
    overlap_gradient_communication: bool = True  # with the work of a micro-batch
    kernels: Kernels = "eager"  # eager: one pass over memory for each of torch's operations, as this project trains

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "tp", "cp", "chunks"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"parallel.{name}={size} must be at least 1")
        for name in ("dp", "micro_rows", "experts_nodes"):
            if (size := getattr(self, name)) < 0:
                raise ValueError(f"parallel.{name}={size} is less than none; use 0 to have it worked out")
        if self.expert_imbalance < 0:
            raise ValueError(f"parallel.expert_imbalance={self.expert_imbalance} is negative; 0 is perfect balance")
        if not 0 <= self.zero <= 3:
            raise ValueError(f"parallel.zero={self.zero} is unknown; use 0, 1, 2 or 3")
        if (self.pp > 1) != (self.schedule != "none"):
            remedy = "name one, 1f1b or dualpipe" if self.pp > 1 else "use 'none', or more pp"
            raise ValueError(f"parallel.pp={self.pp} does not go with schedule={self.schedule!r}; {remedy}")
        if self.chunks > 1 and self.schedule != "interleaved":
            raise ValueError(f"parallel.chunks={self.chunks} needs schedule='interleaved', not {self.schedule!r}")
        if self.schedule == "interleaved" and self.chunks < 2:
            raise ValueError("parallel.schedule='interleaved' with chunks=1 is 1f1b; use chunks=2 or more")
        if self.schedule == "dualpipe" and self.pp % 2:
            raise ValueError(f"parallel.pp={self.pp} is odd; dualpipe pairs stages from both ends, use an even one")
        if self.dp and self.dp * self.cp * self.tp % self.ep:
            raise ValueError(
                f"parallel.ep={self.ep} does not divide dp*cp*tp={self.dp * self.cp * self.tp}: expert ranks are "
                f"found among those"
            )

    def on(self, machine: MachineSpec) -> Layout:
        return self.on_devices(machine.n_devices)

    def on_devices(self, n_devices: int) -> Layout:
        """The same with dp filled in; a ValueError where the devices do not divide so."""
        cut = self.pp * self.cp * self.tp
        if self.dp:
            if self.dp * cut > n_devices:
                raise ValueError(f"parallel: pp*dp*cp*tp={self.dp * cut} devices are more than there are: {n_devices}")
            return self
        if n_devices % cut:
            raise ValueError(f"parallel: pp*cp*tp={cut} does not divide {n_devices} devices; change one or give dp")
        return replace(self, dp=n_devices // cut)  # checks ep

    def check_model(self, config: ModelConfig, row_len: int) -> None:
        """A ValueError where heads, experts or tokens of a row do not divide among the ranks that share them."""
        if config.num_attention_heads % self.tp:
            raise ValueError(f"parallel.tp={self.tp} does not divide {config.num_attention_heads} attention heads")
        if self.ep > 1 and config.feed_forward == "dense":
            raise ValueError(f"parallel.ep={self.ep} has no experts to share out: the model is dense; use ep=1")
        if config.feed_forward == "moe" and config.n_routed_experts % self.ep:
            raise ValueError(f"parallel.ep={self.ep} does not divide {config.n_routed_experts} routed experts")
        if row_len % self.cp:
            raise ValueError(f"parallel.cp={self.cp} does not divide rows of {row_len} tokens")

    @property
    def n_devices(self) -> int:
        """0 while dp is not filled in."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def is_one_device(self) -> bool:
        """Training as this project does it today, on one device or in replicas that each hold everything."""
        return self.kernels == "eager" and (self.pp, self.tp, self.cp, self.ep, self.zero) == (1, 1, 1, 1, 0)

    @property
    def n_stages(self) -> int:
        """Pieces that the layers are cut into, one behind the other."""
        return self.pp * self.stages_per_rank if self.schedule != "dualpipe" else self.pp

    @property
    def stages_per_rank(self) -> int:
        return {"interleaved": self.chunks, "zbv": 2, "dualpipe": 2, "dualpipev": 2}.get(self.schedule, 1)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds. DualPipe holds every stage twice: on rank r, r and pp-1-r."""
        if self.schedule in ("zbv", "dualpipev"):
            return (rank, 2 * self.pp - 1 - rank)
        if self.schedule == "dualpipe":
            return (rank, self.pp - 1 - rank)
        return tuple(rank + chunk * self.pp for chunk in range(self.stages_per_rank))

    @property
    def stage_copies(self) -> int:
        """Pipeline ranks that hold the same stage."""
        return 2 if self.schedule == "dualpipe" else 1

    def micro_batches(self, batch_rows: int) -> tuple[int, int]:
        """(micro-batches of a step, rows in each) on one rank, once dp is filled in."""
        if batch_rows % self.dp:
            raise ValueError(f"{batch_rows} rows of a step do not divide among dp={self.dp} ranks")
        rows = batch_rows // self.dp
        micro_rows = self.micro_rows or rows
        if rows % micro_rows:
            raise ValueError(f"{rows} rows of a rank are no multiple of parallel.micro_rows={micro_rows}")
        n_micro_batches = rows // micro_rows
        if self.schedule == "dualpipe" and n_micro_batches % 2:
            raise ValueError(
                f"{n_micro_batches} micro-batches are odd; dualpipe feeds them from two ends, make it even"
            )
        return n_micro_batches, micro_rows
