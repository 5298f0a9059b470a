"""What `glm fill` and `glm generate` share: from the options to a text, a file of texts, or a session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openglm.bundled import bundled_models
from openglm.cli import console, options
from openglm.cli.batch import Elsewhere, Line, Results, Stream, open_results, read_lines, run_batch, with_id
from openglm.cli.models import load_model, model_folder, model_path
from openglm.config import QuantizationScheme
from openglm.errors import InputError
from openglm.parallel.layout import started
from openglm.tokenizers.base import MASK_WORDS

if TYPE_CHECKING:
    from openglm.inference.glm import GLM
    from openglm.parallel.group import TensorGroup

Value = TypeVar("Value")


@dataclass
class Request:
    """One run of a command: the model, how it answers, and where texts come from and go to."""

    task: str
    """"fill" or "generate"."""
    model: str
    download: bool = False
    loading: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``load_model``, only those that were given."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``GLM.fill`` and ``GLM.generate``, only those that were given."""
    json: bool = False
    batch_size: int = 8

    @classmethod
    def of(cls, task: str, params: Mapping[str, Any]) -> Request:
        """Of a command's parameters: those that `glm fill` and `glm generate` share."""
        own = {name: params[name] for name in ("model", "download", "json", "batch_size")}
        return cls(task, loading=options.loading(params), settings=options.settings(params), **own)

    @cached_property
    def processes(self) -> TensorGroup | None:
        """The processes that torchrun started to answer together; they share the model. None without torchrun."""
        if started() == 1:
            return None
        from openglm.parallel.group import connect

        with options.as_options():
            return connect(self.loading.get("device"))

    def told(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives; under torchrun only one process calls it and tells the others."""
        return make() if self.processes is None else self.processes.told(make)

    @cached_property
    def glm(self) -> GLM:
        """The model; its name and the settings are checked before it is loaded."""
        # Under torchrun the processes meet first, so that what one of them lacks is told by all.
        if self.processes is None:
            self._find()  # before torch is imported
        else:
            self.processes.together(self._find)
        from openglm.inference.sampling import SamplingSettings

        with options.as_options():
            SamplingSettings.of(**self.settings)
            parallel = self.processes is not None
            return load_model(self.model, download=self.download, tensor_parallel=parallel, **self.chosen_loading)

    @property
    def may_choose(self) -> bool:
        """Whether the machine has a say in the type: a bundled model, and none of the options that settle it.

        The compiled kernels know no cache in bfloat16, and ranks are all to load the same.
        """
        asked = {"dtype", "bits", "group", "head_bits", "offload"} & set(self.loading)
        if asked or self.loading.get("cache_dtype") == "bfloat16":
            return False
        return self.model in bundled_models() and self.processes is None

    @cached_property
    def chosen_loading(self) -> dict[str, Any]:
        """``loading``, and for a bundled model on a CPU the type: INT8 where that pays, nearly as exact and several times as
        fast, else float32."""
        if not self.may_choose:
            return self.loading
        from openglm.checkpoints import resolve_device
        from openglm.kernels.cpu.library import variant

        with options.as_options():
            if resolve_device(self.loading.get("device")).type != "cpu":
                return self.loading
            int8 = variant() not in (None, "portable")
        return {**self.loading, **({"bits": 8, "head_bits": 8} if int8 else {"dtype": "float32"})}

    def _find(self) -> None:
        """Raises if there is no such model."""
        model_folder(self.model, download=self.download)
        if (draft := self.loading.get("draft", "lookup")) != "lookup":
            model_folder(draft)

    def check(self, text: str, place: str = "the text") -> None:
        """Refuse what no model can answer. Raises ``InputError``."""
        if not text.strip():
            raise InputError(f"{place} is empty", hint=f"for one: {EXAMPLE[self.task]}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place} is not valid UTF-8 (character {error.start + 1})", hint="set the terminal to UTF-8"
            ) from error

    def has_no_blank(self, text: str) -> bool:
        """Whether a text to be filled holds no mask word, and is therefore continued; worth a remark."""
        return self.task == "fill" and not any(word in text for word in MASK_WORDS)

    def answer(self, text: str) -> None:
        """One text to stdout; on a terminal `generate` shows it while it is written."""
        self.check(text)
        if self.has_no_blank(text):
            console.note("the text has no [MASK], so it is continued")
        glm = self.glm
        stream = self.task == "generate" and console.is_terminal(sys.stdout) and not self.json
        if stream and self.settings.get("num_beams", 1) == 1:
            with options.as_options():
                show_stream(glm, text, self.settings)
            return
        (result,) = self.answer_batch([text])
        self.show(Line(1, text), result)

    def answer_batch(self, texts: Sequence[str]) -> Sequence[Any]:
        """``FillResult`` or ``GenerateResult`` of every text."""
        method = self.glm.fill_batch if self.task == "fill" else self.glm.generate_batch
        with options.as_options():
            return method(list(texts), batch_size=self.batch_size, **self.settings)

    def show(self, line: Line, result: Any) -> None:
        """One result to stdout."""
        if self.json:
            console.write_json(with_id(line, result.to_dict()))
        else:
            console.write_answer(result.text, answer_places(line.text, result))

    def answer_lines(self, source: str, output: Path | None) -> None:
        """All texts of a file or of stdin ("-"), to stdout or to an output that can go on after an interruption."""
        if self.batch_size < 1:
            raise InputError(f"`--batch-size` must be at least 1, not {self.batch_size}")
        lines = self.told(lambda: read_lines(source))
        name = "standard input" if source == "-" else f"`{source}`"
        for line in lines:
            self.check(line.text, f"{name} line {line.number}")
        bare = sum(self.has_no_blank(line.text) for line in lines)
        if bare:
            console.note(f"{bare:,} of {len(lines):,} texts have no [MASK], so they are continued")
        loading = self.chosen_loading
        numbers = {key: loading[key] for key in ("dtype", "cache_dtype", "bits", "group", "head_bits") if key in loading}
        job = {"task": self.task, "model": self.model, **numbers, **self.settings}
        results = None if output is None else self._results(output, lines, name, job)
        try:
            run_batch(
                lines,
                lambda: self.glm and self.answer_batch,
                results=results,
                batch_size=self.batch_size,
                show=self.show,
                source=name,
                label="filling" if self.task == "fill" else "generating",
            )
        finally:
            if results is not None:
                results.close()

    def _results(self, output: Path, lines: list[Line], name: str, job: dict[str, Any]) -> Results | Stream | Elsewhere:
        opened: list[Results | Stream] = []

        def done() -> set[int]:
            opened.append(open_results(output, lines, name, job, _WHICH_TYPE if self.may_choose else ""))
            return set(opened[0].done)

        found = self.told(done)
        return opened[0] if opened else Elsewhere(output, found)

    def run(self, text: str | None, source: str | None, output: Path | None) -> None:
        """The text, the file, what comes through a pipe, or a session; whichever was given."""
        with options.as_options():
            QuantizationScheme.of(*(self.loading.get(name) for name in ("bits", "group", "head_bits")))
        if text is not None and source is not None:
            raise InputError("a text and `--input` exclude each other", hint="give one of them")
        if text is not None and output is not None:
            raise InputError("`--output` goes with `--input`", hint="send a single answer to a file with: > FILE")
        if self.download:
            self.model = model_path(self.model, download=True)
        if text is not None:
            self.answer(text)
        elif source is None and self.told(lambda: console.is_terminal(sys.stdin)):
            if self.processes is not None:
                raise InputError("a session cannot be held with several processes", hint="give a text, or --input FILE")
            if output is not None:
                raise InputError("`--output` goes with `--input`", hint="give a file of texts with --input FILE")
            from openglm.cli.session import run_session

            run_session(self)
        else:
            self.answer_lines(source or "-", output)


_WHICH_TYPE = "which type a bundled model has depends on the machine: --bits 8 --head-bits 8, or --dtype float32"
EXAMPLE = {
    "fill": 'glm fill "The capital of France is [MASK]."',
    "generate": 'glm generate "Once upon a time"',
}


def answer_places(text: str, result: Any) -> list[tuple[int, int]]:
    """Where in the text of a result the model's own words stand: ``[start, end)`` of each."""
    if hasattr(result, "spans"):
        return [(span.start, span.end) for span in result.spans]
    before, after = around_blank(text)
    return [(len(before), len(result.text) - len(after))]


def around_blank(text: str) -> tuple[str, str]:
    """What stands before and behind the one blank of a text; without a blank all stands before it."""
    from openglm.infilling import split_text

    pieces = split_text(text)
    return pieces[0], pieces[2] if len(pieces) > 1 else ""


def show_stream(glm: GLM, text: str, settings: dict[str, Any]) -> None:
    """The text, and the answer piece by piece in colour, to stdout."""
    before, after = around_blank(text)
    pieces = glm.stream(text, **settings)  # whatever is wrong with the text is said before any of it is shown
    console.write(console.printable(before, sys.stdout), end="")
    for piece in pieces:
        console.write(console.paint(console.printable(piece, sys.stdout), console.ANSWER, sys.stdout), end="")
    console.write(console.printable(after, sys.stdout))
