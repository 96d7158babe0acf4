"""fit, validate, test and predict on LightningCLI.

What counts, from weak to strong: the defaults, the environment (`PL_FIT__SAVE_EVERY=50`), the
configuration files in their order, the command line. The hyper-parameters kept in a checkpoint
count for nothing: a run's config.yaml has them all.

A run with an id (`--run_id`, or that of its AWS Batch job) goes on from its own last checkpoint,
see `training/run_state.py`.
"""

import dataclasses
import logging
import os
import sys
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

# Lightning 2.6.6 uses names that jsonargparse has deprecated; this has to be set before the import.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import refrag_lightning.data
import refrag_lightning.training  # noqa: F401  # short class names need the classes imported
from refrag_lightning.cache import write_text
from refrag_lightning.cli import UsageError
from refrag_lightning.cli_errors import explain
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.launch.cluster import plug_in
from refrag_lightning.plain_text import say
from refrag_lightning.training import wandb_run
from refrag_lightning.training.base import RefragLightningModule, check_precision
from refrag_lightning.training.checkpoints import Checkpoints
from refrag_lightning.training.mirror import Mirror
from refrag_lightning.training.remote import fetch_model, is_address
from refrag_lightning.training.run_folder import RunFolder, RunSettings, default_name
from refrag_lightning.training.run_parts import run_callbacks, run_loggers, sample_tables
from refrag_lightning.training.run_start import RunFinished, RunStart
from refrag_lightning.training.run_state import (
    BEST,
    LAST,
    has_best,
    mark_finished,
    read_checkpoint,
)
from refrag_lightning.training.shards import whole_weights
from refrag_lightning.training.summary import closing_lines, resume_command, usage_lines

TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    # validate_first does the whole validation, so two batches of it beforehand are for nothing.
    "num_sanity_val_steps": 0,
    # The loaders of data/resume.py deal the samples out to the ranks themselves.
    "use_distributed_sampler": False,
    # Replaced by ProgressLine and Announcement.
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


# What Lightning says of things that are meant to be so, or that Announcement says better.
_EXPECTED = (
    r"Found \d+ module\(s\) in eval mode",
    r".*does not have many workers",
    r".*isinstance\(treespec, LeafSpec\)",
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    r"The number of training batches .* is smaller than the logging interval",
)


