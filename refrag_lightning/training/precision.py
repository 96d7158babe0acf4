"""Precisions that a run refuses."""


def check_precision(precision: str | int | None) -> None:
    """Refuses precisions that do not work.

    fp16 overflows to NaN where vectors are handed to the decoder. bf16-true rounds the weights that
    train, so that small steps are lost, and the decoder's rotary positions.

    Raises:
        ValueError: If `precision`, as Lightning's Trainer takes it, is one of them.
    """
    if str(precision) == "bf16-true":
        raise ValueError(
            f"trainer.precision ({precision}) is not supported: it rounds the weights that train "
            "and the decoder's positions; use bf16-mixed, with decoder_dtype bfloat16 where the "
            "decoder is frozen"
        )
    if str(precision).startswith("16"):
        raise ValueError(
            f"trainer.precision ({precision}) is not supported: fp16 overflows where vectors are "
            "handed to the decoder; use bf16-mixed or 32-true"
        )
