"""DeepSpeed as the training engine of one rank of a learner group."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  (public; not in __all__)

from rlhf_ray.engines.torch_engine import MOMENTS, adam_state, load_adam_state, move_frozen
from rlhf_ray.models.adapters import compute_in_base_dtype
from rlhf_ray.models.forward import has_fp32_head
from rlhf_ray.observability.phases import report

FLOAT16_LOSS_SCALE = 2.0**12
"""Under it the gradients that pass through a float16 base do not vanish; halved by an overflow.
DeepSpeed's own scaling is for parameters in float16 alone."""
GROWTH_STEPS = 1000
"""Steps after which a scale that overflows have lowered is doubled."""


def join_group(rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """Join the process group of this learner group.

    Call it before anything else imports DeepSpeed, which reads these variables at import.
    """
    cuda = torch.cuda.is_available()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",  # Ray shows each actor its own GPU alone
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    backend, timeout = "nccl" if cuda else "gloo", timedelta(seconds=timeout_s)
    store = _meeting_point(rank, world_size, address, port, timeout)
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=torch.device("cuda", 0) if cuda and world_size > 1 else None,
    )
    import_deepspeed(world_size)
    import deepspeed

    # Uses the process group from above. Without auto_mpi_discovery=False, a missing variable would
    # make it look for mpi4py.
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def wait_for_ranks(have: str) -> None:
    """Wait until the other ranks have done something, in a phase of its own: one may hang."""
    report(f"waiting until the other ranks have {have}", waits=True)
    torch.distributed.barrier()


def import_deepspeed(world_size: int) -> None:
    """Import DeepSpeed, and keep it from compiling an operation when it starts.

    On a CPU it would: an all-reduce for tensor-parallel inference, which nothing here calls. That
    takes a minute of a compiler in each environment, and 69 MB of shared memory for each rank.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(world_size))
    report("importing DeepSpeed")
    import deepspeed

    # DeepSpeed asks which operations this machine can compile, which runs a compiler, unless the
    # answer is there.
    operations: Any = deepspeed.ops
    operations.__compatible_ops__ = {}
    if cuda:  # settings of the user's may have other operations compiled
        from rlhf_ray.engines.deepspeed.build_locks import wait_for_builds

        wait_for_builds()


def _meeting_point(
    rank: int, world_size: int, address: str, port: int, timeout: timedelta
) -> TCPStore:
    """Return the group's store; PyTorch's own would listen on every interface of rank 0's node."""
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, port), family=family, backlog=world_size)
        listener = server.detach()  # the store closes it
    return TCPStore(address, port, world_size, rank == 0, timeout, master_listen_fd=listener)


