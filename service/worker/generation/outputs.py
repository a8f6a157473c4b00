"""From a request and its prompts to the outputs that answer it: first as plans, then as sequences for the engine loop.

A plan is plain values, made where the request was read; its sequence is made where it is written.
"""

import random
from collections.abc import Sequence as Several
from dataclasses import dataclass

from service.domain import GenerateRequest
from service.worker.bundle import Bundle
from service.worker.generation.beam_search import BeamOutput, BeamSearch
from service.worker.generation.output import Output
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.prompts import PromptReader
from service.worker.generation.sampling import Sampler
from service.worker.generation.sequence import Job, Prompt, Sequence


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """One output, or one prompt's search, which has `n` of them. `index` is its place in the request, or its first's.

    The `seed` is that of the output, or of the first; `max_tokens` fit behind the prompt.
    """

    prompt: Prompt
    index: int
    seed: int
    max_tokens: int


def num_places(request: GenerateRequest) -> int:
    """Rows that the outputs take: one for each output, or one for each beam of each prompt's search."""
    num_prompts = request.num_outputs // request.n
    return num_prompts * max(request.n, request.num_beams)


def plans(request: GenerateRequest, prompts: Several[Prompt], reader: PromptReader) -> list[OutputPlan]:
    """One for each output, or one for each prompt's search. Raises TooLarge for a prompt that leaves no room.

    With a seed, an output depends on its prompt and its place among those of the prompt; without one, each on its own.
    """
    num_plans = 1 if request.num_beams > 1 else request.n
    return [
        OutputPlan(prompt, prompt.index * request.n + place, _seed(request, place), room)
        for prompt, room in [(prompt, reader.room(request, prompt)) for prompt in prompts]
        for place in range(num_plans)
    ]


def _seed(request: GenerateRequest, place: int) -> int:
    return random.getrandbits(63) if request.seed is None else request.seed + place


class Outputs:
    """What all outputs of a model share."""

    def __init__(self, bundle: Bundle, tokenizer: PromptTokenizer, *, vocab_size: int) -> None:
        generation = bundle.manifest.generation
        assert generation is not None
        self._tokenizer = tokenizer
        self._all_end_ids = generation.end_ids
        self._temperature = generation.temperature
        self._vocab_size = vocab_size

    def sequence(self, job: Job, request: GenerateRequest, plan: OutputPlan) -> Sequence:
        """Raises InvalidRequest for token ids that the model does not have."""
        if request.num_beams > 1:
            outputs = [self._output(job, request, plan, place) for place in range(request.n)]
            search = self._search(request, plan, outputs)
            return Sequence(job, plan.index, plan.prompt, search, request.echo, num_beams=request.num_beams)
        is_echoed = request.echo and plan.index % request.n == 0
        return Sequence(job, plan.index, plan.prompt, self._output(job, request, plan, 0), is_echoed)

    def _output(self, job: Job, request: GenerateRequest, plan: OutputPlan, place: int) -> Output:
        end_ids = self._end_ids(request)
        sampler = Sampler(
            request,
            temperature=self._temperature if request.temperature is None else request.temperature,
            seed=plan.seed + place,
            prompt_ids=() if plan.prompt.is_whole else plan.prompt.ids,  # a source is another text
            end_ids=end_ids,
            vocab_size=self._vocab_size,
        )
        return Output(
            plan.index + place,
            request,
            sampler=sampler,
            tokenizer=self._tokenizer,
            end_ids=end_ids,
            max_tokens=plan.max_tokens,
            wants_tokens=job.wants_tokens,
        )

    def _search(self, request: GenerateRequest, plan: OutputPlan, outputs: Several[Output]) -> BeamOutput:
        search = BeamSearch(
            num_beams=request.num_beams,
            end_ids={*self._end_ids(request), *request.stop_token_ids},
            min_tokens=request.min_tokens,
            max_tokens=plan.max_tokens,
            length_penalty=request.length_penalty,
            describe=outputs[0].logprob,
        )
        return BeamOutput(search, outputs)

    def _end_ids(self, request: GenerateRequest) -> Several[int]:
        return () if request.ignore_eos else self._all_end_ids
