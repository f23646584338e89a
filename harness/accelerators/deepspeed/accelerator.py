"""Training on many ranks with DeepSpeed: one engine for each named optimizer.

DeepSpeed supports one optimizer per model. Here each named optimizer has its own engine over
the same module. While its forward and backward run, parameters that it does not own require
no gradient. The loop decides when to step (``managed_gradient_accumulation`` is false), so
every ``engine.step()`` is a boundary. The model is called directly and never through
``engine(...)``, so it stays the user's object.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.accelerators.base import (
    Agreement,
    StepHook,
    StepOpt,
    ignore_step,
    missing_backward,
)
from harness.accelerators.deepspeed import library, validation
from harness.accelerators.deepspeed import state as engine_state
from harness.accelerators.deepspeed.config import (
    ConfigFacts,
    check_config,
    init_config,
    read_config,
    zero_stage,
)
from harness.accelerators.deepspeed.engine_set import EngineSet, create_engines
from harness.accelerators.deepspeed.original_model import (
    OriginalModel,
    ReadParameter,
    read_no_values,
)
from harness.accelerators.deepspeed.precision import (
    add_precision,
    find_autocast_dtype,
    hook_precision,
    name_precision,
)
from harness.accelerators.deepspeed.zero3_weights import (
    LocalGradients,
    NewWeights,
    WholeWeights,
    finish_zero_init,
)
from harness.accelerators.devices import choose_rank_device
from harness.accelerators.distributed.environment import (
    read_launch,
    read_lost_after,
    set_environment,
)
from harness.accelerators.distributed.group import RankGroup, detach_to
from harness.accelerators.distributed.row_split import ShareTracker
from harness.accelerators.distributed.sharded_loader import shard_loaders
from harness.accelerators.distributed.watchdog import Watchdog
from harness.accelerators.optimizer_step import default_step_opt
from harness.accelerators.pinned import make_mover
from harness.accelerators.precision import make_autocast
from harness.accelerators.single import named_tensors
from harness.checks.values import check_count
from harness.data.batch import Batch
from harness.pytree import Options, StateDict, map_tensors
from harness.reshard.consolidated import weights_dtype
from harness.reshard.meta_parameters import count_elements, move_real_tensors
from harness.rng import part_rng_state

T = TypeVar("T")

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base of torch's layers of batch normalization."""


