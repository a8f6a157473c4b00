"""ONNX Runtime GenAI behind FastAPI, on a folder that its builder wrote: `genai_fastapi.py FOLDER PORT THREADS`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import uvicorn
from whole_batches import Wanted, create_app


class Model:
    def __init__(self, folder: Path, threads: int) -> None:
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)

    def generate(self, batch: Sequence[Wanted]) -> list[tuple[int, str]]:
        """Prompts are padded on the right, as GenAI wants them; all rows run as long as the longest answer takes."""
        prompts = [
            one.prompt if isinstance(one.prompt, list) else self._tokenizer.encode(one.prompt).tolist() for one in batch
        ]
        width, most = max(map(len, prompts)), max(one.max_tokens for one in batch)
        pad = self._tokenizer.pad_token_id
        ids = np.array([prompt + [pad] * (width - len(prompt)) for prompt in prompts], np.int32)
        first = batch[0]
        options = og.GeneratorParams(self._model)
        options.set_search_options(
            batch_size=len(batch),
            min_length=width + most,
            max_length=width + most,
            do_sample=first.temperature > 0,
            **(
                {"temperature": first.temperature, "top_k": first.top_k, "top_p": first.top_p}
                if first.temperature
                else {}
            ),
        )
        generator = og.Generator(self._model, options)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        rows = [generator.get_sequence(row)[width : width + one.max_tokens] for row, one in enumerate(batch)]
        return [(len(prompt), self._tokenizer.decode(row)) for prompt, row in zip(prompts, rows, strict=True)]


def main() -> None:
    folder, port, threads = sys.argv[1:]
    app = create_app(Model(Path(folder), int(threads)).generate)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
