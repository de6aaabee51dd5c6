"""A drop-in replacement of a pipeline's transformer by an export.

    transformer = DvdqTransformer.from_pretrained("out/wan", delta=0.1)
    pipe = WanPipeline.from_pretrained(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", transformer=transformer, torch_dtype=torch.bfloat16
    )
    video = pipe("a cat in the snow").frames[0]
    for record in transformer.trace: print(record.step, record.branch, record.bits, record.reason)

The pipeline's own code runs unchanged: scheduler, guidance, callbacks, VAE. Every call of its transformer goes to the
engine that the step controller picks.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from dvdquant.clashes import Clash, refuse_clashes
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import CancelSignal
from dvdquant.deploy.pipelines.adapters import get_adapter
from dvdquant.deploy.pipelines.fixed_place import FixedPlace
from dvdquant.deploy.pipelines.from_pipe import keep_in_from_pipe
from dvdquant.deploy.pipelines.lora_adapters import Adapters, LoraAdapters
from dvdquant.deploy.pipelines.request_state import RequestTable
from dvdquant.deploy.pipelines.runner_view import RunnerView
from dvdquant.deploy.pipelines.unsupported import COPIED, WholeEngine, refuse
from dvdquant.deploy.sessions import EngineSession, open_session
from dvdquant.deploy.sessions.guidance_pair import paired
from dvdquant.deploy.switching.controller import StepController, StepInfo, StepRecord
from dvdquant.deploy.switching.defaults import CachePolicy
from dvdquant.deploy.switching.factory import make_controller
from dvdquant.deploy.switching.gbs import Weighting
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hardware.weights import WeightPolicy
from dvdquant.hub.locate import locate_export
from dvdquant.model.diffusers_hooks import check_pipeline_hooks
from dvdquant.system.plugin_file import Plugins, plugin_paths

__all__ = ["DvdqTransformer", "at_step"]

log = logging.getLogger(__name__)

# Options of diffusers' from_pretrained that say nothing an export could differ in.
_HARMLESS = ("local_files_only", "low_cpu_mem_usage", "use_safetensors")
check_pipeline_hooks()
# id of a transformer -> the branch that its pipeline is calling. Each thread and each asyncio task has its own context.
_BRANCHES: ContextVar[Mapping[int, tuple[str, Mapping[str, Any]]]] = ContextVar("dvdquant_branches")
# The step of the loop and the number of steps, where whoever runs a pipeline says them.
_LOOP: ContextVar[tuple[int, int] | None] = ContextVar("dvdquant_loop", default=None)


def at_step(step: int | None, steps: int = 0) -> None:
    """Say where a denoising loop is, for a pipeline that does not pass it and has two transformers.

    Each of two transformers sees some of the steps alone, and would count them from 0. It holds in this thread or asyncio
    task until it is said again.

    Args:
        step: The index of the step that follows, or None after the last one.
        steps: The number of steps.
    """
    _LOOP.set(None if step is None else (step, steps))


class DvdqTransformer(LoraAdapters, FixedPlace, WholeEngine, ModelMixin, ConfigMixin):
    """The transformer of a diffusers pipeline, executed by the engines of an export, one bit-width per denoising step.

    It has no blocks, and only one parameter, which is empty. ``config`` is that of the exported transformer. ``dtype``
    is the export's; the pipeline casts latents and embeddings to it. ``device`` is where the engines are. Inputs may be
    on any device, and outputs go back to the latents' device.

    A batch larger than the export's is run in slices of the export's batch, one after the other. All slices of a step
    run on the same engine.

    Several pipelines may share it, also in several threads. Every request has its own decisions, history and trace (see
    :mod:`dvdquant.deploy.pipelines.request_state`), and the engines run one call after the other. A deep copy shares
    the engines.

    Args:
        session: An open session.
        controller: The rule that decides the bits of each step. Every request gets a fresh controller with the same
            rule.
    """

    def __init__(self, session: EngineSession, controller: StepController) -> None:
        super().__init__()
        keep_in_from_pipe()
        # In _name_or_path diffusers notes where a model was loaded from, also in the config.json that it saves.
        config = {**session.family.config, "_name_or_path": str(session.artifact.root)}
        self.register_to_config(**config)
        self._session = session
        self._adapter = get_adapter(session.family, session.sizes, session.dtype)
        # Accelerate's offloading asks for the device of a module's first parameter.
        placement = torch.empty(0, dtype=session.dtype, device=session.device)
        self.register_parameter("placement", torch.nn.Parameter(placement, requires_grad=False))
        self._moved = False
        self._adapters = Adapters()
        self._requests = RequestTable(session, controller)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        component: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        backend: str = "auto",
        device: str = "auto",
        mode: str = "switch",
        delta: float | None = None,
        schedule: Schedule | str | Path | None = None,
        callback: Callable[[StepInfo], Any] | None = None,
        cache: StepCachePolicy | float | None = None,
        cache_policy: CachePolicy | None = None,
        branch_policy: str = "shared",
        last_high: int | None = None,
        weighting: Weighting | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        attention: str | None = None,
        attention_backend: str | None = None,
        cfg_parallel: str | None = None,
        weights: WeightPolicy = "auto",
        fuse: bool | None = None,
        cuda_graphs: bool = False,
        plugins: Plugins = (),
        **unknown: Any,
    ) -> Self:
        """Open an export as the transformer of a diffusers pipeline.

        Args:
            pretrained_model_name_or_path: The export folder, or a repository of the hub, ``user/name``.
            component: ``transformer``, or ``transformer_2`` of Wan 2.2. The default is the first of the export.
            subfolder: The same as ``component``, by diffusers' name.
            revision: The branch, tag or commit of a repository.
            backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            mode: ``switch`` (δ-GBS), ``a4`` or ``a8`` (always that engine), ``planned`` (with ``schedule``) or
                ``callback`` (with ``callback``). The last two follow from their argument.
            delta: δ of ``switch``. 0 gives 8 bits in every step. Infinity gives 4 bits from step 2 on, except in the
                last ``last_high`` steps. The default is 0.12.
            schedule: A schedule of ``dvdq-plan``, or the path of one.
            callback: A function that is asked for the bits of every step.
            cache: The settings of the step cache. A number is a threshold for the policy.
            cache_policy: What predicts which steps can be skipped: ``forecast``, ``line``, ``easycache`` or ``magcache``.
                It switches the cache on, with a threshold of its own where ``cache`` is None. The default is the family's.
            branch_policy: ``shared`` or ``separate`` decisions of the branches of guidance, see
                :class:`StepController`.
            last_high: The number of last steps of ``switch`` that run on 8 bits. The default is 2; the published rule
                has 0.
            weighting: ``step`` (default) multiplies a change by how far its step moves. ``none`` is the published rule.
            torch_dtype: Refused unless it is the export's dtype, or "auto".
            dtype: The same as ``torch_dtype``, by its newer name.
            compile: Run in PyTorch with the transformer's blocks compiled by torch.compile.
            attention: ``16``, ``int8`` or ``fp8`` for self-attention of long sequences in PyTorch sessions. The default
                is the recipe's.
            attention_backend: The library that computes it, or ``reference``, the definition in plain PyTorch.
            cfg_parallel: A second device, such as ``cuda:1``, where the second branch of guidance runs at the same time as
                the first, on a session of its own. Outputs and decisions are those of one device. Without guidance, and
                where a pipeline runs both branches in one call of the export's batch, the device is not used.
            weights: ``auto``, ``packed`` (4 bits a weight) or ``expanded`` (as the GPU multiplies them), see
                :func:`.sessions.open_session`.
            fuse: Run in PyTorch with what comes before quantized layers in their kernels. The default is to do so where
                ``compile`` is on and the GPU has the kernels.
            cuda_graphs: Repeat steps as CUDA graphs, where launches count, see :func:`.sessions.open_session`.
            plugins: TensorRT plugin libraries that engines need, one path or several. Their code runs: take none that you do
                not trust.
            **unknown: Refused, except options that make no difference here.

        Raises:
            OutputError: The folder is no export.
            EngineError: No engine fits.
            UnsupportedError: An option does not apply, or two options contradict each other, or a
                plugin library is not there.
        """
        # 1. The options.
        skips = cache if cache_policy is None else cache_policy
        _check_options(mode, delta, schedule, callback, last_high, weighting, skips)
        if unknown.get("use_safetensors") is not False:
            unknown = {name: value for name, value in unknown.items() if name not in _HARMLESS}
        if unknown:
            options = [name for name in inspect.signature(cls.from_pretrained).parameters if name != "unknown"]
            raise UnsupportedError(
                f"DvdqTransformer.from_pretrained has no option {next(iter(unknown))}", available=options[1:]
            )
        libraries = plugin_paths(plugins)
        # 2. The export, and the dtype that was asked for.
        artifact = Artifact.open(locate_export(pretrained_model_name_or_path, revision))
        name = component or subfolder or artifact.components[0]
        for option, wanted in (("torch_dtype", torch_dtype), ("dtype", dtype)):
            if wanted not in (None, "auto", artifact.dtype, str(artifact.dtype).removeprefix("torch.")):
                raise UnsupportedError(
                    f"{option} is {wanted!s:.80}", available=str(artifact.dtype), fix="export again with --dtype"
                )

        # 3. The engines and their controller.
        def opener(place: str) -> EngineSession:
            return open_session(
                artifact,
                name,
                backend=backend,
                device=place,
                compile=compile,
                attention=attention,
                attention_backend=attention_backend,
                weights=weights,
                fuse=fuse,
                cuda_graphs=cuda_graphs,
                plugins=libraries,
            )

        session = opener(device)
        if cfg_parallel is not None:
            session = paired(session, opener, cfg_parallel)
        try:
            if isinstance(schedule, (str, Path)):
                schedule = Schedule.load(schedule, artifact.manifest)
            controller = make_controller(
                mode,
                component=session.component,
                family=session.family.name,
                bits=session.bits,
                delta=delta,
                schedule=schedule,
                callback=callback,
                cache=cache,
                cache_policy=cache_policy,
                branch_policy=branch_policy,
                last_high=last_high,
                weighting=weighting,
            )
            return cls(session, controller)
        except BaseException:
            session.close()
            raise

    # -------------------------------------------------------------------------------------------------- what it decides

    def use(self, controller: StepController) -> None:
        """Decide the coming requests with another controller. Trace and history of this thread or task begin anew.

        Args:
            controller: The rule that decides the coming requests.
        """
        self._requests.use(controller)

    @property
    def runner(self) -> RunnerView:
        """Return the runner of this thread's or task's last (or running) request, else of the latest of any.

        It has ``summary()`` and ``on_step``. A callback that is set here gets the record of every call in this context:
        in this thread or asyncio task, in tasks made from there, and in ``asyncio.to_thread``.
        """
        return RunnerView(self._requests)

    @property
    def cancel(self) -> CancelSignal | None:
        """Return the event that cancels the requests of this context, or None.

        Setting it is for this context's running and coming requests, as ``runner.on_step`` is: in this thread or asyncio
        task, in tasks made from there, and in ``asyncio.to_thread``. Once the event is set (``threading.Event``, or
        anything with ``is_set()``), the next call of the transformer raises Cancelled, and so does the pipeline. Text
        encoder and VAE stop as well within :func:`dvdquant.deploy.cancel.cancel_inside`.
        """
        return self._requests.cancel

    @cancel.setter
    def cancel(self, cancel: CancelSignal | None) -> None:
        self._requests.cancel_by(cancel)

    @property
    def session(self) -> EngineSession:
        """Return the session that runs the engines."""
        return self._session

    @property
    def trace(self) -> list[StepRecord]:
        """Return every call of this thread's or task's last (or running) request, in order.

        If it had no request, the trace is that of the latest request of any thread.
        """
        return self._requests.latest.runner.trace

    def close(self) -> None:
        """Free the engines' memory, after a call that is running. A later call raises EngineError."""
        self._session.close()
        self._requests.forget_outputs()

    # --------------------------------------------------------------------------------------------- the pipeline's calls

    @contextlib.contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Note the branch that the pipeline calls in the ``with`` block.

        Args:
            name: The name of the branch: ``cond``, ``uncond`` or ``cond_uncond``.
            **where: ``step_index`` and ``num_inference_steps``, which some pipelines pass.
        """
        before = _BRANCHES.get({})
        _BRANCHES.set({**before, id(self): (name, where)})
        try:
            yield
        finally:
            _BRANCHES.set(before)

    def begin_request(self, steps: int | None = None) -> None:
        """Start a new request with an empty history at the next call in this context.

        This is rarely needed: pipelines report the end of a request by themselves, also of an interrupted one.

        The next call may be in this thread or asyncio task, in a task made from there, or in ``asyncio.to_thread``. A
        pool of threads does not get the context: call this in the function that the pool runs, or submit
        ``contextvars.copy_context().run``.

        Args:
            steps: The number of steps of the request. It matters if the pipeline does not pass the number (all but
                WanPipeline, in diffusers 0.42) and the controller treats the last steps differently. The step cache
                may skip any step but the last, and ``last_high`` counts from the end. Without the number,
                ``weighting`` does nothing.

        Raises:
            UnsupportedError: ``steps`` is no number of steps, or the schedule is for another number.
        """
        if steps is not None:
            number = 0 if isinstance(steps, bool) or not hasattr(steps, "__index__") else operator.index(steps)
            if number < 1:
                raise UnsupportedError(
                    f"begin_request got {steps!r:.80}", available="a number of steps from 1, or None"
                )
            steps = number
        self._requests.begin(steps)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # A pipeline calls this when a request has ended. The trace stays until the next request.
        del recurse
        self._requests.end()

    @torch.compiler.disable  # a compiled caller runs the engines as they are
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer on the arguments of the family's diffusers class.

        Args:
            *args: The positional arguments of that class's ``forward``.
            **kwargs: The keyword arguments of that class's ``forward``.

        Returns:
            ``Transformer2DModelOutput`` with the sample in ``self.dtype``, or a tuple with ``return_dict=False``.

        Raises:
            ShapeError: A size or text length is outside the export's profile, or inputs are for other numbers of
                samples.
            UnsupportedError: ``attention_kwargs`` are given, an input is not in the graph, or gradients are asked for.
            EngineError: The engine failed, or gave NaN at the highest bits too.
            Cancelled: The event :attr:`cancel` is set.
        """
        arguments = self._adapter.bind(args, kwargs)
        return_dict = arguments.pop("return_dict", True)
        if arguments.pop("attention_kwargs", None):
            refuse(
                "attention_kwargs", "attention runs inside the engine", "leave them out; a LoRA is fused before export"
            )
        floats = [value for value in arguments.values() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(value.requires_grad for value in floats):
            refuse("a call with gradients", "an engine has none", "call it under torch.no_grad()")
        with torch.no_grad():
            sample = self._run(arguments)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, arguments: Mapping[str, Any]) -> Tensor:
        inputs = self._adapter.inputs(arguments)
        branch, where = _BRANCHES.get({}).get(id(self), (None, {}))
        given, steps = where.get("step_index"), where.get("num_inference_steps")
        if given is None and (said := _LOOP.get()) is not None:
            given, steps = said
        timestep = float(inputs["timestep"].max())
        if not math.isfinite(timestep):
            raise ShapeError(f"the timestep is {timestep}", available="a finite number", fix="check the scheduler")
        text, latents = arguments["encoder_hidden_states"], arguments["hidden_states"]
        known = text if isinstance(text, Tensor) else None
        with self._requests.call(branch, given, steps, timestep, known, latents) as place:
            whole = self._adapter.run(place.runner, inputs, place.branch, place.step, steps)
            place.note(latents, whole)
        return whole.to(arguments["hidden_states"].device)

    # ------------------------------------------------------------------------------------------------- copies, what it is

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return another transformer on the same engines, with its own requests. Closing one closes both."""
        twin = type(self)(self._session, self._requests.controller.fresh())
        twin._adapters = self._adapters
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> Self:
        """Return another transformer on the same engines, see :meth:`__deepcopy__`."""
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickling.

        Raises:
            UnsupportedError: Engines cannot be pickled.
        """
        refuse("pickle", *COPIED)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes held between calls: weights once, engines and scratch.

        Args:
            return_buffers: Without effect.
        """
        del return_buffers
        return sum(self._session.resident_bytes().values())

    def extra_repr(self) -> str:
        """Return class, component, bits, backend and device as text."""
        session = self._session
        bits = " and ".join(f"a{bits}" for bits in session.bits)
        return f"{self.config['_class_name']} {session.component}, {bits}, {session.backend} on {session.device}"


def _check_options(
    mode: str,
    delta: Any,
    schedule: Any,
    callback: Any,
    last_high: int | None,
    weighting: str | None,
    cache: Any = None,
) -> None:
    """Refuse options that contradict each other, as the command dvdq-run does.

    Raises:
        UnsupportedError: Two options contradict each other.
    """
    follows = schedule is not None or callback is not None  # then the mode follows from this argument
    switches = mode == "switch" and not follows
    rule = "callback" if callback is not None else "schedule"
    clashes = [
        Clash(
            schedule is not None and callback is not None,
            "schedule says the bits of each step, and so does callback",
        ),
        Clash(
            schedule is not None and mode not in ("switch", "planned"),
            f"schedule says the bits of each step, and so does mode={mode!r:.40}",
        ),
        Clash(
            callback is not None and mode not in ("switch", "callback"),
            f"callback says the bits of each step, and so does mode={mode!r:.40}",
        ),
    ]
    # Of a fixed width, last steps are those that the step cache computes.
    for_cache = cache is not None and re.fullmatch(r"a\d+", str(mode)) is not None and not follows
    for name, value in (("delta", delta), ("last_high", last_high), ("weighting", weighting)):
        what = f"{rule} says the bits of each step" if follows else f"mode={mode!r:.40} does not switch"
        allowed = switches or (name == "last_high" and for_cache)
        clashes.append(
            Clash(value is not None and not allowed, f"{name} is for switching engines by delta, and {what}")
        )
    refuse_clashes(clashes)
