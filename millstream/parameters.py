"""The request parameters a job may carry: an allow-list, so that a spec can never name an address or a key.

Source: the Chat Completions reference of the OpenAI API (2026-11), plus the sampling parameters that vLLM, llama.cpp,
SGLang, Ollama, DeepSeek, Mistral and OpenRouter document as top-level fields. What the worker owns is not in it:
`model` and `messages` have their own place in the spec, `stream` and `stream_options` are the worker's.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import Any

from .errors import SpecError

_NUMBERS = {
    "frequency_penalty", "presence_penalty", "temperature", "top_p", "min_p", "typical_p", "top_a", "tfs_z",
    "repetition_penalty", "repeat_penalty", "length_penalty", "dynatemp_range", "dynatemp_exponent",
    "mirostat_tau", "mirostat_eta", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base",
}  # fmt: skip
_WHOLE = {
    "max_tokens", "max_completion_tokens", "n", "seed", "top_logprobs", "top_k", "min_tokens", "repeat_last_n",
    "mirostat", "n_keep", "random_seed", "dry_allowed_length", "dry_penalty_last_n", "truncate_prompt_tokens",
}  # fmt: skip
_FLAGS = {
    "logprobs", "parallel_tool_calls", "store", "ignore_eos", "skip_special_tokens", "include_reasoning",
    "spaces_between_special_tokens", "include_stop_str_in_output", "add_generation_prompt", "continue_final_message",
    "cache_prompt", "safe_prompt", "separate_reasoning", "enable_thinking", "use_beam_search",
}  # fmt: skip
_TEXTS = {
    "reasoning_effort", "service_tier", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "verbosity", "grammar", "guided_regex", "guided_grammar", "reasoning_format", "keep_alive", "prompt_mode",
}  # fmt: skip
_ANY = {
    "audio", "function_call", "functions", "logit_bias", "modalities", "moderation", "prediction",
    "response_format", "stop", "stop_token_ids", "tool_choice", "tools", "web_search_options", "prompt_cache_options",
    "reasoning", "provider", "models", "route", "transforms", "thinking", "options", "format",
    "chat_template_kwargs", "structured_outputs", "guided_json", "guided_choice", "bad_words", "samplers",
    "json_schema", "dry_sequence_breakers", "documents", "mm_processor_kwargs",
}  # fmt: skip

ALLOWED = frozenset(_NUMBERS | _WHOLE | _FLAGS | _TEXTS | _ANY)
"""Every parameter name a spec may carry."""

MAX_CHOICES = 128
"""Largest `n`: OpenAI's own limit."""


def check(params: Mapping[str, Any]) -> None:
    """Raise SpecError naming the first parameter that is unknown or of the wrong kind."""
    for name, value in params.items():
        if name not in ALLOWED:
            raise SpecError(_unknown(name))
        if name in _WHOLE:
            _require(name, value, isinstance(value, int) and not isinstance(value, bool), "a whole number")
        elif name in _NUMBERS:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(name, value, number and abs(value) <= sys.float_info.max, "a number")
        elif name in _FLAGS:
            _require(name, value, isinstance(value, bool), "true or false")
        elif name in _TEXTS:
            _require(name, value, isinstance(value, str), "text")
    n = params.get("n", 1)
    _require("n", n, n is None or 1 <= n <= MAX_CHOICES, f"1 to {MAX_CHOICES}")


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if value is not None and not holds:
        raise SpecError(f"parameter {name}: found {str(value)[:60]!r}, expected {expected}")


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(str(name), ALLOWED, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "the names are in millstream.parameters.ALLOWED"
    reserved = {
        "stream": "the worker always streams",
        "stream_options": "the worker always streams",
        "base_url": "upstreams are named in the worker's own settings",
        "api_base": "upstreams are named in the worker's own settings",
        "api_key": "keys are in the worker's own settings",
        "extra_body": "give its fields as parameters",
    }
    return f"parameter {str(name)[:60]!r} is not one a job may carry: {reserved.get(name, hint)}"
