"""The first token from prefill: which requests may use it, and how to read it from prefill's answer.

Prefill's engine samples a token after the prompt in any case. If its answer names that token (``kv_transfer_params``:
``first_token``), decode's connector has promised to continue from it or to fail, so the client may get it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Api = Literal["completions", "chat"]

# Members of a body that do not change the second token or its text, whatever their value.
_FREE = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "cache_salt", "chat_template", "chat_template_content_format",
        "chat_template_kwargs", "continue_final_message", "ignore_eos", "include_stop_str_in_output",
        "max_completion_tokens", "max_tokens", "messages", "metadata", "min_p", "mm_processor_kwargs", "model",
        "parallel_tool_calls", "priority", "prompt", "request_id", "return_token_ids", "seed", "service_tier",
        "skip_special_tokens", "stop_token_ids", "store", "stream", "stream_options", "temperature", "tool_choice",
        "top_k", "top_p", "truncate_prompt_tokens", "user",
    }
)  # fmt: skip
# Members that must be neutral: the reason code otherwise, and the neutral values besides null.
_NEUTRAL: dict[str, tuple[str, tuple[Any, ...]]] = {
    "allowed_token_ids": ("allowed_token_ids", ([],)),
    "bad_words": ("bad_words", ([],)),
    "best_of": ("best_of", (1,)),
    "echo": ("echo", (False,)),
    "frequency_penalty": ("penalties", (0,)),
    "functions": ("tools", ([],)),
    "logit_bias": ("logit_bias", ({},)),
    "logprob_token_ids": ("logprobs", ([],)),
    "logprobs": ("logprobs", ()),  # 0 asks for the sampled tokens' own; chat's false is handled below
    "min_tokens": ("min_tokens", (0,)),
    "n": ("n", (1,)),
    "presence_penalty": ("penalties", (0,)),
    "prompt_logprobs": ("logprobs", ()),
    "reasoning_effort": ("reasoning", ()),
    "include_reasoning": ("reasoning", ()),
    "repetition_penalty": ("penalties", (1,)),
    "response_format": ("structured_output", ({"type": "text"},)),
    "return_tokens_as_token_ids": ("logprobs", (False,)),
    "stop": ("stop", ([], "")),
    "structured_outputs": ("structured_output", ()),
    "thinking_token_budget": ("reasoning", ()),
    "tools": ("tools", ([],)),
    "top_logprobs": ("logprobs", (0,)),
    "use_beam_search": ("beam_search", (False,)),
    "vllm_xargs": ("extra_args", ({},)),
}
# Reasons from prefill's connector (pdtransport.vllm.first_token); others count as "declined".
_DECLINED = frozenset(
    {
        "allowed_token_ids", "bad_words", "extra_args", "logit_bias", "logits_processors", "logprobs", "min_tokens",
        "model", "no_promise", "partial_character", "penalties", "prompt", "reasoning", "sampling_params", "seed",
        "special_token", "stop", "stopped", "streamed_input", "structured_output", "unsupported", "vllm_version",
    }
)  # fmt: skip


def why_not(api: Api, given: Mapping[str, Any]) -> str:
    """Code that says why a body's first token must come from decode; empty if prefill may give it out.

    A member that is not known to be harmless is a reason. The engines check again after applying their own defaults.
    """
    for key, value in given.items():
        if value is None or key in _FREE or (key == "logprobs" and value is False):
            continue
        if key not in _NEUTRAL:
            return "parameter"
        code, values = _NEUTRAL[key]
        if value not in values:
            return code
    limits = [given[key] for key in ("max_tokens", "max_completion_tokens") if given.get(key) is not None]
    if any(not isinstance(limit, int) or limit < 2 for limit in limits):
        return "max_tokens"  # decode would have nothing to compute
    if given.get("seed") is not None and given.get("temperature") != 0:
        return "seed"
    options = given.get("stream_options")
    if isinstance(options, dict) and options.get("continuous_usage_stats"):
        return "continuous_usage"
    return "tools" if api == "chat" and given.get("tool_choice") not in (None, "none", "auto") else ""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token that prefill sampled, from its answer.

    Args:
        head: members that all events of a stream have in common.
        role: role of a chat message.
        prompt_ids: the prompt's token ids, if the client asked for them.
    """

    token: int
    text: str
    head: dict[str, Any]
    role: str = "assistant"
    prompt_ids: list[int] | None = None


class Unusable(Exception):
    """Prefill gave out a token and decode continues from it, but its text is not usable: neither answer can be used."""


def read(api: Api, answer: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[FirstToken | None, str]:
    """The first token that decode continues from; or None and a code that says why decode samples it.

    Raises:
        Unusable: decode continues from a token whose text this answer does not give.
    """
    token = params.get("first_token")
    if not isinstance(token, int) or isinstance(token, bool):
        declined = params.get("first_token_declined", "unsupported")
        return None, declined if isinstance(declined, str) and declined in _DECLINED else "declined"
    try:
        (choice,) = answer["choices"]
        message = choice["message"] if api == "chat" else choice
        text = message["content" if api == "chat" else "text"]
        head = {key: answer[key] for key in ("id", "created", "model")}
        hidden = [message.get(key) for key in ("reasoning", "reasoning_content", "tool_calls")]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Unusable from None
    if (
        not isinstance(text, str)
        or not text
        or "\ufffd" in text
        or any(hidden)
        or choice.get("finish_reason") != "length"
    ):
        raise Unusable
    ids = (answer if api == "chat" else choice).get("prompt_token_ids")
    return FirstToken(token, text, head, message.get("role") or "assistant", ids), ""
