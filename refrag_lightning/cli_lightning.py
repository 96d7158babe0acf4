"""fit, validate, test and predict on LightningCLI.

What counts, from weak to strong: the defaults, the environment (`PL_FIT__SAVE_EVERY=50`), the
configuration files in their order, the command line. The hyper-parameters kept in a checkpoint
count for nothing: a run's config.yaml has them all.
"""

import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# Lightning 2.6.6 uses names that jsonargparse has deprecated; this has to be set before the import.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import refrag_lightning.data
import refrag_lightning.training  # noqa: F401  # short class names need the classes imported
from refrag_lightning.cli import UsageError
from refrag_lightning.cli_errors import explain
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.training.base import RefragLightningModule, check_precision
from refrag_lightning.training.callbacks import ProgressLine, SpeedMonitor, ValidateFirst
from refrag_lightning.training.checkpoints import Checkpoints
from refrag_lightning.training.metrics_csv import MetricsCSV
from refrag_lightning.training.run_folder import RunSettings, default_name, make_run_folder
from refrag_lightning.training.summary import Announcement, closing_lines, resume_command

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
    RefragCLI(
        RefragLightningModule,
        ResumableDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=1234,
        trainer_defaults=TRAINER_DEFAULTS,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        args=from_folder(args),
    )


def from_folder(args: list[str]) -> list[str]:
    """Lets `--model FOLDER` mean the model in that folder, with the class that the YAML gives.

    So does anything with a `/` in it, such as a name on the Hub; otherwise `--model` takes the name
    of a class. What stands for the folder goes to the end, so that no configuration file takes its
    place.

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
            folders = [f"--model.init_args.init_from={value}"]
        else:
            kept += args[place : place + 1 + apart]
        place += 1 + apart
    return kept + folders


class RefragCLI(LightningCLI):
    """LightningCLI with run folders, one-line errors, and options that win over checkpoints."""

    folder: Path | None = None
    checkpoints: Checkpoints | None = None

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
        """Lets the options stand as they were given, and says where the checkpoint differs.

        Lightning's version puts the checkpoint's hyper-parameters over the command line.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
        """
        settings = self.config[self.config.subcommand]
        path = settings.get("ckpt_path")
        if not path or path in ("last", "best", "hpc") or "://" in path:
            return
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        if self.config.subcommand != "fit" or not Path(path).is_file():
            return
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        given = settings.model.get("init_args", {})
        for name, saved in checkpoint.get("hyper_parameters", {}).items():
            value = given.get(name, saved)
            if _as_data(value) != _as_data(saved):
                print(
                    f"note: {name} is {value} here, {saved} in the checkpoint; {value} counts",
                    file=sys.stderr,
                )

    def before_instantiate_classes(self) -> None:
        """Checks the run's settings before anything is built."""
        names = [field.name for field in dataclasses.fields(RunSettings)]
        self.settings = RunSettings(**{name: self._get(self.config, name) for name in names})
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
        settings = self.settings
        name = settings.name or default_name(type(self.model).__name__)
        self.folder = Path(settings.runs_dir) / name
        if _is_rank_zero():
            suffix = "" if self.subcommand == "fit" else f"_{self.subcommand}"
            self.folder = make_run_folder(settings.runs_dir, name, suffix=suffix)
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        config["logger"] = self._loggers(config["logger"], name)
        config["default_root_dir"] = str(self.folder)
        return self._instantiate_trainer(config, self._callbacks(config))

    def _callbacks(self, trainer: dict[str, Any]) -> list[Callback]:
        assert self.folder is not None
        if self.subcommand != "fit":
            return []
        settings = self.settings
        speed = SpeedMonitor()
        callbacks: list[Callback] = [Announcement(self.folder), speed]
        if not trainer["enable_progress_bar"]:
            callbacks.append(ProgressLine(speed))
        if trainer["enable_checkpointing"] is not False:
            self.checkpoints = Checkpoints(
                self.folder / "checkpoints",
                every_n_steps=settings.save_every,
                monitor=settings.monitor,
                mode=settings.monitor_mode,
            )
            callbacks.append(self.checkpoints)
        if settings.validate_first:
            callbacks.append(ValidateFirst())
        return callbacks

    def _loggers(self, given: Any, name: str) -> list[Logger]:
        """metrics.csv always, then what the configuration adds."""
        assert self.folder is not None
        loggers: list[Logger] = [MetricsCSV(self.folder)]
        if self.settings.wandb != "off":
            loggers.append(self._wandb_logger(name))
        if isinstance(given, Logger):
            loggers.append(given)
        elif isinstance(given, list | tuple):
            loggers += given
        return loggers

    def _wandb_logger(self, name: str) -> Logger:
        assert self.folder is not None
        try:
            from lightning.pytorch.loggers import WandbLogger

            logger = WandbLogger(
                project=self.settings.wandb_project,
                name=f"{name}/{self.folder.name}",
                save_dir=str(self.folder),
                offline=self.settings.wandb == "offline",
            )
        except ModuleNotFoundError as error:
            raise UsageError("wandb is not installed: pip install wandb") from error
        if self.settings.wandb == "offline" and _is_rank_zero():
            print(
                f"W&B:       offline, no account needed; `wandb sync {self.folder}/wandb/offline-*`"
                " uploads it"
            )
        return logger

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException as error:
            self._point_to_checkpoint()
            raise SystemExit(143) from error
        except SystemExit as error:
            self._point_to_checkpoint()
            # Lightning turns Ctrl-C into exit code 1.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise
        except BaseException:
            self._point_to_checkpoint()
            raise

    def _point_to_checkpoint(self) -> None:
        if self.folder is not None and self.checkpoints and self.checkpoints.last_model_path:
            command = resume_command(self.folder, self.checkpoints.last_model_path)
            print(f"to go on from the last checkpoint:\n    {command}", file=sys.stderr)

    def after_fit(self) -> None:
        """Tests and exports the model, and says where everything is."""
        assert self.folder is not None
        if self.settings.test_after_fit and is_overridden("test_step", self.model):
            self.trainer.test(self.model, self.datamodule, verbose=False)
        exported = self.settings.export and self.trainer.is_global_zero
        if exported:
            self.model.export(self.folder / "model")
        if self.trainer.is_global_zero:
            usage = self.model.usage(self.folder / "model").splitlines() if exported else []
            saved = self.checkpoints
            lines = closing_lines(
                self.folder,
                checkpoint=saved.last_model_path if saved else "",
                best=saved.best_model_path if saved else "",
                usage=usage,
            )
            print("\n".join(lines))


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _as_data(value: Any) -> Any:
    """`value` with tuples as lists and namespaces as dicts, to be compared."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _as_data(item) for key, item in value.items()}
    return [_as_data(item) for item in value] if isinstance(value, list | tuple) else value
