"""`glm generate`: how a text goes on."""

from __future__ import annotations

from typing import Annotated

import typer

from openglm.cli import console, options
from openglm.cli.answering import Request

EXAMPLES = r"""
[bold]Examples[/bold]

  glm generate "Once upon a time"

  glm generate "从前有一座山" --temperature 0.8 --top-p 0.9 --seed 1

  glm generate "Dear friend," --num-beams 4 --max-tokens 32 --json
"""


def generate(
    context: typer.Context,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help=r"The beginning; \[gMASK] is appended.", show_default=False)
    ] = None,
    model: options.Model = "nano",
    download: options.Download = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    bits: options.Bits = None,
    group: options.Group = None,
    head_bits: options.HeadBits = None,
    cache_dtype: options.CacheDtype = None,
    draft: options.Draft = None,
    offload: options.Offload = None,
    memory: options.Memory = None,
    max_tokens: options.MaxTokens = None,
    min_tokens: options.MinTokens = None,
    num_beams: options.NumBeams = None,
    length_penalty: options.LengthPenalty = None,
    no_repeat_ngram_size: options.NoRepeat = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    input: options.Input = None,
    output: options.Output = None,
    batch_size: options.BatchSize = 8,
    json: options.Json = False,
) -> None:
    """Continue a text.

    Without TEXT: the lines of --input or of a pipe, or else a session. On a terminal the answer appears while it is
    written.
    """
    console.one_voice()
    request = Request.of("generate", context.params)
    request.run(text, input, output)
