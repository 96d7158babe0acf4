"""The base of every LightningModule here: optimiser, checkpoints of what trains, NaN stop, export.

A subclass gives the model and the steps, and nothing else:

    class AlignmentModule(RefragLightningModule):
        def __init__(self, encoder: str, decoder: str, *, train: list[str] | None = None, **kwargs):
            super().__init__(**kwargs)                  # lr, weight_decay, warmup, …
            self.encoder, self.decoder, self.train_parts = encoder, decoder, train

        def configure_model(self):
            if self.model is None:                      # Lightning calls it more than once
                self.model = RefragModel.from_encoder_decoder(…)
                self.model.set_trainable(…)

        def training_step(self, batch, batch_idx):
            mean = …                                    # over this rank's targets
            shares, means = self.step_means({"loss": mean}, self.count_targets(batch))
            self.log_train(means, num_tokens=tokens)
            return shares["loss"]

        def count_targets(self, batch):
            return {"loss": …}                          # how many the mean above is of

`training/hello.py` is a whole one to begin with. Do not override `state_dict`, `load_state_dict` or
`configure_callbacks`; call `super()` in the hooks `setup`, `on_fit_start`, `on_train_start`,
`on_train_batch_start`, `on_before_backward`, `on_save_checkpoint` and
`configure_gradient_clipping`. Everything of the training batches that is logged has to be logged by
the step (`log_train` does): Lightning does not save the running means of an epoch, so they would
differ after a resume.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from refrag_lightning.model.files import check_finite, replace_folder
from refrag_lightning.model.trainable import TrainableParts
from refrag_lightning.training.across_ranks import (
    AccumulatedStep,
    global_means,
    mean_over_ranks,
    num_ranks,
)
from refrag_lightning.training.finite import FiniteWatch
from refrag_lightning.training.gradients import clip_by_norm, clip_by_value
from refrag_lightning.training.optim import WarmupCosine, adamw, parameter_groups
from refrag_lightning.training.precision import check_precision
from refrag_lightning.training.random_states import RandomStates
from refrag_lightning.training.restart import begin_epoch_anew, leave_finished_epoch
from refrag_lightning.training.sharded import ShardedStrategy
from refrag_lightning.training.stop import StopTogether
from refrag_lightning.training.trained_state import check_trained_state, frozen_keys


class RefragLightningModule(LightningModule):
    """Base of the modules that train a `RefragModel` (see the module's docstring).

    Args:
        lr: Peak learning rate: one number, or one a part, such as
            `{projector: 1.0e-3, decoder: 5.0e-5}`.
        weight_decay: Of matrices; biases, norms and scalars never decay.
        betas: AdamW's.
        warmup: Warm-up in optimiser steps (a whole number), or as a share of the run (0.05).
        lr_floor: Learning rate at the end of the cosine, as a share of its peak.

    Attributes:
        model: The model, built by `configure_model`; None before.
        num_tokens: Tokens that this rank has trained on since it started, counted by `log_train`.
        tokens_before: Tokens that all ranks had trained on when the run was resumed.
    """

    model: nn.Module | None
    tokenizer: Any = None

    def __init__(
        self,
        *,
        lr: float | dict[str, float] = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: int | float = 0.05,
        lr_floor: float = 0.1,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup = warmup
        self.lr_floor = lr_floor
        self.model = None
        self.num_tokens = 0
        self.tokens_before = 0
        # The frozen weights come from the base models, so a checkpoint has only the others.
        self.strict_loading = False
        self._watch = FiniteWatch()
        self._loss_of_all: Any = None
        # Of the optimiser's step, where it has several micro-batches; see `step_means`.
        self._micro_batches: Sequence[Any] = ()
        self._micro_batch = 0
        self._step: AccumulatedStep | None = None
        self.save_hyperparameters()

    # What a subclass gives

    def configure_model(self) -> None:
        """Builds `self.model` unless it is there; freezes what does not train."""
        raise NotImplementedError

    def count_targets(self, batch: Any) -> dict[str, Tensor | float]:
        """How many targets, or their summed weight, the mean of each loss of a batch is of.

        What `step_means` gets; needed where gradients are accumulated. It is called on the CPU, for
        all batches of an optimiser's step before the first one is trained on.

        Args:
            batch: A training batch.

        Returns:
            Name of a loss -> number.
        """
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Writes the model and its tokenizer as one folder for `from_pretrained`, in one step.

        Args:
            folder: Where to; may exist.
        """
        assert self.model is not None
        with replace_folder(folder) as new:
            self.model.save_pretrained(new)  # type: ignore[operator]
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(new)

    def usage(self, folder: Path) -> str:
        """The lines of Python that use an exported `folder`, printed at the end of a run."""
        return (
            "from refrag_lightning import RefragModel, RefragTokenizer\n"
            f'model = RefragModel.from_pretrained("{folder}")\n'
            f'tokenizer = RefragTokenizer.from_pretrained("{folder}")'
        )

    def describe(self) -> list[str]:
        """Further lines on what is about to be done, printed at the start of a run."""
        return []

    # Means over an optimiser's step

    def begin_micro_batch(self, number: int, step: Sequence[Any]) -> None:
        """Notes which micro-batch of an accumulated gradient comes next; data modules call it.

        Args:
            number: Its place among the step's batches.
            step: The step's batches, in order.
        """
        if number == 0 or step is not self._micro_batches:
            self._step = None
        self._micro_batch, self._micro_batches = number, step

    def step_means(
        self, means: Mapping[str, Tensor], counts: Mapping[str, Tensor | float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Turns means over a batch's targets into shares of the means over an optimiser's step.

        Each target of the step then weighs the same, whichever rank and micro-batch it is in; see
        `across_ranks`. To be called once in a training step, on every rank.

        Args:
            means: Name -> mean over this rank's targets, a scalar with a gradient. Every rank has
                to give the same names.
            counts: Name -> how many targets, or their summed weight, the mean is of: what
                `count_targets` gives.

        Returns:
            The shares, to be summed up and returned by the step; and the means over all ranks and
            the step's micro-batches so far, without gradient, to be logged.

        Raises:
            ValueError: If gradients are accumulated, but the data does not say over which batches.
        """
        num_batches = self.trainer.accumulate_grad_batches
        if num_batches == 1:
            self._step = None
            return global_means(means, counts)
        is_last = self._micro_batch + 1 == len(self._micro_batches)
        # As Lightning decides whether the optimiser steps after this batch.
        if not self._micro_batches or is_last == self.trainer.fit_loop._should_accumulate():
            raise ValueError(
                f"trainer.accumulate_grad_batches ({num_batches}) needs a ResumableDataModule, "
                "which gives the batches of an optimiser's step together, and may not change "
                "while an epoch begins"
            )
        if self._step is None:
            counted = [self.count_targets(batch) for batch in self._micro_batches]
            totals = {name: sum(count[name] for count in counted) for name in means}
            self._step = AccumulatedStep(totals, num_batches=num_batches, device=self.device)
        return self._step.means(means, counts)

    # Logging

    def log_train(
        self,
        metrics: dict[str, Any],
        *,
        num_tokens: int = 0,
        weights: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Logs `train/<name>` for each metric, every `log_every_n_steps`, and counts tokens.

        To be called once a step, on every rank. A metric that a batch has no value of (a task that
        it lacks) is not logged for it. What is logged is the mean over the ranks that have a value,
        and over the micro-batches of an optimiser's step.

        Args:
            metrics: Name -> scalar, float or torchmetrics metric. `loss` is to be the global one
                (see `step_means`): every rank looks whether it is finite.
            num_tokens: Tokens of this batch on this rank, for the tokens per second.
            weights: Name -> what a metric is the mean of on this rank, such as the number of
                targets; for a name that is left out ranks count the same, and it is that of the
                whole step, as `step_means` gives it.
        """
        self.num_tokens += num_tokens
        ends_step = True
        if self._step is not None:
            metrics, weights = self._step.figures(metrics, weights or {})
            ends_step = self._micro_batch + 1 == len(self._micro_batches)
        if num_ranks() > 1:
            self._loss_of_all = metrics.get("loss")
            every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and ends_step and (self.global_step + 1) % every == 0:
                values = {k: v for k, v in metrics.items() if isinstance(v, Tensor | float | int)}
                metrics = metrics | mean_over_ranks(values, weights or {}, device=self.device)
        # A number would be brought to the device by Lightning, which waits for the device.
        named = {
            f"train/{name}": torch.full((), value, device=self.device, dtype=torch.float32)
            if isinstance(value, float | int)
            else value
            for name, value in metrics.items()
        }
        # Lightning would go on to log the value of an earlier batch.
        results = self.trainer._results
        if results is not None:
            kept = {f"training_step.{name}" for name in named}
            for key in [k for k in results if k.startswith("training_step.") and k not in kept]:
                del results[key]
        self.log_dict(named, on_step=True, on_epoch=False)

    def total_tokens(self) -> int:
        """Tokens trained on so far by all ranks, those before a resume among them.

        Every rank has to call it.
        """
        here = torch.tensor(self.num_tokens, device=self.device)
        return self.tokens_before + int(self.trainer.strategy.reduce(here, reduce_op="sum"))

    # Optimiser

    def configure_optimizers(self) -> Any:
        """AdamW and warm-up + cosine over the run's optimiser steps.

        Raises:
            ValueError: If the number of steps cannot be known.
        """
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError(
                "the number of training steps is unknown, which the learning rate's cosine needs: "
                "set trainer.max_steps, or max_epochs with a data set of known length"
            )
        groups = parameter_groups(
            self.named_parameters(), lr=self.lr, weight_decay=self.weight_decay
        )
        # Before the scheduler is built: it puts the first step's rates into the groups.
        self._configured = [
            {"lr": group["lr"], "weight_decay": group["weight_decay"], "betas": tuple(self.betas)}
            for group in groups
        ]
        optimizer = adamw(groups, betas=tuple(self.betas))  # type: ignore[arg-type]
        scheduler = WarmupCosine(
            optimizer, warmup=self.warmup, total_steps=int(total_steps), floor=self.lr_floor
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Puts this run's settings over those that a checkpoint's optimiser state brought along."""
        leave_finished_epoch(self.trainer)
        begin_epoch_anew(self.trainer)
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if not isinstance(scheduler, WarmupCosine):
            return
        for group, configured in zip(optimizer.param_groups, self._configured, strict=True):  # type: ignore[union-attr]
            group.update(configured)
        scheduler.apply([configured["lr"] for configured in self._configured])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, logs the norm before it as `train/grad_norm`, and stops where it is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_value = gradient_clip_algorithm == "value"
        if by_value and gradient_clip_val:
            clip_by_value(parameters, gradient_clip_val)
        norm = clip_by_norm(parameters, None if by_value else gradient_clip_val or None)
        self._watch.check("gradient norm", norm)
        self.log("train/grad_norm", norm, on_step=True, on_epoch=False)

    # Train and eval mode, precision

    def setup(self, stage: str) -> None:
        """Refuses precisions and strategies that would give wrong weights.

        Raises:
            ValueError: If the trainer's precision (see `check_precision`) or strategy is one.
        """
        check_precision(self.trainer.precision)
        strategy = self.trainer.strategy
        others = isinstance(strategy, ModelParallelStrategy | FSDPStrategy)
        if others and not isinstance(strategy, ShardedStrategy):
            raise ValueError(
                f"trainer.strategy ({type(strategy).__name__}) does not know what to shard here: "
                "use refrag_lightning.training.ShardedStrategy (configs/trainer/fsdp.yaml)"
            )

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that every run needs, also one started from Python."""
        return [RandomStates(), StopTogether()]

    def on_fit_start(self) -> None:
        """Puts the parts that train into train mode and the frozen ones into eval mode.

        `from_pretrained` returns eval mode and Lightning keeps what it finds.
        """
        assert self.model is not None, "configure_model has to build self.model"
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            # Buffers are constants. Sent around before each batch they would bring the ranks out
            # of step where they have different numbers of validation batches.
            wrapper.broadcast_buffers = False
        # Sets the model's own flag too, by which it connects what a batch leaves out, and leaves
        # frozen layers that compute their activations again in the mode that they need for it.
        self.model.train()
        if isinstance(self.model, TrainableParts):
            return
        for part in self.model.children():
            part.train(any(parameter.requires_grad for parameter in part.parameters()))

    # The stop at a value that is not finite

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Notes which batch this is."""
        ids = getattr(batch, "ids", None)
        if ids is None and isinstance(batch, dict):
            ids = batch.get("ids")
        self._watch.begin(epoch=self.current_epoch, batch_idx=batch_idx, ids=ids)

    def on_before_backward(self, loss: Tensor) -> None:
        """Stops where the loss is not finite, on this rank or another one."""
        self._watch.check("loss", loss)
        if isinstance(self._loss_of_all, Tensor):
            self._watch.check("loss over all ranks", self._loss_of_all)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the token count; refuses to write weights that a NaN has reached."""
        self._watch.settle()
        checkpoint["num_tokens"] = self.total_tokens()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the token count."""
        self.tokens_before, self.num_tokens = checkpoint.get("num_tokens", 0), 0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What trains, and nothing else."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in frozen_keys(self):
            state.pop(prefix + key, None)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads what trains; the frozen weights stay as they are.

        Raises:
            ValueError: If `state_dict` is not exactly what trains in this module, or holds NaN or
                infinity.
        """
        check_trained_state(expected=self.state_dict(), given=state_dict)
        tensors = ((key, value) for key, value in state_dict.items() if type(value) is Tensor)
        check_finite(tensors, what="the checkpoint")
        return super().load_state_dict(state_dict, strict=False, assign=assign)
