"""transformers' `generate` in fp32 behind FastAPI: `transformers_generate.py GGUF PORT THREADS`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn
from transformers import AutoTokenizer, LlamaForCausalLM
from whole_batches import Wanted, create_app


class Model:
    def __init__(self, gguf: Path) -> None:
        folder = str(gguf.parent)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        self._model = LlamaForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(self, batch: Sequence[Wanted]) -> list[tuple[int, str]]:
        """Prompts are padded on the left; all rows run for as long as the longest answer takes."""
        prompts = [
            one.prompt if isinstance(one.prompt, list) else self._tokenizer(one.prompt).input_ids for one in batch
        ]
        width, most = max(map(len, prompts)), max(one.max_tokens for one in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        first = batch[0]
        sampling = {"temperature": first.temperature, "top_k": first.top_k, "top_p": first.top_p}
        written = self._model.generate(
            ids,
            attention_mask=real,
            max_new_tokens=most,
            min_new_tokens=most,
            pad_token_id=0,
            do_sample=first.temperature > 0,
            **(sampling if first.temperature > 0 else {}),
        )[:, width:].tolist()
        texts = [self._tokenizer.decode(row[: one.max_tokens]) for row, one in zip(written, batch, strict=True)]
        return [(len(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]


def main() -> None:
    gguf, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    app = create_app(Model(Path(gguf)).generate)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
