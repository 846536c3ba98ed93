"""Pipeline x expert x ZeRO-1 data parallelism as a `ParallelPlan` of the training loop.

Layers are divided over pipeline stages. A stage's dense weights are divided over its ranks for the optimizer, each
rank's experts over the ranks that hold the same ones. So every value is in one optimizer, Newton-Schulz of a matrix
is done once, and sums over all ranks count nothing twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k2.config.optimizer import OptimizerConfig
from k2.distributed import peers
from k2.distributed.expert import divide_experts, local_experts
from k2.distributed.mesh import Mesh
from k2.distributed.ownership import local_layout, owners, shard_layout
from k2.distributed.pipeline import Pipeline, keep_layers
from k2.distributed.slow import SlowRanks
from k2.distributed.watchdog import HERE, collective, working
from k2.distributed.zero import Replicas
from k2.errors import UserError
from k2.model.initial import draw
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.training.batches import NextTokenLoss, TokenBatch
from k2.training.loop import Aftermath, Loss, LossFn, one_by_one
from k2.training.state import BatchT


class DistributedPlan:
    """One rank's part of a model, its optimizer, and what the ranks exchange in a step.

    The model is complete, and the same on all ranks; here it keeps this rank's layers and experts only. With a seed it
    comes without memory, on the meta device, and only this rank's part gets some, with the values of
    `Transformer.initialize`.
    """

    def __init__(self, mesh: Mesh, model: Transformer, seed: int | None = None) -> None:
        self._mesh, self._model, self.layout = mesh, model, mesh.layout
        self._pipeline: tuple[Any, Pipeline] | None = None
        self._finite = True
        self._slow = SlowRanks(mesh.layout.data_parallel)
        self._layout = logical_tensors(model.config)
        keep_layers(model, mesh)
        divide_experts(model, mesh.experts)
        held = model.state_dict().keys()
        mine = [tensor for tensor in self._layout if tensor.parameter in held]
        self._local = local_layout(mine, local_experts(model.config.n_routed_experts, mesh.experts))
        if seed is not None:
            _give_memory(model)
            draw(model.state_dict(), self._local, seed, model.config.initializer_range)
        self._sharded = {tensor.parameter for tensor in self._local if tensor.shard_axis is not None}
        self._replicas = [self._divide(mesh.stage, False), self._divide(mesh.replicas, True)]

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

    @property
    def data_rank(self) -> int:
        """Which part of every step's rows this rank reads; the stages of a pipeline read the same."""
        return self._mesh.data_rank

    def losses(
        self, model: Transformer, batches: Iterable[BatchT], loss_fn: LossFn[BatchT]
    ) -> Iterable[tuple[int, Loss]]:
        """Micro-batches one by one, or through the pipeline: all of one shape, and with the next-token loss."""
        if self.layout.pp == 1:
            return self._alone(model, batches, loss_fn)
        found = [batch for batch in batches if isinstance(batch, TokenBatch)]
        assert isinstance(loss_fn, NextTokenLoss), "only this loss is divided over pipeline stages"
        key = model.config, loss_fn, len(found), found[0].tokens_BL.shape, torch.is_grad_enabled()
        if self._pipeline is None or self._pipeline[0] != key:
            self._pipeline = key, Pipeline(self._mesh, model, loss_fn, found)
        return self._pipeline[1].losses(found)

    def _alone(
        self, model: Transformer, batches: Iterable[BatchT], loss_fn: LossFn[BatchT]
    ) -> Iterator[tuple[int, Loss]]:
        with working():
            yield from one_by_one(model, batches, loss_fn)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, in place."""
        with collective("sums", tensors):
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._mesh.everyone)

    def max_(self, tensor: Tensor) -> None:
        """Maximum over all ranks, in place."""
        with collective("maxima", [tensor]):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._mesh.everyone)

    def reduce_gradients(self) -> None:
        """Give the owner of every shard the sum of all ranks' gradients.

        An expert's gradient already has the tokens of all ranks that exchange tokens; its replicas add theirs.
        """
        dense = [weight.grad for weight in self._dense() if weight.grad is not None]
        self._finite = bool(torch.stack(torch._foreach_norm(dense)).isfinite().all()) if dense else True
        with collective("gradients to their owners", [p for each in self._replicas for p in each.own.values()]):
            for replicas in self._replicas:
                replicas.reduce()

    def _dense(self) -> list[nn.Parameter]:
        """Weights whose gradients come from this rank's own rows; an expert's come from others' as well."""
        return [weight for name, weight in self._model.named_parameters() if name not in self._sharded]

    def not_finite(self) -> list[int]:
        """The ranks whose own rows gave gradients that are no numbers; all must call it."""
        return [rank for rank, finite in enumerate(peers.from_all(self._finite)) if not finite]

    def share_weights(self) -> None:
        """Bring every owner's weights to all ranks that hold them."""
        with collective("weights from their owners", [p for each in self._replicas for p in each.own.values()]):
            for replicas in self._replicas:
                replicas.gather()

    def share_update(self, optimizer: MuonClip) -> None:
        """Bring every owner's weights to all ranks that hold them; the RMS of the update becomes that of all values."""
        self.share_weights()
        values = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
        sums = torch.tensor([optimizer.update_rms**2 * values, values], dtype=torch.float64)
        self.sum_([sums])
        optimizer.update_rms = float((sums[0] / sums[1].clamp(min=1)).sqrt())

    def after(self, step: int) -> Aftermath:
        """End a step: agree whether to end the run, and compare how long the ranks of a stage computed."""
        HERE.step, mine, HERE.working_s = step, HERE.working_s, 0.0
        found = torch.zeros(self._mesh.world_size + 1, dtype=torch.float64)
        found[self._mesh.rank], found[-1] = mine, HERE.told_to_end
        self.max_(found)
        *seconds, ends = found.tolist()
        return Aftermath(bool(ends), self._slow.update(seconds))

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model's weights and buffers, one after the other on every rank: all must read to the end."""
        with torch.device("meta"):
            whole = Transformer(self._model.config).state_dict()
        mine = self._model.state_dict()
        stages: list[dict[str, torch.dtype]] = [{}] * self.layout.pp
        dist.all_gather_object(stages, {n: t.dtype for n, t in mine.items()}, group=self._mesh.pipeline)
        for name, like in whole.items():
            stage = next(rank for rank, names in enumerate(stages) if name in names)
            if stage == self._mesh.pipeline.rank():
                tensor = self._collect(mine[name]) if name in self._sharded else mine[name].clone()
            else:
                tensor = torch.empty_like(like, dtype=stages[stage][name], device=self._device)
            dist.broadcast(tensor, group=self._mesh.pipeline, group_src=stage)
            yield name, tensor

    def published(self, model: Transformer) -> list[LogicalTensor]:
        """The tensors of this rank's part that it publishes: ranks that hold the same ones take turns."""
        groups = {True: self._mesh.replicas, False: self._mesh.stage}
        turns = [(tensor, groups[tensor.parameter in self._sharded]) for tensor in self._local]
        return [tensor for turn, (tensor, group) in enumerate(turns) if turn % group.size() == group.rank()]

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _collect(self, mine: Tensor) -> Tensor:
        parts = mine.new_empty(self._mesh.experts.size() * len(mine), *mine.shape[1:])
        dist.all_gather_single(parts, mine.contiguous(), group=self._mesh.experts)
        return parts


def _give_memory(model: Transformer) -> None:
    """To parameters that have none yet, in the precision that they and their gradients were given."""
    types = {name: parameter.grad_dtype for name, parameter in model.named_parameters()}
    model.to_empty(device=torch.get_default_device())
    for name, parameter in model.named_parameters():
        parameter.grad_dtype = types[name]
