"""Expert parallelism x ZeRO-1 data parallelism as a `ParallelPlan` of the training loop.

Dense weights are divided over all ranks for the optimizer, each rank's experts over the ranks that hold the same ones.
So every value is in one optimizer, Newton-Schulz of a matrix is done once, and sums over all ranks count nothing twice.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k2.config.optimizer import OptimizerConfig
from k2.distributed.expert import divide_experts, local_experts
from k2.distributed.mesh import Mesh
from k2.distributed.ownership import local_layout, owners, shard_layout
from k2.distributed.zero import Replicas
from k2.errors import UserError
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip


class DistributedPlan:
    """One rank's part of a model, its optimizer, and what the ranks exchange in a step.

    The model must be the same on all ranks, experts included; here it keeps this rank's experts only.
    """

    def __init__(self, mesh: Mesh, model: Transformer) -> None:
        self._mesh, self._model = mesh, model
        self._layout = logical_tensors(model.config)
        divide_experts(model, mesh.experts)
        self._local = local_layout(self._layout, local_experts(model.config.n_routed_experts, mesh.experts))
        self._sharded = {tensor.parameter for tensor in self._local if tensor.shard_axis is not None}
        self._replicas = [self._divide(mesh.everyone, False), self._divide(mesh.replicas, True)]

    def _divide(self, group: dist.ProcessGroup, sharded: bool) -> Replicas:
        layout = [tensor for tensor in self._local if (tensor.parameter in self._sharded) == sharded]
        names = {tensor.parameter for tensor in layout}
        parameters = {name: weight for name, weight in self._model.named_parameters() if name in names}
        lengths = {name: len(weight) for name, weight in parameters.items()}
        return Replicas(group, parameters, owners(layout, lengths, group.size()))

    @property
    def owned(self) -> tuple[dict[str, nn.Parameter], list[LogicalTensor]]:
        """What this rank's optimizer updates and its checkpoints hold: shards by name, and the tensors in them."""
        parameters = {name: shard for replicas in self._replicas for name, shard in replicas.own.items()}
        layout = [tensor for replicas in self._replicas for tensor in shard_layout(self._local, replicas.mine)]
        return parameters, layout

    def optimizer(self, config: OptimizerConfig) -> MuonClip:
        """MuonClip over the shards that this rank owns.

        Raises:
            UserError: spectral norms are asked for; they need all weights in one place.
        """
        if config.spectral_interval:
            raise UserError(f"optimizer.spectral_interval is {config.spectral_interval}; over many ranks it must be 0")
        parameters, layout = self.owned
        return MuonClip(parameters.items(), layout, config, clip_layout=self._layout)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, in place."""
        for tensor in tensors:
            dist.all_reduce(tensor, group=self._mesh.everyone)

    def max_(self, tensor: Tensor) -> None:
        """Maximum over all ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._mesh.everyone)

    def reduce_gradients(self) -> None:
        """Give the owner of every shard the sum of all ranks' gradients.

        An expert's gradient already has the tokens of all ranks that exchange tokens; its replicas add theirs.
        """
        for replicas in self._replicas:
            replicas.reduce()

    def share_weights(self) -> None:
        """Bring every owner's weights to all ranks that hold them."""
        for replicas in self._replicas:
            replicas.gather()

    def share_update(self, optimizer: MuonClip) -> None:
        """Bring every owner's weights to all ranks that hold them; the RMS of the update becomes that of all values."""
        self.share_weights()
        values = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
        sums = torch.tensor([optimizer.update_rms**2 * values, values], dtype=torch.float64)
        self.sum_([sums])
        optimizer.update_rms = float((sums[0] / sums[1].clamp(min=1)).sqrt())

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's weights and buffers on every rank, experts collected one parameter at a time."""
        return {
            name: self._collect(tensor) if name in self._sharded else tensor.clone()
            for name, tensor in self._model.state_dict().items()
        }

    def _collect(self, mine: Tensor) -> Tensor:
        parts = mine.new_empty(self._mesh.experts.size() * len(mine), *mine.shape[1:])
        dist.all_gather_single(parts, mine.contiguous(), group=self._mesh.experts)
        return parts