class DeepSpeedEngine:
    """One rank; AdamW over the trainable parameters, sharded as the ZeRO stage says."""

    _overflows = True  # as gradients in float16 may
    _scales_loss = False  # by itself, where DeepSpeed doesn't know of the base's float16

    def __init__(
        self,
        module: nn.Module,
        *,
        learning_rate: float,
        epsilon: float,
        max_grad_norm: float,
        zero_stage: int,
        dtype: str,
        settings: Mapping[str, object],
    ) -> None:
        import deepspeed

        self._zero_stage = zero_stage
        if keeps_fp32 := has_fp32_head(module):
            compute_in_base_dtype(module)
        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=learning_rate, eps=epsilon, weight_decay=0.0)
        initialize: Any = deepspeed.initialize  # its annotations are too narrow
        self._engine, self._optimizer, *_ = initialize(
            model=module,
            model_parameters=trainable,
            optimizer=optimizer,
            # In bf16 and fp16 DeepSpeed would cast all parameters; at stage 3 all that are trained
            # must have one data type.
            config=_deepspeed_config(
                zero_stage, "float32" if keeps_fp32 else dtype, max_grad_norm, settings
            ),
        )
        self._overflows = dtype == "float16"
        self._scales_loss = keeps_fp32 and dtype == "float16"
        if self._scales_loss:
            self._set_loss_scale(FLOAT16_LOSS_SCALE)
        self.model = self._engine  # ZeRO 3 counts micro-batches in the engine's own forward
        self.module = self._engine.module
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self._trainable = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self._num_steps = 0

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        return self._engine.device

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Gather trainable parameters while they are read or written; all ranks must enter."""
        if self._zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._trainable.values()), modifier_rank=0):
            yield

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients; DeepSpeed averages them over the ranks in every call."""
        self._engine.backward(loss)

    def step(self) -> float | None:
        """Clip, step and clear the gradients; return their norm before clipping.

        None: the gradients overflowed in float16, so there was no step but the loss scale is lower.
        In other data types DeepSpeed takes none either where gradients are not finite, but that is
        no matter of scale: the norm is then infinite.
        """
        num_skipped = self._engine.skipped_steps
        self._engine.step()
        if self._engine.skipped_steps > num_skipped:
            if not self._overflows:
                return float("inf")
            if self._scales_loss:
                self._set_loss_scale(self._optimizer.loss_scale / 2)
            return None
        self._num_steps += 1
        if self._scales_loss and self._num_steps % GROWTH_STEPS == 0:
            self._set_loss_scale(self._optimizer.loss_scale * 2)
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _set_loss_scale(self, scale: float) -> None:
        self._optimizer.override_loss_scale(min(max(scale, 1.0), FLOAT16_LOSS_SCALE))

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self._adam().param_groups:
            group["lr"] = rate

    def discard(self) -> None:
        """Drop the gradients. DeepSpeed frees them only in a step, so take one and undo it."""
        state = self.export_state()
        self.step()
        self.import_state(state)

    def sleep(self) -> None:
        """Move the frozen weights to main memory."""
        move_frozen(self.module, torch.device("cpu"))

    def wake(self) -> None:
        """Move the frozen weights back."""
        move_frozen(self.module, self.device)

    def sum_over_ranks(self, value: float) -> float:
        """Return the sum over the group, in float64."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total)

    def export_state(self) -> dict[str, torch.Tensor]:
        """Return fp32 weights and moments by parameter name, the same at any number of ranks.

        DeepSpeed's own ZeRO checkpoints do not load at another number of ranks.
        """
        state = adam_state(
            self._trainable, weight=self._weight, moment=self._moment, num_steps=self._num_steps
        )
        if self._scales_loss:
            state["loss_scale"] = torch.tensor(self._optimizer.loss_scale)
        return state

    def import_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state from `export_state`, of any number of ranks."""
        if int(state["num_steps"]) and not self._num_steps:
            self._make_moments()
        load_adam_state(
            self._trainable, state, set_weight=self._set_weight, set_moments=self._set_moments
        )
        self._num_steps = int(state["num_steps"])
        if self._scales_loss:  # a state of another engine or data type has none
            self._set_loss_scale(float(state.get("loss_scale", FLOAT16_LOSS_SCALE)))
        for entry in self._adam().state.values():
            if "step" in entry:
                entry["step"] = torch.tensor(float(self._num_steps))
            for key in MOMENTS if not self._num_steps else ():
                if key in entry:
                    # A state from before the first step has no moments to overwrite these.
                    entry[key].zero_()

    def _make_moments(self) -> None:
        """Take a step that moves nothing: Adam allocates its moments in its first step."""
        rates = [group["lr"] for group in self._adam().param_groups]
        for group in self._adam().param_groups:
            group["lr"] = 0.0
        tokens = torch.ones(1, 2, dtype=torch.long, device=self.device)
        output = self._engine(input_ids=tokens, attention_mask=tokens)
        self._engine.backward(getattr(output, "logits", output).sum() * 0.0)
        self._engine.step()
        for group, rate in zip(self._adam().param_groups, rates, strict=True):
            group["lr"] = rate

    def _adam(self) -> torch.optim.Optimizer:
        """Return the AdamW inside DeepSpeed's wrapper."""
        inner = self._optimizer.optimizer
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def _weight(self, param: nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(param)
        assert full is not None
        return full

    def _moment(self, param: nn.Parameter, key: str) -> torch.Tensor | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(param, key)

    def _set_weight(self, param: nn.Parameter, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(param, value.to(self.device))
        with self.whole_parameters():
            param.data.copy_(value)  # the low-precision copy that forwards read; not set above

    def _set_moments(
        self, param: nn.Parameter, moments: Mapping[str, torch.Tensor], num_steps: int
    ) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for key in MOMENTS:
            safe_set_full_optimizer_state(param, moments[key].to(self.device), key)


def _deepspeed_config(
    zero_stage: int, dtype: str, max_grad_norm: float, settings: Mapping[str, object]
) -> dict[str, object]:
    further = dict(settings)
    zero = further.pop("zero", {})
    assert isinstance(zero, dict)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The caller owns the step boundary: micro-batches hold unequal numbers of tokens.
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": zero_stage, **zero},
        # DeepSpeed refuses torch's AdamW otherwise; its own FusedAdam has to be compiled.
        "zero_allow_untested_optimizer": True,
        # Nor does it offload torch's AdamW otherwise (policy.deepspeed.zero.offload_optimizer).
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 10**9,
        **further,
    }
