"""From a request and its prompts to the outputs that answer it, as sequences for the engine loop."""

import random
from collections.abc import Sequence as Several

from service.domain import GenerateRequest
from service.worker.generation.beam_search import BeamOutput, BeamSearch
from service.worker.generation.output import Output
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.prompts import PromptReader
from service.worker.generation.sampling import Sampler
from service.worker.generation.sequence import Job, Prompt, Sequence


def num_places(request: GenerateRequest) -> int:
    """Rows that the outputs take: one for each output, or one for each beam of each prompt's search."""
    num_prompts = request.num_outputs // request.n
    return num_prompts * max(request.n, request.num_beams)


class Outputs:
    """What all outputs of a model share; `end_ids` and `temperature` are the manifest's."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        prompts: PromptReader,
        *,
        end_ids: Several[int],
        temperature: float,
        vocab_size: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._all_end_ids = end_ids
        self._temperature = temperature
        self._vocab_size = vocab_size

    def sequences(self, request: GenerateRequest, job: Job, prompts: Several[Prompt]) -> list[Sequence]:
        """One for each output, or one for each prompt's search. Raises TooLarge for a prompt that leaves no room.

        With a seed, an output depends on its prompt and its place among those of the prompt.
        """
        seed = random.getrandbits(63) if request.seed is None else request.seed
        return [sequence for prompt in prompts for sequence in self._of_prompt(request, job, prompt, seed)]

    def _of_prompt(self, request: GenerateRequest, job: Job, prompt: Prompt, seed: int) -> list[Sequence]:
        first = prompt.index * request.n
        outputs = [self._output(request, job, prompt, first + place, seed + place) for place in range(request.n)]
        if request.num_beams > 1:
            search = self._search(request, prompt, outputs)
            return [Sequence(job, first, prompt, search, request.echo, num_beams=request.num_beams)]
        return [
            Sequence(job, first + place, prompt, output, is_echoed=request.echo and place == 0)
            for place, output in enumerate(outputs)
        ]

    def _output(self, request: GenerateRequest, job: Job, prompt: Prompt, index: int, seed: int) -> Output:
        end_ids = self._end_ids(request)
        sampler = Sampler(
            request,
            temperature=self._temperature if request.temperature is None else request.temperature,
            seed=seed,
            prompt_ids=() if prompt.is_whole else prompt.ids,  # a source is another text
            end_ids=end_ids,
            vocab_size=self._vocab_size,
        )
        return Output(
            index,
            request,
            sampler=sampler,
            tokenizer=self._tokenizer,
            end_ids=end_ids,
            max_tokens=self._prompts.room(request, prompt),
            wants_tokens=job.wants_tokens,
        )

    def _search(self, request: GenerateRequest, prompt: Prompt, outputs: Several[Output]) -> BeamOutput:
        search = BeamSearch(
            num_beams=request.num_beams,
            end_ids={*self._end_ids(request), *request.stop_token_ids},
            min_tokens=request.min_tokens,
            max_tokens=self._prompts.room(request, prompt),
            length_penalty=request.length_penalty,
            describe=outputs[0].logprob,
        )
        return BeamOutput(search, outputs)

    def _end_ids(self, request: GenerateRequest) -> Several[int]:
        return () if request.ignore_eos else self._all_end_ids