def run(args: list[str]) -> None:
    """Runs a subcommand.

    Args:
        args: The subcommand and its options.

    Raises:
        UsageError: If they cannot be understood.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    try:
        RefragCLI(
            RefragLightningModule,
            ResumableDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=1234,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            args=from_folder(args),
        )
    except RunFinished as finished:
        say(finished)


def hello(args: list[str]) -> None:
    """Runs `fit` on the smallest module, as configs/hello.yaml does; options may be added.

    Args:
        args: The subcommand and further options of `fit`.
    """
    model, data = ("--model", "HelloModule"), ("--data", "HelloDataModule")
    trainer = ("--trainer.max_steps", "60", "--trainer.log_every_n_steps", "5")
    run(["fit", *model, *data, *trainer, "--save_every", "10", *args[1:]])


def from_folder(args: list[str]) -> list[str]:
    """Lets `--model FOLDER` mean the model in that folder, with the class that the YAML gives.

    So does anything with a `/` in it, such as a name on the Hub or the address of a run, which is
    copied to here; otherwise `--model` takes the name of a class. What stands for the folder goes
    to the end, so that no configuration file takes its place.

    Args:
        args: The subcommand and its options.
    """
    kept: list[str] = []
    folders: list[str] = []
    place = 0
    while place < len(args):
        name, equals, value = args[place].partition("=")
        apart = name == "--model" and not equals and place + 1 < len(args)
        if apart:
            value = args[place + 1]
        if name == "--model" and value and ("/" in value or Path(value).expanduser().is_dir()):
            folder = fetch_model(value) if is_address(value) else value
            folders = [f"--model.init_args.init_from={folder}"]
        else:
            kept += args[place : place + 1 + apart]
        place += 1 + apart
    return kept + folders


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml in one step; Lightning writes it in place."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes it; Lightning calls this on the first rank."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        write_text(folder / self.config_filename, text)


class RefragCLI(LightningCLI):
    """LightningCLI with run folders, one-line errors, and options that win over checkpoints."""

    folder: RunFolder | None = None
    checkpoints: Checkpoints | None = None
    mirror: Mirror | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # LightningCLI parses, builds and runs in its constructor.
        with ExitStack() as self.held:
            super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises its errors, reads the environment and takes no abbreviations."""
        return super().init_parser(
            **kwargs, exit_on_error=False, default_env=True, allow_abbrev=False
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's own settings, at the top level."""
        parser.add_class_arguments(RunSettings, None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; an error becomes one line.

        Raises:
            UsageError: Naming the option and the nearest valid one.
        """
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            bases = {"model": RefragLightningModule, "data": ResumableDataModule}
            message = explain(str(error), self._subcommand_parsers[args[0]], bases)
            raise UsageError(message) from error

    def _parse_ckpt_path(self) -> None:
        """Finds the run's folder and what it goes on from.

        Lightning's version puts the checkpoint's hyper-parameters over the command line; here the
        options stand as they were given, and it is said where the checkpoint differs.

        Raises:
            UsageError: If W&B is asked for and not installed.
            RunFinished: If the run came to its end before.
            FileNotFoundError: If there is no such checkpoint.
            OSError: If an address cannot be read.
        """
        config = self.config[self.config.subcommand]
        fields = [field.name for field in dataclasses.fields(RunSettings)]
        self.settings = RunSettings(**{name: config.get(name) for name in fields})
        if self.settings.wandb in ("offline", "online") and not wandb_run.installed():
            raise UsageError("wandb is not installed: pip install wandb")
        self.start = RunStart(
            self.settings,
            name=self.settings.name or default_name(config.model.class_path.split(".")[-1]),
            subcommand=self.config.subcommand,
            trainer=config.trainer,
            checkpoint=config.get("ckpt_path"),
        )
        if self.config.subcommand != "fit":
            return
        given = config.model.get("init_args", {})
        for name, saved in self.start.hyper_parameters.items():
            value = given.get(name, saved)
            if _as_data(value) != _as_data(saved):
                say(
                    f"note: {name} is {value} here, {saved} in the checkpoint; {value} counts",
                    file=sys.stderr,
                )

    def before_instantiate_classes(self) -> None:
        """Checks the precision before anything is built."""
        # Here as well as in the module: on a CPU Lightning turns fp16 into bf16 before.
        check_precision(self._get(self.config, "trainer").precision)

    def instantiate_classes(self) -> None:
        """Builds everything; a setting that a class refuses is told in the class's own words.

        jsonargparse wraps them into a message that lists every setting.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if not str(error).startswith("Does not validate") or error.__cause__ is None:
                raise
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run's folder, loggers and callbacks."""
        # First: on the further nodes of a job it says that this is not the first rank.
        config = plug_in({**self._get(self.config_init, "trainer"), **kwargs})
        self.folder = self.start.open_folder(first_rank=_is_rank_zero(), held=self.held)
        if self.folder.address is not None:
            self.mirror = Mirror(self.folder.local, self.folder.address)
        config["logger"] = self._loggers(config["logger"])
        config["default_root_dir"] = str(self.folder.local)
        return self._instantiate_trainer(config, self._callbacks(config))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Hands over the checkpoint that was found; config.yaml keeps the one that was given."""
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | {"ckpt_path": self.start.checkpoint} if "ckpt_path" in kwargs else kwargs

    def _callbacks(self, trainer: dict[str, Any]) -> list[Callback]:
        assert self.folder is not None
        settings = self.settings
        callbacks = sample_tables(settings)
        if self.subcommand != "fit":
            return callbacks
        if trainer["enable_checkpointing"] is not False:
            self.checkpoints = Checkpoints(
                self.folder.local / "checkpoints",
                every_n_steps=settings.save_every,
                monitor=settings.monitor,
                mode=settings.monitor_mode,
            )
        return callbacks + run_callbacks(
            settings,
            self.folder,
            trainer=trainer,
            checkpoints=self.checkpoints,
            mirror=self.mirror,
        )

    def _loggers(self, given: Any) -> list[Logger]:
        assert self.folder is not None and self.subcommand is not None
        config = self._parser(self.subcommand).dump(
            self.config[self.subcommand], skip_none=False, format="yaml"
        )
        return run_loggers(
            self.settings,
            self.folder,
            given=given,
            name=self.start.name,
            config=yaml.safe_load(config),
            resumed_from=self.start.shown_checkpoint,
            first_rank=_is_rank_zero(),
        )

    def _run_subcommand(self, subcommand: str) -> None:
        if isinstance(self.datamodule, ResumableDataModule):
            self.datamodule.restart_epoch = self.settings.restart_epoch
        try:
            super()._run_subcommand(subcommand)
            wandb_run.finish(self.trainer)
            if self.mirror is not None and self.trainer.is_global_zero:
                self.mirror.close()
        except SIGTERMException as error:
            self._break_off()
            # A node's first process takes another code of a further one for a crash, and is killed.
            further = os.environ.get("LOCAL_RANK", "0") != "0"
            raise SystemExit(0 if further else 143) from error
        except SystemExit as error:
            self._break_off()
            # Lightning turns Ctrl-C into exit code 1.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise
        except BaseException:
            self._break_off()
            raise

    def _break_off(self) -> None:
        """Saves what there is of a run that failed or was stopped, and says how to go on."""
        wandb_run.finish(self.trainer, failed=True)
        if self.mirror is not None:
            self.mirror.leave(self.trainer)
        if not _is_rank_zero() or self.folder is None or self.checkpoints is None:
            return
        if self.checkpoints.last_model_path:
            command = resume_command(self.folder.shown(), self.folder.shown(LAST))
            say(f"to go on from the last checkpoint:\n    {command}", file=sys.stderr)

    def _step_before(self) -> int | None:
        """The step of the checkpoint that the run began with, if there was one."""
        checkpoint = self.start.checkpoint
        return None if checkpoint is None else read_checkpoint(Path(checkpoint))["global_step"]

    def after_fit(self) -> None:
        """Tests and exports the model, and says where everything is."""
        assert self.folder is not None
        folder = self.folder
        if self.settings.test_after_fit and is_overridden("test_step", self.model):
            self.trainer.test(self.model, self.datamodule, verbose=False)
        exported = self.settings.export and self.trainer.is_global_zero
        # Shards are gathered by all ranks; the first one writes.
        with whole_weights(self.model) if self.settings.export else nullcontext():
            if exported:
                self.model.export(folder.local / "model")
        if not self.trainer.is_global_zero:
            return
        if folder.has_id:
            settings = self._get(self.config, "trainer")
            mark_finished(folder, settings, step=self.trainer.global_step)
        if self.mirror is not None:
            # Before it is said to be there.
            self.mirror.copy()
        saved = self.checkpoints
        if (step := self._step_before()) == self.trainer.global_step:
            say(
                f"nothing was trained: the checkpoint is at step {step} already, where this run "
                "ends; raise trainer.max_steps or max_epochs to go on"
            )
        has_own = bool(saved and saved.last_model_path) or self.start.own is not None
        best = saved.best_model_path if saved else ""
        lines = closing_lines(
            folder.shown(),
            checkpoint=folder.shown(LAST) if has_own else "",
            best=folder.shown(BEST) if best and has_best(folder) else best,
            usage=usage_lines(self.model.usage, folder) if exported else [],
        )
        say("\n".join(lines))


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _as_data(value: Any) -> Any:
    """`value` with tuples as lists and namespaces as dicts, to be compared."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _as_data(item) for key, item in value.items()}
    return [_as_data(item) for item in value] if isinstance(value, list | tuple) else value