class DeepSpeedAccelerator:
    """Ranks that train one model together with DeepSpeed.

    Parameters
    ----------
    config
        DeepSpeed's own config: a dict or a JSON file, in DeepSpeed's words. None means ZeRO
        0. ``prepare`` fills in ``"auto"`` values and missing batch sizes.
    device
        ``cpu`` or ``cuda``; None takes CUDA if there is any. DeepSpeed uses one kind in a
        process. An index, as in ``cuda:1``, replaces the one of the rank.
    accumulate : >= 1
        Micro-batches per optimizer step, the same as ``gradient_accumulation_steps``.
    precision
        As in ``SingleDevice``: DeepSpeed's ``torch_autocast``. None: as the config says.
    zero_init
        Build models under ``deepspeed.zero.Init``, so that no rank ever holds a whole one.

    Attributes
    ----------
    counted : int or None
        Samples of the present batch that count on this rank. 0 means that the batch is a
        placeholder because the rank has no samples left; None, that the loader is not
        divided over ranks.
    overflows : dict of int
        Steps skipped because gradients overflowed, by optimizer name.

    Raises
    ------
    ValueError
        If the config is wrong, or there are fewer devices than ranks. One rank raises it,
        and the others raise ``PeerError``.

    Notes
    -----
    - Losses are means over samples. If the ranks' batches differ in length, each loss is
      weighted so that gradients are the mean over all samples.
    - A parameter without a gradient in a whole window is stepped with a zero gradient, so
      its momentum and weight decay still apply. Plain torch does not step it.
    - Each rank has its own buffers in training, such as the statistics of BatchNorm. All
      ranks get those of rank 0 before data other than the training data is read, and at
      the end.

    References
    ----------
    DeepSpeed 0.19.8, ``runtime/engine.py``; https://www.deepspeed.ai/docs/config-json/.
    """

    trains_loss = False  # an engine trains the parameters of one module

    def __init__(
        self,
        config: Mapping[str, object] | str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        accumulate: int = 1,
        precision: str | None = None,
        zero_init: bool = False,
    ) -> None:
        advice = "Use 1 to step on every batch."
        check_count("accelerator(accumulate)", accumulate, 1, advice)
        launch = read_launch()
        self.rank, self.local_rank = launch.rank, launch.local_rank
        self.world_size, self.is_main = launch.world_size, launch.rank == 0
        self.device = choose_rank_device(device, launch.local_rank)
        self._move = make_mover(self.device)
        self._given_accumulate = self.accumulate = self.window = accumulate
        self.steps: dict[str, int] = {}
        self.overflows: dict[str, int] = {}
        self._ranks = RankGroup(launch, self.device)
        self._watchdog: Watchdog | None = None
        if self.world_size > 1:
            self._watchdog = Watchdog.find() or Watchdog(
                self._ranks, launch.launcher_pid, lost_after_s=read_lost_after()
            )
        self.meet("an accelerator, which fit, evaluate and predict make")
        self._check_devices()
        self._config = self._ranks.check_on_every_rank(
            lambda: self._read_config(config, precision, zero_init)
        )
        facts = {"config": self._config, "zero_init": zero_init}
        advice = "Pass the same config on every rank."
        self._ranks.check_same("accelerator", facts, advice)
        self._zero_init = zero_init
        self._clear()

    def _clear(self) -> None:
        """Forget what ``prepare`` made."""
        self._model: nn.Module | None = None
        self._filled: Options = {}
        self._engines = EngineSet()
        self._original: OriginalModel | None = None
        self._hooks: list[RemovableHandle] = []
        self._cleanup = ExitStack()
        self._shares = ShareTracker(num_recent=self.accumulate + 8)
        self._whole: WholeWeights | None = None
        self._local_gradients: AbstractContextManager[object] = nullcontext()
        self.num_backwards = 0
        self.before_step: StepHook = ignore_step
        self.after_step: StepHook = ignore_step

    # ------------------------------------------------------------------ prepare

    @property
    def has_optimizer(self) -> bool:
        """True if the config describes the optimizer, which DeepSpeed then builds."""
        return "optimizer" in self._config

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        return name_precision(self._filled or self._config)

    def _read_config(
        self,
        config: Mapping[str, object] | str | Path | None,
        precision: str | None,
        zero_init: object,
    ) -> dict[str, Any]:
        library.choose_kind(self.device.type)
        read = add_precision(read_config(config), precision)
        check_config(read, self._collect_facts())
        validation.check_zero_init(zero_init, zero_stage(read))
        return read

    def _collect_facts(self, **facts: Any) -> ConfigFacts:
        device, fields = self.device.type, library.known_fields()
        return ConfigFacts(
            world_size=self.world_size, device=device, fields=fields, **facts
        )

    def _check_devices(self) -> None:
        if self.device.type == "cuda" and self.world_size > 1:
            uuid = str(torch.cuda.get_device_properties(self.device).uuid)
            devices = self._ranks.gather_objects((socket.gethostname(), uuid))
            self._ranks.check_on_every_rank(lambda: validation.check_devices(devices))

    @contextmanager
    def building(self) -> Iterator[None]:
        """Build the model of a fit inside, with ``zero_init`` divided over the ranks.

        The model may also enter ``deepspeed.zero.Init`` itself.
        """
        library.silence_deepspeed_warnings()
        with ExitStack() as stack:
            stack.enter_context(self._set_local_rank())
            stack.enter_context(library.keep_functions())
            if self._zero_init:
                config = init_config(self._config)
                stack.enter_context(
                    library.divide_layers(config, validation.check_layer)
                )
            if self.guard is not None:
                stack.enter_context(self.guard)
                stack.enter_context(library.divide_copies())
            yield

    def _set_local_rank(self) -> AbstractContextManager[None]:
        """Tell DeepSpeed inside the index of the device, which it reads at any time."""
        index = self.local_rank if self.device.index is None else self.device.index
        return set_environment(LOCAL_RANK=str(index))

    def prepare(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Any] | None = None,
        loaders: Sequence[Any] = (),
        *,
        opt_hparams: Mapping[str, object] | None = None,
    ) -> tuple[nn.Module, dict[str, Any], list[Any]]:
        """Place the model, create the engines, divide the loaders over the ranks.

        Parameters
        ----------
        model
            The same object is returned; call it as before.
        optimizers
            By name. Empty if the config describes the optimizer; None to evaluate only.
        loaders
            The first is the training loader. None stays None.
        opt_hparams
            Values for ``"auto"`` in the config's optimizer.

        Raises
        ------
        ValueError, TypeError
            If the training cannot work. One rank raises it, the others ``PeerError``.

        Notes
        -----
        After it, the random generators of each rank draw numbers of their own, also those
        that were seeded alike: dropout and augmentation differ. Rank 0's are unchanged.
        """
        self.finish()
        try:
            return self._prepare(model, optimizers, loaders, opt_hparams)
        except BaseException:
            with suppress(Exception):
                self.finish(failed=True)
            raise

    def _prepare(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Any] | None,
        loaders: Sequence[Any],
        opt_hparams: Mapping[str, object] | None,
    ) -> tuple[nn.Module, dict[str, Any], list[Any]]:
        self._set_working(True)
        self._model = model
        opts = None if optimizers is None else dict(optimizers)
        first = loaders[0] if loaders else None
        facts = self._collect_facts(
            accumulate=self._given_accumulate,
            batch_size=getattr(first, "batch_size", None),
            num_parameters=count_elements(model),
            opt_hparams=opt_hparams or {},
        )
        self._filled = self._ranks.check_on_every_rank(
            lambda: validation.complete_config(self._config, model, opts, facts)
        )
        self._ranks.check_same(
            "prepare",
            validation.describe_model(model, opts or {})
            | validation.describe_loaders(loaders),
            "Start every rank with the same code and data.",
        )
        self._original = OriginalModel(model)
        if opts is None:
            model.to(self.device)
            self.share_weights(model)
        else:
            self._cleanup.enter_context(self._set_local_rank())
            self._cleanup.enter_context(library.keep_functions())
            self._cleanup.enter_context(library.reset_autocast())
            self._cleanup.callback(library.forget_model, model)
            finish_zero_init(model, self._filled, self.device)
            self._engines = create_engines(
                model, opts, self._filled, self.device, self._count_step
            )
            stage = zero_stage(self._filled)
            if stage > 1 or self.world_size > 1:
                self._local_gradients = LocalGradients(stage)
            if stage == 3:
                wrappers = [engine.engine.optimizer for engine in self._engines]
                self._whole = WholeWeights(model, wrappers)
        engines = self._engines.deepspeed_engines.values()
        self._hooks = hook_precision(model, engines, self._filled, self.device)
        self.accumulate = self.window = int(self._filled["gradient_accumulation_steps"])
        self.steps = dict.fromkeys(self._engines.names, 0)
        self.overflows = dict.fromkeys(self._engines.names, 0)
        facades: dict[str, Any] = {e.name: e.facade for e in self._engines}
        # A window may be read ahead, and each of its batches be recorded with its copy.
        self._shares = ShareTracker(num_recent=2 * self.accumulate + 8)
        sharded = shard_loaders(
            loaders,
            self._ranks,
            self._shares,
            before_eval=self._send_buffers,
            # BatchNorm cannot train on one row.
            has_pairs=any(isinstance(part, BatchNorm) for part in model.modules()),
        )
        self._ranks.check_on_every_rank(
            lambda: validation.check_num_batches(sharded, self.world_size)
        )
        part_rng_state(self.rank, self.device)
        return model, facades, sharded

    def _count_step(self, name: str, applied: bool) -> None:
        counts = self.steps if applied else self.overflows
        counts[name] += 1

    def _send_buffers(self) -> None:
        """Send rank 0's buffers to all ranks: those are saved and returned."""
        if self._model is not None:
            self._send_tensors(self._model, dict(self._model.named_buffers()))

    def share_weights(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0's model, one after another.

        Every rank must call it, with the same model, before ``prepare``.
        """
        self._send_tensors(model, named_tensors(model))

    def _send_tensors(self, model: nn.Module, live: Mapping[str, Tensor]) -> None:
        """Overwrite tensors of a model with those of rank 0."""
        for name, value in self._ranks.send_tensors(live).items():
            # A buffer that grew on one rank alone.
            place, _, leaf = name.rpartition(".")
            model.get_submodule(place)._buffers[leaf] = value

    # ------------------------------------------------------------ forward to step

    @contextmanager
    def optimizing(self, name: str | None = None) -> Iterator[None]:
        """Run the forward and backward of one optimizer inside.

        Only parameters that it owns get gradients.

        Raises
        ------
        ValueError
            If `name` is not an optimizer, or None could mean several.
        RuntimeError
            At ZeRO 1 to 3, if parameters were frozen or unfrozen since ``prepare``.
        """
        with ExitStack() as stack:
            if len(self._engines) and torch.is_grad_enabled():
                stack.enter_context(self._engines.activate(name))
            if self._whole is not None:
                stack.enter_context(self._whole.gathering())
            dtype = find_autocast_dtype(self._filled)
            stack.enter_context(make_autocast(self.device, dtype))
            yield

    def backward(self, loss: Tensor, name: str | None = None) -> None:
        """Add the gradients of ``loss / window``, weighted by the rank's samples.

        Parameters
        ----------
        loss : scalar with a graph
            Mean over the samples of the rank's batch.
        name
            Optimizer; None means that of the present ``optimizing``, or the only one.

        Raises
        ------
        ValueError
            If the loss is not a scalar with a graph, or its graph contains parameters of
            another optimizer.
        RuntimeError
            If there are several optimizers and it is not called inside ``optimizing``.
        """
        engine = self._engines.find(name)
        self._engines.check_loss(engine, loss)
        if self.window > 1:
            loss = loss / self.window
        share = self._shares.present
        weight = 1.0 if share is None else share.weight(self.world_size)
        if weight != 1.0:
            loss = loss * weight
        engine.backward(loss)
        if self._whole is not None:
            self._whole.release()
        self.num_backwards += 1

    @property
    def guard(self) -> AbstractContextManager[object] | None:
        """Refuses operations on divided weights inside; None if none are divided.

        Before ``prepare`` it gathers the weights that operations read.
        """
        if self._model is None and zero_stage(self._config) == 3:
            return NewWeights(self._ranks)
        return self._whole

    @contextmanager
    def counting_backward(self, name: str | None = None) -> Iterator[None]:
        """Check that ``backward`` is called inside."""
        engine = self._engines.find(name)
        before = engine.done
        yield
        if engine.done == before:
            raise missing_backward("under DeepSpeed")

    def is_boundary(self, name: str | None = None) -> bool:
        """True when the window has as many backwards as it should."""
        return self._engines.find(name).done >= self.window

    def step(
        self, name: str | None = None, step_opt: StepOpt = default_step_opt
    ) -> bool:
        """Step at a boundary and clear the gradients; True if weights changed."""
        engine = self._engines.find(name)
        if engine.done < self.window:
            return False
        with self._local_gradients:
            self.before_step(engine.name)
        is_stepped = engine.step(step_opt)
        if is_stepped:
            self.after_step(engine.name)
        return is_stepped

    def drop_window(self) -> None:
        """Clear the gradients of every engine in an open window. Every rank must call it."""
        for engine in self._engines:
            engine.drop_window()

    def clip(
        self, max_norm: float, name: str | None = None, norm_type: float = 2.0
    ) -> Tensor:
        """Clip the total gradient norm in the next ``step``.

        Returns
        -------
        scalar
            The norm before clipping. It is NaN until ``step``, which combines the gradients
            of all ranks, and after a step without a norm.

        Raises
        ------
        ValueError
            If `norm_type` is not 2.
        """
        if norm_type != 2.0:
            msg = f"clip(norm_type): expected 2.0 under DeepSpeed, got {norm_type!r}."
            raise ValueError(f"{msg} DeepSpeed supports only the Euclidean norm.")
        return self._engines.find(name).clip(max_norm)

    # -------------------------------------------------------------------- ranks

    @property
    def counted(self) -> int | None:
        """Samples of the present batch that count; None if the loader is not divided."""
        share = self._shares.present
        return None if share is None else share.count

    def to_device(self, batch: Batch) -> Batch:
        """Move the batch to the device and make it the present one."""
        self._shares.select(batch)
        return self._move(batch)

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along dim 0; their lengths may differ.

        A rank whose batch is a placeholder (``counted`` is 0) adds no rows.
        """
        if self.counted == 0:
            tensor = tensor[:0] if tensor.dim() else tensor.reshape(1)[:0]
        return self._ranks.gather(tensor)

    def reduce(
        self, tensor: Tensor, op: Literal["sum", "mean", "max"] = "sum"
    ) -> Tensor:
        """The tensor reduced over ranks; the same value on each."""
        return self._ranks.reduce(tensor, op)

    def broadcast(self, value: object, src: int = 0) -> Any:
        """The value that rank `src` holds."""
        return self._ranks.broadcast(value, src)

    def gather_objects(self, value: T) -> list[T]:
        """The value of each rank, in order of rank, with its tensors on the CPU."""
        cpu = torch.device("cpu")
        return self._ranks.gather_objects(detach_to(value, cpu))

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return self._ranks.any(flag)

    def meet(self, what: str) -> None:
        """Wait until every rank does the same; an error tells what another rank does."""
        if self._watchdog is not None:
            self._watchdog.barrier.wait(what)

    def _set_working(self, is_working: bool) -> None:
        """Tell the other ranks whether they need this one."""
        if self._watchdog is not None:
            self._watchdog.set_working(is_working)

    def agreement(self, name: str) -> Agreement:
        """Make what ranks use to agree on a batch; every rank must call it."""
        if self._watchdog is None:
            return Agreement()
        return self._watchdog.make_agreement(name)

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        self._ranks.barrier()

    # -------------------------------------------------------------------- state

    def _read_whole(self, param: nn.Parameter) -> Tensor:
        """The whole parameter, in float32 if an engine trains it in less."""
        owner = self._engines.find_owner(param)
        precise = None if owner is None else owner.read_full_precision(param)
        if precise is not None:
            return precise
        if not hasattr(param, "ds_id"):
            return param.data
        with library.import_deepspeed().zero.GatheredParameters([param]):
            return param.data.clone()

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole weights and buffers, detached, on the CPU; empty except on rank 0."""
        original = self._original or OriginalModel(model)
        return original.gather_state_dict(self._read_whole, keep=self.is_main)

    def state_dict(self) -> StateDict:
        """Weights, buffers, optimizers, open gradients and counters of this rank.

        Tensors are live: copy them before the next step. Everything else is plain JSON.
        Only rank 0 returns the tensors that all ranks share.

        Raises
        ------
        RuntimeError
            Before ``prepare``, and in an open window with offloaded optimizer states.
        """
        engine_state.check_closed_window(self._filled, self._engines)
        stage = zero_stage(self._filled)
        model, original = self._prepared_model()
        for engine in self._engines:
            engine.follow_weights()  # which code of the user changed after the last step
        done = {engine.name: engine.done for engine in self._engines}
        state = engine_state.capture_state(
            model, self._engines.deepspeed_engines, stage, done
        )
        if not self.is_main:
            state["shared"] = {}
        if tracked := library.get_tracked_random():
            state["tracked_random"] = tracked
        dtypes = {name: str(dtype) for name, dtype in original.dtypes.items()}
        if {*dtypes.values(), weights_dtype(model)} - {"torch.float32"}:
            state["dtypes"] = dtypes
        return state | {
            "world_size": self.world_size,
            "stage": stage,
            "steps": dict(self.steps),
            "overflows": dict(self.overflows),
            "done": done,
            "layouts": {e.name: e.layout(self.rank) for e in self._engines},
            "members": {engine.name: engine.members for engine in self._engines},
            "shapes": original.shapes,
            "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        }

    def load_state_dict(
        self, state: StateDict, parts: Sequence[str] = ("model", "optimizers")
    ) -> None:
        """Restore what ``state_dict`` returned, all of it or one of the two parts.

        Every rank must call it. What ``take_model_part`` took is enough for ``model``.

        Raises
        ------
        CheckpointError
            If it is from another model, other optimizers, another number of ranks or
            another ZeRO stage.
        """
        stage, engines = zero_stage(self._filled), self._engines.deepspeed_engines
        here = {"world_size": self.world_size, "stage": stage}
        self._ranks.check_on_every_rank(lambda: engine_state.check_origin(state, here))
        # The other ranks get what rank 0 has into their own memory, tensor by tensor.
        forms = map_tensors(state["shared"], lambda tensor: tensor.detach().to("meta"))
        forms = self._ranks.broadcast_objects(forms)
        complete = state if self.is_main else {**state, "shared": forms}
        model, _ = self._prepared_model()
        self._ranks.check_on_every_rank(
            lambda: engine_state.restore_state(model, engines, stage, complete, parts)
        )
        self._ranks.send_tensors(
            engine_state.list_restored(model, engines, forms, parts)
        )
        if "model" in parts and "layouts" not in state:
            engine_state.refresh_masters(engines.values())
        if "optimizers" in parts:
            if "tracked_random" in state:
                library.set_tracked_random(state["tracked_random"])
            self.steps.update(state["steps"])
            self.overflows.update(state["overflows"])
            for engine in self._engines:
                engine.done = state["done"][engine.name]
                engine.note_steps(state["steps"][engine.name])
            if stage == 0:  # only there can parameters be frozen after the fit begins
                for name, param in model.named_parameters():
                    param.requires_grad_(name not in state["frozen"])
        for engine in engines.values():
            engine_state.fetch_persistent(engine)

    def _prepared_model(self) -> tuple[nn.Module, OriginalModel]:
        if self._model is None or self._original is None:
            msg = "accelerator: expected prepare(model, ...) first, got no model."
            raise RuntimeError(f"{msg} Call prepare before this.")
        return self._model, self._original

    def finish(self, *, failed: bool = False, keep: bool = True) -> None:
        """Release the engines; the model is a plain one with whole weights, on the CPU.

        It is the same on every rank that keeps it.

        Every rank must call it. The process group is kept for the next fit.

        Parameters
        ----------
        failed
            This rank ends alone and the others may not call it. With several ranks,
            nothing is gathered, and the model cannot be used any more.
        keep
            False: this rank takes part, but its model gets no values. Its parameters are on
            the ``meta`` device. If no rank keeps them, nothing is gathered.
        """
        for hook in self._hooks:
            hook.remove()
        if self._model is not None and self._original and len(self._engines):
            install = None
            if self.world_size == 1 or not failed:
                self._send_buffers()
                # If no rank keeps the weights, none are gathered.
                read: ReadParameter = self._read_whole
                if not self.any(keep):
                    read = read_no_values
                install = self._original.gather_plain(read, keep=keep)
            for engine in self._engines:
                engine.finish()
            if install is not None:
                install()
                move_real_tensors(self._model, torch.device("cpu"))
        self._cleanup.close()
        self._clear()
        self._set_working(False)
