"""The checkpoint whose weights the peers get: the one that the bundle was made of. The repository does not hold it."""

import hashlib
import json
from pathlib import Path

from .contenders import ROOT

USUAL = ROOT / "runs/translation/everyday"
_WEIGHTS = "model.safetensors"
NO_CHECKPOINT = (
    f"the peers get the weights of the checkpoint that the bundle was made of, and there is none in {USUAL} "
    "(--checkpoint names another folder; attnd and bare need none). `make train-translation ARGS='--data FOLDER'` "
    "trains one anew, whose weights are not the shipped bundle's: the bench then says how a bundle is made of it, too."
)
_OTHER_WEIGHTS = """{bundle} was not made of {checkpoint}, whose weights the peers would get.
If you have the one that it was made of, name it with --checkpoint. If this one was trained anew, make a bundle of it,
with the data that it was trained on:
  .venv/bin/python -m model.export_translator {checkpoint} --out runs/translation/bundle --data FOLDER
and measure that: --bundle runs/translation/bundle --checkpoint {checkpoint}
Without the peers, --only attnd,bare, no checkpoint is needed."""


def checkpoint_for(bundle: Path, named: Path | None) -> Path | None:
    """The one that is `named`, or else the usual one; None if that is not there.

    Raises SystemExit if there is none where one was named, or if the bundle was made of another.
    """
    checkpoint = (named or USUAL).resolve()
    if (checkpoint / _WEIGHTS).is_file():
        check_weights(bundle, checkpoint)
        return checkpoint
    if named is None:
        return None
    raise SystemExit(f"there is no {checkpoint / _WEIGHTS}")


def check_weights(bundle: Path, checkpoint: Path) -> None:
    """Raises SystemExit unless the bundle was made of this very checkpoint."""
    provenance = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["provenance"]
    found = hashlib.sha256((checkpoint / _WEIGHTS).read_bytes()).hexdigest()
    if found != provenance.get("checkpoint_sha256"):
        raise SystemExit(_OTHER_WEIGHTS.format(bundle=bundle, checkpoint=checkpoint))
