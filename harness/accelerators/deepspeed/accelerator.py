"""Many ranks by DeepSpeed: one engine for each named optimizer over one module.

DeepSpeed knows one optimizer a model. Here each named optimizer has an engine of its own
over the same module, and while its forward and backward run, parameters that it does not
own ask for no gradient. The loop owns accumulation (``managed_gradient_accumulation`` is
false), so every ``engine.step()`` is a boundary. The model is called as it is, by its own
hooks, and never by ``engine(...)``: it stays the user's object.
"""

from __future__ import annotations

import socket
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.accelerators.base import StepOpt, default_step_opt
from harness.accelerators.deepspeed.config import (
    ConfigFacts,
    check_config,
    fill_config,
    read_config,
    zero_stage,
)
from harness.accelerators.deepspeed.engine import NamedEngine, parameters_in_graph
from harness.accelerators.deepspeed.gather import (
    gather_plain_parameters,
    gather_state_dict,
    list_attributes,
)
from harness.accelerators.deepspeed.library import (
    ignore_warnings,
    import_deepspeed,
    known_fields,
    silence_deepspeed_warnings,
    unchanged_optimizers,
)
from harness.accelerators.deepspeed.precision import (
    hook_autocast,
    hook_inputs,
    make_autocast,
)
from harness.accelerators.deepspeed.state import capture_state, restore_state
from harness.accelerators.deepspeed.validation import (
    check_optimizers,
    describe_loaders,
    describe_model,
    is_elementwise,
)
from harness.accelerators.devices import choose_rank_device
from harness.accelerators.distributed.environment import read_launch, set_environment
from harness.accelerators.distributed.group import RankGroup
from harness.accelerators.distributed.sharded_loader import RankShare, ShardedLoader
from harness.accelerators.distributed.watchdog import Watchdog
from harness.data.batch import move
from harness.data.loaders import num_batches
from harness.errors import CheckpointError
from harness.reshard.consolidated import parameter_shapes

DEFAULT_NAME = "opt"
"""Name of the optimizer that DeepSpeed's config describes."""


