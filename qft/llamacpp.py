"""A GGUF file run by llama.cpp itself, through the server that the xllamacpp package brings."""

from __future__ import annotations

import importlib
import importlib.util
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qft.errors import MissingError, ModelError

__all__ = ["LlamaCpp"]


class LlamaCpp:
    """One loaded GGUF file. Ask with token ids: then no text is tokenized twice, and no BOS is added.

    Raises MissingError without the package or the file, ModelError if llama.cpp does not load it or fails to answer.
    Source: llama.cpp's server, routes /tokenize and /completion, on 127.0.0.1 for as long as this lives.
    """

    def __init__(self, path: Path, *, context: int, threads: int = 1) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingError("llama.cpp: needs the package xllamacpp; pip install 'qft[llamacpp]'")
        if not path.is_file():
            raise MissingError(f"{path}: does not exist")
        binding = importlib.import_module("xllamacpp")
        settings = binding.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup = context, 1, False
        settings.cpuparams.n_threads = threads
        try:
            self._server = binding.Server(settings)
        except Exception as error:  # the binding passes on whatever llama.cpp throws
            raise ModelError(f"{path}: llama.cpp does not load it: {error}") from error

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of `text`, special tokens in it recognized; `add_special`: with BOS if the file asks for it."""
        asked = {"content": text, "add_special": add_special, "parse_special": True}
        tokens: list[int] = self._ask("/tokenize", asked)["tokens"]
        return tokens

    def next_log_probs(self, ids: Sequence[int], vocabulary: int) -> NDArray[np.float32]:
        """Log probabilities in nats of the token after `ids`, float32 [vocabulary].

        One request a position: the server tells them of tokens that it generates, not of those it reads."""
        # The server leaves out a token that is half a character. It is made to choose a letter: that changes what is
        # sampled, not the probabilities, which are taken before sampling.
        letter = self.tokenize("a", add_special=False)[0]
        told = {"n_probs": vocabulary, "post_sampling_probs": False, "logit_bias": [[letter, 1e9]]}
        answer = self._ask("/completion", _greedy(ids, 1) | told)
        found = answer["completion_probabilities"][0]["top_logprobs"]
        if len(found) != vocabulary:
            raise ModelError(f"llama.cpp: told the probabilities of {len(found)} tokens where {vocabulary} were asked")
        log_probs = np.full(vocabulary, np.nan, np.float32)
        log_probs[[one["id"] for one in found]] = [one["logprob"] for one in found]
        return log_probs

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The most likely continuation, up to and with the token that ends it."""
        tokens: list[int] = self._ask("/completion", _greedy(ids, max_new_tokens))["tokens"]
        return tokens

    def _ask(self, route: str, body: dict[str, Any]) -> Any:
        address = self._server.listening_address + route
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request) as reply:  # noqa: S310 (the address is this process's own server)
                return json.loads(reply.read())
        except OSError as error:
            raise ModelError(f"llama.cpp: {route} failed: {error}") from error


def _greedy(ids: Sequence[int], count: int) -> dict[str, Any]:
    return {"prompt": list(ids), "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": True}
