"""An encoder-decoder's checkpoint -> a bundle of task "translation": packed weights, three graphs, tokenizer, manifest.

    python -m model.export_translator runs/translation/everyday --out model/zoo/translation --data FOLDER

The same checkpoint and data give the same bytes. Verifies a float32 twin, which must agree with PyTorch to the token,
and the bundle in int8; what fails is not left behind.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.commands import run
from model.export_decoder import Options, graph_spec, manifest
from model.pairs import Pair
from model.recipes.translation import DATA_HELP
from model.recipes.translation_corpora import everyday_corpus
from model.train import CHECKPOINT_HELP, checkpoint_sha256
from model.translator_graph import build_translator
from model.translator_quality import Sets
from model.translator_samples import Samples, samples_for
from model.translator_vocabulary import Translator, load_translator
from model.translator_weights import WEIGHTS_FILE, translator_pieces
from model.verify_translator import sources_of, verify_translator
from service.worker.bundle import MANIFEST, TOKENIZER, Manifest
from service.worker.weights.packing import write_pieces

CREATED = 1_795_305_600  # 22 November 2026; not a file's time, which a copy changes


def export_translator(translator: Translator, out: Path, options: Options, *, samples: Samples) -> Manifest:
    """Writes all files (not verified yet) into the new directory `out`. Raises ValueError for what cannot be served.

    `samples`: what integers are made for.
    """
    out.mkdir(parents=True)
    config, num_written = translator.config, translator.num_written
    parts = translator_pieces(
        config, translator.model, None if options.precision == "float32" else samples, num_written
    )
    places = write_pieces(out / WEIGHTS_FILE, parts)
    specs = {}
    graphs = build_translator(config, options.precision, places=places, file=WEIGHTS_FILE, num_written=num_written)
    for name, graph in graphs.items():
        (out / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        specs[name] = graph_spec(graph, f"{name}.onnx")
    (out / TOKENIZER).write_text(translator.text.tokenizer, encoding="utf-8")
    content = manifest("translation", config, translator.text, options, specs, out)
    (out / MANIFEST).write_text(content.to_json())
    return content


def options(checkpoint: Path, *, id: str, licence: str, created: int = CREATED) -> Options:
    provenance: dict[str, Any] = json.loads((checkpoint / "train.json").read_text())
    return Options(
        id=id,
        created=created,
        licence=licence,
        provenance=provenance | {"checkpoint_sha256": checkpoint_sha256(checkpoint)},
    )


def export_verified(checkpoint: Path, out: Path, chosen: Options, *, training: Sequence[Pair], sets: Sets) -> bool:
    """Puts the bundle at `out` only if it and its float32 twin pass. Prints every check; says whether all passed."""
    translator = load_translator(checkpoint, training)
    config, subwords = translator.config, translator.subwords
    sources, samples = sources_of(config, subwords, sets), samples_for(config, subwords, training)
    reports = {}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        for precision in ("float32", "int8"):
            new = Path(folder) / precision
            made = replace(chosen, precision=precision)
            content = export_translator(translator, new, made, samples=samples)
            scored = sets if precision == chosen.precision else {}
            reports[precision] = verify_translator(new, translator, sources, samples, sets=scored)
            print(f"{precision}\n{reports[precision].text()}", flush=True)
        passed = all(report.passed for report in reports.values())
        if passed:
            quality = reports[chosen.precision].quality
            verification = {name: report.facts() for name, report in reports.items()}
            (new / MANIFEST).write_text(replace(content, quality=quality, verification=verification).to_json())
            shutil.rmtree(out, ignore_errors=True)
            new.rename(out)
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument("--out", type=Path, required=True, help="the bundle's directory; replaced if it is there")
    parser.add_argument("--data", type=Path, help=f"for int8 and BLEU: {DATA_HELP}")
    parser.add_argument("--licence", default="Apache-2.0")
    parser.add_argument("--created", type=int, default=CREATED, help="seconds since 1970 that the manifest says")
    flags = parser.parse_args(arguments)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = options(flags.checkpoint, id=flags.out.name, licence=flags.licence, created=flags.created)
    corpus = everyday_corpus(flags.data) if flags.data else None
    training, sets = (corpus.training, corpus.test) if corpus else ([], {})
    return 0 if export_verified(flags.checkpoint, flags.out, chosen, training=training, sets=sets) else 1


if __name__ == "__main__":
    run(main)