class DeepSpeedAccelerator:
    """Ranks that train one model together, by DeepSpeed.

    Parameters
    ----------
    config
        DeepSpeed's own config: a dict or a JSON file, in DeepSpeed's words; None is ZeRO 0.
        ``"auto"`` values and missing batch sizes are filled in by ``prepare``.
    device
        ``cpu`` or ``cuda``; None takes CUDA where there is one.
    accumulate : >= 1
        Micro-batches to an optimizer step; ``gradient_accumulation_steps`` says the same.

    Attributes
    ----------
    counted : int or None
        Samples of the present batch that count on this rank: 0 where the batch only stands
        in for a rank that has none left, None where the loader is not divided.
    overflows : dict of int
        Steps skipped since gradients overflowed, by optimizer name.

    Raises
    ------
    ValueError
        If the config is wrong, or there are fewer devices than ranks; on one rank, while
        the others raise ``PeerError``.

    Notes
    -----
    - Losses are means over samples. Where the ranks' batches differ in length, each loss
      is weighted so that gradients are the mean over all samples.
    - A parameter that a whole window gave no gradient counts as having a zero one: momentum
      and weight decay go on. Plain torch leaves it alone.
    - Buffers, such as the statistics of BatchNorm, are each rank's own in training; rank
      0's are sent to all before other data than the training data is read.

    References
    ----------
    DeepSpeed 0.19.8, ``runtime/engine.py``; https://www.deepspeed.ai/docs/config-json/.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        accumulate: int = 1,
    ) -> None:
        if accumulate < 1:
            msg = f"accelerator(accumulate): expected at least 1, got {accumulate!r}."
            raise ValueError(f"{msg} Use 1 to step on every batch.")
        launch = read_launch()
        self.rank, self.local_rank = launch.rank, launch.local_rank
        self.world_size, self.is_main = launch.world_size, launch.rank == 0
        self.device = choose_rank_device(device, launch.local_rank)
        self.accumulate = self.window = accumulate
        self.steps: dict[str, int] = {}
        self.overflows: dict[str, int] = {}
        self._ranks = RankGroup(launch, self.device)
        if self.world_size > 1 and not Watchdog.is_running():
            Watchdog(self._ranks, launch.launcher_pid)
        self._check_devices()
        self._config = self._ranks.check_on_every_rank(lambda: self._checked(config))
        advice = "Give every rank the same config."
        self._ranks.check_same("accelerator", {"config": self._config}, advice)
        self._clear()

    def _clear(self) -> None:
        """Forget what ``prepare`` made."""
        self._model: nn.Module | None = None
        self._filled: dict[str, Any] = {}
        self._named_engines: dict[str, NamedEngine] = {}
        self._active: NamedEngine | None = None
        self._checked_graphs: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, list[int]] = {}
        self._attributes: dict[nn.Module, frozenset[str]] = {}
        self._hooks: list[Any] = []
        self._held = ExitStack()
        self._share: RankShare | None = None
        self._recent_shares: deque[tuple[Any, RankShare]] = deque(
            maxlen=self.accumulate + 8
        )

    # ---------------------------------------------------------------- readiness

    @property
    def has_optimizer(self) -> bool:
        """True if the config has an optimizer, which DeepSpeed builds."""
        return "optimizer" in self._config

    def _checked(self, config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
        """The config, if DeepSpeed and this machine can serve it."""
        read = read_config(config)
        check_config(read, self._setting())
        return read

    def _setting(self, **facts: Any) -> ConfigFacts:
        """What fills ``"auto"`` values, as far as it is known."""
        device, fields = self.device.type, known_fields()
        return ConfigFacts(
            world_size=self.world_size, device=device, fields=fields, **facts
        )

    def _check_devices(self) -> None:
        """Two ranks on one device would wait for each other for ever."""
        if self.device.type != "cuda" or self.world_size == 1:
            return
        found = torch.cuda.get_device_properties(self.device)
        every = self._ranks.gather_objects((socket.gethostname(), str(found.uuid)))

        def check() -> None:
            if len(set(every)) < len(every):
                msg = f"accelerator: expected a device for each of {len(every)} ranks"
                advice = "Start fewer ranks (--num_gpus), or give device='cpu'."
                raise ValueError(f"{msg}, got {len(set(every))}. {advice}")

        self._ranks.check_on_every_rank(check)

    def prepare(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Any] | None = None,
        loaders: Sequence[Any] = (),
        *,
        opt_hparams: Mapping[str, Any] | None = None,
    ) -> tuple[nn.Module, dict[str, Any], list[Any]]:
        """Place the model, make the engines, divide the loaders over the ranks.

        Parameters
        ----------
        model
            The same object comes back; call it as before.
        optimizers
            By name; empty where the config has the optimizer; None to evaluate only.
        loaders
            The first is the training loader. None stays None.
        opt_hparams
            Fills ``"auto"`` values of the config's optimizer.

        Raises
        ------
        ValueError, TypeError
            Before training, for what cannot work, on one rank; ``PeerError`` on the others.
        """
        self.finish()
        self._model = model
        opts = None if optimizers is None else dict(optimizers)
        first = loaders[0] if loaders else None
        setting = self._setting(
            accumulate=self.accumulate,
            batch_size=getattr(first, "batch_size", None),
            num_parameters=sum(param.numel() for param in model.parameters()),
            opt_hparams=opt_hparams or {},
        )
        self._filled = self._ranks.check_on_every_rank(
            lambda: self._check_and_fill(model, opts, setting)
        )
        facts = describe_model(model, opts or {}) | describe_loaders(loaders)
        self._ranks.check_same(
            "prepare", facts, "Start every rank with the same code and data."
        )
        self._dtypes = {name: value.dtype for name, value in model.named_parameters()}
        self._shapes = {
            name: list(shape) for name, shape in parameter_shapes(model).items()
        }
        self._attributes = list_attributes(model)
        if opts is None:
            model.to(self.device)
            self._send_from_main([*model.parameters(), *model.buffers()])
        else:
            self._make_engines(model, opts)
        self._hook(model)
        self.accumulate = self.window = int(self._filled["gradient_accumulation_steps"])
        self.steps = dict.fromkeys(self._named_engines, 0)
        self.overflows = dict.fromkeys(self._named_engines, 0)
        facades: dict[str, Any] = {
            name: part.facade for name, part in self._named_engines.items()
        }
        divided = self._shard_loaders(loaders)
        self._ranks.check_on_every_rank(lambda: self._check_batches(divided))
        return model, facades, divided

    def _check_and_fill(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Any] | None,
        setting: ConfigFacts,
    ) -> dict[str, Any]:
        """DeepSpeed's config for this model and data, if they can be trained."""
        stage = zero_stage(self._config)
        if optimizers is not None:
            check_optimizers(model, optimizers, self._config, stage)
        filled = fill_config(self._config, setting)
        if all(is_elementwise(opt) for opt in (optimizers or {}).values()):
            filled.setdefault("zero_allow_untested_optimizer", True)
        # DeepSpeed refuses torch's optimizers with offload, as slow, unless told so.
        filled.setdefault("zero_force_ds_cpu_optimizer", False)
        return filled

    def _make_engines(self, model: nn.Module, optimizers: Mapping[str, Any]) -> None:
        """One engine for each optimizer."""
        deepspeed = import_deepspeed()
        silence_deepspeed_warnings()
        # DeepSpeed reads it whenever it likes, at ZeRO 3 in the model's forward.
        self._held.enter_context(set_environment(LOCAL_RANK=str(self.local_rank)))
        deepspeed.utils.logger.setLevel(self._filled.get("log_level", "error").upper())
        stage = zero_stage(self._filled)
        trained = [param for param in model.parameters() if param.requires_grad]
        owned = {
            name: [param for group in opt.param_groups for param in group["params"]]
            for name, opt in optimizers.items()
        } or {DEFAULT_NAME: trained}
        for opt in optimizers.values() if stage else ():
            # ZeRO 1 and 2 stumble over a group whose parameters are all frozen.
            for group in opt.param_groups:
                group["params"] = [p for p in group["params"] if p.requires_grad]
        groups = {
            name: [dict(group) for group in opt.param_groups if group["params"]]
            for name, opt in optimizers.items()
        } or {DEFAULT_NAME: [{"params": trained}]}
        made = {}
        for name in owned:
            with ignore_warnings(), unchanged_optimizers():
                made[name], *_ = deepspeed.initialize(
                    args=Namespace(device_rank=self.device.index or 0),
                    model=model,
                    optimizer=optimizers.get(name),
                    model_parameters=None if optimizers else trained,
                    config=dict(self._filled),
                )
        for name, engine in made.items():
            part = NamedEngine(name, engine, model, owned[name], stage, groups[name])
            part.on_step = self._counter(name)
            self._named_engines[name] = part

    def _counter(self, name: str) -> Any:
        """Count steps and overflows, whoever steps."""

        def count(applied: bool) -> None:
            counts = self.steps if applied else self.overflows
            counts[name] += 1

        return count

    def _hook(self, model: nn.Module) -> None:
        """Bring the model's forward into the config's precision."""
        if self._filled.get("torch_autocast", {}).get("enabled", False):
            self._hooks += hook_autocast(model, self._filled, self.device)
        for part in self._named_engines.values():
            dtype = next(iter(part.engine.module.parameters())).dtype
            if dtype in {torch.bfloat16, torch.float16}:
                self._hooks.append(hook_inputs(model, dtype))
                break

    def _shard_loaders(self, loaders: Sequence[Any]) -> list[Any]:
        """The loaders, each giving this rank's part."""
        if self.world_size == 1:
            return list(loaders)
        divided: list[Any] = []
        for place, loader in enumerate(loaders):
            if loader is None:
                divided.append(None)
                continue
            divided.append(
                ShardedLoader(
                    loader,
                    self._ranks,
                    on_batch=self._record_share,
                    on_begin=self._send_buffers if place else lambda: None,
                    on_end=self._clear_share,
                )
            )
        return divided

    def _check_batches(self, loaders: Sequence[Any]) -> None:
        """Rows that fill one process's batch may not fill all ranks'."""
        for place, loader in enumerate(loaders):
            if loader is not None and num_batches(loader) == 0:
                sizes = f"{self.world_size} ranks x {loader.batch_size} rows"
                msg = f"prepare: expected at least one batch of {sizes} in data {place}"
                got = f"got {len(loader.dataset)} rows with drop_last"
                advice = "Make batch_size smaller or set drop_last=False."
                raise ValueError(f"{msg}, {got}. {advice}")

    def _record_share(self, batch: Any, share: RankShare) -> Any:
        """Remember what of the batch counts until it comes back to ``to_device``."""
        self._recent_shares.append((batch, share))
        self._share = share
        return batch

    def _clear_share(self) -> None:
        """After a pass there is no present batch."""
        self._share = None

    def _send_buffers(self) -> None:
        """Give all ranks the buffers of rank 0, whose weights are the ones that are kept."""
        if self._model is not None:
            self._send_from_main(list(self._model.buffers()))

    def _send_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with rank 0's."""
        if self.world_size > 1 and tensors:
            sent = self._ranks.broadcast([tensor.data for tensor in tensors])
            for tensor, value in zip(tensors, sent, strict=True):
                tensor.data.copy_(value)

    # ------------------------------------------------------------ forward to step

    def _named_engine(self, name: str | None) -> NamedEngine:
        """The optimizer meant by None: the present one, or the only one."""
        if name is None and self._active is not None:
            return self._active
        if name is None and len(self._named_engines) == 1:
            return next(iter(self._named_engines.values()))
        if name not in self._named_engines:
            msg = "accelerator: expected the name of a prepared optimizer"
            raise ValueError(
                f"{msg}, got {name!r}. Choose from {list(self._named_engines)}."
            )
        return self._named_engines[name]

    @contextmanager
    def optimizing(self, name: str | None = None) -> Iterator[None]:
        """Hold the forward and backward of an optimizer: only what it owns gets gradients.

        Raises
        ------
        ValueError
            If `name` is no optimizer, or several are meant by None.
        RuntimeError
            At ZeRO 1 to 3, if parameters were frozen or unfrozen since ``prepare``.
        """
        if not self._named_engines or not torch.is_grad_enabled():
            with make_autocast(self._filled, self.device):
                yield
            return
        part = self._named_engine(name)
        part.check_frozen()
        part.begin_forward()
        before, self._active = self._active, part
        try:
            with part.freeze_others(), make_autocast(self._filled, self.device):
                yield
        finally:
            self._active = before

    def backward(self, loss: Tensor, name: str | None = None) -> None:
        """Add the gradients of ``loss / window``, weighted by the rank's samples.

        Parameters
        ----------
        loss : scalar with a graph
            Mean over the samples of the rank's batch.
        name
            Optimizer; None: the one of the present ``optimizing``, or the only one.

        Raises
        ------
        ValueError
            If the loss is no scalar or has no graph, or its graph leads to parameters of
            another optimizer.
        RuntimeError
            If there are several optimizers and ``optimizing`` does not hold the backward.
        """
        part = self._named_engine(name)
        self._check_loss(part, loss)
        if self.window > 1:
            loss = loss / self.window
        weight = 1.0 if self._share is None else self._share.weight(self.world_size)
        if weight != 1.0:
            loss = loss * weight
        part.backward(loss)

    def _check_loss(self, part: NamedEngine, loss: Tensor) -> None:
        """Refuse a loss that would give wrong gradients or none; graphs once an optimizer."""
        place = f"backward({part.name!r})"
        if loss.numel() != 1 or loss.grad_fn is None:
            form = f"shape {tuple(loss.shape)}, grad_fn {loss.grad_fn}"
            msg = f"{place}: expected a scalar with a graph, got {form}."
            raise ValueError(f"{msg} Take the mean, and compute it with gradients on.")
        if len(self._named_engines) == 1:
            return
        if self._active is not part:
            active = None if self._active is None else self._active.name
            msg = f"{place}: expected 'with accelerator.optimizing({part.name!r})' around it"
            advice = "Put the optimizer's forward and backward inside."
            raise RuntimeError(f"{msg}, got {active!r}. {advice}")
        if part.name not in self._checked_graphs:
            self._check_graph(place, part, loss)
            self._checked_graphs.add(part.name)

    def _check_graph(self, place: str, part: NamedEngine, loss: Tensor) -> None:
        """Each optimizer needs a graph of its own."""
        below = parameters_in_graph(loss)
        for other in self._named_engines.values():
            if other is not part and below & other.owned_ids:
                msg = f"{place}: expected a graph of its own, got one shared with"
                advice = (
                    f"Compute the loss of {part.name!r} anew inside its optimizing()."
                )
                raise ValueError(f"{msg} optimizer {other.name!r}. {advice}")

    @contextmanager
    def counting_backward(self, name: str | None = None) -> Iterator[None]:
        """See that ``backward`` is called inside; it counts.

        Raises
        ------
        RuntimeError
            If it was not called: gradients that DeepSpeed does not know of would be lost.
        """
        part = self._named_engine(name)
        before = part.done
        yield
        if part.done == before:
            msg = (
                "backward(loss): expected a call of ctx.accelerator.backward, got none"
            )
            advice = "Call ctx.accelerator.backward(loss, ctx.opt_name) in it."
            raise RuntimeError(f"{msg} under DeepSpeed. {advice}")

    def is_boundary(self, name: str | None = None) -> bool:
        """True when as many backwards as the window holds have been done."""
        return self._named_engine(name).done >= self.window

    def step(
        self, name: str | None = None, step_opt: StepOpt = default_step_opt
    ) -> bool:
        """Step at a boundary and clear the gradients; True if the weights were changed."""
        part = self._named_engine(name)
        if part.done < self.window:
            return False
        return part.step(step_opt)

    def clip(
        self, max_norm: float, name: str | None = None, norm_type: float = 2.0
    ) -> Tensor:
        """Clip the total gradient norm in the coming ``step``.

        Returns
        -------
        scalar
            The norm found. Gradients are in parts on all ranks until ``step`` brings them
            together, which fills it; NaN before, and after a step without a norm.

        Raises
        ------
        ValueError
            If `norm_type` is not 2.
        """
        if norm_type != 2.0:
            msg = f"clip(norm_type): expected 2.0 under DeepSpeed, got {norm_type!r}."
            raise ValueError(f"{msg} DeepSpeed knows the Euclidean norm only.")
        return self._named_engine(name).clip(max_norm)

    # -------------------------------------------------------------------- ranks

    @property
    def counted(self) -> int | None:
        """Samples of the present batch that count; None where the loader is not divided."""
        return None if self._share is None else self._share.count

    def to_device(self, batch: Any) -> Any:
        """The batch on the device; it is the present batch from here on."""
        for place, (held, share) in enumerate(self._recent_shares):
            if held is batch:
                self._share = share
                del self._recent_shares[place]
                break
        return move(batch, self.device)

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks one after another along dim 0; their lengths may differ.

        While a batch only stands in (``counted`` is 0) this rank gives no rows.
        """
        if self.counted == 0:
            tensor = tensor[:0] if tensor.dim() else tensor.reshape(1)[:0]
        return self._ranks.gather(tensor)

    def reduce(
        self, tensor: Tensor, op: Literal["sum", "mean", "max"] = "sum"
    ) -> Tensor:
        """The tensor reduced over ranks; the same value on each."""
        return self._ranks.reduce(tensor, op)

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The value that rank `src` holds."""
        return self._ranks.broadcast(value, src)

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return self._ranks.any(flag)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._ranks.barrier()

    # ------------------------------------------------------------- whole and parts

    def _whole(self, param: nn.Parameter) -> Tensor:
        """The whole parameter, in float32 where an engine trains it in less."""
        owner = next(
            (p for p in self._named_engines.values() if id(param) in p.owned_ids), None
        )
        precise = None if owner is None else owner.read_full_precision(param)
        if precise is not None:
            return precise
        if not hasattr(param, "ds_id"):
            return param.data
        with import_deepspeed().zero.GatheredParameters([param]):
            return param.data.clone()

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights and buffers, whole, detached, on the CPU; empty except on rank 0."""
        return gather_state_dict(model, self._whole, self._dtypes, keep=self.is_main)

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, optimizers, gradients of an open window, counters of this rank.

        Tensors are live: copy them before the next step. The rest is what JSON can hold.
        What all ranks share is given by rank 0 alone.

        Raises
        ------
        RuntimeError
            Before ``prepare``, and in an open window with offloaded optimizer states.
        """
        offload = self._filled.get("zero_optimization", {}).get("offload_optimizer", {})
        is_open = any(part.done for part in self._named_engines.values())
        if is_open and offload.get("device", "none") != "none":
            msg = "state_dict: expected the end of a window with offload_optimizer"
            raise RuntimeError(f"{msg}, got an open one. Save after an optimizer step.")
        stage = zero_stage(self._filled)
        model = self._prepared()
        state = capture_state(model, self._deepspeed_engines(), stage)
        if not self.is_main:
            state["shared"] = {}
        return state | {
            "world_size": self.world_size,
            "stage": stage,
            "steps": dict(self.steps),
            "overflows": dict(self.overflows),
            "done": {name: part.done for name, part in self._named_engines.items()},
            "layouts": {
                n: part.layout(self.rank) for n, part in self._named_engines.items()
            },
            "members": {
                name: part.members for name, part in self._named_engines.items()
            },
            "shapes": self._shapes,
            "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        parts: Sequence[str] = ("model", "optimizers"),
    ) -> None:
        """Take back what ``state_dict`` gave, all of it or one of the two parts.

        Every rank has to call it.

        Raises
        ------
        CheckpointError
            If it is of another model, other optimizers, another number of ranks, or
            another ZeRO stage.
        """
        self._ranks.check_on_every_rank(lambda: self._check_origin(state))
        stage, shared = zero_stage(self._filled), self._ranks.broadcast(state["shared"])
        whole = {**state, "shared": shared}
        self._ranks.check_on_every_rank(
            lambda: restore_state(
                self._prepared(), self._deepspeed_engines(), stage, whole, parts
            )
        )
        if "optimizers" in parts:
            self.steps.update(state["steps"])
            self.overflows.update(state["overflows"])
            for name, part in self._named_engines.items():
                part.done = state["done"][name]
            for name, param in self._prepared().named_parameters():
                # Later than at the fit's begin they can be frozen at ZeRO 0 alone.
                if stage == 0:
                    param.requires_grad_(name not in state["frozen"])
        for engine in self._deepspeed_engines().values():
            kept = getattr(engine.optimizer, "persistent_parameters", None)
            if kept:
                # Small parameters stay whole on each rank at ZeRO 3: fetch them anew.
                engine.empty_partition_cache()
                kept[0].all_gather(kept)

    def _check_origin(self, state: Mapping[str, Any]) -> None:
        """Parts fit together on the ranks and at the stage that they come from only."""
        here = {"world_size": self.world_size, "stage": zero_stage(self._filled)}
        for name, want in here.items():
            if state.get(name) != want:
                msg = (
                    f"resume: expected a state of {name} {want}, got {state.get(name)}."
                )
                advice = (
                    f"Resume with {name} {state.get(name)}, or take the weights only."
                )
                raise CheckpointError(f"{msg} {advice}")

    def _prepared(self) -> nn.Module:
        """The model that was prepared."""
        if self._model is None:
            msg = "accelerator: expected prepare(model, ...) first, got no model."
            raise RuntimeError(f"{msg} Call prepare before this.")
        return self._model

    def _deepspeed_engines(self) -> dict[str, Any]:
        """Engines by optimizer name."""
        return {name: part.engine for name, part in self._named_engines.items()}

    def finish(self, *, failed: bool = False) -> None:
        """Release the engines; the model is a plain one with whole weights, on the CPU.

        Every rank has to call it. The process group stays for the next fit.

        Parameters
        ----------
        failed
            This rank ends alone: with several ranks nothing is gathered, for the others
            may never come, and the model is of no further use.
        """
        for hook in self._hooks:
            hook.remove()
        if self._model is not None and self._named_engines:
            install = None
            if self.world_size == 1 or not failed:
                install = gather_plain_parameters(
                    self._model, self._whole, self._dtypes, self._attributes
                )
            for part in self._named_engines.values():
                part.finish()
            if install is not None:
                install()
                self._model.cpu()
        self._held.close()
        self._clear()
