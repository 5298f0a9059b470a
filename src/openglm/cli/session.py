"""A conversation with the model on a terminal: one text after another, with history and several lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openglm.cli import console
from openglm.errors import OpenGLMError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from openglm.cli.answering import Request

HELP = """Enter answers, Alt-Enter (or Esc, Enter) begins another line, the arrow keys bring back earlier texts.
Ctrl-C stops an answer or drops the text, Ctrl-D or /exit ends. /help shows this."""
_INVITATION = {
    "fill": "Write a text with [MASK] where words are missing (/help for the keys, Ctrl-D to end).",
    "generate": "Write how a text begins (/help for the keys, Ctrl-D to end).",
}


def history_file() -> Path:
    """Where earlier texts are kept: ``$XDG_STATE_HOME/openglm/history``, else below ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "openglm" / "history"


def make_prompt(**terminal: Any) -> PromptSession[str]:
    """The input line. ``terminal``: ``input`` and ``output`` of prompt_toolkit, for tests."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        history = FileHistory(str(path))
    except OSError:  # a home that cannot be written is no reason to stop
        history = InMemoryHistory()
    return PromptSession(
        multiline=True,
        key_bindings=keys,
        history=history,
        auto_suggest=AutoSuggestFromHistory(),
        prompt_continuation=lambda width, line, wrapped: "  ",
        **terminal,
    )


def run_session(request: Request, prompt: PromptSession[str] | None = None) -> None:
    """Read texts and answer them until Ctrl-D or /exit; an error is shown and the session goes on."""
    prompt = prompt or make_prompt()
    console.note(f"loading `{request.model}`")
    _ = request.glm
    console.note(console.paint(_INVITATION[request.task], "dim", sys.stderr))
    while True:
        try:
            text = prompt.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        command = text.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/help":
            console.note(HELP)
        elif command:
            try:
                request.answer(text)
            except KeyboardInterrupt:
                console.note("\ninterrupted")
            except OpenGLMError as error:
                console.show_error(error)
