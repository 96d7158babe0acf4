"""How Lightning is made to go on from the end of an epoch, and to begin one anew."""

from lightning.pytorch import Trainer


def begin_epoch_anew(trainer: Trainer) -> None:
    """Makes a run resumed inside an epoch begin that epoch from its first batch.

    Where the data module has to (see `ResumableDataModule.restart_epoch`). To be called when
    training starts.
    """
    if not getattr(trainer.datamodule, "epoch_restarted", False):  # type: ignore[attr-defined]
        return
    loop = trainer.fit_loop.epoch_loop
    for part in (loop, loop.val_loop):
        part._restarting = False
        part.reset_restart_stage()


def leave_finished_epoch(trainer: Trainer) -> None:
    """Makes a run resumed from the end of an epoch begin with the next epoch.

    With `max_steps` set, Lightning 2.6 takes such a checkpoint for one from inside the epoch: it
    runs the end of the epoch a second time and counts it twice. With `max_epochs` alone it does
    what this function does. To be called when training starts.
    """
    loop = trainer.fit_loop
    if not loop.restarted_on_epoch_end:
        return
    loop.epoch_progress.increment_completed()
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        # Not through the property: with max_steps it never takes False.
        part._restarting = False
        part.reset_restart_stage()
