"""Command lines run one after another by the same processes, and what they train.

    python -m tests.training.ranks '[["fit", ...], ["fit", ...]]'

Importing takes longer than these runs, so several share a start. Lightning starts the further
processes by running this command again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from refrag_lightning.data.examples import Example, collate
from refrag_lightning.data.resume import ResumableDataModule
from refrag_lightning.text.segments import render_chat
from refrag_lightning.training import SFTModule

ROOT = Path(__file__).parents[2]
# Whether a run broke off where it was told to.
broken_off = [False]
DOC = '<doc id="{0}" title="River {0}">River {0} flows past town {1} and on to the sea.</doc>'


def start(command, *, cwd, **variables):
    """Starts a Python command in a process of its own, with the repository on its path."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PL_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(*commands, cwd):
    """Runs command lines on two processes, one after another; returns code and output."""
    process = start(["-m", "tests.training.ranks", json.dumps(commands)], cwd=cwd)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


class BreakingSFT(SFTModule):
    """Ends at a step by an error. It has no dropout, which would differ between ranks.

    Args:
        break_at: The step.
        **kwargs: See `SFTModule`.
    """

    def __init__(self, break_at: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.break_at = break_at

    def configure_model(self):
        super().configure_model()
        for part in self.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0

    def training_step(self, batch, batch_idx):
        if self.global_step == self.break_at:
            sys.modules["__main__"].broken_off.append(True)
            raise ValueError("broken off")
        return super().training_step(batch, batch_idx)


class Rivers(ResumableDataModule):
    """Questions: every other one with a document, and with a longer answer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @property
    def tokenizer(self):
        return self.trainer.lightning_module.tokenizer

    def training_data(self):
        return range(80)

    def collate(self, samples):
        examples = [self._example(number) for number in samples]
        module = self.trainer.lightning_module
        return collate(examples, self.tokenizer, teacher=module.needs_teacher)

    def val_dataloader(self):
        return self.eval_dataloader(range(100, 105))

    def _example(self, number):
        text, answer = "Are there rivers?", "Yes."
        if number % 2 == 0:
            text = DOC.format(number, number % 7) + " Where does it flow?"
            answer = f"Past town {number % 7} and on to the sea, as all the others of them do."
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        tokenizer = self.tokenizer
        segments = render_chat(
            tokenizer.decoder,
            messages,
            add_generation_prompt=False,
            header=tokenizer.header,
            footer=tokenizer.footer,
        )
        # Validation also writes answers, of different lengths.
        prompt = tuple(segments[:-1]) if number >= 100 else None
        references = (answer,) if prompt else ()
        return Example(tuple(segments), id=str(number), prompt=prompt, references=references)


def rivers(name, *, batch_size, steps=12, **options):
    """The command line of a run on `Rivers`, everything trained."""
    settings = {
        "name": name,
        "model": "tests.training.ranks.BreakingSFT",
        "model.encoder": "tiny/encoder",
        "model.decoder": "tiny/decoder",
        "model.compression": 4,
        "model.lr": 0.003,
        "data": "tests.training.ranks.Rivers",
        "data.batch_size": batch_size,
        "data.shuffle": "false",
        "trainer.accelerator": "cpu",
        "trainer.devices": 2 if batch_size == 1 else 1,
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": steps,
        "save_every": 6,
        **options,
    }
    return ["fit", *(f"--{key}={value}" for key, value in settings.items())]


if __name__ == "__main__":
    from refrag_lightning.cli import main

    for arguments in json.loads(sys.argv[1]):
        try:
            main(arguments)
        except SystemExit:
            # The module is there twice: as what runs, and by its name.
            if not broken_off.pop():
                raise
