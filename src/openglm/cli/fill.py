"""`glm fill`: the blanks of a text."""

from __future__ import annotations

from typing import Annotated

import typer

from openglm.cli import console, options
from openglm.cli.answering import Request

EXAMPLES = r"""
[bold]Examples[/bold]

  glm fill "The capital of France is \[MASK]."

  glm fill "\[MASK]是中国的首都。" --json

  glm fill "The sky is \[MASK]." --show-layout

  printf 'The sky is \[MASK].\nWater is \[MASK].\n' > texts.txt

  glm fill --input texts.txt --output answers.jsonl
"""


def fill(
    context: typer.Context,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help=r"Text with \[MASK] where words are missing.", show_default=False)
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
    show_layout: Annotated[
        bool,
        typer.Option(
            "--show-layout",
            help="Show what the network sees for the first blank, and stop.",
            rich_help_panel="Input and output",
        ),
    ] = False,
) -> None:
    r"""Fill the blanks of a text.

    \[MASK] stands for some words, \[sMASK] for a sentence, \[gMASK] for a whole ending. Without TEXT: the lines of
    --input or of a pipe, or else a session.
    """
    console.one_voice()
    request = Request.of("fill", context.params)
    if show_layout:
        from openglm.cli.layout import show_layout as show

        show(request, text)
    else:
        request.run(text, input, output)
