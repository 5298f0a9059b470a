"""`glm fill --show-layout`: what the network sees for the first blank of a text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from openglm.cli import console
from openglm.cli.models import open_source
from openglm.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from openglm.cli.answering import Request
    from openglm.infilling import Prompt

#: Width of the table without its last column and the tokens.
_OTHER_COLUMNS = 34
#: Rows of the answer that are shown.
_ANSWER_ROWS = 2


def show_layout(request: Request, text: str | None) -> None:
    """Print tokens, positions and who sees whom for the first blank. Loads the tokenizer, not the network."""
    if text is None:
        raise InputError("`--show-layout` needs a text", hint='for one: glm fill "The sky is [MASK]." --show-layout')
    request.check(text)
    source = open_source(request.model, download=request.download)
    if source.tokenizer_path is None:
        raise CheckpointError(f"`{request.model}` has no tokenizer", hint="put the tokenizer's file into its folder")
    from openglm.infilling import blank_prompt, encode_text, first_blank
    from openglm.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(source.tokenizer_path)
    special = source.config.special_tokens
    ids = encode_text(text, tokenizer)
    found = first_blank(ids, special)
    assert found is not None  # `encode_text` sees to it
    prompt = blank_prompt(ids, found[0], special)
    names = {token: name for name, token in special.items()}
    tokens = [names[i] if i in names else _visible(tokenizer.decode([i])) for i in map(int, prompt.layout.tokens)]
    if request.json:
        console.write_json(_as_json(prompt, tokens))
    else:
        _print_table(prompt, tokens)


def _as_json(prompt: Prompt, tokens: list[str]) -> dict[str, Any]:
    return {
        "kind": prompt.kind,
        "mask_index": prompt.mask_index,
        "tokens": tokens,
        "ids": prompt.layout.tokens.tolist(),
        "positions": prompt.layout.positions.tolist(),
        "context": prompt.layout.context,
        "answer_start": prompt.answer_start,
        "answer_step": prompt.answer_step,
        "visible": prompt.layout.visible().astype(int).tolist(),
    }


def _visible(text: str) -> str:
    # A blank, a newline or half a character must be seen, too.
    return "".join("␣" if c == " " else "↵" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text) or "·"


def _print_table(prompt: Prompt, tokens: list[str]) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    layout, n = prompt.layout, prompt.layout.context
    visible = layout.visible()
    printer = Console(file=sys.stdout, width=None if console.is_terminal(sys.stdout) else 200, highlight=False)
    longest = max(8, *(cell_len(token) for token in tokens))
    picture = len(layout) + _ANSWER_ROWS + longest + _OTHER_COLUMNS <= printer.width  # else in words
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("part", "left"), ("index", "right"), ("token", "left"), ("id", "right"), ("position", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    table.add_column("may see", no_wrap=True)
    for index in range(len(layout)):
        sees = "".join("■" if seen else "·" for seen in visible[index])
        words = "part A" if index < n else "part A and itself"
        blank = index == prompt.mask_index
        table.add_row(
            "A" if index < n else "B",
            str(index),
            Text(tokens[index], style="bold magenta" if blank else "cyan" if index >= n else ""),
            str(int(layout.tokens[index])),
            str(int(layout.positions[index])),
            sees if picture else words,
        )
    for number, position in enumerate(prompt.answer_positions(_ANSWER_ROWS)):
        index = len(layout) + number
        sees = "■" * (index + 1) if picture else "part A, answer so far"
        name = Text(f"answer {number + 1}", style=console.ANSWER)
        table.add_row("B", str(index), name, "", str(int(position)), sees)
    run = "positions run on" if prompt.answer_step else "they keep the position of the blank"
    printer.print(table)
    printer.print(Text(f"\nfirst blank: {prompt.kind} at index {prompt.mask_index}; tokens of the answer: {run}"))
